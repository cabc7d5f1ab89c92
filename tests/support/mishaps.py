"""One way to each place in the code at which an error is made, with what it needs to go wrong.

A key is a `support.commands.Site` as text: file, function, and the number of the place in it.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch
from uuid import uuid4

import httpx
import numpy as np
import pynvml
import torch
from huggingface_hub import errors as hub_errors
from prefect.exceptions import ObjectNotFound
from prefect.states import Crashed, Scheduled
from support.databases import migrated
from support.plans import environment, manifest, plan_for, snapshot
from support.small_adapter import small_tensors, write_small_adapter, write_tensors
from support.vllm_program import place_vllm

from deployments import deploy, prefect_api, prefect_worker, schedule
from deployments.services import Layout
from deployments.stack import Stack
from flows import api, finetune, hosts, join, resume, run_context, temporary_server
from flows.cli import champion, data, follow, options, plan, project, runs, servers
from flows.cli.app import _explained as explained
from qwen3ft import errors, faults, settings
from qwen3ft.chat import rendering, templates, tokenizer
from qwen3ft.config import TrainingConfig, load_config, parse_config
from qwen3ft.data import hub as data_hub
from qwen3ft.data import reading, sources
from qwen3ft.disk import files
from qwen3ft.disk.digests import DigestCache, code_digest
from qwen3ft.embedded import MODEL_DIR
from qwen3ft.evaluation import generation, inference
from qwen3ft.evaluation.ability import read_ability_rows
from qwen3ft.jobs import failures
from qwen3ft.jobs.folders import JobDir, RunDir
from qwen3ft.jobs.heartbeat import StopRequest
from qwen3ft.machine import environment as environments
from qwen3ft.machine import gpu_choice, gpu_lock, gpus, leaks, memory, network
from qwen3ft.model import hub as model_hub
from qwen3ft.model import hub_errors as translated
from qwen3ft.model import room, saved_adapter, shapes, source_folder
from qwen3ft.operations import resumption, retention
from qwen3ft.planning import gpu_specs
from qwen3ft.planning.plan import build_plan
from qwen3ft.records.data import SourceFile
from qwen3ft.records.evaluation import Champion
from qwen3ft.records.machine import GpuUse
from qwen3ft.records.serving import EngineName
from qwen3ft.records.training import Failure
from qwen3ft.recovery.adjust import FailedAttempt, GiveUp, decide_retry
from qwen3ft.registry import aliases, bounded_calls, lookup
from qwen3ft.registry import registry as registries
from qwen3ft.registry.registry import Registry
from qwen3ft.server import engines, probe
from qwen3ft.server import run as server_run
from qwen3ft.serving import export, gguf_files, hub_push, parity, session
from qwen3ft.serving.engines import events, own, places, vllm
from qwen3ft.tracking import connection as connections
from qwen3ft.tracking.journal import AttemptEnded, Journal
from qwen3ft.tracking.points import table_json
from qwen3ft.tracking.sender import Sender
from qwen3ft.training import checkpoint_writer, engine, trainer
from qwen3ft.training.fused.offload import HostStash

Mishap = Callable[[Path], Any]
"""What goes wrong, given an empty folder whose name has a space; it raises a FinetuneError."""

BASE, NAME = "qwen3ft-embedded", "owner/name"


def config(**changes: Any) -> TrainingConfig:
    """Return settings of a run with the embedded model."""
    return TrainingConfig(model_name="embedded", **changes)


def write(folder: Path, name: str, text: str) -> Path:
    """Write a file, and return its path."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def throw(error: BaseException) -> None:
    """Raise an error that a function returned."""
    raise error


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Make a project of the folder, and work in it."""
    write(folder, "qwen3ft.yaml", "model_name: embedded\n")
    before, variables = Path.cwd(), dict(os.environ)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
        os.environ.clear()
        os.environ.update(variables)


def in_project(call: Callable[..., Any], *arguments: Any, **options: Any) -> Mishap:
    """Return the mishap of a call in a project folder."""

    def mishap(folder: Path) -> None:
        with inside(folder):
            call(*arguments, **options)

    return mishap


def registry_in(folder: Path) -> Registry:
    """Return the registry of a database without models."""
    shutil.copy(migrated("mlflow"), folder / "mlflow.db")
    return Registry(f"sqlite:///{folder / 'mlflow.db'}")


def find(folder: Path, wanted: str) -> Any:
    """Look for an adapter that was never made."""
    folders = {"output_dir": str(folder / "out"), "runs_dir": str(folder / "runs")}
    return lookup.find_adapter(config(**folders), registry_in(folder), wanted)


def hub_answer(kind: type[Exception], status: int) -> Exception:
    """Return an error of huggingface_hub, as it makes it of an answer of the hub."""
    request = httpx.Request("GET", "https://hub.example/api")
    return kind("refused", response=httpx.Response(status, request=request))  # type: ignore[call-arg]


def begun_run(folder: Path, text: str = "") -> RunDir:
    """Return a run with settings, or with this text in their place."""
    run = RunDir(folder / "runs" / "a-run")
    write(run.path, "config.json", text or config(seed=1).model_dump_json())
    return run


# --- mishaps that take more than a line ---


def twice_on_one_gpu(folder: Path) -> None:
    """A second run finds the lock of the GPU taken."""
    with (
        gpu_lock.hold_gpu(gpu_lock.CPU, "1", when_busy="wait", wait_seconds=1, folder=folder),
        gpu_lock.hold_gpu(gpu_lock.CPU, "2", when_busy="refuse", wait_seconds=0, folder=folder),
    ):
        pass


def join_attempt(
    folder: Path, *, is_whole: bool = True, attempt: int = 1, mode: int = 0o700
) -> None:
    """Join an attempt in progress whose model and rows are there, or not."""
    run = RunDir(folder)
    plan = plan_for().for_run("run", str(folder), attempt=1, resume_from=None)
    if is_whole:
        there = {"path": str(folder)}
        plan = plan.with_settings(
            model=plan.model.model_copy(update=there), dataset=plan.dataset.model_copy(update=there)
        )
    job = run.attempt(attempt).create(plan)
    job.path.chmod(mode)
    with run_context.try_lock(run.lock):
        join._join(job, 1, code_digest(), "")


def joined_twice(folder: Path) -> None:
    """Two flow runs for one host of an attempt."""
    for name in "ab":
        join._claim(JobDir(folder), 1, name)


def no_join_deployment(_: Path) -> None:
    """The server does not know the deployment of other hosts."""
    client = MagicMock()
    client.read_deployment_by_name.side_effect = ObjectNotFound(Exception("404"))
    hosts._find_deployment(client)


def attempt_made_elsewhere(folder: Path) -> None:
    """A host that was cut off goes on, and another one has continued its run."""
    for _ in range(2):
        finetune._claim(plan_for(), RunDir(folder))


def no_server_to_ask(_: Path) -> None:
    """The server is away for longer than it may be."""
    client = MagicMock()
    client.read_deployment_by_name.side_effect = httpx.ConnectError("refused")
    with patch.object(hosts, "_SERVER_SECONDS", -1):
        hosts._find_deployment(client)


def no_other_host(folder: Path, *, is_first: bool = True) -> None:
    """No worker takes the flow run of the second host, or it has vanished later."""
    client = MagicMock()
    client.read_flow_run.return_value.state = Scheduled()
    run = RunDir(folder / "run")
    joined = hosts.JoinedHosts(config(), run)
    joined._asked = {1: uuid4()}
    joined._wait(client, run.attempt(1), 0, is_first=is_first)


def full_gpu_of_a_host(_: Path) -> None:
    """Another program fills the GPU of a host that joins."""
    machine = environment(80.0)
    gpu = machine.gpus[0]
    use = GpuUse(total_bytes=gpu.total_bytes, free_bytes=1, processes=())
    join._require_room(plan_for(), 0, machine, "b", probe=lambda _: use, settle_seconds=0)


def wrong_python(_: Path) -> None:
    """`make` was started with a Python that is too old."""
    with patch.object(sys, "version_info", (3, 9, 1)):
        environments._refuse_wrong_python()


def no_uv_and_no_pip(folder: Path) -> None:
    """Nothing can install packages."""
    with (
        patch.object(environments.shutil, "which", return_value=None),
        patch.object(environments.importlib.util, "find_spec", return_value=None),
    ):
        environments.EnvironmentManager(folder)._uv()


def changed_file(folder: Path) -> None:
    """A file of rows has grown since it was looked at."""
    path = write(folder, "rows.jsonl", "{}")
    reading._check_unchanged(SourceFile("rows.jsonl", path, "train", size_bytes=1))


def no_commit_of_a_dataset(folder: Path) -> None:
    """The hub's answer about a data set is incomplete."""
    with patch("huggingface_hub.HfApi.dataset_info") as info:
        info.return_value.sha = None
        data_hub._resolve(data_hub.HubDataset(NAME, None, None), folder)


def no_commit_of_a_model(_: Path) -> None:
    """The hub's answer about a model is incomplete."""
    with patch("huggingface_hub.HfApi.model_info") as info:
        info.return_value.sha = None
        model_hub._resolve_revision(TrainingConfig(model_name=NAME))


def no_memory_for_one(_: Path) -> None:
    """A batch of one question does not fit."""

    def run(_: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    list(generation.in_batches([1, 2], 2, run))


def changed_adapter(folder: Path) -> None:
    """A file of an adapter was changed after it was saved."""
    write_small_adapter(folder)
    saved_adapter.open_adapter(write(folder, "adapter_config.json", "{}").parent)


def adapter_of_another_model(folder: Path) -> Path:
    """Write the adapter of a base model that this machine does not have."""
    write_small_adapter(folder)
    return folder


def champion_of_another_model(folder: Path) -> None:
    """The adapter in use was trained on another base model."""
    saved = write_small_adapter(folder)
    in_use = Champion(
        registered_model="m", version="1", source_uri="runs:/1/adapter", adapter_path=saved.path
    )
    inference._check_champion(in_use, snapshot())


def out_of_attempts(_: Path) -> None:
    """Training ran out of memory once, and no other attempt is allowed."""
    error = errors.OutOfMemoryError("It is full.", why="It is small.", next_command="nvidia-smi")
    failed = [FailedAttempt(plan_for(), Failure.from_error(error))]
    limits = {"allow_degraded": False, "newest_checkpoint": None}
    given_up = decide_retry(failed, max_attempts=1, **limits)
    assert isinstance(given_up, GiveUp)
    raise given_up.failure.to_error()


def no_such_version(folder: Path) -> None:
    """A version is promoted that was never registered."""
    shutil.copy(migrated("mlflow"), folder / "mlflow.db")
    connection = connections.connect(f"sqlite:///{folder / 'mlflow.db'}")
    aliases.require_version(connection, "a-name", "1")


def refused_tensors(folder: Path) -> None:
    """A model has none of the tensors of the file."""
    write_tensors(folder / "adapter_model.safetensors", small_tensors())
    with patch("peft.get_peft_model_state_dict", return_value={}):
        inference._check_attached(object(), "candidate", folder)  # type: ignore[arg-type]


def other_adapter(_: Path) -> None:
    """PEFT attaches more parameters than were planned."""
    from peft import LoraConfig  # noqa: F401  loaded before it is replaced

    from qwen3ft.model.adapter import LoRAAdapter

    spec = shapes.plan_adapter(config(), shapes.read_shape(MODEL_DIR))
    adapter = LoRAAdapter(spec)
    with (
        patch("peft.get_peft_model", return_value=torch.nn.Linear(2, 2)),
        patch.object(adapter, "get_trainable_params_info", return_value={"trainable": 6}),
    ):
        adapter.apply_lora(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


def no_room_anywhere(folder: Path) -> None:
    """The folder of adapters cannot be written."""
    wanted = config(runs_dir=str(folder / "runs"), output_dir="/dev/null/x")
    room.require_room(wanted, RunDir(folder / "runs" / "1"), None)


def fused_without_a_gpu(_: Path) -> None:
    """Kernels are asked for that this machine or plan cannot use."""
    model = snapshot()
    wanted = TrainingConfig(kernels="fused", lora_dropout=0.1)
    spec = shapes.plan_adapter(wanted, model.shape)
    build_plan(wanted, environment(gpu_gb=None), model, spec, manifest())


def no_rows_to_plan(_: Path) -> None:
    """A data set without training rows is planned."""
    model = snapshot()
    spec = shapes.plan_adapter(TrainingConfig(), model.shape)
    empty = manifest().model_copy(update={"train": manifest().train.model_copy(update={"rows": 0})})
    build_plan(TrainingConfig(), environment(), model, spec, empty)


def rank_of_another_size(_: Path) -> None:
    """A rank is above the features of the model's smallest projection."""
    shape = shapes.read_shape(MODEL_DIR).model_copy(update={"hidden_size": 4})
    shapes.plan_adapter(config(lora_r=8), shape)


def slow_mlflow(folder: Path) -> None:
    """MLflow gives no answer in time."""
    import time

    calls = bounded_calls.BoundedCalls(f"sqlite:///{folder / 'mlflow.db'}")
    with patch.object(bounded_calls, "connect", lambda _: None):
        calls.within(0.01, lambda _: time.sleep(1.0))


def nothing_in_mlflow(folder: Path) -> None:
    """A version's run has no adapter."""
    from mlflow import MlflowClient

    registry = registry_in(folder)
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    run = client.create_run(client.create_experiment("x", str(folder / "artifacts")))
    registry._fetch(run.info.run_id, "0" * 64, folder / "fetched")


def refused_by_mlflow(_: Path) -> None:
    """MLflow does not accept what it is sent."""
    with connections._translated("http://127.0.0.1:1"):
        raise ValueError("not finite")


def stuck_tracking(folder: Path) -> None:
    """The journal cannot be read."""
    shutil.copy(migrated("mlflow"), folder / "mlflow.db")
    run = RunDir(folder / "run")
    run.path.mkdir()
    Journal(run).run_started("x", {}, {})
    with patch("qwen3ft.tracking.sender.lines_from", side_effect=OSError(28, "No space left")):
        Sender(run, f"sqlite:///{folder / 'mlflow.db'}").step()


def end_without_a_beginning(folder: Path) -> None:
    """The journal lacks the line in which an attempt began."""
    ended = AttemptEnded(number=3, status="FAILED", tags={})
    sender = Sender(RunDir(folder), f"sqlite:///{folder / 'mlflow.db'}")
    sender._end_attempt(None, "1", ended)  # type: ignore[arg-type]


def held_out_rows_gone(folder: Path) -> None:
    """The cache with the rows of a run was cleaned."""
    write_small_adapter(folder / "adapter")
    wanted = config(cache_dir=str(folder / "cache"), runs_dir=str(folder / "runs"))
    export.find_held_out(wanted, folder / "adapter")


def unknown_tokenizer(folder: Path) -> None:
    """llama.cpp's converter, which is no package of the tests, refuses a model."""

    class Model:
        """As in llama.cpp: it does not know how the tokenizer splits texts."""

        model_arch = None

        def __init__(self, *_: Any, **__: Any) -> None:
            raise NotImplementedError("BPE pre-tokenizer was not recognized")

    modules = {"gguf": MagicMock(), "conversion": MagicMock(get_model_class=lambda _: Model)}
    shutil.copy(MODEL_DIR / "config.json", folder)
    with patch.object(gguf_files, "_import_converter"), patch.dict(sys.modules, modules):
        gguf_files.write_model(folder, folder / "x.gguf", "bf16")


def converter_that_fails(folder: Path) -> None:
    """llama.cpp's script is not where it was installed."""
    with patch.object(gguf_files, "_llama_cpp", return_value=folder):
        gguf_files.write_lora(folder, folder, folder / "x.gguf")


def push_to_no_repository(folder: Path) -> None:
    """The name has no owner."""
    write_small_adapter(folder / "adapter")
    hub_push.push_adapter(folder / "adapter", "adapter", ())


def no_converter(_: Path) -> None:
    """The packages of the extra are not installed."""
    with patch.object(gguf_files, "find_spec", return_value=None):
        gguf_files.require_gguf_packages()


def ended_engine(**watching: Any) -> None:
    """Raise what a server says when the watch over its worker ends like this."""
    made = object.__new__(engines.Engine)
    made._request, made._job = MagicMock(), MagicMock()
    made._loop, ended = asyncio.new_event_loop(), list[errors.FinetuneError]()
    with patch.object(engines, "run_worker", **watching), patch.object(made, "_end", ended.append):
        made._run()
        made._loop.run_until_complete(asyncio.sleep(0))
    made._loop.close()
    raise ended[0]


def served_otherwise(engine: EngineName) -> None:
    """A server answers otherwise than the run's test did."""
    question = [{"role": "user", "content": "q"}]
    kept = probe.KeptAnswer(question, thinking=False, answer="right", reference="right")
    test = probe.KeptTest([kept], "exact_match", "cpu")
    answer = {"choices": [{"message": {"content": "wrong"}}], "usage": {"completion_tokens": 2}}
    transport = httpx.MockTransport(lambda _: httpx.Response(200, json=answer))

    async def ask() -> None:
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            await probe.prove(client, "v1", test, False, engine, "cpu", at_once=1)

    asyncio.run(ask())


def beside_another_base(folder: Path) -> None:
    """An adapter is served beside those of another base model."""
    write_small_adapter(folder)
    with patch.object(places, "find_base", return_value="its own"):
        places.require_place(saved_adapter.open_adapter(folder), "another", 8, loaded=0, places=4)


def vllm_that_ended() -> None:
    """The program ends while it loads."""
    made = object.__new__(vllm.VllmServer)
    made._log = Path("/dev/null")

    async def end() -> None:
        made._process = await asyncio.create_subprocess_exec("false")
        raise await made.watch()

    asyncio.run(end())


def no_vllm(folder: Path) -> None:
    """The program is not installed."""
    with patch.object(vllm, "find_vllm", return_value=None):
        vllm.require_vllm()


def old_vllm(folder: Path) -> None:
    """The program on PATH is older than the one that was tried."""
    with patch.object(vllm, "find_vllm", return_value=str(place_vllm(folder, "0.9.2"))):
        vllm.require_vllm()


def drifted(folder: Path) -> None:
    """The merged model loses answers."""
    from qwen3ft.records.requests import FormScore, ParityReport

    score = FormScore(
        form="merged",
        exact_match=0.5,
        answer_loss=2.0,
        same_answers=0.5,
        lost_answers=0.5,
        loss_drift=1.0,
        seconds=1.0,
    )
    report = ParityReport(
        rows=2, thinking=False, max_loss_drift=0.1, max_lost_answers=0.1, scores=(score,)
    )
    export._require_parity(report, folder)


def too_large_to_compare(folder: Path) -> None:
    """A merged model exceeds the budget of a machine without a GPU."""
    from qwen3ft.machine.memory import MemoryOptimizer
    from qwen3ft.records.requests import ExportLimits, ExportRequest

    request = ExportRequest(
        config=config(max_memory_gb=1.0),
        base="b",
        adapter=str(folder),
        quantization="nf4",
        shape=snapshot().shape,
        merged="m",
        rows_path="r",
        device="cpu",
        limits=ExportLimits(),
    )
    parity._load_merged(request, MemoryOptimizer(1.0, "cpu"))


def unknown_tensors(folder: Path) -> None:
    """A checkpoint is of another model."""
    write_tensors(folder / "adapter_model.safetensors", {"a": np.zeros(2, np.float32)})
    with patch.object(checkpoint_writer, "set_peft_model_state_dict") as attach:
        attach.return_value.unexpected_keys = ["a"]
        checkpoint_writer.load_adapter(folder, object())


def attempt_of(folder: Path) -> engine.TrainingEngine:
    """Return the engine of an attempt that has not begun."""
    plan_of_run = plan_for().for_run("1", str(folder), attempt=1, resume_from=None)
    made = object.__new__(engine.TrainingEngine)
    made.plan, made.job = plan_of_run, JobDir(folder / "attempts" / "01")
    made.job.checkpoints.mkdir(parents=True)
    made.job.log.touch()
    return made


def trained_without_an_evaluation(folder: Path) -> None:
    """Training ended, and there is no held-out loss."""

    class State:
        """What is read of the trainer's."""

        log_history: tuple[()] = ()
        best_global_step = None
        global_step = 4

    class Trained:
        """A trainer that is done."""

        state = State()

    attempt_of(folder).outcome(Trained())  # type: ignore[arg-type]


def endless_norm(folder: Path) -> None:
    """A gradient is not finite."""
    made = object.__new__(trainer.QATrainer)
    made.plan = plan_for().for_run("1", str(folder), attempt=1, resume_from=None)
    made._require_finite(float("nan"), 3)


def no_pinned_memory(_: Path) -> None:
    """The host refuses memory for activations."""
    stash = HostStash(torch.device("cpu"), 2**20)
    with patch.object(torch, "empty", side_effect=RuntimeError("cannot pin")):
        stash._new_slab()


def silent_server(folder: Path) -> None:
    """The Prefect server stops while a run is followed."""
    run = RunDir(folder)
    follower = follow.Follower(
        layout_of(folder), "1", follow.MetricsTail(run), follow.LockTail(run)
    )
    with patch.object(follow, "_UNREACHABLE_SECONDS", -1.0):
        list(follower.events())


def no_schedule(folder: Path) -> None:
    """The server knows no deployment."""
    with patch.object(schedule, "read_deployment", return_value=None):
        schedule._registered(Stack(folder))


def layout_of(folder: Path) -> Layout:
    """Return the layout of a stack that nobody started: no port 1 answers."""
    return Layout(folder, prefect_port=1, mlflow_port=1)


def interrupted(_: Path) -> None:
    """Ctrl-C while the temporary server starts."""
    with patch.object(finetune, "temporary_server", side_effect=KeyboardInterrupt):
        finetune.run_in_process(config())


def run_in_progress(folder: Path) -> None:
    """A run is resumed while it is in progress elsewhere."""
    wanted = config(runs_dir=str(folder))
    with (
        run_context.try_lock(folder / "a-run.lock", 0) as _,
        patch.object(run_context, "LOOK_SECONDS", 0.0),
    ):
        run = RunDir(folder / "a-run")
        run.path.mkdir()
        with run_context.try_lock(run.lock, 0), run_context.open_run(wanted, "a-run", None):
            pass


def dead_server(_: Path) -> None:
    """Prefect's temporary server ends at once."""

    class Ended:
        """A process that has ended."""

        def poll(self) -> int:
            return 1

    log = io.BytesIO(b"no port")
    temporary_server._wait(Ended(), "http://127.0.0.1:1/api", "", log)  # type: ignore[arg-type]


def program_that_fails(_: Path) -> Any:
    """Stand in for `python -m prefect`."""
    return patch.object(
        environments.EnvironmentManager, "get_python_executable", return_value="false"
    )


def refused_start(folder: Path) -> None:
    """`prefect deployment run` fails."""
    with program_that_fails(folder):
        follow.start_run(Stack(folder), {})


def refused_deployment(folder: Path) -> None:
    """`prefect deploy` fails."""
    with program_that_fails(folder):
        deploy._run_prefect_deploy(Stack(folder))


def dead_service(folder: Path) -> None:
    """A server of the stack ends before it answers."""
    made = Stack(folder)
    write(folder, ".qwen3ft/logs/prefect.log", "no port\n")
    log = made.layout().log("prefect")
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("no port\n")
    made._wait("prefect")


def job_variables(_: Path) -> None:
    """A run asks for another command."""
    asyncio.run(prefect_worker.FixedJob.from_template_and_values({}, {"command": "rm"}))


def upload_refused(folder: Path) -> None:
    """MLflow does not take the adapter of a run."""
    from tasks import promote

    begun_run(folder)
    with patch.object(promote, "wait_for_upload", return_value=False):
        promote.register.fn(config(), None, str(folder / "runs" / "a-run"))


def failed_run(folder: Path) -> None:
    """A run that was followed ends without words."""
    last = follow.StateChange("run", "Crashed", "CRASHED")
    raise runs._run_failed(last, folder / "runs" / "a-run", folder / "worker.log")


def lost_card(folder: Path) -> None:
    """A run completed, and its folder is gone."""
    runs._show_end(layout_of(folder), "Promoted", "", folder / "a-run", as_json=False)


def rows_of_a_preview(folder: Path) -> None:
    """A row is asked for that does not exist."""
    rows = [json.dumps({"question": f"What {n}?", "answer": f"It is {n}."}) for n in range(40)]
    path = write(folder, "rows.jsonl", "\n".join(rows))
    with inside(folder):
        data.preview_command(paths=[str(path)], row=1000, as_json=True)


QUICK: dict[str, Mishap] = {
    "qwen3ft/chat/rendering.py conversation_of 1": lambda _: rendering.conversation_of(
        {"messages": [{"role": "user", "content": "x"}]}
    ),
    "qwen3ft/chat/templates.py template_error 1": lambda _: throw(
        templates._runaway([], (), "it took 3 s")
    ),
    "qwen3ft/chat/tokenizer.py load_tokenizer 1": tokenizer.load_tokenizer,
    "qwen3ft/config.py parse_config 1": lambda _: parse_config({"lora_r": 0}),
    "qwen3ft/config.py read_settings_file 1": lambda f: load_config(f / "a file.yaml"),
    "qwen3ft/config.py read_settings_file 2": lambda f: load_config(write(f, "c.yaml", "[a]")),
    "qwen3ft/config.py checked_name 1": lambda f: find(f, ".."),
    "qwen3ft/data/hub.py parse_hub_name 1": lambda _: data_hub.parse_hub_name("hf://datasets/x"),
    "qwen3ft/data/hub.py _choose 1": lambda _: data_hub._choose(
        data_hub.HubDataset(NAME, None, "*.csv"), "train", ["x.jsonl"]
    ),
    "qwen3ft/data/hub.py _resolve 1": no_commit_of_a_dataset,
    "qwen3ft/data/reading.py _check_unchanged 1": changed_file,
    "qwen3ft/data/sources.py _fingerprinted 1": lambda f: sources._fingerprinted(
        SourceFile("a b", f / "a b", "train"), DigestCache(f / "digests.json")
    ),
    "qwen3ft/data/sources.py _chosen_paths 1": lambda _: sources.resolve_sources(TrainingConfig()),
    "qwen3ft/data/sources.py _files 1": lambda f: sources.resolve_sources(
        config(data_paths=(f"{f}/no",))
    ),
    "qwen3ft/data/sources.py _files 2": lambda f: sources.resolve_sources(
        config(data_paths=(str(write(f, "a b.pdf", "x")),))
    ),
    "qwen3ft/data/sources.py _folder_files 1": lambda f: sources.resolve_sources(
        config(data_paths=(str(f),))
    ),
    "qwen3ft/data/sources.py _glob_files 1": lambda f: sources.resolve_sources(
        config(data_paths=(f"{f}/*.jsonl",))
    ),
    "qwen3ft/data/sources.py _source 1": lambda f: sources._source(f / "a\udcff.jsonl", "train"),
    "qwen3ft/data/sources.py _embedded_file 1": lambda _: sources.resolve_sources(
        config(data_paths=("embedded:nonsense",))
    ),
    "qwen3ft/errors.py _rebuild 1": lambda _: throw(
        errors.FinetuneError.from_dict(
            errors.ConfigError("a", why="b", next_command="ls").to_dict()
        )
    ),
    "qwen3ft/evaluation/ability/__init__.py _unusable 1": lambda f: read_ability_rows(
        config(ability_path=f"{f}/no.jsonl")
    ),
    "qwen3ft/evaluation/generation.py in_batches 1": no_memory_for_one,
    "qwen3ft/evaluation/inference.py read_questions 1": lambda f: inference.read_questions(
        write(f, "test.jsonl", ""), 5
    ),
    "qwen3ft/evaluation/inference.py _check_champion 1": champion_of_another_model,
    "qwen3ft/evaluation/inference.py _check_attached 1": refused_tensors,
    "qwen3ft/faults.py _parse 1": lambda _: faults._parse("ooom"),
    "qwen3ft/disk/files.py require_disk 1": lambda f: files.require_disk(
        f / "x", 2**60, "It", "why"
    ),
    "qwen3ft/jobs/failures.py translate 1": lambda _: throw(
        failures.translate(ValueError("x"), "train")
    ),
    "qwen3ft/jobs/failures.py translate_exit 1": lambda _: throw(
        failures.translate_exit(-9, "", oom_kills=1, phase="train")
    ),
    "qwen3ft/jobs/failures.py folder_gone 1": lambda f: throw(failures.folder_gone(f / "a b")),
    "qwen3ft/jobs/failures.py _build 1": lambda _: throw(
        failures.translate(torch.cuda.OutOfMemoryError("CUDA out of memory."), "train")
    ),
    "qwen3ft/jobs/failures.py _preempted 1": lambda _: throw(
        failures.translate_exit(-15, "", oom_kills=0, phase="train")
    ),
    "qwen3ft/jobs/failures.py _unexplained 1": lambda _: throw(
        failures.translate_exit(-25, "", oom_kills=0, phase="train")
    ),
    "qwen3ft/jobs/failures.py _unexplained 2": lambda _: throw(
        failures.translate_exit(-11, "", oom_kills=0, phase="train")
    ),
    "qwen3ft/jobs/heartbeat.py StopRequest.error 1": lambda _: throw(StopRequest().error()),
    "qwen3ft/machine/environment.py EnvironmentManager.install_dependencies 1": lambda f: (
        environments.EnvironmentManager(f).install_dependencies()
    ),
    "qwen3ft/machine/environment.py EnvironmentManager._uv 1": no_uv_and_no_pip,
    "qwen3ft/machine/environment.py EnvironmentManager._run 1": lambda f: (
        environments.EnvironmentManager(f)._run(["ls", "/no such folder"], "Looking")
    ),
    "qwen3ft/machine/environment.py EnvironmentManager.validate_environment 1": lambda f: (
        environments.EnvironmentManager(f, ["no-such-package"]).validate_environment()
    ),
    "qwen3ft/machine/environment.py _refuse_wrong_python 1": wrong_python,
    "qwen3ft/machine/gpu_choice.py _refusal 1": lambda _: throw(
        gpu_choice._refusal("gpus is 2, and this machine has one.", "It has no more.", ())
    ),
    "qwen3ft/machine/gpu_lock.py _busy 1": twice_on_one_gpu,
    "qwen3ft/machine/gpu_lock.py _no_folder 1": lambda f: gpu_lock._prepare_folder(
        write(f, "a file", "") / "x"
    ),
    "qwen3ft/machine/gpus.py _no_answer 1": lambda _: throw(
        gpus._no_answer(pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST))
    ),
    "qwen3ft/machine/network.py _no_interface 1": lambda _: network.find_interface(
        "http://127.0.0.1:4200/api"
    ),
    "qwen3ft/machine/leaks.py leak_error 1": lambda _: throw(
        leaks.leak_error(leaks.Growth("host memory", 2.0**20, 10, 100, 2**27), 2**30, 100)
    ),
    "qwen3ft/machine/memory.py over_budget 1": lambda _: throw(
        memory.over_budget(2**33, 2**32, "cpu")
    ),
    "qwen3ft/machine/memory.py over_budget 2": lambda _: throw(
        memory.over_budget(2**33, 2**32, "cuda", 2**32)
    ),
    "qwen3ft/model/adapter.py LoRAAdapter.apply_lora 1": other_adapter,
    "qwen3ft/model/hub.py _resolve_revision 1": no_commit_of_a_model,
    "qwen3ft/model/hub_errors.py hub_error 1": lambda _: throw(
        translated.hub_error(
            hub_answer(hub_errors.GatedRepoError, 403), model_hub._MODEL, NAME, None, []
        )
    ),
    "qwen3ft/model/hub_errors.py hub_error 2": lambda _: throw(
        translated.hub_error(
            hub_answer(hub_errors.RevisionNotFoundError, 404), model_hub._MODEL, NAME, "v9", []
        )
    ),
    "qwen3ft/model/hub_errors.py hub_error 3": lambda f: model_hub.resolve_model(
        TrainingConfig(model_name=NAME, cache_dir=str(f))
    ),
    "qwen3ft/model/hub_errors.py not_found 1": lambda _: throw(
        translated.not_found(data_hub._DATASET, NAME, "The hub has none.", [])
    ),
    "qwen3ft/model/room.py _not_ready 1": no_room_anywhere,
    "qwen3ft/model/saved_adapter.py refused_adapter 1": changed_adapter,
    "qwen3ft/model/saved_adapter.py _require_files 1": saved_adapter.open_adapter,
    "qwen3ft/model/saved_adapter.py find_base 1": lambda f: saved_adapter.find_base(
        saved_adapter.open_adapter(adapter_of_another_model(f))
    ),
    "qwen3ft/model/saved_adapter.py shape_of 1": lambda f: saved_adapter.shape_of(f),
    "qwen3ft/model/shapes.py find_shape 1": lambda _: shapes.find_shape("no/model"),
    "qwen3ft/model/shapes.py plan_adapter 1": rank_of_another_size,
    "qwen3ft/model/shapes.py _refused 1": shapes.read_shape,
    "qwen3ft/model/source_folder.py check_tokenizer_files 1": lambda f: (
        source_folder.check_tokenizer_files(write(f, "tokenizer_config.json", "[]").parent)
    ),
    "qwen3ft/model/source_folder.py _refused 1": lambda f: throw(
        source_folder._refused(f, "it has no weights")
    ),
    "qwen3ft/operations/resumption.py find_begun_run 1": lambda f: resumption.find_begun_run(
        f, "no-run"
    ),
    "qwen3ft/operations/resumption.py own_settings 1": lambda f: resumption.own_settings(
        begun_run(f, "{")
    ),
    "qwen3ft/operations/resumption.py resumed_settings 1": lambda f: resumption.resumed_settings(
        begun_run(f), {"seed": "2"}
    ),
    "qwen3ft/operations/retention.py _require_continuable 1": lambda f: retention.plan_removals(
        config(runs_dir=str(f)), (), retention.RetentionPolicy(abandon=("nothing",))
    ),
    "qwen3ft/planning/fit.py kernels_of 1": fused_without_a_gpu,
    "qwen3ft/planning/gpu_specs.py require_gpu_spec 1": lambda _: gpu_specs.require_gpu_spec(
        "Voodoo"
    ),
    "qwen3ft/planning/plan.py build_plan 1": no_rows_to_plan,
    "qwen3ft/planning/refusal.py nothing_fits 1": lambda _: plan.plan_command(
        model="14b", budget=1, gpu="h200"
    ),
    "qwen3ft/recovery/adjust.py _give_up 1": out_of_attempts,
    "qwen3ft/registry/aliases.py require_version 1": no_such_version,
    "qwen3ft/registry/aliases.py nothing_before 1": lambda _: throw(
        aliases.nothing_before("a-name", "1")
    ),
    "qwen3ft/registry/aliases.py _changed 1": lambda _: throw(
        aliases._changed("a-name", "1 is not promoted", "2", "1")
    ),
    "qwen3ft/registry/bounded_calls.py BoundedCalls.within 1": slow_mlflow,
    "qwen3ft/registry/lookup.py _not_found 1": lambda _: throw(
        lookup._not_found("a-name", "champion", ["another"])
    ),
    "qwen3ft/registry/lookup.py _not_found 2": lambda f: find(f, "champion"),
    "qwen3ft/registry/lookup.py _not_found 3": lambda f: find(f, "no-such-run"),
    "qwen3ft/registry/registry.py Registry._fetch 1": nothing_in_mlflow,
    "qwen3ft/registry/registry.py _not_as_saved 1": lambda _: throw(
        registries._not_as_saved("1", "it was cut off", "")
    ),
    "qwen3ft/serving/export.py find_held_out 1": held_out_rows_gone,
    "qwen3ft/serving/export.py _require_place 1": lambda f: export._require_place(
        write(f, "x", "").parent
    ),
    "qwen3ft/serving/export.py _require_parity 1": drifted,
    "qwen3ft/serving/parity.py _read_rows 1": lambda f: parity._read_rows(
        write(f, "rows.jsonl", ""), 5
    ),
    "qwen3ft/serving/parity.py _load_merged 1": too_large_to_compare,
    "qwen3ft/serving/gguf_files.py require_gguf_packages 1": no_converter,
    "qwen3ft/serving/gguf_files.py write_model 1": unknown_tokenizer,
    "qwen3ft/serving/gguf_files.py write_lora 1": converter_that_fails,
    "qwen3ft/serving/hub_push.py push_adapter 1": push_to_no_repository,
    "qwen3ft/serving/hub_push.py _explained 1": lambda _: throw(
        hub_push._explained(ConnectionError("refused"), NAME)
    ),
    "qwen3ft/serving/hub_push.py _explained 2": lambda _: throw(
        hub_push._explained(hub_answer(hub_errors.HfHubHTTPError, 403), NAME)
    ),
    "qwen3ft/serving/hub_push.py _explained 3": lambda _: throw(
        hub_push._explained(hub_answer(hub_errors.HfHubHTTPError, 500), NAME)
    ),
    "qwen3ft/server/engines.py Engine._run 1": lambda _: ended_engine(),
    "qwen3ft/server/engines.py Engine._run 2": lambda _: ended_engine(
        side_effect=OSError(28, "No space left on device")
    ),
    "qwen3ft/server/probe.py prove 1": lambda _: served_otherwise("vllm"),
    "qwen3ft/server/probe.py prove 2": lambda _: served_otherwise("own"),
    "qwen3ft/server/probe.py read_kept_test 1": lambda f: probe.read_kept_test(
        config(runs_dir=str(f)), "a-run", 5
    ),
    "qwen3ft/server/run.py _listen 1": lambda _: server_run._listen("no such host", 1),
    "qwen3ft/serving/engines/events.py engine_failed 1": lambda _: throw(
        events.engine_failed("ConnectError: refused")
    ),
    "qwen3ft/serving/engines/own.py _hindered 1": lambda _: throw(
        own._hindered("Triton is missing")
    ),
    "qwen3ft/serving/engines/own.py _cannot_decode 1": lambda _: throw(
        own._cannot_decode("it has no room")
    ),
    "qwen3ft/serving/engines/places.py require_place 1": beside_another_base,
    "qwen3ft/serving/engines/places.py require_cache_room 1": lambda _: places.require_cache_room(
        "vLLM", 1, 9
    ),
    "qwen3ft/serving/engines/vllm.py require_vllm 1": no_vllm,
    "qwen3ft/serving/engines/vllm.py require_vllm 2": old_vllm,
    "qwen3ft/serving/engines/vllm.py VllmServer.watch 1": lambda _: vllm_that_ended(),
    "qwen3ft/serving/session.py _ended_early 1": lambda _: throw(session._ended_early()),
    "qwen3ft/settings.py find_settings 1": lambda _: settings.find_settings([], "nonsense"),
    "qwen3ft/tracking/connection.py _rejected 1": refused_by_mlflow,
    "qwen3ft/tracking/connection.py _unavailable 1": lambda _: throw(
        connections._unavailable("http://127.0.0.1:1", OSError("refused"))
    ),
    "qwen3ft/tracking/connection.py _folder_of 1": lambda f: connections._folder_of(
        "mlflow-artifacts:/../../x", f
    ),
    "qwen3ft/tracking/points.py table_json 1": lambda f: table_json(write(f, "a.jsonl", "{\n")),
    "qwen3ft/tracking/points.py table_json 2": lambda f: table_json(write(f, "a.jsonl", "")),
    "qwen3ft/tracking/sender.py Sender._end_attempt 1": end_without_a_beginning,
    "qwen3ft/tracking/sender.py Sender.step 1": stuck_tracking,
    "qwen3ft/training/checkpoint_writer.py load_adapter 1": unknown_tensors,
    "qwen3ft/training/engine.py TrainingEngine.outcome 1": trained_without_an_evaluation,
    "qwen3ft/training/engine.py TrainingEngine._checkpoint_of 1": lambda f: attempt_of(
        f
    )._checkpoint_of(3),
    "qwen3ft/training/fused/offload.py HostStash._new_slab 1": no_pinned_memory,
    "qwen3ft/training/trainer.py QATrainer._require_finite 1": endless_norm,
    "flows/api.py _read_run 1": lambda f: api._read_run(f / "no-run"),
    "flows/api.py _read_run 2": lambda f: api._read_run(begun_run(f).path),
    "flows/cli/app.py _explained 1": lambda _: throw(explained(NotADirectoryError("x"))),
    "flows/cli/champion.py _no_such_version 1": lambda _: throw(
        champion._no_such_version("a-name", "9")
    ),
    "flows/cli/data.py preview_command 1": rows_of_a_preview,
    "flows/cli/follow.py Follower._read_run 1": silent_server,
    "flows/cli/follow.py find_run 1": lambda f: follow.find_run(layout_of(f), None),
    "flows/cli/follow.py find_run 2": lambda f: follow.find_run(layout_of(f), "nonsense"),
    "flows/cli/follow.py start_run 1": refused_start,
    "flows/cli/options.py read_overrides 1": lambda _: options.read_overrides(["max_steps="]),
    "flows/cli/project.py open_project 1": lambda f: _outside(f, project.open_project),
    "flows/cli/runs.py _no_server 1": in_project(runs.follow_command),
    "flows/cli/runs.py _run_failed 1": failed_run,
    "flows/cli/runs.py _show_end 1": lost_card,
    "flows/cli/servers.py env_command 1": in_project(servers.env_command),
    "flows/finetune.py _continued_elsewhere 1": attempt_made_elsewhere,
    "flows/finetune.py run_in_process 1": interrupted,
    "flows/hosts.py _patiently 1": no_server_to_ask,
    "flows/hosts.py _find_deployment 1": no_join_deployment,
    "flows/hosts.py JoinedHosts._too_few 1": no_other_host,
    "flows/hosts.py _too_late 1": lambda f: no_other_host(f, is_first=False),
    "flows/hosts.py _refusal 1": lambda _: throw(hosts._refusal(1, Crashed())),
    "flows/join.py _require_other_host 1": lambda f: join._join(
        JobDir(f), 1, "", "", network.machine_name()
    ),
    "flows/join.py _require_code 1": lambda f: join._join(JobDir(f / "missing"), 1, "another", ""),
    "flows/join.py _require_folder 1": lambda f: join_attempt(f, attempt=2),
    "flows/join.py _require_folder 2": lambda f: join_attempt(f, is_whole=False),
    "flows/join.py _claim 1": joined_twice,
    "flows/join.py _require_private 1": lambda f: join._join(
        JobDir(f / "missing"), 1, code_digest(), ""
    ),
    "flows/join.py _require_private 2": lambda f: join_attempt(f, mode=0o750),
    "flows/join.py _require_gpus_as 1": lambda _: join._require_gpus_as(
        environment(None), "NVIDIA H200", "b"
    ),
    "flows/join.py _require_room 1": full_gpu_of_a_host,
    "flows/join.py _over 1": lambda f: join._require_in_progress(RunDir(f).attempt(1), RunDir(f)),
    "flows/resume.py refuse_second_resume 1": lambda _: resume.refuse_second_resume(
        config(), "1", 5
    ),
    "flows/run_context.py open_run 1": run_in_progress,
    "flows/run_context.py make_folders 1": lambda _: run_context.make_folders(
        config(runs_dir="/dev/null/runs")
    ),
    "flows/temporary_server.py _wait 1": dead_server,
    "tasks/promote.py register 1": upload_refused,
    "deployments/deploy.py _run_prefect_deploy 1": refused_deployment,
    "deployments/prefect_api.py send 1": lambda f: prefect_api.send(layout_of(f), "flow_runs"),
    "deployments/prefect_worker.py FixedJob.from_template_and_values 1": job_variables,
    "deployments/schedule.py check_schedule 1": lambda _: schedule.check_schedule(
        "61 * * * *", "UTC"
    ),
    "deployments/schedule.py _registered 1": no_schedule,
    "deployments/stack.py Stack._wait 1": dead_service,
}
"""Mishaps that take milliseconds, by the place where their error is made."""

_DATA, _MODEL, _MOVES = "tests/data", "tests/model", "tests/registry/test_moves.py"

ELSEWHERE: dict[str, str] = {
    "qwen3ft/data/refusal.py check_not_empty 1": f"{_DATA}/test_no_rows.py::"
    "test_a_held_out_file_without_usable_rows",
    "qwen3ft/data/refusal.py check_usable 1": f"{_DATA}/test_no_rows.py::"
    "test_an_end_without_rows_says_why_and_what_to_do",
    "qwen3ft/data/tokenizing.py tokenize_table 1": f"{_DATA}/test_data_policies.py::"
    "test_a_long_reasoning_loses_its_middle_where_asked_and_the_answer_stays",
    "qwen3ft/serving/hub_push.py push_adapter 2": "tests/serving/test_hub_push.py::"
    "test_what_was_to_be_private_is_not_put_into_a_public_repository",
    "qwen3ft/jobs/launcher.py _stalled 1": "tests/jobs/test_launcher.py::"
    "test_a_clock_that_is_set_neither_fakes_nor_hides_a_stall",
    "qwen3ft/training/ranks.py Ranks._require_alike 1": "tests/training/test_ranks.py::"
    "test_a_rank_with_another_version_of_the_code_is_refused",
    "qwen3ft/training/ranks.py _together 1": "tests/training/test_ranks.py::"
    "test_a_rank_that_ends_parts_the_others_at_once",
    "qwen3ft/worker/hosts.py OtherHosts._failure 1": "tests/worker/test_host_agents.py::"
    "test_a_silent_host_counts_as_gone_and_one_that_is_there_does_not",
    "qwen3ft/model/manager.py ModelManager.quantize 1": f"{_MODEL}/test_model.py::"
    "test_settings_that_fail_fall_back_and_mark_the_snapshot",
    "qwen3ft/model/save_adapter.py save_adapter 1": f"{_MODEL}/test_save_adapter.py::"
    "test_a_full_disk_is_found_before_writing",
    "qwen3ft/model/save_adapter.py _check_checkpoint 1": f"{_MODEL}/test_save_adapter.py::"
    "test_an_adapter_that_is_not_finite_is_refused",
    "qwen3ft/model/save_adapter.py _check_checkpoint 2": f"{_MODEL}/test_save_adapter.py::"
    "test_a_file_that_is_no_safetensors_file_is_refused",
    "qwen3ft/model/tokenizer_trial.py try_tokenizer 1": f"{_MODEL}/test_tokenizer_trial.py::"
    "test_native_code_without_end_is_ended",
    "qwen3ft/preflight/policy.py too_little_memory 1": "tests/preflight/test_preflight_policy.py::"
    "test_too_little_memory_is_reported_part_by_part",
    "qwen3ft/recovery/shared_gpu.py _too_full 1": "tests/recovery/test_shared_gpu.py::"
    "test_a_wait_for_memory_ends_at_its_limit",
    "qwen3ft/registry/aliases.py _refuse_rolled_back 1": f"{_MOVES}::"
    "test_a_night_names_what_it_tested_and_leaves_alone_what_a_person_took_back",
    "qwen3ft/registry/bounded_calls.py promotion_lock 1": f"{_MOVES}::"
    "test_a_promoter_that_hangs_is_not_waited_for_forever",
    "flows/cli/champion.py promote_command 1": f"{_MOVES}::"
    "test_a_version_is_promoted_by_hand_if_intact_and_degraded_only_if_asked_for",
}
"""The test that provokes the error of a place where that takes longer."""


def _outside(folder: Path, call: Callable[[], Any]) -> Any:
    before = Path.cwd()
    os.chdir(folder)
    try:
        return call()
    finally:
        os.chdir(before)
