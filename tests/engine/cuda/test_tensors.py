from __future__ import annotations

import gc
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from meancache_trt.engine.cuda import dlpack
from meancache_trt.engine.cuda.device import ALIGNMENT_BYTES
from meancache_trt.engine.cuda.runtime import DeviceRuntime
from meancache_trt.errors import InputError, RenderError
from tests.fakes.cuda import FakeDevice

DTYPES = ["float32", "float16", "bfloat16", "int64", "int32", "uint8", "int8", "bool", "float64"]


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice()


@pytest.fixture
def runtime(device: FakeDevice) -> Iterator[DeviceRuntime]:
    with DeviceRuntime(device) as opened:
        yield opened
    assert not device.violations


def ramp(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def test_new_tensors_are_zero_and_aligned(runtime: DeviceRuntime) -> None:
    tensor = runtime.zeros((3, 5), "float32")
    assert tensor.pointer % ALIGNMENT_BYTES == 0
    assert (tensor.shape, tensor.dtype) == ((3, 5), "float32")
    assert np.array_equal(tensor.read(), np.zeros((3, 5), np.float32))


def test_what_is_written_is_read(runtime: DeviceRuntime) -> None:
    tensor = runtime.tensor(ramp(2, 3))
    assert np.array_equal(tensor.read(), ramp(2, 3))
    tensor.write(ramp(2, 3) + 1)
    assert np.array_equal(tensor.read(), ramp(2, 3) + 1)


def test_a_tensor_of_a_strided_array_has_its_values(runtime: DeviceRuntime) -> None:
    assert np.array_equal(runtime.tensor(ramp(2, 3).T).read(), ramp(2, 3).T)


def test_scalars_and_empty_tensors(runtime: DeviceRuntime) -> None:
    assert runtime.tensor(np.float32(3).reshape(())).read() == 3
    assert runtime.zeros((0, 4), "float32").read().shape == (0, 4)


def test_a_view_is_the_same_memory(runtime: DeviceRuntime) -> None:
    tensor = runtime.tensor(ramp(2, 6))
    view = tensor.view((3, 4))
    view.write(ramp(3, 4) * 2)
    assert view.pointer == tensor.pointer
    assert np.array_equal(tensor.read(), ramp(2, 6) * 2)
    with pytest.raises(RenderError, match=r"as many elements as in \(2, 6\), found \(5,\)"):
        tensor.view((5,))


@pytest.mark.parametrize("wrong", [ramp(3, 2), ramp(2, 3).astype(np.float64)])
def test_writing_another_shape_or_type_is_refused(
    runtime: DeviceRuntime, wrong: np.ndarray
) -> None:
    with pytest.raises(RenderError, match=r"expected float32 of shape \(2, 3\), found"):
        runtime.zeros((2, 3), "float32").write(wrong)


def test_a_view_keeps_the_memory_alive(runtime: DeviceRuntime, device: FakeDevice) -> None:
    view = runtime.tensor(ramp(4)).view((2, 2))
    gc.collect()
    device.collect()
    assert np.array_equal(view.read(), ramp(2, 2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_takes_a_tensor_without_a_copy(runtime: DeviceRuntime, dtype: str) -> None:
    tensor = runtime.zeros((2, 3), dtype)
    taken = torch.from_dlpack(tensor)
    assert taken.data_ptr() == tensor.pointer
    assert taken.dtype == getattr(torch, dtype)
    assert taken.shape == (2, 3)
    taken.fill_(1)
    expected = np.ones((2, 3), np.float32)
    read = tensor.read()
    if dtype == "bfloat16":
        assert np.array_equal(read, np.full((2, 3), 0x3F80, np.uint16))  # the bits of 1
    else:
        assert np.array_equal(read.astype(np.float32), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tensor_of_torch_is_taken_without_a_copy(
    runtime: DeviceRuntime, device: FakeDevice, dtype: str
) -> None:
    given = torch.ones(2, 3, dtype=getattr(torch, dtype))
    device.adopt(np.from_dlpack(given.view(torch.uint8)))
    tensor = runtime.from_dlpack(given)
    assert (tensor.pointer, tensor.shape, tensor.dtype) == (given.data_ptr(), (2, 3), dtype)
    assert torch.equal(torch.from_dlpack(tensor), given)


def test_a_part_of_a_tensor_of_torch_begins_where_it_begins(
    runtime: DeviceRuntime, device: FakeDevice
) -> None:
    given = torch.arange(12.0).reshape(4, 3)
    device.adopt(given.numpy())
    assert np.array_equal(runtime.from_dlpack(given[2:]).read(), given[2:].numpy())


def test_what_was_taken_lives_as_long_as_the_tensor(
    runtime: DeviceRuntime, device: FakeDevice
) -> None:
    given = torch.full((1000,), 7.0)
    device.adopt(given.numpy())
    tensor = runtime.from_dlpack(given)
    del given
    gc.collect()
    others = [torch.zeros(1000) for _ in range(100)]  # would take the memory, were it free
    assert (tensor.read() == 7).all()
    assert len(others) == 100


def test_what_torch_holds_outlives_the_runtime(device: FakeDevice) -> None:
    with DeviceRuntime(device) as runtime:
        tensor = runtime.tensor(ramp(8))
        taken = torch.from_dlpack(tensor)
    del tensor
    gc.collect()
    device.collect()
    assert np.array_equal(taken.numpy(), ramp(8))


def test_memory_is_free_once_torch_lets_go_of_it(
    runtime: DeviceRuntime, device: FakeDevice
) -> None:
    lent = len(dlpack._lent)
    taken = torch.from_dlpack(runtime.zeros((8,), "float32"))
    pointer = taken.data_ptr()
    assert len(dlpack._lent) == lent + 1
    del taken
    gc.collect()
    device.collect()
    assert len(dlpack._lent) == lent
    assert not any(block.is_alive and block.pointer == pointer for block in device.blocks)


def test_a_capsule_that_nobody_took_is_given_back(runtime: DeviceRuntime) -> None:
    lent = len(dlpack._lent)
    capsule = runtime.zeros((8,), "float32").__dlpack__()
    assert len(dlpack._lent) == lent + 1
    del capsule
    assert len(dlpack._lent) == lent


def test_a_consumer_waits_for_our_work(runtime: DeviceRuntime, device: FakeDevice) -> None:
    tensor = runtime.zeros((8,), "float32")  # enqueued, not done
    tensor.__dlpack__(stream=0x700)
    tensor.__dlpack__()
    tensor.__dlpack__(stream=-1)
    assert device.ordered_before == [0x700, 1]


def test_a_copy_or_another_device_is_refused_as_the_protocol_says(runtime: DeviceRuntime) -> None:
    tensor = runtime.zeros((8,), "float32")
    for arguments in ({"copy": True}, {"dl_device": (2, 7)}):
        with pytest.raises(BufferError, match="without a copy"):
            tensor.__dlpack__(**arguments)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(4, 6).T, "expected contiguous memory, found strides"),
        (torch.ones(2, dtype=torch.complex64), "found DLPack type code 5 with 64 bits"),
        (torch.ones(2, device="meta"), "by DLPack, found Tensor"),
        ([1.0, 2.0], "by DLPack, found list"),
    ],
)
def test_what_cannot_be_taken_is_refused(
    runtime: DeviceRuntime, value: object, message: str
) -> None:
    with pytest.raises(RenderError, match=message):
        runtime.from_dlpack(value)


def test_a_tensor_on_another_device_is_refused() -> None:
    with (
        DeviceRuntime(FakeDevice(dlpack_device=(2, 0))) as runtime,
        pytest.raises(RenderError, match=r"DLPack device \(2, 0\), found \(1, 0\); move it"),
    ):
        runtime.from_dlpack(torch.ones(2))


def test_a_producer_is_told_our_stream() -> None:
    told = []

    class Producer:
        def __dlpack_device__(self) -> tuple[int, int]:
            return (2, 0)

        def __dlpack__(self, *, stream: int) -> object:
            told.append(stream)
            raise BufferError("enough")

    with DeviceRuntime(FakeDevice(dlpack_device=(2, 0))) as runtime:
        with pytest.raises(RenderError, match="enough"):
            runtime.from_dlpack(Producer())
        assert told == [runtime.stream.handle]


def test_a_hosts_pointer_is_a_tensor(runtime: DeviceRuntime, device: FakeDevice) -> None:
    array = ramp(2, 3)
    tensor = runtime.from_pointer(device.adopt(array), (3, 2), "float32", owner=array)
    assert np.array_equal(tensor.read(), ramp(3, 2))
    with pytest.raises(InputError, match="expected the address of device memory, found 0"):
        runtime.from_pointer(0, (1,), "float32")


def test_a_closed_runtime_refuses_everything(device: FakeDevice) -> None:
    with DeviceRuntime(device) as runtime:
        tensor = runtime.zeros((2,), "float32")
    runtime.close()
    for use in (
        tensor.read,
        lambda: tensor.write(np.zeros(2, np.float32)),
        tensor.__dlpack__,
        lambda: runtime.zeros((2,), "float32"),
        lambda: runtime.from_dlpack(torch.ones(2)),
        runtime.synchronize,
        runtime.__enter__,
    ):
        with pytest.raises(RenderError):
            use()


def test_a_hosts_stream_is_used_and_left_open(device: FakeDevice) -> None:
    external = device.adopt_stream()
    with DeviceRuntime(device, external.handle) as runtime:
        runtime.zeros((4,), "float32")
        assert runtime.stream.handle == external.handle
        assert external.pending
    assert external.handle in device.streams
