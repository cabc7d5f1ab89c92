"""A fine-tuned model is found by any of its names and answers piece by piece, from a worker."""

from __future__ import annotations

import shutil
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.registered import MODEL, add_version, copy_database
from support.small_adapter import write_small_adapter
from support.trained_adapter import Trained

from flows import cli
from flows.cli.adapters import ChosenAdapter
from qwen3ft.chat.rendering import prompt_ids
from qwen3ft.chat.thinking import ThinkingSplitter, split_thinking
from qwen3ft.config import TrainingConfig
from qwen3ft.decoding.fitting import used_bytes
from qwen3ft.decoding.writing import AnswerLimits
from qwen3ft.disk.files import read_json_lines, write_json_atomic
from qwen3ft.errors import ModelNotFoundError, SaveError
from qwen3ft.evaluation.inference import InferenceTester
from qwen3ft.jobs.folders import JobDir
from qwen3ft.model.saved_adapter import open_adapter
from qwen3ft.planning.decoder_sizes import PAGE_TOKENS, DecoderSizes
from qwen3ft.records.requests import AskRequest, Chunk
from qwen3ft.registry.lookup import find_adapter
from qwen3ft.registry.registry import Registry
from qwen3ft.serving.answering import Responder
from qwen3ft.serving.session import ChatSession
from qwen3ft.serving.voices import CHAT_BURST_STEPS, DecoderVoice, PlainVoice, Voice, open_voice
from qwen3ft.units import GIB

ROOT = Path(__file__).parents[2]


# --- thinking and answer ---


def in_pieces(text: str, cuts: list[int], *, opened: bool = False) -> tuple[str, str]:
    """Feed `text` to the splitter piece by piece, and join its parts by kind."""
    splitter, borders = ThinkingSplitter(opened=opened), sorted({0, len(text), *cuts})
    joined = {"thinking": "", "answer": ""}
    for start, end in pairwise(borders):
        for kind, part in splitter.feed(text[start:end]):
            assert part
            joined[kind] += part
    for kind, part in splitter.close():
        joined[kind] += part
    return joined["thinking"], joined["answer"]


TEXTS = st.lists(
    st.sampled_from(["<think>", "</think>", "<", "</", "think", ">", "a", " ", "\n", "思"]),
    max_size=12,
).map("".join)


@given(TEXTS.filter(lambda text: text.count("</think>") <= 1), st.data())
def test_pieces_add_up_to_what_the_whole_text_says(text: str, data: Any) -> None:
    """Wherever the text is cut, nothing comes twice, early or as the wrong kind."""
    cuts = data.draw(st.lists(st.integers(0, max(0, len(text))), max_size=8))
    opens = text.lstrip().startswith("<think>")
    if "</think>" in text and not opens:
        assert in_pieces(text, cuts, opened=True) == split_thinking(text)
    else:
        assert in_pieces(text, cuts) == split_thinking(text)


def test_an_answer_is_shown_before_its_end() -> None:
    """Text is emitted at once; only white space and the beginning of a tag wait."""
    splitter = ThinkingSplitter(opened=True)
    assert splitter.feed("hm ") == [("thinking", "hm")]
    assert splitter.feed("so</thi") == [("thinking", " so")]
    assert splitter.feed("nk>\n\nyes\n") == [("answer", "yes")]
    assert splitter.feed("no") == [("answer", "\nno")]


# --- answering ---


@pytest.fixture(scope="module")
def loaded(trained: Trained) -> tuple[Any, Any]:
    return InferenceTester(trained.config).load_finetuned_model(str(trained.adapter))


@pytest.fixture
def job(tmp_path: Path) -> JobDir:
    return JobDir(tmp_path)


def request_for(trained: Trained, **changes: Any) -> AskRequest:
    values = {"config": trained.config, "adapter": str(trained.adapter), "device": "cpu"}
    return AskRequest.model_validate({**values, "thinking": False, **changes})


def pieces(job: JobDir) -> list[Chunk]:
    return [Chunk.model_validate(line) for line in read_json_lines(job.pieces)]


@pytest.fixture(scope="module")
def voices(trained: Trained, loaded: tuple[Any, Any]) -> dict[str, Voice]:
    """Both ways to write an answer, by the setting that asks for them."""
    shape = trained.snapshot.shape
    return {
        kernels: open_voice(
            *loaded,
            shape,
            request_for(
                trained, config=trained.config.model_copy(update={"kernels": kernels, **BUDGETS})
            ),
        )
        for kernels in ("plain", "fused")
    }


BUDGETS = {"max_new_tokens": 16, "max_thinking_tokens": 3}


def told(
    voice: Voice, loaded: tuple[Any, Any], request: AskRequest, job: JobDir, *rows: Any
) -> Any:
    """Return the chunks of each row's answer."""
    speaker = Responder(voice, *loaded, request, job, lambda _: None)
    chunks = []
    for row in rows:
        job.pieces.unlink(missing_ok=True)
        speaker.answer(({"role": "user", "content": row["question"]},))
        chunks.append(pieces(job))
    return chunks


def test_the_pieces_are_the_answer_that_the_inference_test_gives(
    trained: Trained, loaded: tuple[Any, Any], voices: dict[str, Voice], job: JobDir
) -> None:
    """They come as several chunks, also in Chinese, with the end last; both ways alike."""
    assert [type(voice) for voice in voices.values()] == [PlainVoice, DecoderVoice]
    tester, rows = InferenceTester(trained.config), trained.rows[:6]
    plain, decoded = (
        told(voice, loaded, request_for(trained), job, *rows) for voice in voices.values()
    )
    assert plain == decoded
    for row, (*parts, end) in zip(rows, plain, strict=True):
        assert "".join(piece.text for piece in parts) == row["answer"]
        assert tester.test_inference(*loaded, row["question"]) == row["answer"]
        assert (end.kind, end.stopped) == ("end", True)
    assert max(map(len, plain)) > 2


def test_thinking_in_a_chat_has_its_budget(
    trained: Trained, loaded: tuple[Any, Any], voices: dict[str, Voice], job: JobDir
) -> None:
    """When it is spent, the model answers; both ways alike."""
    config = trained.config.model_copy(update=BUDGETS)
    request, row = request_for(trained, config=config, thinking=True), trained.rows[0]
    [plain], [decoded] = (told(voice, loaded, request, job, row) for voice in voices.values())
    assert plain == decoded
    # this model closes a block at once, so it is made to think in the middle of an answer
    limits = AnswerLimits(16, 2, opened=True)
    ids = prompt_ids(loaded[1], row["question"], False)
    for voice in voices.values():
        written = voice.write(ids, limits, _Deaf(), lambda: True)
        closing = list(voice.marks.closing)
        assert written[2 : 2 + len(closing)] == closing, written


class _Deaf:
    """A streamer that nobody listens to."""

    def put(self, _: Any) -> None:
        """Ignore tokens."""

    def end(self) -> None:
        """Ignore the end."""


def test_an_answer_that_nobody_wants_any_more_stops(
    trained: Trained, loaded: tuple[Any, Any], voices: dict[str, Voice], job: JobDir
) -> None:
    """It stops a token or two after the request, and the next one is answered all the same."""
    job.stop.touch()
    for voice in voices.values():
        [[*_, end]] = told(voice, loaded, request_for(trained), job, trained.rows[0])
        assert (end.kind, end.stopped) == ("end", False)
        assert end.tokens <= CHAT_BURST_STEPS
    job.stop.unlink()
    [[*parts, _]] = told(voices["fused"], loaded, request_for(trained), job, trained.rows[0])
    assert "".join(piece.text for piece in parts) == trained.rows[0]["answer"]


def test_a_conversation_may_outgrow_the_decoder(
    trained: Trained, loaded: tuple[Any, Any], job: JobDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A larger one is made for it."""
    monkeypatch.setattr("qwen3ft.serving.voices.FIRST_PROMPT_TOKENS", 8)
    config = trained.config.model_copy(update={"kernels": "fused", "max_thinking_tokens": 0})
    request = request_for(trained, config=config)
    voice = open_voice(*loaded, trained.snapshot.shape, request)
    [[*parts, _]] = told(voice, loaded, request, job, trained.rows[0])
    assert "".join(piece.text for piece in parts) == trained.rows[0]["answer"]


@pytest.mark.parametrize("times", [1.5, 0.5])
def test_a_conversation_that_outgrows_the_budget_is_answered(
    trained: Trained, loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, times: float
) -> None:
    """By a decoder with room for it alone, else by transformers; both as if there were room."""
    monkeypatch.setattr("gc.collect", lambda: 0)  # it takes long in the process of the tests
    monkeypatch.setattr("qwen3ft.serving.voices.FIRST_PROMPT_TOKENS", 8)
    ids = prompt_ids(loaded[1], " ".join(row["question"] for row in trained.rows[:4]), False)
    # planned for so many blocks, a page takes gigabytes
    shape = trained.snapshot.shape.model_copy(update={"num_hidden_layers": 10**5})
    short = {"kernels": "fused", "max_new_tokens": 3, "max_thinking_tokens": 0}
    config = trained.config.model_copy(update={**short, "max_memory_gb": 10.0**6})
    voice = open_voice(*loaded, shape, request_for(trained, config=config))
    assert isinstance(voice, DecoderVoice)
    load = voice._load_for(int(times * len(ids)))
    room_bytes = load.bytes_of(DecoderSizes(1, -(-load.most_tokens // PAGE_TOKENS) + 1, 0))
    tight = config.model_copy(update={"max_memory_gb": (used_bytes("cpu") + room_bytes) / GIB})
    voice._request = request_for(trained, config=tight)
    limits = AnswerLimits(config.max_new_tokens, 0)
    plain = PlainVoice(*loaded).write(ids, limits, _Deaf(), lambda: True)
    assert voice.write(ids, limits, _Deaf(), lambda: True) == plain
    assert (voice._decoder is not None) == (times > 1)


def test_a_session_asks_as_the_adapter_s_run_did(tmp_path: Path) -> None:
    """Also with its limits, unless the request names its own."""
    write_small_adapter(tmp_path)  # its run had 16
    for said, limit in (((), 16), (("max_new_tokens",), 3)):
        config = TrainingConfig(model_name="embedded", max_new_tokens=3)
        session = ChosenAdapter(config, tmp_path, "cpu", frozenset(said)).open_session(None)
        assert session._request.config.max_new_tokens == limit


def test_a_session_answers_and_leaves_nothing_behind(
    trained: Trained, tmp_path: Path, cold_workers: None
) -> None:
    """One worker answers all questions; afterwards it is gone, and so are its files."""
    config = trained.config.model_copy(update={"cache_dir": str(tmp_path)})
    rows = trained.rows[:2]
    with ChatSession(request_for(trained, config=config)) as session:
        session.wait_until_ready()
        children = psutil.Process().children()
        [worker] = [child for child in children if child.cmdline()[-2:-1] == ["answer"]]
        for row in rows:
            *parts, end = session.ask([{"role": "user", "content": row["question"]}])
            assert "".join(piece.text for piece in parts) == row["answer"]
            assert end.kind == "end"
    assert not worker.is_running()
    assert list((tmp_path / "sessions").iterdir()) == []


@pytest.mark.slow
def test_what_ends_the_worker_is_raised_in_its_caller(trained: Trained, tmp_path: Path) -> None:
    """The waiting process gets the same error, not silence."""
    adapter = Path(shutil.copytree(trained.adapter, tmp_path / "adapter"))
    (adapter / "provenance.json").write_text("{}")
    config = trained.config.model_copy(update={"cache_dir": str(tmp_path)})
    request = request_for(trained, config=config, adapter=str(adapter))
    with ChatSession(request) as session, pytest.raises(SaveError, match="is damaged"):
        session.wait_until_ready()


@pytest.mark.slow
def test_generate_prints_the_answer_alone(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing else is on standard output, so it can be piped."""
    row = trained.rows[0]
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    arguments = ["generate", row["question"], "--adapter", str(trained.adapter)]
    for name in ("model_name", "max_memory_gb", "cache_dir", "max_new_tokens"):
        arguments += ["--set", f"{name}={getattr(trained.config, name)}"]
    monkeypatch.setattr(sys, "argv", ["qwen3ft", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    assert capsys.readouterr().out == f"{row['answer']}\n"


# --- which adapter ---


@pytest.fixture(scope="module")
def place(
    migrated_database: Path, trained: Trained, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainingConfig, Registry]:
    """Register two versions, the second in use; the run night-1 saved an adapter here."""
    folder = tmp_path_factory.mktemp("place")
    uri = copy_database(migrated_database, folder)
    registry = Registry(uri)
    for run, expected in (("first", None), ("second", "1")):
        version = add_version(uri, folder, run)
        registry.promote(MODEL, version, expected)
    changes = {"name": MODEL, "cache_dir": str(folder / "cache")}
    return trained.config.model_copy(update=changes), registry


@pytest.mark.parametrize(
    ("wanted", "run"),
    [
        ("champion", "second"),
        ("previous", "first"),
        ("1", "first"),
        ("v2", "second"),
        ("first", "first"),  # a run that saved on another machine: by its version
    ],
)
def test_an_adapter_is_found_by_alias_version_and_run(
    place: tuple[TrainingConfig, Registry], wanted: str, run: str
) -> None:
    """It is fetched into the cache, and is the adapter of that run."""
    folder = find_adapter(*place, wanted)
    assert open_adapter(folder).provenance["run_id"] == run


def test_a_run_s_own_folder_is_used_where_it_is(
    place: tuple[TrainingConfig, Registry], trained: Trained, tmp_path: Path
) -> None:
    """It is found by the run's id below output_dir or in its card, and by its path."""
    config, registry = place
    assert find_adapter(config, registry, "night-1") == trained.adapter
    assert find_adapter(config, registry, str(trained.adapter)) == trained.adapter
    moved = config.model_copy(update={"output_dir": "/nowhere", "runs_dir": str(tmp_path)})
    (tmp_path / "night-1").mkdir()
    write_json_atomic(tmp_path / "night-1/card.json", {"adapter_path": str(trained.adapter)})
    assert find_adapter(moved, registry, "night-1") == trained.adapter


@pytest.mark.parametrize("card", [b"[]", b"3", b'{"a', b'{"adapter_path": 3}', b"\xff"])
def test_a_damaged_card_names_no_place(
    place: tuple[TrainingConfig, Registry], tmp_path: Path, card: bytes
) -> None:
    """The run's adapter is then found by its version."""
    config, registry = place
    (tmp_path / "first").mkdir()
    (tmp_path / "first/card.json").write_bytes(card)
    here = config.model_copy(update={"runs_dir": str(tmp_path)})
    folder = find_adapter(here, registry, "first")
    assert open_adapter(folder).provenance["run_id"] == "first"


@pytest.mark.parametrize("wanted", ["challenger", "9", "never-ran", "./nowhere"])
def test_the_error_of_a_missing_adapter_names_it(
    place: tuple[TrainingConfig, Registry], wanted: str
) -> None:
    """The name is that given on the command line."""
    with pytest.raises(ModelNotFoundError) as raised:
        find_adapter(*place, wanted)
    assert wanted.removeprefix("./") in raised.value.what
