"""Tensors handed over by the DLPack protocol (dmlc/dlpack, `dlpack.h`), in and out.

NumPy has no bfloat16 and no device memory, so capsules are read and made here, by ctypes.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import Any

from meancache_trt.errors import RenderError

_KINDS = {"int": 0, "uint": 1, "float": 2, "bfloat": 4, "bool": 6}  # DLDataTypeCode
_DTYPES = {
    ("int", 8): "int8",
    ("int", 32): "int32",
    ("int", 64): "int64",
    ("uint", 8): "uint8",
    ("float", 16): "float16",
    ("float", 32): "float32",
    ("float", 64): "float64",
    ("bfloat", 16): "bfloat16",
    ("bool", 8): "bool",
}
_BY_CODE = {(_KINDS[kind], bits): dtype for (kind, bits), dtype in _DTYPES.items()}
_BY_NAME = {dtype: code for code, dtype in _BY_CODE.items()}
_NAME = b"dltensor"


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _DLManagedTensor(ctypes.Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_DLManagedTensor))
_DLManagedTensor._fields_ = (
    ("dl_tensor", _DLTensor),
    ("manager_ctx", ctypes.c_void_p),
    ("deleter", _Deleter),
)

_CapsuleDestructor = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def _api(name: str, result: Any, *arguments: Any) -> Any:
    """A function of Python's own C interface, called with the interpreter's lock held."""
    return ctypes.PYFUNCTYPE(result, *arguments)((name, ctypes.pythonapi))


_new_capsule = _api(
    "PyCapsule_New", ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, _CapsuleDestructor
)
_is_valid = _api("PyCapsule_IsValid", ctypes.c_int, ctypes.py_object, ctypes.c_char_p)
_pointer_in = _api("PyCapsule_GetPointer", ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
# In a capsule's destructor no reference to it can be made any more, so by address there.
_is_valid_at = _api("PyCapsule_IsValid", ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)
_pointer_at = _api("PyCapsule_GetPointer", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)

_lent: dict[int, tuple[Any, ...]] = {}
"""What each capsule that a consumer has not released points into, by its address."""


@dataclass(frozen=True)
class Described:
    """A tensor in a capsule; `owner` keeps its memory alive."""

    pointer: int
    shape: tuple[int, ...]
    dtype: str
    owner: object


def is_known(dtype: str) -> bool:
    """Whether tensors of this element type can be handed over."""
    return dtype in _BY_NAME


def described(value: Any, device: tuple[int, int], stream: int | None) -> Described:
    """The tensor that `value` gives by DLPack, ready for work on `stream`.

    Raises `RenderError` where it is on another device, not contiguous, of an unknown type, or no
    tensor at all.
    """
    try:
        found = tuple(int(part) for part in value.__dlpack_device__())
        if found != device:
            raise RenderError(
                f"expected a tensor on the DLPack device {device}, found {found}; move it there"
            )
        capsule = value.__dlpack__() if stream is None else value.__dlpack__(stream=stream)
    except (AttributeError, BufferError, RuntimeError, TypeError, ValueError) as error:
        raise RenderError(
            f"expected a tensor that can be handed over by DLPack, found {type(value).__name__}: "
            f"{error}"
        ) from error
    return _read(capsule)


def _read(capsule: Any) -> Described:
    if not _is_valid(capsule, _NAME):
        raise RenderError(f"expected a DLPack capsule, found {capsule!r}")
    managed = ctypes.cast(_pointer_in(capsule, _NAME), ctypes.POINTER(_DLManagedTensor))
    tensor = managed.contents.dl_tensor
    shape = tuple(tensor.shape[axis] for axis in range(tensor.ndim))
    dtype = _BY_CODE.get((tensor.code, tensor.bits))
    if dtype is None or tensor.lanes != 1:
        raise RenderError(
            f"expected a tensor of {', '.join(_BY_NAME)}, found DLPack type code {tensor.code} "
            f"with {tensor.bits} bits; convert it"
        )
    strides = [tensor.strides[axis] for axis in range(tensor.ndim)] if tensor.strides else None
    if strides is not None and not _is_contiguous(shape, strides):
        raise RenderError(
            f"expected contiguous memory, found strides {tuple(strides)} of shape {shape}; copy it "
            "first"
        )
    # The capsule is not consumed: it frees the memory when it goes, and so is the owner.
    return Described((tensor.data or 0) + tensor.byte_offset, shape, dtype, capsule)


def capsule_of(
    pointer: int, shape: tuple[int, ...], dtype: str, *, device: tuple[int, int], owner: object
) -> object:
    """A capsule over memory that `owner` keeps alive, until the consumer releases it.

    Raises `RenderError` for an element type that DLPack consumers do not know.
    """
    if dtype not in _BY_NAME:
        raise RenderError(f"expected one of {', '.join(_BY_NAME)}, found a tensor of {dtype}")
    code, bits = _BY_NAME[dtype]
    axes = ctypes.c_int64 * len(shape)
    sizes, strides = axes(*shape), axes(*_compact(shape))
    tensor = _DLTensor(pointer, *device, len(shape), code, bits, 1, sizes, strides, 0)
    managed = _DLManagedTensor(tensor, None, _release)
    address = ctypes.addressof(managed)
    _lent[address] = (managed, sizes, strides, owner)
    return _new_capsule(address, _NAME, _destroy)


def _released(managed: Any) -> None:
    _lent.pop(ctypes.addressof(managed.contents), None)


def _destroyed(capsule: int) -> None:
    """Release what nobody consumed; a consumer renames the capsule."""
    if _is_valid_at(capsule, _NAME):
        _lent.pop(_pointer_at(capsule, _NAME), None)


_release, _destroy = _Deleter(_released), _CapsuleDestructor(_destroyed)


def _compact(shape: tuple[int, ...]) -> list[int]:
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


def _is_contiguous(shape: tuple[int, ...], strides: list[int]) -> bool:
    if 0 in shape:
        return True
    expected = zip(shape, strides, _compact(shape), strict=True)
    return all(size == 1 or found == wanted for size, found, wanted in expected)
