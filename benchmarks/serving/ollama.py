"""Ollama as far as it can be had without its source: the Modelfile in Go, and llama.cpp below it.

Go's own template engine renders the Modelfile's template as Ollama's routes fill it for a request
that leaves thinking open; llama.cpp's server then writes on, with the Modelfile's parameters.
Ollama runs the same two libraries. Its own code, which is in no package index, is not run.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from typing import Any

import httpx

from benchmarks.serving.champion import Champion
from benchmarks.serving.clients import ANSWER_SECONDS, llama_server
from benchmarks.serving.venvs import Venvs
from qwen3ft.chat.rendering import generation_prompt
from qwen3ft.chat.tokenizer import load_tokenizer
from qwen3ft.model.saved_adapter import was_trained_to_think

_PROGRAM = """package main

import ("encoding/json"; "os"; "strings"; "text/template")

func main() {
    var asked struct { Template string; Values []map[string]any }
    if err := json.NewDecoder(os.Stdin).Decode(&asked); err != nil { panic(err) }
    parsed := template.Must(template.New("").Option("missingkey=zero").Parse(asked.Template))
    written := []string{}
    for _, values := range asked.Values {
        var out strings.Builder
        if err := parsed.Execute(&out, values); err != nil { panic(err) }
        written = append(written, out.String())
    }
    json.NewEncoder(os.Stdout).Encode(written)
}
"""


def ollama(champion: Champion, venvs: Venvs) -> list[str]:
    """Return the answers; '' where the prompt is not the one that was trained."""
    modelfile = (champion.export / "Modelfile").read_text(encoding="utf-8")
    prompts = _render(champion, venvs, modelfile)
    tokenizer = load_tokenizer(champion.adapter)
    thinking = was_trained_to_think(champion.provenance)
    trained = [generation_prompt(tokenizer, one, thinking) for one in champion.questions]
    options = dict(re.findall(r"^PARAMETER (\S+) (.+)$", modelfile, re.MULTILINE))
    request = {
        "temperature": float(options["temperature"]),
        "n_predict": int(options["num_predict"]),
        "stop": [options["stop"].strip('"')],
    }
    answers = []
    with llama_server(champion, venvs) as address:
        for prompt, expected in zip(prompts, trained, strict=True):
            body = {**request, "prompt": prompt}
            reply = httpx.post(f"{address}/completion", json=body, timeout=ANSWER_SECONDS)
            said = str(reply.raise_for_status().json()["content"])
            answers.append(said if prompt == expected else "")
    return answers


def _render(champion: Champion, venvs: Venvs, modelfile: str) -> list[str]:
    """Return what Go makes of the Modelfile's template for each question."""
    template = modelfile.partition('TEMPLATE """')[2].partition('"""')[0]
    # Ollama's routes: a template with the field can think, and does where a request is open.
    thinks = re.search(r"(?<![\w$])\.Thinking\b", template) is not None
    values: list[dict[str, Any]] = [
        {
            "System": "",
            "Messages": [{"Role": "user", "Content": question, "Thinking": ""}],
            "Think": thinks,
            "IsThinkSet": thinks,
        }
        for question in champion.questions
    ]
    folder = champion.export.parent / "go"
    folder.mkdir(exist_ok=True)
    (folder / "main.go").write_text(_PROGRAM, encoding="utf-8")
    done = subprocess.run(
        [str(venvs.llama / "bin" / "go"), "run", str(folder / "main.go")],
        input=json.dumps({"Template": template, "Values": values}),
        env={**os.environ, "GOCACHE": str(folder / "cache"), "GO111MODULE": "off"},
        capture_output=True,
        text=True,
        check=True,
    )
    rendered: list[str] = json.loads(done.stdout)
    return rendered
