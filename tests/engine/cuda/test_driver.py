"""What can be said of the driver's device without a driver: the calls, their order, the errors."""

from __future__ import annotations

import gc
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from cuda.bindings import driver as real

from meancache_trt.engine.cuda import driver as module
from meancache_trt.engine.cuda.driver import DriverDevice, stream_handle
from meancache_trt.engine.probe import Gpu
from meancache_trt.errors import InputError, RenderError
from tests.fakes.driver import STATUS, FakeDriver

GPU = Gpu(1, "A GPU", "8.9", 8 << 30, 6 << 30)


@pytest.fixture
def driver() -> FakeDriver:
    return FakeDriver()


@pytest.fixture
def device(driver: FakeDriver) -> DriverDevice:
    return DriverDevice(GPU, driver)


def test_every_function_of_the_driver_that_is_called_exists() -> None:
    source = Path(module.__file__).read_text()
    names = set(re.findall(r"\.(cu[A-Z]\w+)", source))
    assert len(names) > 20
    assert not [name for name in names if not callable(getattr(real, name, None))]


def test_the_device_says_what_torch_and_dlpack_call_it(device: DriverDevice) -> None:
    assert device.name == "cuda:1"
    assert device.dlpack_device == (2, 1)
    assert (device.compute_capability, device.product) == ("8.9", "A GPU")
    assert device.free_bytes() == 3 << 20


def test_a_status_becomes_an_error_with_the_drivers_words(
    device: DriverDevice, driver: FakeDriver
) -> None:
    driver.fails["cuStreamSynchronize"] = STATUS.CUDA_ERROR_ILLEGAL_ADDRESS
    with pytest.raises(RenderError, match=r"finish its work: CUDA_ERROR_OF_A_TEST \(words of"):
        device.stream().synchronize()


def test_too_little_memory_says_how_much_there_is(device: DriverDevice, driver: FakeDriver) -> None:
    driver.fails["cuMemAlloc"] = STATUS.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(RenderError, match="expected 16 MiB of memory on the GPU, found 3 MiB free"):
        device.allocate(16 << 20)


def test_memory_is_freed_after_its_object_and_after_the_work(
    device: DriverDevice, driver: FakeDriver
) -> None:
    pointer = device.allocate(100).pointer
    gc.collect()
    assert "cuMemFree" not in driver.names  # a finalizer calls nothing
    device.collect()
    assert driver.calls[-3:] == [
        ("cuCtxSynchronize", ()),
        ("cuCtxSetCurrent", ("context",)),
        ("cuMemFree", (pointer,)),
    ]


def test_nothing_is_freed_while_a_capture_is_under_way(
    device: DriverDevice, driver: FakeDriver
) -> None:
    memory = [device.allocate(100)]

    def enqueue() -> None:
        memory.clear()
        gc.collect()
        device.collect()
        assert "cuMemFree" not in driver.names

    graph = device.stream().capture(enqueue)
    device.collect()
    assert driver.count("cuMemFree") == 1
    graph.launch()
    assert driver.names[-1] == "cuGraphLaunch"


def test_a_capture_is_ended_instantiated_and_uploaded(
    device: DriverDevice, driver: FakeDriver
) -> None:
    stream = device.stream()
    before = len(driver.names)
    stream.capture(lambda: None)
    assert driver.names[before:] == [
        "cuStreamBeginCapture",
        "cuStreamEndCapture",
        "cuGraphInstantiate",
        "cuGraphDestroy",
        "cuGraphUpload",
    ]


def test_a_capture_that_fails_is_ended_and_raises_what_failed(
    device: DriverDevice, driver: FakeDriver
) -> None:
    def enqueue() -> None:
        raise RenderError("refused")

    stream = device.stream()
    with pytest.raises(RenderError, match="refused"):
        stream.capture(enqueue)
    assert driver.names[-2:] == ["cuStreamEndCapture", "cuGraphDestroy"]
    stream.capture(lambda: None)  # and the stream can be used again


def test_a_capture_that_cuda_invalidated_is_an_error(
    device: DriverDevice, driver: FakeDriver
) -> None:
    driver.fails["cuStreamEndCapture"] = STATUS.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED
    with pytest.raises(RenderError, match="capture the calls"):
        device.stream().capture(lambda: None)
    assert "cuGraphInstantiate" not in driver.names


def test_closing_frees_memory_then_lets_go_of_the_gpu(
    device: DriverDevice, driver: FakeDriver
) -> None:
    stream, memory = device.stream(), device.allocate(100)
    stream.close()
    device.close()
    device.close()
    assert driver.names[-3:] == ["cuStreamDestroy", "cuMemFree", "cuDevicePrimaryCtxRelease"]
    for use in (lambda: memory.pointer, lambda: device.allocate(1), stream.synchronize):
        with pytest.raises(RenderError, match="closed"):
            use()


def test_lent_memory_keeps_the_gpu_until_it_is_given_back(
    device: DriverDevice, driver: FakeDriver
) -> None:
    memory = device.allocate(100)
    memory.lend()
    device.close()
    assert "cuMemFree" not in driver.names
    assert "cuDevicePrimaryCtxRelease" not in driver.names
    assert memory.pointer
    del memory
    gc.collect()
    assert driver.names[-2:] == ["cuMemFree", "cuDevicePrimaryCtxRelease"]


def test_copies_wait_and_clearing_does_not(device: DriverDevice, driver: FakeDriver) -> None:
    stream, memory = device.stream(), device.allocate(16)
    before = len(driver.names)
    array = np.zeros(4, np.float32)
    stream.fill_zeros(memory.pointer, 16)
    stream.copy_in(memory.pointer, array)
    stream.copy_out(array, memory.pointer)
    wait = "cuStreamSynchronize"
    copies = ["cuMemsetD8Async", "cuMemcpyHtoDAsync", wait, "cuMemcpyDtoHAsync", wait]
    assert driver.names[before:] == copies


def test_a_stream_waits_for_an_event_of_another(device: DriverDevice, driver: FakeDriver) -> None:
    one, other = device.stream(), device.stream()
    other.wait_for(one.record())
    assert driver.names[-3:-1] == ["cuEventRecord", "cuStreamWaitEvent"]
    one.order_before(2)
    waiting = [arguments for name, arguments in driver.calls if name == "cuStreamWaitEvent"]
    assert int(waiting[-1][0]) == 2


def test_a_hosts_stream_is_left_to_the_host(device: DriverDevice, driver: FakeDriver) -> None:
    stream = device.stream(SimpleNamespace(__cuda_stream__=lambda: (0, 0x9000)))
    assert stream.handle == 0x9000
    stream.close()
    assert "cuStreamDestroy" not in driver.names


@pytest.mark.parametrize(
    ("external", "handle"),
    [
        (0x9000, 0x9000),
        (SimpleNamespace(__cuda_stream__=lambda: (0, 77)), 77),
        (SimpleNamespace(__cuda_stream__=(0, 78)), 78),
    ],
)
def test_a_stream_is_a_number_or_says_its_number(external: object, handle: int) -> None:
    assert stream_handle(external) == handle


@pytest.mark.parametrize("external", [0, 1, 2, SimpleNamespace(__cuda_stream__=lambda: (0, 0))])
def test_a_default_stream_is_refused(external: object) -> None:
    with pytest.raises(InputError, match="expected a stream of its own, found a default stream"):
        stream_handle(external)


@pytest.mark.parametrize("external", ["stream", True, 1.5])
def test_what_is_no_stream_is_refused(external: object) -> None:
    with pytest.raises(InputError, match="a stream is a cudaStream_t as a number"):
        stream_handle(external)
