"""Real messages of memory that ran out, and messages that only look like it.

Collected from the sources and trackers of the libraries.
"""

from __future__ import annotations

import json


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
