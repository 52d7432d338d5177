"""The structures of `meancache_trt.h`, field by field, for `native`."""

from __future__ import annotations

import ctypes
from ctypes import Structure, c_char_p, c_double, c_int, c_int64, c_size_t, c_void_p
from typing import Any, ClassVar

VERSION = "0.1.0"
"""Of the header whose structures these are."""

MAX_RANK = 8
CANCELLED = 8

DTYPES = {1: "float32", 2: "float16", 4: "float64", 5: "int32", 6: "int64", 7: "bool"}
"""NumPy's names of `mct_dtype`; it has none for bfloat16."""

Callback = ctypes.CFUNCTYPE(c_int, c_void_p, c_int64, c_int64)


class Sized(Structure):
    """A structure that begins with its own size."""

    _fields_: ClassVar[list[Any]]

    def __init__(self, **values: Any) -> None:
        super().__init__(struct_size=ctypes.sizeof(type(self)), **values)


class BundleOptions(Sized):
    """What is opened."""

    _fields_: ClassVar = [
        ("struct_size", c_size_t),
        ("path", c_char_p),
        ("is_full_check", c_int),
    ]


class BundleInfo(Sized):
    """What a bundle is."""

    _fields_: ClassVar = [
        ("struct_size", c_size_t),
        ("bundle_id", c_char_p),
        ("family", c_char_p),
        ("model_name", c_char_p),
        ("model_digest", c_char_p),
        ("guidance", c_int),
        ("has_default_guidance_scale", c_int),
        ("default_guidance_scale", c_double),
        ("resolution_count", c_size_t),
        ("schedule_count", c_size_t),
        ("conditioning_count", c_size_t),
        ("text_encoder_count", c_size_t),
        ("text_tokens", c_int64),
        ("frames_per_second", c_double),
        ("has_space_tiling", c_int),
    ]


class Resolution(Sized):
    """A size, with shapes of one sample."""

    _fields_: ClassVar = [
        ("struct_size", c_size_t),
        ("height", c_int64),
        ("width", c_int64),
        ("frames", c_int64),
        ("noise_rank", c_size_t),
        ("noise_shape", c_int64 * MAX_RANK),
        ("latent_rank", c_size_t),
        ("latent_shape", c_int64 * MAX_RANK),
        ("image_rank", c_size_t),
        ("image_shape", c_int64 * MAX_RANK),
    ]


class Schedule(Sized):
    """A schedule in a bundle."""

    _fields_: ClassVar = [
        ("struct_size", c_size_t),
        ("name", c_char_p),
        ("method", c_char_p),
        ("precision", c_char_p),
        ("budget", c_int64),
        ("steps", c_int64),
        ("history", c_int64),
        ("is_calibrated", c_int),
        ("has_guidance_scale", c_int),
        ("guidance_scale", c_double),
        ("has_guidance_range", c_int),
        ("guidance_low", c_double),
        ("guidance_high", c_double),
    ]


class Tensor(Sized):
    """Name, type and shape."""

    _fields_: ClassVar = [
        ("struct_size", c_size_t),
        ("name", c_char_p),
        ("dtype", c_int),
        ("rank", c_size_t),
        ("shape", c_int64 * MAX_RANK),
        ("size_bytes", c_size_t),
    ]


class SessionOptions(Sized):
    """What a session is for."""

    _fields_: ClassVar = [
        ("struct_size", c_size_t),
        ("schedule", c_char_p),
        ("backend", c_char_p),
        ("height", c_int64),
        ("width", c_int64),
        ("frames", c_int64),
        ("batch", c_int64),
        ("text_tokens", c_int64),
        ("has_guidance_scale", c_int),
        ("guidance_scale", c_double),
        ("threads", c_int),
        ("device", c_int),
        ("concurrency", c_int),
    ]


class SessionInfo(Sized):
    """What a session became."""

    _fields_: ClassVar = [
        ("struct_size", c_size_t),
        ("backend", c_char_p),
        ("backend_version", c_char_p),
        ("schedule", c_char_p),
        ("precision", c_char_p),
        ("budget", c_int64),
        ("batch", c_int64),
        ("height", c_int64),
        ("width", c_int64),
        ("frames", c_int64),
        ("has_guidance_scale", c_int),
        ("guidance_scale", c_double),
        ("conditioning_count", c_size_t),
        ("noise_count", c_size_t),
        ("latent_count", c_size_t),
        ("image_count", c_size_t),
        ("tensor_bytes", c_size_t),
    ]


class RunOptions(Sized):
    """Where a run begins."""

    _fields_: ClassVar = [
        ("struct_size", c_size_t),
        ("seeds", c_void_p),
        ("seed_count", c_size_t),
        ("noise", c_void_p),
        ("noise_count", c_size_t),
        ("noise_memory", c_int),
        ("on_evaluation", Callback),
        ("user_data", c_void_p),
        ("stream", c_void_p),
    ]


class DecodeOptions(Sized):
    """What is decoded, and where to."""

    _fields_: ClassVar = [
        ("struct_size", c_size_t),
        ("latent", c_void_p),
        ("latent_count", c_size_t),
        ("latent_memory", c_int),
        ("pixels", c_void_p),
        ("pixels_count", c_size_t),
        ("rgb", c_void_p),
        ("rgb_count", c_size_t),
        ("vae_tiling", c_int),
    ]


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """The shape of a tensor, cut to its rank."""
    return tuple(tensor.shape[: tensor.rank])


def values_of(structure: Structure) -> dict[str, Any]:
    """The fields as Python values: texts, numbers, and shapes cut to their rank."""
    values: dict[str, Any] = {}
    for name, *_ in structure._fields_[1:]:
        value = getattr(structure, name)
        if isinstance(value, bytes):
            value = value.decode()
        elif isinstance(value, ctypes.Array):
            value = tuple(value[: values[name.replace("shape", "rank")]])
        values[name] = value
    return values
