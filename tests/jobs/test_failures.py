"""Foreign exceptions, exit codes and signals become the right errors, shown on real messages."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys

import pytest
from support.failure_messages import (
    ASYNC_NOTE,
    GPU_MEMORY_ERRORS,
    HOST_MEMORY_ERRORS,
    MEMORY_LOGS,
    NOT_MEMORY_ERRORS,
    NOT_MEMORY_LOGS,
    TORCH_CAPPED,
    TORCH_NEW,
    TORCH_OLD,
    R,
    foreign,
)

from qwen3ft.errors import (
    CheckpointCorruptError,
    DeviceFaultError,
    DivergedError,
    DownloadError,
    EnvironmentNotReadyError,
    FinetuneError,
    InsufficientMemoryError,
    ModelAccessError,
    ModelNotFoundError,
    ModelUnavailableError,
    OutOfMemoryError,
    PreemptedError,
    QuantizationError,
    SaveError,
    TrackingUnavailableError,
    WorkerCrashedError,
    error_kinds,
)
from qwen3ft.jobs.failures import memory_numbers, translate, translate_exit
from qwen3ft.records.training import Failure


@pytest.mark.parametrize(
    ("domain", "error"),
    [("gpu", e) for e in GPU_MEMORY_ERRORS] + [("host", e) for e in HOST_MEMORY_ERRORS],
    ids=lambda value: str(value)[:50],
)
def test_memory_that_ran_out_is_recognised_in_every_wording(domain: str, error: Exception) -> None:
    """Each real message about a GPU's or main memory becomes OutOfMemoryError of its domain."""
    found = translate(error, "train")
    assert type(found) is OutOfMemoryError, found
    assert (found.facts["domain"], found.facts["phase"]) == (domain, "train")


@pytest.mark.parametrize("log", MEMORY_LOGS)
def test_memory_that_ran_out_is_recognised_in_the_log_of_a_native_exit(log: str) -> None:
    """Native code that prints its reason and exits is judged by what it printed."""
    assert type(translate_exit(1, log)) is OutOfMemoryError


def test_there_are_enough_real_messages_on_both_sides() -> None:
    """At least 30 messages are about memory and 30 only look like it."""
    assert len(GPU_MEMORY_ERRORS) + len(HOST_MEMORY_ERRORS) + len(MEMORY_LOGS) >= 30
    assert len(NOT_MEMORY_ERRORS) + len(NOT_MEMORY_LOGS) >= 30


@pytest.mark.parametrize("error", NOT_MEMORY_ERRORS, ids=lambda error: str(error)[:50])
def test_what_only_looks_like_memory_is_not_taken_for_it(error: BaseException) -> None:
    """Near misses and quoted data never become OutOfMemoryError."""
    assert not isinstance(translate(error, "train"), OutOfMemoryError)


@pytest.mark.parametrize("log", NOT_MEMORY_LOGS)
def test_log_lines_that_quote_memory_errors_are_not_taken_for_one(log: str) -> None:
    """A log line decides only where it begins like the message itself."""
    assert not isinstance(translate_exit(1, log), OutOfMemoryError)


def test_a_real_torch_exception_and_a_real_cpu_allocation_failure_are_recognised() -> None:
    """Torch on this machine still produces the messages."""
    import torch

    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    found = translate(caught.value, "train")
    assert found.facts["domain"] == "host"
    assert found.facts["tried_gb"] == 2**30
    assert translate(torch.OutOfMemoryError("any text"), "train").facts["domain"] == "gpu"


def test_a_real_numpy_allocation_failure_is_recognised() -> None:
    """Numpy's own MemoryError subclass is found through its base class."""
    import numpy as np

    with pytest.raises(MemoryError) as caught:
        np.empty(2**59)
    assert translate(caught.value, "data").facts["domain"] == "host"


OTHERS = [
    (R("CUDA error: device-side assert triggered" + ASYNC_NOTE), DeviceFaultError),
    (R("CUDA error: an illegal memory access was encountered"), DeviceFaultError),
    (R("NVRM: Xid (PCI:0000:01:00): 79, GPU has fallen off the bus."), DeviceFaultError),
    (foreign("NVMLError_GpuIsLost", "GPU is lost", foreign("NVMLError", "").__class__), None),
    (R("Unable to determine the device handle for GPU 0: GPU is lost"), DeviceFaultError),
    (foreign("DistBackendError", "NCCL error in: x.cpp:1, ncclSystemError", R), DeviceFaultError),
    (R("CUDA error: no kernel image is available for execution"), EnvironmentNotReadyError),
    (R("Found no NVIDIA driver on your system."), EnvironmentNotReadyError),
    (OSError(28, "No space left on device", "/x"), SaveError),
    (foreign("SafetensorError", "I/O error: No space left on device (os error 28)"), SaveError),
    (R("[enforce fail at inline_container.cc:664] . No space left on device"), SaveError),
    (PermissionError(13, "Permission denied", "/x"), EnvironmentNotReadyError),
    (ModuleNotFoundError("No module named 'bitsandbytes'"), EnvironmentNotReadyError),
    (ValueError("Blockwise 4bit quantization only supports 16/32-bit floats"), QuantizationError),
    (NotImplementedError("4-bit quantization data type x is not implemented."), QuantizationError),
    (R("\"addmm_impl_cpu_\" not implemented for 'Half'"), QuantizationError),
    (ValueError("Some modules are dispatched on the CPU or the disk."), InsufficientMemoryError),
    (FloatingPointError("overflow encountered in exp"), DivergedError),
    (foreign("GatedRepoError", "403 Client Error. Cannot access gated", OSError), ModelAccessError),
    (OSError("You are trying to access a gated repo.\nMake sure to have access"), ModelAccessError),
    (foreign("HfHubHTTPError", "401 Client Error: Unauthorized", OSError), ModelAccessError),
    (foreign("HTTPStatusError", "Client error '403 Forbidden' for url 'x'"), ModelAccessError),
    (
        foreign("RepositoryNotFoundError", "401 Client Error. Not Found", OSError),
        ModelNotFoundError,
    ),
    (OSError("x is not a local folder and is not a valid model identifier"), ModelNotFoundError),
    (foreign("HTTPStatusError", "Client error '404 Not Found' for url 'x'"), ModelNotFoundError),
    (foreign("HfHubHTTPError", "429 Client Error: Too Many Requests", OSError), DownloadError),
    (foreign("HTTPStatusError", "Server error '503 Service Unavailable' for url"), DownloadError),
    (foreign("OfflineModeIsEnabled", "Cannot reach x", ConnectionError), ModelUnavailableError),
    (foreign("LocalEntryNotFoundError", "x", FileNotFoundError), ModelUnavailableError),
    (OSError("We couldn't connect to 'https://huggingface.co' to load"), ModelUnavailableError),
    (ConnectionResetError(104, "Connection reset by peer"), DownloadError),
    (foreign("ReadTimeout", "The read operation timed out"), DownloadError),
    (foreign("ChunkedEncodingError", "Connection broken: IncompleteRead"), DownloadError),
    (foreign("MlflowException", "API request to http://x failed"), TrackingUnavailableError),
    (KeyboardInterrupt(), PreemptedError),
    (ZeroDivisionError("division by zero"), WorkerCrashedError),
    (RuntimeError("some bug"), WorkerCrashedError),
]


@pytest.mark.parametrize(("error", "kind"), OTHERS, ids=lambda value: str(value)[:40])
def test_other_foreign_exceptions_become_the_error_that_describes_them(
    error: BaseException, kind: type[FinetuneError] | None
) -> None:
    """Device, disk, package, hub and quantisation messages each have their class."""
    assert type(translate(error, "load")) is (kind or DeviceFaultError)


def test_the_cause_of_an_exception_counts_when_the_exception_itself_says_nothing() -> None:
    """A wrapped out-of-memory error is found through __cause__, __context__ and groups."""
    memory = foreign("OutOfMemoryError", TORCH_NEW, R)
    wrapped = RuntimeError("training step failed")
    wrapped.__cause__ = memory
    in_context = RuntimeError("clean-up failed")
    in_context.__context__ = memory
    for error in (wrapped, in_context, ExceptionGroup("two", [ValueError("a"), memory])):
        assert isinstance(translate(error, "train"), OutOfMemoryError)
    in_context.__suppress_context__ = True
    assert isinstance(translate(in_context, "train"), WorkerCrashedError)


def test_an_endless_chain_of_causes_ends() -> None:
    """A cycle of causes is searched once."""
    first, second = RuntimeError("a"), RuntimeError("b")
    first.__cause__, second.__cause__ = second, first
    assert isinstance(translate(first, "train"), WorkerCrashedError)


def test_our_own_errors_pass_through_and_gain_the_phase() -> None:
    """A FinetuneError stays the same object, also when something foreign wraps it."""
    own = CheckpointCorruptError("step-000200 has 3 bytes instead of 9")
    assert translate(own, "load") is own
    assert own.facts["phase"] == "load"
    wrapper = RuntimeError("resume failed")
    wrapper.__cause__ = own
    assert translate(wrapper, "train") is own
    assert own.facts["phase"] == "load"


def test_the_numbers_of_a_message_become_facts() -> None:
    """Old and new wordings of torch give the same names, in GB."""
    assert memory_numbers(TORCH_NEW) == {
        "tried_gb": 2.0,
        "free_gb": round(14.62 / 1024, 4),
        "total_gb": 23.69,
        "allocated_gb": 22.47,
    }
    assert memory_numbers(TORCH_OLD)["total_gb"] == 10.76
    assert memory_numbers(TORCH_CAPPED)["allowed_gb"] == 13.0
    assert "tried 2 GB" in translate(R(TORCH_NEW), "train").what


@pytest.mark.parametrize(
    ("returncode", "log", "oom_kills", "kind"),
    [
        (-9, "", 1, OutOfMemoryError),
        (137, "", 1, OutOfMemoryError),
        (-9, "", 0, WorkerCrashedError),
        (-9, "RuntimeError: CUDA error: out of memory", 0, OutOfMemoryError),
        (-15, "", 0, PreemptedError),
        (143, "RuntimeError: CUDA error: unknown error", 0, PreemptedError),
        (-2, "", 0, PreemptedError),
        (130, "", 0, PreemptedError),
        (-11, "", 0, WorkerCrashedError),
        (-6, "terminate called\n  what():  CUDA error: unspecified launch failure", 0, None),
        (-6, "what():  [Rank 0] x\nncclSystemError: System call failed", 0, None),
        (1, "/a/IndexKernel.cu:92: operator(): block: [0,0,0] Assertion `i < n` failed.", 0, None),
        (1, "Error an illegal memory access was encountered at line 1 in file /x/ops.cu", 0, None),
        (1, "ModuleNotFoundError: No module named 'torch'", 0, EnvironmentNotReadyError),
        (1, "OSError: [Errno 28] No space left on device", 0, SaveError),
        (-25, "", 0, SaveError),
        (0, "", 0, WorkerCrashedError),
        (255, "", 0, WorkerCrashedError),
    ],
)
def test_exit_codes_and_signals_are_explained_by_the_log_and_the_kernel(
    returncode: int, log: str, oom_kills: int, kind: type[FinetuneError] | None
) -> None:
    """Signals from outside explain an end first, then the log."""
    error = translate_exit(returncode, log, oom_kills=oom_kills, phase="train")
    assert type(error) is (kind or DeviceFaultError)
    assert error.facts["phase"] == "train"


def test_the_last_known_line_of_the_log_decides() -> None:
    """An early, survived hiccup does not hide what ended the worker."""
    log = "ConnectionError: refused\nretrying\nRuntimeError: CUDA error: out of memory\nbye"
    assert isinstance(translate_exit(1, log), OutOfMemoryError)


def test_a_real_worker_that_runs_out_of_address_space_is_classified_from_outside() -> None:
    """A process under a memory limit that dies of it is seen as out of host memory."""
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**29, 2**29)); bytearray(2**32)"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    error = translate_exit(ended.returncode, ended.stderr)
    assert isinstance(error, OutOfMemoryError)
    assert error.facts["domain"] == "host"


def test_a_failure_of_an_older_version_is_still_read() -> None:
    """Its additional field is ignored."""
    old = {"kind": "DivergedError", "what": "NaN", "facts": {}, "log_tail": "", "why": ""}
    assert Failure.model_validate(old) == Failure(kind="DivergedError", what="NaN")


def test_every_error_survives_json_and_pickle() -> None:
    """Errors, records and JSON hold the same, for every class of the tree."""
    for kind in error_kinds():
        error = kind("what", why="why", next_command="qwen3ft doctor", phase="train", loss=1.5)
        failure = Failure.from_error(error)
        again = type(failure).model_validate_json(failure.model_dump_json())
        assert again == failure
        for copy in (again.to_error(), pickle.loads(pickle.dumps(error))):
            assert type(copy) is kind
            assert copy.to_dict() == error.to_dict()


def test_facts_that_json_cannot_hold_become_text() -> None:
    """A non-finite loss or a path among the facts does not stop the failure from being written."""
    error = DivergedError("loss", loss=float("nan"), steps=(1, float("inf")), kind_of=object)
    values = Failure.from_error(error).model_dump(mode="json")
    assert json.dumps(values, allow_nan=False)
    assert values["facts"]["loss"] == "nan"
    assert values["facts"]["steps"] == [1, "inf"]


def test_every_translated_error_names_what_why_and_one_command() -> None:
    """No message leaves its reader without a next step."""
    everything = [*GPU_MEMORY_ERRORS, *HOST_MEMORY_ERRORS, *NOT_MEMORY_ERRORS]
    for error in everything + [pair[0] for pair in OTHERS]:
        found = translate(error, "train")
        assert found.what
        assert found.why
        assert found.next_command.split()[0] in {"qwen3ft", "df", "nvidia-smi", "hf", "ulimit"}


def test_credentials_in_foreign_messages_are_masked() -> None:
    """A URL with a password is not repeated."""
    error = translate(RuntimeError("no answer from https://me:hunter2@host/x"), "load")
    assert "hunter2" not in str(error) + json.dumps(error.facts)
