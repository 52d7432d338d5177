"""Prompts to conditioning tensors, from the text encoders that a bundle carries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray

from meancache_trt.errors import BundleError, ExportError, InputError, RuntimeUnavailableError
from meancache_trt.export.checkpoint import Checkpoint, check_libraries
from meancache_trt.export.family import Family, Wrapper

TextPrecision = Literal["float32", "checkpoint"]


class PromptEncoder:
    """A family's text encoders in torch, loaded at the first use, kept until `release`.

    `directory` is a diffusers pipeline folder that has at least the family's text components.
    `precision` "checkpoint" loads each encoder in the dtype in which it is stored.
    """

    def __init__(
        self,
        family: Family,
        directory: Path,
        text_tokens: int,
        precision: TextPrecision = "float32",
    ) -> None:
        self._family = family
        self._directory = directory
        self._text_tokens = text_tokens
        self._precision = precision
        self._pipeline: Any = None

    def encode(self, prompts: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Conditioning by transformer input name, batch first; masks as they are, else float32.

        Prompts longer than the text tokens are cut, as diffusers does. Raises `InputError` for no
        prompts at all, `RuntimeUnavailableError` without torch and diffusers, and `BundleError`
        where the encoders cannot be loaded.
        """
        if not prompts:
            raise InputError("there are no prompts to encode; give at least one")
        wrapper = _wrapper(self._family)
        if self._pipeline is None:
            self._pipeline = self._load()
        return self._encoded(wrapper, prompts)

    def release(self) -> None:
        """Free the encoders; `encode` loads them again."""
        self._pipeline = None

    def _load(self) -> Any:
        import torch  # noqa: PLC0415  rendering from ready embeddings must not need it

        dtype = torch.float32 if self._precision == "float32" else {"default": "auto"}
        try:
            with _no_progress_bars():
                return self._text_pipeline(dtype)
        except (OSError, ValueError, ExportError) as error:
            raise BundleError(
                f"the prompt encoders in {self._directory} cannot be loaded: "
                f"{str(error).splitlines()[0]}; restore the folder or build the bundle again"
            ) from error

    def _text_pipeline(self, dtype: Any) -> Any:
        """The diffusers pipeline, on the CPU, without its networks.

        `dtype` is torch's, or diffusers' mapping by component, such as {"default": "auto"}.
        """
        import diffusers  # noqa: PLC0415  rendering from ready embeddings must not need it

        source = Checkpoint(self._directory)
        needed = {"scheduler", *self._family.text_components}
        check_libraries(source, needed)
        others = {part for part, kind in source.index.items() if isinstance(kind, list)} - needed
        return getattr(diffusers, source.pipeline_class).from_pretrained(
            self._directory, **dict.fromkeys(others), dtype=dtype, local_files_only=True
        )

    def _encoded(self, wrapper: Wrapper, prompts: Sequence[str]) -> dict[str, NDArray[Any]]:
        import torch  # noqa: PLC0415  rendering from ready embeddings must not need it

        with torch.inference_mode():
            tensors = wrapper.encode_prompts(self._pipeline, prompts, self._text_tokens)
        return {
            name: (tensor.float() if tensor.is_floating_point() else tensor).numpy()
            for name, tensor in tensors.items()
        }


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep diffusers' and transformers' bars off the screen while encoders load."""
    import diffusers.utils.logging  # noqa: PLC0415
    import transformers.utils.logging  # noqa: PLC0415

    libraries = (diffusers.utils.logging, transformers.utils.logging)
    shown = [library for library in libraries if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def _wrapper(family: Family) -> Wrapper:
    try:
        return family.wrapper()
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"encoding prompts needs torch, diffusers and transformers ({error}); install "
            "meancache-trt[text], or render from embeddings that were encoded before"
        ) from error
