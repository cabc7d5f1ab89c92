"""Parts that all engines share: limits counted on the host, and the choice of an engine."""

from __future__ import annotations

import asyncio
import shutil
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.golden_conversations import TEMPLATES
from support.plans import QWEN3_4B
from support.planted_adapters import EMOJI
from support.small_adapter import write_small_adapter
from support.trained_adapter import Trained
from support.vllm_program import place_vllm

from qwen3ft.chat.tokenizer import load_tokenizer
from qwen3ft.config import TrainingConfig
from qwen3ft.decoding.writing import AnswerLimits, Marks, Writing
from qwen3ft.embedded import MODEL_DIR
from qwen3ft.errors import EnvironmentNotReadyError
from qwen3ft.model.saved_adapter import open_adapter
from qwen3ft.records.serving import Ask, Piece, Prompting, Refused, ServeRequest
from qwen3ft.server import choice
from qwen3ft.server.choice import choose_engine
from qwen3ft.serving.engines import own, vllm
from qwen3ft.serving.engines.asking import AnswerText, Asker
from qwen3ft.serving.engines.events import open_engine
from qwen3ft.serving.engines.llama_cpp import LlamaServers, _Loaded
from qwen3ft.serving.engines.tally import Tally
from qwen3ft.units import GIB

END, OPEN, CLOSE, NEWLINE, WORD = range(5)
MARKS = Marks((END,), OPEN, CLOSE, (NEWLINE, CLOSE, NEWLINE))
WITHOUT_TAGS = Marks((END,))


def written_by_the_decoder(limits: AnswerLimits, marks: Marks, said: list[int]) -> list[int]:
    """Return the tokens of an answer whose model would say `said`, and then words."""
    writing = Writing(1, marks, 0, torch.device("cpu"))
    writing.begin(0, limits)
    tokens: list[int] = []
    while not writing.state["ended"].item():
        forcing, closing = writing.forced()
        spoken = said[len(tokens)] if len(tokens) < len(said) else WORD
        token = torch.where(forcing, closing, torch.tensor([spoken]))
        writing.advance(token, forcing)
        tokens.append(int(token))
    return tokens


def written_by_a_program(limits: AnswerLimits, marks: Marks, said: list[int]) -> list[int]:
    """Return the tokens that are relayed of a program that says the same, three at a time."""
    tally = Tally(limits, marks)
    while not tally.is_over:
        start = len(tally.tokens)
        tally.take([*said, *[WORD] * 99][start : start + 3])
        if tally.is_thinking_spent:
            tally.close_thinking()
    return tally.tokens


@given(
    st.builds(
        AnswerLimits,
        answer_tokens=st.integers(1, 6),
        thinking_tokens=st.integers(0, 4),
        opened=st.booleans(),
        all_tokens=st.none() | st.integers(1, 12),
    ),
    st.sampled_from((MARKS, WITHOUT_TAGS)),
    st.lists(st.integers(END, WORD), max_size=14),
)
def test_an_answer_that_is_relayed_ends_where_the_decoder_ends_it(
    limits: AnswerLimits, marks: Marks, said: list[int]
) -> None:
    """Whatever the model says: thinking within its budget, its end, and every limit."""
    relayed = written_by_a_program(limits, marks, said)
    assert relayed == written_by_the_decoder(limits, marks, said)


@pytest.mark.parametrize(
    ("version", "device", "budget_gb", "gpu_gb", "free_gb", "chosen", "reason"),
    [
        ("0.32.0", "cuda", 8, 8, 7.9, "vllm", "is installed"),
        ("0.32.1rc2.dev3+gabc123.cpu", "cuda", 8, 8, 7.9, "vllm", "is installed"),
        ("0.9.2", "cuda", 8, 8, 8, "own", "is vLLM 0.9.2, and 0.32 is needed"),
        ("0.32.0", "cuda", 8, 80, 7.5, "own", "vLLM takes 8.00 GB from the start, and 7.50 GB are"),
        ("0.32.0", "cuda", 2, 8, 8, "own", "vLLM would need 3."),
        ("0.32.0", "cuda", 8, 3, 3, "own", "the budget is 2.8"),
        ("0.32.0", "cpu", 8, 0, 0, "own", "there is no GPU"),
        (None, "cuda", 8, 8, 8, "own", "vLLM is not installed"),
    ],
)
def test_vllm_is_chosen_on_a_gpu_where_it_fits(
    trained: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: str | None,
    device: Literal["cuda", "cpu"],
    budget_gb: float,
    gpu_gb: float,
    free_gb: float,
    chosen: str,
    reason: str,
) -> None:
    """The reason says so; an engine that somebody names is taken as it is."""
    if version is not None:
        place_vllm(tmp_path, version)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    gpu = SimpleNamespace(total_bytes=int(gpu_gb * GIB), free_bytes=int(free_gb * GIB))
    for module in (vllm, choice):
        monkeypatch.setattr(module, "visible_gpus", lambda: (gpu,))
    request = ServeRequest(
        engine="own",
        config=trained.config.model_copy(update={"max_memory_gb": budget_gb}),
        adapter=str(trained.adapter),
        device=device,
        socket="",
        slots=4,
    )
    name, why = choose_engine("auto", request)
    assert name == chosen
    assert reason in why
    assert choose_engine("llama.cpp", request) == ("llama.cpp", "as --engine says")


def test_a_vllm_whose_version_nobody_says_is_tried(tmp_path: Path) -> None:
    """A program beside no packages: a script of the user's, say."""
    program = place_vllm(tmp_path, "0.9.2")
    alone = shutil.copy(program, tmp_path / "script")
    assert vllm.version_of(str(program)) == "0.9.2"
    assert vllm.version_of(alone) is None
    assert vllm.is_new_enough(None)


def test_vllm_is_not_started_on_a_gpu_that_it_does_not_fit(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that somebody names, too."""
    monkeypatch.setattr(
        vllm, "visible_gpus", lambda: (SimpleNamespace(total_bytes=8 * GIB, free_bytes=8 * GIB),)
    )
    request = ServeRequest(
        engine="vllm",
        config=trained.config.model_copy(update={"max_memory_gb": 2}),
        adapter=str(trained.adapter),
        device="cuda",
        socket=str(tmp_path / "engine"),
        slots=4,
    )
    server = vllm.VllmServer(request, Path(trained.snapshot.path), 8, [0], 512, tmp_path)
    with pytest.raises(EnvironmentNotReadyError, match="vLLM does not fit the budget"):
        server._variables()


@pytest.mark.parametrize(
    ("family", "thinking", "refused"),
    [("instruct", True, True), ("instruct", False, False), ("embedded", True, False)],
)
def test_thinking_is_not_asked_of_a_template_that_has_none(
    family: str, thinking: bool, refused: bool
) -> None:
    """An Instruct model would answer as if nothing had been asked for."""
    tokenizer = load_tokenizer(MODEL_DIR)
    tokenizer.chat_template = TEMPLATES[family]
    asker = Asker(tokenizer, Marks.of(tokenizer, [tokenizer.eos_token_id]), 512)
    prompting = Prompting(thinking=False, answer_tokens=16, thinking_tokens=0, escape=True)
    question = {"role": "user", "content": "Hello"}
    ask = Ask(id=1, name="one", messages=(question,), thinking=thinking)
    found = asker.prepare(ask, prompting)
    assert isinstance(found, Refused) == refused
    assert not refused or "enable_thinking" in found.message


@pytest.mark.parametrize("context_tokens", [2048, 8192, 40960])
def test_the_decoder_is_planned_for_the_longest_prompt(tmp_path: Path, context_tokens: int) -> None:
    """A client may fill the context with it, though answers are expected to need a part."""
    write_small_adapter(tmp_path)
    request = ServeRequest(
        engine="own",
        config=TrainingConfig(model_name="embedded"),
        adapter=str(tmp_path),
        device="cuda",
        socket="",
        slots=4,
        context_tokens=context_tokens,
    )
    load = own._expected_load(request, open_adapter(tmp_path), QWEN3_4B)
    assert load.most_tokens == context_tokens
    assert load.fixed_bytes() == replace(load, prompt_tokens=context_tokens).fixed_bytes()


def test_what_keeps_the_decoder_from_a_model_is_met_by_another_engine(trained: Trained) -> None:
    """Here a GPU without bfloat16: fewer slots, or a shorter context, would meet it again."""
    request = ServeRequest(
        engine="own",
        config=trained.config,
        adapter=str(trained.adapter),
        device="cuda",
        socket="",
        slots=4,
    )
    with pytest.raises(EnvironmentNotReadyError, match="the GPU has no bfloat16") as raised:
        own.DecodingEngine(request)
    assert raised.value.next_command == "qwen3ft serve --engine llama.cpp"


@pytest.mark.parametrize("left_out", [0, 1, 2])
def test_an_answer_that_ends_within_a_character_has_the_test_s_text(left_out: int) -> None:
    """A limit may cut it there; the test decodes all its tokens at once."""
    tokenizer = load_tokenizer(MODEL_DIR)
    ids = tokenizer.encode(f"a {EMOJI}")
    ids = ids[: len(ids) - left_out]
    answer = AnswerText(1, tokenizer, 3, opened=False, stops=(), ends=(tokenizer.eos_token_id,))
    said = [*answer.feed(ids[:-1], is_over=False), *answer.feed(ids[-1:], is_over=True)]
    text = "".join(one.text for one in said if isinstance(one, Piece))
    assert text == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("is_there", [True, False])
def test_an_adapter_that_llama_cpp_has_unloaded_leaves_no_file(
    tmp_path: Path, is_there: bool
) -> None:
    """A server that follows the champion loads one with every promotion.

    Somebody may have emptied the folder of temporary files.
    """
    servers, ended = object.__new__(LlamaServers), list[bool]()
    stack = ExitStack()
    stack.callback(ended.append, True)
    lora = tmp_path / "1.gguf"
    if is_there:
        lora.touch()
    servers._loaded = {"v1": _Loaded(stack, open_engine(tmp_path / "socket"), lora)}
    asyncio.run(servers.unload("v1"))
    assert ended
    assert list(tmp_path.iterdir()) == []
