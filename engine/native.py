"""The C++ host from Python: the same bundle through the C functions of `meancache_trt.h`.

    with NativeBundle("flux.mcb") as bundle, bundle.session("b10") as session:
        session.set_conditioning(conditioning.tensors)
        latents = session.run(noise)
        pictures = session.decode()

Nothing is loaded before the first `NativeBundle`. A wheel that was built with the host carries the
library; any other is named by its path.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping, Sequence
from ctypes import byref, c_char_p, c_size_t, c_void_p
from functools import partial
from importlib import resources
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from meancache_trt.engine import native_abi as abi
from meancache_trt.errors import (
    BundleError,
    InputError,
    MeanCacheError,
    PlanError,
    PlanMismatchError,
    RenderError,
    RuntimeUnavailableError,
    ScheduleError,
)

_LIBRARY = "libmeancache_trt.so"
_ERRORS: dict[int, type[MeanCacheError]] = {
    1: ScheduleError,
    2: BundleError,
    3: RuntimeUnavailableError,
    4: PlanError,
    5: PlanMismatchError,
    6: RenderError,
    7: InputError,
}

OnEvaluation = Callable[[int, int], None]
"""(evaluations done, B), called after each evaluation; an exception raised in it cancels."""


class NativeLibrary:
    """The shared library; `path` None means the one that the package carries.

    Raises `RuntimeUnavailableError` where it is not there, cannot be loaded, or is of another
    version.
    """

    def __init__(self, path: Path | str | None = None) -> None:
        found = Path(str(resources.files("meancache_trt"))) / _LIBRARY if path is None else path
        try:
            self._functions = ctypes.CDLL(str(found))
        except OSError as error:
            raise RuntimeUnavailableError(
                f"the C++ host cannot be loaded ({error}); name its library, or install a wheel "
                "that was built with it: pip wheel . -C wheel.cmake=true"
            ) from error
        for name in ("mct_version", "mct_backends", "mct_last_error"):
            getattr(self._functions, name).restype = c_char_p
        for name in ("mct_bundle_destroy", "mct_session_destroy"):
            getattr(self._functions, name).restype = None
            getattr(self._functions, name).argtypes = [c_void_p]
        if self.version != abi.VERSION:
            raise RuntimeUnavailableError(
                f"expected the C++ host {abi.VERSION}, found {self.version} at {found}; build it "
                "again"
            )

    @property
    def version(self) -> str:
        return self._text("mct_version")

    @property
    def backends(self) -> list[str]:
        """Those that it was compiled with, in the order in which they are tried."""
        names = self._text("mct_backends")
        return names.split(",") if names else []

    def call(self, name: str, *arguments: Any) -> int:
        """Call a function and raise what it reports; returns 0, or that it was cancelled."""
        status = int(getattr(self._functions, name)(*arguments))
        if status in (0, abi.CANCELLED):
            return status
        raise _ERRORS.get(status, MeanCacheError)(self._text("mct_last_error"))

    def destroy(self, name: str, handle: c_void_p) -> None:
        """Free a handle, which becomes null."""
        getattr(self._functions, name)(handle)
        handle.value = None

    def _text(self, name: str) -> str:
        return str(getattr(self._functions, name)().decode(errors="replace"))


class _Handle:
    """Something of the library that is freed once; a context manager."""

    _destroy: ClassVar[str]

    def __init__(self, library: NativeLibrary) -> None:
        self.library = library
        self._handle = c_void_p()

    def close(self) -> None:
        """Free it; nothing happens the second time."""
        self.library.destroy(self._destroy, self._handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _get(self, name: str, value: Any, *index: int) -> Any:
        indices = [c_size_t(number) for number in index]
        self.library.call(name, self._handle, *indices, byref(value))
        return value


class NativeBundle(_Handle):
    """A bundle, opened and checked by the C++ host. Raises what `Bundle.open` does."""

    _destroy = "mct_bundle_destroy"

    def __init__(
        self,
        directory: Path | str,
        *,
        library: NativeLibrary | None = None,
        is_full_check: bool = False,
    ) -> None:
        super().__init__(library or NativeLibrary())
        options = abi.BundleOptions(path=os.fsencode(directory), is_full_check=is_full_check)
        self.library.call("mct_bundle_open", byref(options), byref(self._handle))

    @property
    def info(self) -> dict[str, Any]:
        """What the C structure `mct_bundle_info` says."""
        return abi.values_of(self._get("mct_bundle_get_info", abi.BundleInfo()))

    def resolutions(self) -> list[dict[str, Any]]:
        """Every `mct_resolution`, the default first."""
        get = partial(self._get, "mct_bundle_get_resolution")
        return [
            abi.values_of(get(abi.Resolution(), k)) for k in range(self.info["resolution_count"])
        ]

    def schedules(self) -> list[dict[str, Any]]:
        """Every `mct_schedule`, those with most evaluations first."""
        get = partial(self._get, "mct_bundle_get_schedule")
        return [abi.values_of(get(abi.Schedule(), k)) for k in range(self.info["schedule_count"])]

    def conditioning(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors of conditioning for one prompt."""
        get = partial(self._get, "mct_bundle_get_conditioning")
        tensors = [get(abi.Tensor(), index) for index in range(self.info["conditioning_count"])]
        return {tensor.name.decode(): abi.shape_of(tensor) for tensor in tensors}

    def text_encoders(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the token ids of one prompt, by text encoder."""
        get = partial(self._get, "mct_bundle_get_text_encoder")
        tensors = [get(abi.Tensor(), index) for index in range(self.info["text_encoder_count"])]
        return {tensor.name.decode(): abi.shape_of(tensor) for tensor in tensors}

    def session(
        self,
        schedule: str | None = None,
        *,
        backend: str | None = None,
        height: int = 0,
        width: int = 0,
        frames: int = 0,
        batch: int = 1,
        text_tokens: int = 0,
        guidance_scale: float | None = None,
        threads: int = 0,
        concurrency: int = 1,
    ) -> NativeSession:
        """A session; arguments as in `mct_session_options`, 0 and None for the defaults."""
        options = abi.SessionOptions(
            schedule=_bytes(schedule),
            backend=_bytes(backend),
            height=height,
            width=width,
            frames=frames,
            batch=batch,
            text_tokens=text_tokens,
            has_guidance_scale=guidance_scale is not None,
            guidance_scale=guidance_scale or 0.0,
            threads=threads,
            concurrency=concurrency,
        )
        return NativeSession(self.library, self._handle, options, self.resolutions())


class NativeSession(_Handle):
    """One schedule at one size and batch. Not thread-safe; made by `NativeBundle.session`."""

    _destroy = "mct_session_destroy"

    def __init__(
        self,
        library: NativeLibrary,
        bundle: c_void_p,
        options: abi.SessionOptions,
        resolutions: Sequence[Mapping[str, Any]],
    ) -> None:
        super().__init__(library)
        library.call("mct_session_create", bundle, byref(options), byref(self._handle))
        self.info: dict[str, Any] = abi.values_of(
            self._get("mct_session_get_info", abi.SessionInfo())
        )
        size = [self.info[name] for name in ("height", "width", "frames")]
        (resolution,) = [
            entry
            for entry in resolutions
            if [entry[name] for name in ("height", "width", "frames")] == size
        ]
        batch = self.info["batch"]
        self.noise_shape: tuple[int, ...] = (batch, *resolution["noise_shape"])
        self.latent_shape: tuple[int, ...] = (batch, *resolution["latent_shape"])
        self.image_shape: tuple[int, ...] = (batch, *resolution["image_shape"])
        get = partial(self._get, "mct_session_get_conditioning")
        self._conditioning: dict[str, str] = {
            tensor.name.decode(): abi.DTYPES[tensor.dtype]
            for tensor in (get(abi.Tensor(), k) for k in range(self.info["conditioning_count"]))
        }

    def set_conditioning(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Set tensors by name, batch first; those that are not named stay."""
        for name, tensor in tensors.items():
            dtype = self._conditioning.get(name, tensor.dtype)
            values = np.ascontiguousarray(tensor, dtype)
            data, size = values.ctypes.data_as(c_void_p), c_size_t(values.nbytes)
            self.library.call(
                "mct_session_set_conditioning", self._handle, name.encode(), data, size, 0
            )

    def set_token_ids(self, encoder: str, ids: NDArray[np.int64]) -> None:
        """Encode token ids, (batch, tokens), with one of the bundle's text encoders."""
        values = np.ascontiguousarray(ids, np.int64)
        data, count = values.ctypes.data_as(c_void_p), c_size_t(values.size)
        self.library.call("mct_session_set_token_ids", self._handle, encoder.encode(), data, count)

    def run(
        self,
        noise: NDArray[np.float32] | None = None,
        on_evaluation: OnEvaluation | None = None,
        *,
        seeds: Sequence[int] | None = None,
    ) -> NDArray[np.float32]:
        """The final latent, from noise (batch, *noise_shape) or from seeds, one a sample."""
        raised: list[BaseException] = []
        options = abi.RunOptions(on_evaluation=_callback(on_evaluation, raised))
        if noise is not None:
            values = np.ascontiguousarray(noise, np.float32)
            options.noise, options.noise_count = values.ctypes.data, values.size
        if seeds is not None:
            numbers = np.asarray(seeds, np.uint64)
            options.seeds, options.seed_count = numbers.ctypes.data, numbers.size
        self.library.call("mct_session_run", self._handle, byref(options))
        if raised:
            raise raised[0]
        latent = np.empty(self.latent_shape, np.float32)
        data, count = latent.ctypes.data_as(c_void_p), c_size_t(latent.size)
        self.library.call("mct_session_read_latent", self._handle, data, count, 0)
        return latent

    def decode(
        self, latent: NDArray[np.float32] | None = None, *, vae_tiling: bool = False
    ) -> NDArray[np.float32]:
        """Pictures in [0, 1], (batch, H, W, 3), of the last run's latent or a given one."""
        pixels = np.empty(self.image_shape, np.float32)
        options = abi.DecodeOptions(pixels=pixels.ctypes.data, pixels_count=pixels.size)
        self._decode(options, latent, vae_tiling=vae_tiling)
        return pixels

    def decode_rgb(
        self, latent: NDArray[np.float32] | None = None, *, vae_tiling: bool = False
    ) -> NDArray[np.uint8]:
        """As `decode`, 8 bits a channel."""
        rgb = np.empty(self.image_shape, np.uint8)
        options = abi.DecodeOptions(rgb=rgb.ctypes.data, rgb_count=rgb.size)
        self._decode(options, latent, vae_tiling=vae_tiling)
        return rgb

    def _decode(
        self, options: abi.DecodeOptions, latent: NDArray[np.float32] | None, *, vae_tiling: bool
    ) -> None:
        options.vae_tiling = vae_tiling
        if latent is not None:
            values = np.ascontiguousarray(latent, np.float32)
            options.latent, options.latent_count = values.ctypes.data, values.size
        self.library.call("mct_session_decode", self._handle, byref(options))


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else os.fsencode(text)


def _callback(on_evaluation: OnEvaluation | None, raised: list[BaseException]) -> Any:
    if on_evaluation is None:
        return abi.Callback()

    def called(_user: int | None, done: int, budget: int) -> int:
        try:
            on_evaluation(done, budget)
        except BaseException as error:  # it is raised again when the C function has returned
            raised.append(error)
            return 1
        return 0

    return abi.Callback(called)
