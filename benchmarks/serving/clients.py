"""The clients: each asks every question by a request that sets nothing, and returns the answers.

Servers are started with the command of SERVING.md, in the exported folder, with nothing added but
a port. What others wrote runs in environments of its own, or in a process of its own.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from benchmarks.machine import ROOT
from benchmarks.serving.champion import REGISTERED_NAME, Champion
from benchmarks.serving.venvs import Venvs
from qwen3ft.serving.instructions import vllm_lora_command, vllm_merged_command
from qwen3ft.serving.names import served_name

START_SECONDS = 900.0
ANSWER_SECONDS = 300.0

_QUIET = {
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "true",
}

_PIPELINE = """
import json, sys
from transformers import pipeline
ask = pipeline("text-generation", "./merged")
for question in json.load(sys.stdin):
    said = ask([{"role": "user", "content": question}])
    print("ANSWER" + json.dumps(said[0]["generated_text"][-1]["content"]))
"""

_MLFLOW = """
import json, sys, mlflow
model = mlflow.pyfunc.load_model(sys.argv[1])
for question in json.load(sys.stdin):
    said = model.predict([{"question": question}])
    print("ANSWER" + json.dumps(said["answer"].iloc[0]))
"""

# what `llama-server` does with the options of SERVING.md; the package has the server alone
_LLAMA_CPP = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
params.port = int(options["--port"])
params.model.path, params.n_predict = options["-m"], int(options["-n"])
params.model_alias = {options["--alias"]}
if "--lora" in options:
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(options["--lora"], 1.0)]
    params.chat_template = open(options["--chat-template-file"]).read()
    params.sampling.temp = float(options["--temp"])
server = xllamacpp.Server(params)
time.sleep(1e6)
"""


def vllm_merged(champion: Champion, venvs: Venvs) -> list[str]:
    """Ask vLLM with the merged model."""
    return _ask_vllm(champion, venvs, vllm_merged_command(champion.provenance))


def vllm_lora(champion: Champion, venvs: Venvs) -> list[str]:
    """Ask vLLM with the adapter on the base model."""
    return _ask_vllm(champion, venvs, vllm_lora_command(champion.provenance, "./adapter"))


def transformers_pipeline(champion: Champion, venvs: Venvs) -> list[str]:
    """Ask transformers' pipeline for text generation, in Python."""
    return _ask_script(champion, [sys.executable, "-c", _PIPELINE], champion.export)


def plain_peft(champion: Champion, venvs: Venvs) -> list[str]:
    """Run the code of the adapter's README.md for each question."""
    card = (champion.adapter / "README.md").read_text(encoding="utf-8")
    load, ask = card.partition("```python\n")[2].partition("```")[0].rsplit("print(", 1)
    said = ask.strip().removesuffix(")").replace('"..."', "question")
    script = f"import json, sys\n{load}\nfor question in json.load(sys.stdin):\n"
    script += f"    print('ANSWER' + json.dumps({said}))\n"
    return _ask_script(champion, [sys.executable, "-c", script], champion.adapter)


def transformers_serve(champion: Champion, venvs: Venvs) -> list[str]:
    """Ask `transformers serve`."""
    command = [str(venvs.vllm / "bin" / "transformers"), "serve", "./merged"]
    with server(command, champion.export, "/health") as address:
        return ask_chat(address, champion.questions, "./merged")


def llama_cpp(champion: Champion, venvs: Venvs) -> list[str]:
    """Ask llama.cpp's server with the merged model as GGUF."""
    return _ask_llama_cpp(champion, venvs, _command(champion, "llama-server -m model-"))


def llama_cpp_lora(champion: Champion, venvs: Venvs) -> list[str]:
    """Ask llama.cpp's server with the adapter as GGUF on the base model."""
    from qwen3ft.embedded import MODEL_DIR
    from qwen3ft.serving.gguf_files import write_model

    base = champion.export.with_name("base.gguf")
    if not base.is_file():
        write_model(MODEL_DIR, base, "bf16")
    command = _command(champion, "llama-server -m BASE")
    return _ask_llama_cpp(champion, venvs, command.replace("BASE.gguf", str(base)))


def mlflow_load(champion: Champion, venvs: Venvs) -> list[str]:
    """Ask `mlflow.pyfunc.load_model`."""
    model = f"models:/{REGISTERED_NAME}@champion"
    return _ask_script(champion, [sys.executable, "-c", _MLFLOW, model], ROOT)


def mlflow_serve(champion: Champion, venvs: Venvs) -> list[str]:
    """Ask `mlflow models serve`."""
    program = str(Path(sys.executable).with_name("mlflow"))
    model = f"models:/{REGISTERED_NAME}@champion"
    command = [program, "models", "serve", "-m", model, "--env-manager", "local"]
    path = f"{Path(program).parent}:{os.environ['PATH']}"  # as in an activated environment
    extra = {"MLFLOW_TRACKING_URI": champion.tracking_uri, "PATH": path}
    with server(command, ROOT, "/ping", extra) as address:
        body = {"dataframe_records": [{"question": one} for one in champion.questions]}
        reply = httpx.post(f"{address}/invocations", json=body, timeout=ANSWER_SECONDS)
        return [one["answer"] for one in reply.raise_for_status().json()["predictions"]]


CLIENTS: dict[str, Callable[[Champion, Venvs], list[str]]] = {
    "transformers pipeline": transformers_pipeline,
    "plain PEFT": plain_peft,
    "transformers serve": transformers_serve,
    "llama.cpp server, GGUF": llama_cpp,
    "llama.cpp server, LoRA GGUF": llama_cpp_lora,
    "mlflow.pyfunc.load_model": mlflow_load,
    "mlflow models serve": mlflow_serve,
    "vLLM, merged": vllm_merged,
    "vLLM, LoRA": vllm_lora,
}


def _command(champion: Champion, start: str) -> str:
    """Return the line of SERVING.md that begins with `start`."""
    text = (champion.export / "SERVING.md").read_text(encoding="utf-8")
    [line] = [line for line in text.splitlines() if line.startswith(start)]
    return line


def _ask_vllm(champion: Champion, venvs: Venvs, command: str) -> list[str]:
    assert command in (champion.export / "SERVING.md").read_text(encoding="utf-8")
    _, *options = shlex.split(command)
    program = [str(venvs.vllm / "bin" / "vllm"), *options]
    with server(program, champion.export, "/health") as address:
        return ask_chat(address, champion.questions, served_name(champion.provenance))


def _ask_llama_cpp(champion: Champion, venvs: Venvs, command: str) -> list[str]:
    with llama_server(champion, venvs, command) as address:
        return ask_chat(address, champion.questions, served_name(champion.provenance))


def llama_server(
    champion: Champion, venvs: Venvs, command: str | None = None
) -> AbstractContextManager[str]:
    """Run llama.cpp's server by a command of SERVING.md, by default with the merged model."""
    command = command or _command(champion, "llama-server -m model-")
    _, *options = shlex.split(command)
    program = [str(venvs.llama / "bin" / "python"), "-c", _LLAMA_CPP, *options]
    return server(program, champion.export, "/health")


def ask_chat(address: str, questions: Sequence[str], model: str) -> list[str]:
    """Send each question alone to /v1/chat/completions; no temperature, nothing of thinking."""
    answers = []
    for question in questions:
        body = {"model": model, "messages": [{"role": "user", "content": question}]}
        reply = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=ANSWER_SECONDS)
        message = reply.raise_for_status().json()["choices"][0]["message"]
        answers.append(str(message["content"]))
    return answers


def _ask_script(champion: Champion, command: Sequence[str], folder: Path) -> list[str]:
    done = subprocess.run(
        command,
        input=json.dumps(champion.questions),
        cwd=folder,
        env={**os.environ, **_QUIET, "MLFLOW_TRACKING_URI": champion.tracking_uri},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)[:80]}: {done.stderr[-2000:]}")
    return [json.loads(found) for found in re.findall(r"^ANSWER(.*)$", done.stdout, re.MULTILINE)]


@contextmanager
def server(
    command: Sequence[str], folder: Path, health: str, extra: Mapping[str, Any] | None = None
) -> Iterator[str]:
    """Run a server on a free port until the body ends; yield its address once it answers."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    log = folder.parent / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            cwd=folder,
            env={**os.environ, **_QUIET, **(extra or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait(process, address + health, log)
        yield address
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(address, timeout=10).is_success:
                return
        except httpx.HTTPError:
            pass
        time.sleep(1)
    raise SystemExit(f"the server did not start: {log.read_text(errors='replace')[-3000:]}")
