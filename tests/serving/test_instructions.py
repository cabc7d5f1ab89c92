"""The Modelfile and the commands of an export ask the model as training did."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support.go_template import render
from support.golden_conversations import CONVERSATIONS, TEMPLATES, assistant, user

from qwen3ft.chat.rendering import conversation_of
from qwen3ft.chat.templates import KNOWN_TEMPLATES, apply_template, identify_template
from qwen3ft.chat.tokenizer import load_tokenizer
from qwen3ft.embedded import MODEL_DIR
from qwen3ft.records.requests import ParityReport
from qwen3ft.serving.instructions import ollama_template, vllm_lora_command, write_serving_files

Case = tuple[str, dict[str, Any], str]
"""An Ollama template, the values it is given, and what the chat template renders."""

CARD = {
    "run_id": "night-1",
    "base": {
        "model_name": "Qwen/Qwen3-4B-Thinking-2507",
        "revision": "a" * 40,
        "local_path": None,
        "quantization": "nf4-double",
    },
    "data": {"usable_rows": 10, "reasoning_rows": 0},
    "plan": {"adapter": {"r": 6}},
    "config": {"max_new_tokens": 256},
    "degraded": [],
}
REPORT = ParityReport(rows=1, thinking=True, max_loss_drift=0.1, max_lost_answers=0.1, scores=())


def as_ollama_gives_it(messages: list[dict[str, Any]], think: bool | None) -> dict[str, Any]:
    """Return the values that Ollama passes to `template.Execute`."""
    return {
        "System": "\n\n".join(m["content"] for m in messages if m["role"] == "system"),
        "Messages": [
            {"Role": m["role"], "Content": m["content"], "Thinking": m.get("reasoning", "")}
            for m in messages
        ],
        "Think": bool(think),
        "IsThinkSet": think is not None,
    }


def conversations() -> list[list[dict[str, Any]]]:
    """Return conversations without tools, each with and without its last answer."""
    found = [[user("a"), assistant("b", "c"), user("d"), assistant("e", "f")]]
    for row in CONVERSATIONS.values():
        messages = list(conversation_of(row).messages)
        if not row["tools"] and all(m["role"] != "tool" for m in messages):
            found += [messages[:-1], messages]
    return [[dict(message) for message in messages] for messages in found]


def cases(family: str) -> list[Case]:
    """Return every conversation, with thinking unset, on and off, for both kinds of adapter."""
    tokenizer = load_tokenizer(MODEL_DIR)
    tokenizer.chat_template = TEMPLATES[family]
    name = identify_template(tokenizer).name
    made: list[Case] = []
    for thinking in (True, False):
        template = str(ollama_template(name, thinking=thinking))
        for messages in conversations():
            for think in (None, True, False):
                wanted = thinking if think is None else think
                expected = apply_template(tokenizer, messages, prompt=True, thinking=wanted)
                made.append((template, as_ollama_gives_it(messages, think), expected))
    return made


@pytest.mark.parametrize("family", TEMPLATES)
def test_the_ollama_template_renders_as_the_chat_template(family: str) -> None:
    """System prompts, turns, reasoning and the prompt are equal byte for byte."""
    made = cases(family)
    assert len(made) > 200
    for template, values, expected in made:
        assert render(template, values) == expected


@pytest.mark.slow
def test_go_itself_renders_the_same(tmp_path: Path) -> None:
    """Go's text/template is the engine that Ollama uses."""
    go = shutil.which("go")
    if go is None:
        pytest.skip("needs Go")
    program = """package main

import ("bytes"; "encoding/json"; "os"; "text/template")

func main() {
    var cases [][]any
    if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil { panic(err) }
    written := []string{}
    for _, one := range cases {
        parsed := template.Must(template.New("").Option("missingkey=zero").Parse(one[0].(string)))
        var out bytes.Buffer
        if err := parsed.Execute(&out, one[1]); err != nil { panic(err) }
        written = append(written, out.String())
    }
    json.NewEncoder(os.Stdout).Encode(written)
}
"""
    (tmp_path / "main.go").write_text(program)
    made = [case for family in TEMPLATES for case in cases(family)]
    done = subprocess.run(
        [go, "run", str(tmp_path / "main.go")],
        input=json.dumps([[template, values] for template, values, _ in made]),
        env={**os.environ, "GOCACHE": str(tmp_path / "cache"), "GO111MODULE": "off"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == [expected for _, _, expected in made]


def test_every_known_chat_template_has_an_ollama_template_and_no_other_one() -> None:
    """A template that nobody tested is not written."""
    for name in KNOWN_TEMPLATES.values():
        assert ollama_template(name, thinking=True) is not None
    assert ollama_template("", thinking=True) is None
    assert ollama_template("Llama", thinking=True) is None


def write(folder: Path, template: str) -> Path:
    (folder / "merged").mkdir()
    (folder / "merged" / "chat_template.jinja").write_text(template, encoding="utf-8")
    write_serving_files(folder, CARD, REPORT)
    return folder


def test_the_modelfile_starts_from_the_merged_model(tmp_path: Path) -> None:
    """It has the template in quotes, the end token, and greedy settings."""
    text = (write(tmp_path, TEMPLATES["qwen3"]) / "Modelfile").read_text(encoding="utf-8")
    template = str(ollama_template("Qwen3", thinking=True))
    assert '"""' not in template
    assert f'FROM ./merged\nTEMPLATE """{template}"""\n' in text
    assert 'PARAMETER stop "<|im_end|>"\n' in text
    assert "PARAMETER temperature 0\nPARAMETER num_predict 256\n" in text


def test_an_unknown_chat_template_gives_no_modelfile_and_says_so(tmp_path: Path) -> None:
    """One changed letter is enough."""
    folder = write(tmp_path, TEMPLATES["qwen3"] + " ")
    assert not (folder / "Modelfile").exists()
    assert "There is no Modelfile, because" in (folder / "SERVING.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("rank", "limit"), [(1, 1), (6, 8), (8, 8), (9, 16), (200, 256)])
def test_vllm_gets_a_rank_that_it_takes(rank: int, limit: int) -> None:
    """The command has the next allowed rank, the base's revision, and the adapter's name."""
    card = {**CARD, "plan": {"adapter": {"r": rank}}}
    words = shlex.split(vllm_lora_command(card, "./a folder"))
    assert words[:5] == ["vllm", "serve", "Qwen/Qwen3-4B-Thinking-2507", "--revision", "a" * 40]
    assert words[words.index("--max-lora-rank") + 1] == str(limit)
    assert "night-1=./a folder" in words
