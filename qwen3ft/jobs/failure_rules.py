"""The table of foreign failures: which exception types and messages become which error.

Types are matched by name, so no library is imported. Messages are matched at the start of a line
only, and never in exceptions that quote their input (ValueError and its kin), so that text in a row
is not mistaken for a failure. The real messages behind the patterns are in
`tests/jobs/test_failures.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from qwen3ft.errors import (
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
    QuantizationError,
    SaveError,
    TrackingUnavailableError,
)


@dataclass(frozen=True)
class Rule:
    """One kind of foreign failure; it applies if any of its three conditions holds."""

    kind: type[FinetuneError]
    what: str
    """Headline; the foreign type and message follow it."""
    why: str
    """Cause, as far as this kind of failure reveals it."""
    next_command: str = "qwen3ft doctor"
    types: str = ""
    """Names of exception types or their base classes; sufficient on their own."""
    lines: str = ""
    """Pattern for the start of a line, unless the exception type quotes its input."""
    typed: tuple[str, str] = ("", "")
    """Names of types, and a pattern that must occur anywhere in the message."""
    facts: dict[str, Any] = field(default_factory=dict)

    def applies(self, names: frozenset[str], message: str) -> bool:
        """Return True if an exception of the classes `names` with this message is of this kind."""
        if names & frozenset(self.types.split()):
            return True
        typed_names, pattern = self.typed
        if names & frozenset(typed_names.split()) and re.search(pattern, message):
            return True
        if not self.lines or names & _QUOTING_TYPES:
            return False
        return any(
            not line_types(line)[0] & _QUOTING_TYPES and re.match(self.lines, line_types(line)[1])
            for line in message.splitlines()
        )


# their text may come from the data
_QUOTING_TYPES = frozenset(
    {"ValueError", "TypeError", "LookupError", "KeyError", "IndexError", "AssertionError"}
    | {"AttributeError", "NameError", "SyntaxError", "JSONDecodeError", "UnicodeDecodeError"}
)

_TYPE = r"[A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Failed|Enabled|Timeout)"
_LINE = re.compile(rf"\s*(?:\[[^\]\n]*\]:?\s+)*(?:what\(\):\s*)?((?:{_TYPE}: )*)(.*)")


def line_types(line: str) -> tuple[frozenset[str], str]:
    """Split "[rank0]: a.BError: text" into the names of exception types and the text."""
    match = _LINE.match(line)
    assert match is not None  # the pattern also matches an empty line
    types, rest = match.groups()
    if re.fullmatch(_TYPE, rest):
        types, rest = f"{types}{rest}: ", ""
    return frozenset(name.rsplit(".", 1)[-1] for name in types.split(": ") if name), rest


_GPU_MEMORY = (
    r"(?:CUDA|HIP|XPU|MPS backend) out of memory\b"
    r"|(?i:(?:CUDA|HIP)(?: driver| runtime)? error(?: \(2\))?\s*: (?:out of memory|hipErrorOutOf))"
    r"|[^\n]{0,80}(?:CUDA_ERROR_OUT_OF_MEMORY|cudaErrorMemoryAllocation)\b"
    r"|[^\n]{0,80}(?:CUBLAS|CUDNN|CUSOLVER|CUSPARSE|HIPBLAS)_STATUS_(?:\w+_)?ALLOC\w*_FAILED"
    r"|Triton Error \[(?:CUDA|HIP)\]: out of memory"
    r"|Error out of memory at line \d+ in file"  # bitsandbytes, which then calls exit(1)
    r"|[^\n]{0,80}\bCuda failure (?:\d+ )?'out of memory'"  # NCCL
    r"|cudaMalloc\w* failed:? out of memory"
    # raised while torch composes its out-of-memory message and NVML does not answer
    r"|NVML_SUCCESS == r INTERNAL ASSERT FAILED at [^\n]*CUDACachingAllocator"
)
_HOST_MEMORY = (
    r"[^\n]{0,80}DefaultCPUAllocator: (?:can't allocate|not enough) memory"
    r"|Unable to allocate [\d.]+ \w+ for an array"
    r"|(?:terminate called after throwing an instance of ')?std::bad_alloc"
    r"|[^\n]{0,300}\bCannot allocate memory(?:\W|$)|\[Errno 12\]"
    r"|malloc of size \d+ failed|realloc of size \d+ failed"  # pyarrow
    r"|memory allocation of \d+ bytes failed"  # Rust: tokenizers, safetensors
    r"|OpenBLAS error: Memory allocation still failed"
    r"|DataLoader worker \(pid[^)]*\) is killed by signal: Killed"
    r"|(?:Memory cgroup o|O)ut of memory: Kill(?:ed)? process|oom-kill:constraint="  # the kernel
    r"|slurmstepd: error: Detected \d+ oom.kill event"
)
_NO_DEVICE = (
    r"CUDA (?:driver )?error: (?:no kernel image|no CUDA-capable|invalid device ordinal"
    r"|system not yet init|the provided PTX)"
    r"|Error no kernel image is available for execution on the device at line"
    r"|Found no NVIDIA driver|Torch not compiled with CUDA|CUDA driver version is insufficient"
    r"|The NVIDIA driver on your system is too old|CUDA Setup failed"
    r"|[^\n]{0,80}compiled without GPU support|No CUDA GPUs are available"
)
_DEVICE_FAULT = (
    r"(?:CUDA|HIP)(?: driver| runtime)? [Ee]rror\b|Triton Error \[|cu(?:DNN|BLAS) error\b"
    r"|[^\n]{0,80}\b(?:CUBLAS|CUDNN|CUSOLVER)_STATUS_\w+"
    r"|[^\n]{0,80}\bnccl\w*Error\b|[^\n]{0,40}NCCL (?:error|WARN Cuda failure)"
    r"|Error [\w ,-]+ at line \d+ in file [^\n]*\.(?:cpp|cu|cuh|c)\b"  # bitsandbytes
    r"|[^\n]{0,120}\.cu:\d+: [^\n]*Assertion `"
    r"|NVRM: Xid|[^\n]{0,80}GPU (?:is lost|has fallen off the bus)|[^\n]{0,80}uncorrectable ECC"
    r"|[^\n]{0,80}device-side assert|[^\n]{0,80}illegal memory access"
)
_DISK = (
    r"[^\n]{0,300}(?:No space left on device|Disk quota exceeded|Read-only file system"
    r"|File too large)|\[Errno (?:27|28|30|122)\]|[^\n]{0,300}\(os error (?:27|28|30|122)\)"
)
_4BIT = (
    r"(?i)\b4-?bit quanti[sz]|blockwise \S*\s?quanti[sz]|quanti[sz]ation (?:data )?(?:type|state)"
    r"|quant_(?:type|state|storage)\b|\bbnb_4bit|bf16/gpu|bfloat16 is (?:not|only) supported"
    r"|not implemented for '(?:Half|BFloat16)'"
)
_HTTP = "HfHubHTTPError HTTPStatusError HTTPError"
_NETWORK = (
    "ConnectionError ConnectError ConnectTimeout ReadError ReadTimeout WriteError Timeout "
    "TimeoutException TimeoutError NetworkError TransportError RemoteProtocolError ProtocolError "
    "ChunkedEncodingError IncompleteRead MaxRetryError SSLError XetDownloadError URLError"
)
_OTHER_MODEL = "qwen3ft plan --set model_name=Qwen/Qwen3-4B-Thinking-2507"

RULES = (
    Rule(
        EnvironmentNotReadyError,
        "Shared memory is full",
        "Data-loading processes share tensors through /dev/shm, which is too small.",
        "df -h /dev/shm",
        lines=r"[^\n]{0,200}out of shared memory|unable to open shared memory object",
    ),
    Rule(
        OutOfMemoryError,
        "GPU memory ran out",
        "More memory was requested than the GPU or the budget has left.",
        types="OutOfMemoryError",
        lines=_GPU_MEMORY,
        facts={"domain": "gpu"},
    ),
    Rule(
        OutOfMemoryError,
        "Host memory ran out",
        "More memory was requested than this machine or its control group has left.",
        types="MemoryError _ArrayMemoryError ArrowMemoryError",
        lines=_HOST_MEMORY,
        facts={"domain": "host"},
    ),
    Rule(
        InsufficientMemoryError,
        "The quantised model does not fit the device",
        "Some of its layers would have to stay on the CPU or the disk.",
        "qwen3ft plan",
        typed=("ValueError", r"Some modules are dispatched on the CPU or the disk"),
    ),
    Rule(
        EnvironmentNotReadyError,
        "The GPU cannot be used",
        "The driver, the device, or the GPU code of a package is missing or does not match.",
        lines=_NO_DEVICE,
    ),
    Rule(
        DeviceFaultError,
        "The GPU or its driver failed",
        "After such an error this process cannot use the GPU any more.",
        "nvidia-smi",
        types="NVMLError DistBackendError ncclSystemError ncclInternalError ncclRemoteError",
        lines=_DEVICE_FAULT,
    ),
    Rule(
        SaveError,
        "A file could not be written",
        "The disk or quota is full, a size limit is reached, or the file system is read-only.",
        "df -h",
        lines=_DISK,
    ),
    Rule(
        EnvironmentNotReadyError,
        "A file or folder cannot be accessed",
        "Its owner or mode does not permit it for this user.",
        types="PermissionError",
    ),
    Rule(
        EnvironmentNotReadyError,
        "A package is missing or broken",
        "It is not installed, or is incompatible with the others.",
        types="ImportError ModuleNotFoundError PackageNotFoundError",
    ),
    Rule(
        QuantizationError,
        "The 4-bit setting cannot be used here",
        "The model's layers, the data type or the device do not support it.",
        typed=("ValueError NotImplementedError RuntimeError TypeError AssertionError", _4BIT),
    ),
    Rule(
        DivergedError,
        "A number became non-finite",
        "The computation returned NaN or infinity.",
        typed=("FloatingPointError RuntimeError", r"(?i)returned nan values|overflow encountered"),
    ),
    Rule(
        ModelAccessError,
        "The model cannot be downloaded",
        "It is gated, and no token with access was sent.",
        "hf auth login",
        types="GatedRepoError DisabledRepoError",
        typed=(f"{_HTTP} OSError", r"(?i)gated repo|\b403 (?:Client Error|Forbidden)"),
    ),
    Rule(
        ModelNotFoundError,
        "There is no such model or revision",
        "No local folder and no accessible repository on the hub has that name.",
        _OTHER_MODEL,
        types="RepositoryNotFoundError RevisionNotFoundError RemoteEntryNotFoundError "
        "HFValidationError",
        typed=(f"{_HTTP} OSError", r"\b404 (?:Client|Not F)|is not a valid model identifier"),
    ),
    Rule(
        ModelAccessError,
        "The model cannot be downloaded",
        "The token is missing, invalid or expired.",
        "hf auth login",
        typed=(_HTTP, r"\b401 (?:Client Error|Unauthorized)"),
    ),
    Rule(
        ModelUnavailableError,
        "The model is not cached and cannot be fetched",
        "The hub cannot be reached, or offline mode is set.",
        types="OfflineModeIsEnabled LocalEntryNotFoundError IncompleteSnapshotError",
        typed=("OSError", r"We couldn't connect to|couldn't find (?:it|them) in the cached files"),
    ),
    Rule(
        TrackingUnavailableError,
        "MLflow cannot be reached",
        "Its server or database does not answer.",
        "qwen3ft status",
        typed=(
            "MlflowException RestException",
            r"(?i)API request to|max retries|database is locked|connection|INTERNAL_ERROR",
        ),
    ),
    Rule(
        DownloadError,
        "A download failed",
        "The hub asked to wait, returned a server error, or the connection broke.",
        types=_NETWORK,
        typed=(_HTTP, r"\b(?:408|425|429|5\d\d) \w"),
    ),
)
"""Tried in order; the first that applies decides."""
