"""Which NVIDIA driver and GPUs are here, asked without CUDA's runtime.

cuda.core waits for ever where the driver is missing, so it is only imported where this found a
GPU. The driver itself is asked in a process of its own, since a damaged one may hang too.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from typing import Any

import msgspec

from meancache_trt.errors import RuntimeUnavailableError

_DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_NAME_LENGTH = 256


class Gpu(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A GPU; `compute_capability` is such as "8.9"."""

    index: int
    name: str
    compute_capability: str
    total_bytes: int
    free_bytes: int


class Driver(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was found. `cuda_version` is the newest CUDA that the driver runs, such as "13.0".

    `problem` says why there are no `gpus`; it is None where there are some.
    """

    cuda_version: str | None = None
    problem: str | None = None
    gpus: tuple[Gpu, ...] = ()


def probe(*, timeout_s: float = 10.0) -> Driver:
    """Ask the driver; returns within `timeout_s`."""
    try:
        ctypes.CDLL(_DRIVER)
    except OSError:
        return Driver(problem=f"there is no NVIDIA driver ({_DRIVER} is not found)")
    command = [sys.executable, "-m", __name__]
    try:
        done = subprocess.run(command, capture_output=True, timeout=timeout_s, check=True)
        return msgspec.json.decode(done.stdout, type=Driver)
    except subprocess.TimeoutExpired:
        return Driver(problem=f"the NVIDIA driver does not answer within {timeout_s:g} s")
    except (subprocess.CalledProcessError, msgspec.DecodeError) as error:
        return Driver(problem=f"asking the NVIDIA driver failed: {error}")


def find_gpu(index: int = 0, driver: Driver | None = None) -> Gpu:
    """The GPU of that index, of what a probe found before or else of a new one.

    Raises `RuntimeUnavailableError` where there is none, saying what runs without one.
    """
    driver = probe() if driver is None else driver
    if index < len(driver.gpus):
        return driver.gpus[index]
    problem = driver.problem or f"there are {len(driver.gpus)} GPUs, found no index {index}"
    raise RuntimeUnavailableError(
        f"expected an NVIDIA GPU, but {problem}; use `--backend onnxruntime`, which runs on the "
        "CPU, or see `meancache-trt doctor`"
    )


def _asked() -> Driver:
    """Ask in this process; may hang with a damaged driver."""
    cuda = ctypes.CDLL(_DRIVER)
    status = cuda.cuInit(0)
    if status:
        return Driver(problem=f"the NVIDIA driver is there, but cuInit returned {status}")
    version, count = ctypes.c_int(), ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    cuda.cuDeviceGetCount(ctypes.byref(count))
    gpus = tuple(_gpu(cuda, index) for index in range(count.value))
    problem = None if gpus else "the NVIDIA driver is there, but sees no GPU"
    major, minor = version.value // 1000, version.value % 1000 // 10
    return Driver(f"{major}.{minor}", problem, gpus)


def _gpu(cuda: Any, index: int) -> Gpu:
    device, context = ctypes.c_int(), ctypes.c_void_p()
    name = ctypes.create_string_buffer(_NAME_LENGTH)
    total, free = ctypes.c_size_t(), ctypes.c_size_t()
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, _NAME_LENGTH, device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(total), device)
    if cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) == 0:
        cuda.cuCtxSetCurrent(context)
        cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
        cuda.cuDevicePrimaryCtxRelease_v2(device)
    numbers = []
    for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR):
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        numbers.append(str(value.value))
    return Gpu(index, name.value.decode(), ".".join(numbers), total.value, free.value)


if __name__ == "__main__":
    sys.stdout.buffer.write(msgspec.json.encode(_asked()))
