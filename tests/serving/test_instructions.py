"""The Modelfile and the commands of an export ask the model as training did."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.go_template import render
from support.golden_conversations import CONVERSATIONS, TEMPLATES, assistant, user

from qwen3ft.chat.rendering import conversation_of
from qwen3ft.chat.templates import KNOWN_TEMPLATES, apply_template, identify_template
from qwen3ft.chat.tokenizer import load_tokenizer
from qwen3ft.embedded import MODEL_DIR
from qwen3ft.records.requests import GgufType, ParityReport
from qwen3ft.serving.instructions import (
    llama_server_command,
    vllm_lora_command,
    vllm_merged_command,
    write_serving_files,
)
from qwen3ft.serving.ollama import ollama_template

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


def ollama_sees_thinking(template: str) -> bool:
    """Return what Ollama infers of a template: it has the field .Thinking in a loop."""
    return re.search(r"(?<![\w$])\.Thinking\b", template) is not None


def as_ollama_gives_it(
    messages: list[dict[str, Any]], think: bool | None, can_think: bool
) -> dict[str, Any]:
    """Return the values that Ollama's routes pass to `template.Execute`.

    A request that leaves thinking open is one for thinking, if the model can.
    """
    if think is None and can_think:
        think = True
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
    """Return every conversation, with thinking unset, on and off, for both kinds of adapter.

    A model that cannot think is not asked to: Ollama refuses such a request.
    """
    tokenizer = load_tokenizer(MODEL_DIR)
    tokenizer.chat_template = TEMPLATES[family]
    name = identify_template(tokenizer).name
    made: list[Case] = []
    for thinking in (True, False):
        template = str(ollama_template(name, thinking=thinking))
        for messages in conversations():
            can_think = ollama_sees_thinking(template)
            for think in (None, True, False) if can_think else (None, False):
                wanted = thinking if think is None else think
                expected = apply_template(tokenizer, messages, prompt=True, thinking=wanted)
                values = as_ollama_gives_it(messages, think, can_think)
                made.append((template, values, expected))
    return made


@pytest.mark.parametrize("family", TEMPLATES)
def test_the_ollama_template_renders_as_the_chat_template(family: str) -> None:
    """System prompts, turns, reasoning and the prompt are equal byte for byte."""
    made = cases(family)
    assert len(made) > 150
    for template, values, expected in made:
        assert render(template, values) == expected


@pytest.mark.parametrize("name", ["Qwen3", "qwen3ft embedded"])
def test_ollama_thinks_only_where_the_run_was_trained_to(name: str) -> None:
    """It looks for the field in the template, and would turn thinking on for all others."""
    assert ollama_sees_thinking(str(ollama_template(name, thinking=True)))
    assert not ollama_sees_thinking(str(ollama_template(name, thinking=False)))


@pytest.mark.slow
def test_go_itself_renders_the_same(tmp_path: Path) -> None:
    """Go's text/template is the engine that Ollama uses, and its parser finds the same fields."""
    go = shutil.which("go", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if go is None:
        pytest.skip("needs Go: make test-go fetches it")
    program = """package main

import ("bytes"; "encoding/json"; "os"; "strings"; "text/template"; "text/template/parse")

func thinks(node parse.Node, looping bool) bool {
    var inner []parse.Node
    switch n := node.(type) {
    case *parse.ListNode:
        if n != nil { inner = n.Nodes }
    case *parse.IfNode:
        inner = []parse.Node{n.Pipe, n.List, n.ElseList}
    case *parse.RangeNode:
        looping = looping || strings.Contains(n.Pipe.String(), ".Messages")
        inner = []parse.Node{n.List, n.ElseList}
    case *parse.ActionNode:
        inner = []parse.Node{n.Pipe}
    case *parse.PipeNode:
        for _, command := range n.Cmds { inner = append(inner, command.Args...) }
    case *parse.FieldNode:
        return looping && n.Ident[0] == "Thinking"
    }
    for _, one := range inner { if thinks(one, looping) { return true } }
    return false
}

func main() {
    var cases [][]any
    if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil { panic(err) }
    written := []any{}
    for _, one := range cases {
        parsed := template.Must(template.New("").Option("missingkey=zero").Parse(one[0].(string)))
        var out bytes.Buffer
        if err := parsed.Execute(&out, one[1]); err != nil { panic(err) }
        written = append(written, []any{out.String(), thinks(parsed.Tree.Root, false)})
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
    assert json.loads(done.stdout) == [
        [expected, ollama_sees_thinking(template)] for template, _, expected in made
    ]


def test_every_known_chat_template_has_an_ollama_template_and_no_other_one() -> None:
    """A template that nobody tested is not written."""
    for name in KNOWN_TEMPLATES.values():
        assert ollama_template(name, thinking=True) is not None
    assert ollama_template("", thinking=True) is None
    assert ollama_template("Llama", thinking=True) is None


def write(folder: Path, template: str, gguf: GgufType | None = "q8_0") -> Path:
    (folder / "merged").mkdir()
    (folder / "merged" / "chat_template.jinja").write_text(template, encoding="utf-8")
    write_serving_files(folder, CARD, REPORT, gguf)
    return folder


def test_the_modelfile_starts_from_the_gguf_file(tmp_path: Path) -> None:
    """It has the template in quotes, the end token, and greedy settings."""
    text = (write(tmp_path, TEMPLATES["qwen3"]) / "Modelfile").read_text(encoding="utf-8")
    template = str(ollama_template("Qwen3", thinking=False))
    assert '"""' not in template
    assert f'FROM ./model-q8_0.gguf\nTEMPLATE """{template}"""\n' in text
    assert 'PARAMETER stop "<|im_end|>"\n' in text
    assert "PARAMETER temperature 0\nPARAMETER num_predict 256\n" in text


def test_an_unknown_chat_template_gives_no_modelfile_and_says_so(tmp_path: Path) -> None:
    """One changed letter is enough."""
    folder = write(tmp_path, TEMPLATES["qwen3"] + " ")
    assert not (folder / "Modelfile").exists()
    assert "There is no Modelfile, because" in (folder / "SERVING.md").read_text(encoding="utf-8")


def test_without_gguf_there_is_no_modelfile(tmp_path: Path) -> None:
    """Ollama does not read Qwen3 as safetensors, so SERVING.md says how to get the other."""
    folder = write(tmp_path, TEMPLATES["qwen3"], None)
    assert not (folder / "Modelfile").exists()
    serving = (folder / "SERVING.md").read_text(encoding="utf-8")
    assert serving.count("`qwen3ft export DIR --format gguf`") == 2
    assert "llama-server" not in serving


@pytest.mark.parametrize(("rows", "tokens"), [(0, 256), (9, 2304)])
def test_the_commands_allow_for_the_thinking_that_was_trained(rows: int, tokens: int) -> None:
    """VLLM is told to part it from the answer, and llama.cpp how long both may be."""
    config = {"max_new_tokens": 256, "max_thinking_tokens": 2048}
    data = {"usable_rows": 10, "reasoning_rows": rows}
    card = {**CARD, "config": config, "data": data}
    for command in (vllm_lora_command(card, "./adapter"), vllm_merged_command(card)):
        assert ("--reasoning-parser qwen3" in command) == bool(rows)
    words = shlex.split(llama_server_command(card, "bf16"))
    assert words[-2:] == ["-n", str(tokens)]


@pytest.mark.parametrize(("rank", "limit"), [(1, 1), (6, 8), (8, 8), (9, 16), (200, 256)])
def test_vllm_gets_a_rank_that_it_takes(rank: int, limit: int) -> None:
    """The command has the next allowed rank, the base's revision, and the adapter's name."""
    card = {**CARD, "plan": {"adapter": {"r": rank}}}
    words = shlex.split(vllm_lora_command(card, "./a folder"))
    assert words[:5] == ["vllm", "serve", "Qwen/Qwen3-4B-Thinking-2507", "--revision", "a" * 40]
    assert words[words.index("--max-lora-rank") + 1] == str(limit)
    assert "qwen3-4b-thinking-2507-night-1=./a folder" in words
