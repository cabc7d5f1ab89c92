"""Foreign exceptions, exit codes and signals become the right errors, shown on real messages."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import warnings

import pytest

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
from qwen3ft.failures import memory_numbers, to_error, to_failure, translate, translate_exit


def foreign(type_name: str, message: str, base: type[Exception] = Exception) -> Exception:
    """An exception of a library that need not be installed: the type's name and the text."""
    kind: type[Exception] = type(type_name, (base,), {})
    return kind(message)


TORCH_NEW = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.69 GiB of "
    "which 14.62 MiB is free. Process 12345 has 23.66 GiB memory in use. Of the allocated memory "
    "22.47 GiB is allocated by PyTorch, and 511.00 MiB is reserved by PyTorch but unallocated."
)
TORCH_OLD = (
    "CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; 10.76 GiB total capacity; 9.58 GiB "
    "already allocated; 18.44 MiB free; 9.64 GiB reserved in total by PyTorch) If reserved memory "
    "is >> allocated memory try setting max_split_size_mb to avoid fragmentation."
)
TORCH_CAPPED = (
    "CUDA out of memory. Tried to allocate 594.00 MiB. GPU 0 has a total capacity of 139.81 GiB of "
    "which 126.52 GiB is free. 13.00 GiB allowed; Of the allocated memory 12.10 GiB is allocated "
    "by PyTorch, and 310.10 MiB is reserved by PyTorch but unallocated."
)
ASYNC_NOTE = (
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the "
    "stacktrace below might be incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1"
)
R = RuntimeError
GPU_MEMORY_ERRORS = [
    foreign("OutOfMemoryError", TORCH_NEW, R),
    foreign("OutOfMemoryError", TORCH_CAPPED, R),
    foreign("OutOfMemoryError", "Allocation on device 0 would exceed allowed memory.", R),
    R(TORCH_OLD),
    R("CUDA error: out of memory" + ASYNC_NOTE),
    foreign("AcceleratorError", "CUDA error: out of memory" + ASYNC_NOTE, R),
    R("CUDA driver error: out of memory"),
    R("cuda runtime error (2) : out of memory at /pytorch/aten/src/THC/THCGeneral.cpp:50"),
    R("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    R("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasLtMatmul( ltHandle, ...)`"),
    R("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    R("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    R("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    R("Triton Error [CUDA]: out of memory"),
    R("Triton Error [HIP]: out of memory"),
    R("HIP out of memory. Tried to allocate 1.12 GiB. GPU 0 has a total capacity of 15.98 GiB"),
    R("HIP error: out of memory\nHIP kernel errors might be asynchronously reported"),
    R("XPU out of memory. Tried to allocate 512.00 MiB. GPU 0 has a total capacity of 15.11 GiB."),
    R(
        "MPS backend out of memory (MPS allocated: 17.91 GB, other allocations: 1.02 MB, max "
        "allowed: 18.13 GB). Tried to allocate 256.00 MB on private pool."
    ),
    R(
        'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "../c10/cuda/CUDACachingAllocator.cpp":1090, '
        "please report a bug to PyTorch."
    ),
    foreign(
        "DistBackendError",
        "NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.hpp:268, unhandled cuda error "
        "(run with NCCL_DEBUG=INFO for details), NCCL version 2.20.5\nncclUnhandledCudaError: Call "
        "to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'",
        R,
    ),
    foreign("BackendCompilerFailed", f"backend='inductor' raised:\nRuntimeError: {TORCH_OLD}", R),
    foreign("InductorError", f"OutOfMemoryError: {TORCH_NEW}", R),
    R(
        "Caught OutOfMemoryError in replica 0 on device 0.\nOriginal Traceback (most recent call "
        f"last):\n  File 'x.py', line 1, in f\ntorch.cuda.OutOfMemoryError: {TORCH_NEW}"
    ),
    foreign("CUDARuntimeError", "cudaErrorMemoryAllocation: out of memory", R),
    foreign("CudaAPIError", "[2] Call to cuMemAlloc results in CUDA_ERROR_OUT_OF_MEMORY"),
]
HOST_MEMORY_ERRORS = [
    R(
        "[enforce fail at alloc_cpu.cpp:73] . DefaultCPUAllocator: can't allocate memory: you "
        "tried to allocate 4294967296 bytes. Error code 12 (Cannot allocate memory)"
    ),
    R(
        "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 33554432000 bytes. Error code 12 (Cannot allocate memory)"
    ),
    R(
        "[enforce fail at CPUAllocator.cpp:64] . DefaultCPUAllocator: can't allocate memory: you "
        "tried to allocate 9437184000 bytes."
    ),
    R(
        "[enforce fail at C:\\b\\alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: "
        "you tried to allocate 1073741824 bytes."
    ),
    MemoryError(),
    foreign(
        "_ArrayMemoryError",
        "Unable to allocate 7.45 GiB for an array with shape (1000000, 1000) and data type float64",
        MemoryError,
    ),
    foreign("ArrowMemoryError", "malloc of size 8589934592 failed", MemoryError),
    OSError(12, "Cannot allocate memory"),
    R("std::bad_alloc"),
    R(
        "unable to mmap 4965799096 bytes from file </models/model-00001-of-00002.safetensors>: "
        "Cannot allocate memory (12)"
    ),
    foreign("SafetensorError", "Error while opening: Cannot allocate memory (os error 12)"),
    R(
        "DataLoader worker (pid 4411) is killed by signal: Killed. "
        "Details are lost due to multiprocessing."
    ),
    ImportError("libcublasLt.so.12: failed to map segment: Cannot allocate memory"),
]
MEMORY_LOGS = [
    "Error out of memory at line 559 in file /src/csrc/pythonInterface.cpp",
    "loading\nError out of memory at line 386 in file /mmfs1/home/dettmers/git/csrc/ops.cu\n",
    "Traceback (most recent call last):\n  File 'x.py', line 3\nMemoryError",
    f"[rank0]: torch.OutOfMemoryError: {TORCH_NEW}\n",
    f"terminate called after throwing an instance of 'c10::Error'\n  what():  {TORCH_NEW}",
    "terminate called after throwing an instance of 'std::bad_alloc'\n  what():  std::bad_alloc",
    "memory allocation of 34359738368 bytes failed",
    "OpenBLAS error: Memory allocation still failed after 10 retries, giving up.",
    "[ 8123.456789] Out of memory: Killed process 4242 (python) total-vm:31234567kB",
    "[98.1] Memory cgroup out of memory: Killed process 77 (python) total-vm:9000kB, anon-rss:1kB",
    "slurmstepd: error: Detected 1 oom_kill event in StepId=123.batch.",
    "numpy.core._exceptions._ArrayMemoryError: Unable to allocate 1.0 GiB for an array",
]
NOT_MEMORY_ERRORS: list[BaseException] = [
    OSError(28, "No space left on device"),
    OSError(122, "Disk quota exceeded"),
    OSError(30, "Read-only file system"),
    OSError(24, "Too many open files"),
    BlockingIOError(11, "Resource temporarily unavailable"),
    ValueError("row 17: 'CUDA out of memory. Tried to allocate 2.00 GiB' has no answer"),
    ValueError("CUDA out of memory. Tried to allocate 2.00 GiB\nis the question of row 17"),
    R("bad row 3: {'question': 'What does CUDA out of memory mean?'}"),
    KeyError("out of memory"),
    json.JSONDecodeError("CUDA out of memory", "{", 0),
    IndexError("index out of range in self"),
    R("CUDA error: device-side assert triggered" + ASYNC_NOTE),
    R("CUDA error: an illegal memory access was encountered" + ASYNC_NOTE),
    R("CUDA error: misaligned address" + ASYNC_NOTE),
    R("CUDA error: unspecified launch failure" + ASYNC_NOTE),
    R("CUDA error: uncorrectable ECC error encountered" + ASYNC_NOTE),
    R("CUDA error: invalid argument" + ASYNC_NOTE),
    R("CUDA error: no kernel image is available for execution on the device" + ASYNC_NOTE),
    R("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx( handle, opa)`"),
    R("CUDA error: CUBLAS_STATUS_INTERNAL_ERROR when calling `cublasSgemm( handle)`"),
    R("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    R("Triton Error [CUDA]: an illegal memory access was encountered"),
    foreign(
        "OutOfResources",
        "out of resource: shared memory, Required: 131072, Hardware limit: 101376. Reducing block "
        "sizes or `num_stages` may help.",
    ),
    R("memory leak detected: RSS grew by 12 MiB per step"),
    R(
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that "
        "dataloader's workers are out of shared memory. Please try to raise your limit."
    ),
    R("unable to open shared memory object </torch_1_2> in read-write mode: No space left (28)"),
    R("DataLoader worker (pid(s) 4411) exited unexpectedly"),
    R("Expected all tensors to be on the same device, but found at least two devices, cuda:0, cpu"),
    R("mat1 and mat2 shapes cannot be multiplied (4x2560 and 4096x2560)"),
    R("The size of tensor a (256) must match the size of tensor b (128) at dimension 1"),
    R("No CUDA GPUs are available"),
    R("Torch not compiled with CUDA enabled"),
    R("Function 'MulBackward0' returned nan values in its 0th output."),
    R("view size is not compatible with input tensor's size and stride, out of bounds memory"),
    OverflowError("cannot fit 'int' into an index-sized integer"),
    RecursionError("maximum recursion depth exceeded"),
    foreign("HfHubHTTPError", "507 Server Error: Insufficient Storage for url: https://x", OSError),
    foreign("TimeoutError", "memory dump timed out"),
]
NOT_MEMORY_LOGS = [
    "12:00:01 INFO    data: row 'CUDA out of memory. Tried to allocate 2 GiB' was left out",
    '{"question": "CUDA out of memory. What now?"}',
    "Error invalid argument at line 393 in file /src/csrc/pythonInterface.cpp",
    "ValueError: CUDA out of memory in row 5",
    "Q: std::bad_alloc, why?",
]


@pytest.mark.parametrize("error", GPU_MEMORY_ERRORS, ids=lambda error: str(error)[:50])
def test_gpu_memory_that_ran_out_is_recognised_in_every_wording(error: Exception) -> None:
    """Each real message of a GPU library becomes OutOfMemoryError of the domain gpu."""
    found = translate(error, "train")
    assert type(found) is OutOfMemoryError, found
    assert found.facts["domain"] == "gpu"
    assert found.facts["phase"] == "train"


@pytest.mark.parametrize("error", HOST_MEMORY_ERRORS, ids=lambda error: str(error)[:50])
def test_host_memory_that_ran_out_is_recognised_in_every_wording(error: Exception) -> None:
    """Each real message about main memory becomes OutOfMemoryError of the domain host."""
    found = translate(error, "load")
    assert type(found) is OutOfMemoryError, found
    assert found.facts["domain"] == "host"


@pytest.mark.parametrize("log", MEMORY_LOGS)
def test_memory_that_ran_out_is_recognised_in_the_log_of_a_native_exit(log: str) -> None:
    """Native code that prints its reason and exits is judged by what it printed."""
    assert type(translate_exit(1, log)) is OutOfMemoryError


def test_there_are_enough_real_messages_on_both_sides() -> None:
    """At least 30 messages that are memory and 30 that only look like it."""
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
    """The texts are not only remembered: this machine's torch produces them now."""
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
    (
        NotImplementedError("4-bit quantization data type nf5 is not implemented."),
        QuantizationError,
    ),
    (R("\"addmm_impl_cpu_\" not implemented for 'Half'"), QuantizationError),
    (ValueError("Some modules are dispatched on the CPU or the disk."), InsufficientMemoryError),
    (FloatingPointError("overflow encountered in exp"), DivergedError),
    (
        foreign("GatedRepoError", "403 Client Error. Cannot access gated repo for url x", OSError),
        ModelAccessError,
    ),
    (OSError("You are trying to access a gated repo.\nMake sure to have access"), ModelAccessError),
    (foreign("HfHubHTTPError", "401 Client Error: Unauthorized", OSError), ModelAccessError),
    (foreign("HTTPStatusError", "Client error '403 Forbidden' for url 'x'"), ModelAccessError),
    (
        foreign("RepositoryNotFoundError", "401 Client Error. Repository Not Found", OSError),
        ModelNotFoundError,
    ),
    (
        OSError("Qwen/Qwen9 is not a local folder and is not a valid model identifier listed on"),
        ModelNotFoundError,
    ),
    (foreign("HTTPStatusError", "Client error '404 Not Found' for url 'x'"), ModelNotFoundError),
    (foreign("HfHubHTTPError", "429 Client Error: Too Many Requests", OSError), DownloadError),
    (foreign("HTTPStatusError", "Server error '503 Service Unavailable' for url"), DownloadError),
    (foreign("OfflineModeIsEnabled", "Cannot reach x", ConnectionError), ModelUnavailableError),
    (foreign("LocalEntryNotFoundError", "x", FileNotFoundError), ModelUnavailableError),
    (OSError("We couldn't connect to 'https://huggingface.co' to load"), ModelUnavailableError),
    (ConnectionResetError(104, "Connection reset by peer"), DownloadError),
    (foreign("ReadTimeout", "The read operation timed out"), DownloadError),
    (foreign("ChunkedEncodingError", "Connection broken: IncompleteRead"), DownloadError),
    (
        foreign("MlflowException", "API request to http://127.0.0.1:5000 failed: refused"),
        TrackingUnavailableError,
    ),
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
    """What a worker without a failure ended of: signals from outside first, then its log."""
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


def test_every_error_survives_json_and_pickle_with_the_end_of_the_log() -> None:
    """Errors, records and JSON hold the same, for every class of the tree."""
    for kind in error_kinds():
        error = kind("what", why="why", next_command="qwen3ft doctor", phase="train", loss=1.5)
        failure = to_failure(error, log_tail="the end")
        again = type(failure).model_validate_json(failure.model_dump_json())
        assert again == failure
        for copy in (to_error(again), pickle.loads(pickle.dumps(error))):
            assert type(copy) is kind
            assert copy.to_dict() == error.to_dict()


def test_facts_that_json_cannot_hold_become_text() -> None:
    """A non-finite loss or a path among the facts does not stop the failure from being written."""
    error = DivergedError("loss", loss=float("nan"), steps=(1, float("inf")), kind_of=object)
    values = to_failure(error).model_dump(mode="json")
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


def test_importing_this_module_needs_no_torch() -> None:
    """The flow's process may translate without loading what it translates from."""
    code = "import sys, qwen3ft.failures; assert 'torch' not in sys.modules"
    with warnings.catch_warnings():
        subprocess.run([sys.executable, "-c", code], check=True)
