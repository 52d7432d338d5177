"""Prompts to conditioning tensors, from the text encoders that a bundle carries."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from meancache_trt.errors import BundleError, InputError, RuntimeUnavailableError
from meancache_trt.export.family import Family, Wrapper


class PromptEncoder:
    """A family's text encoders, loaded at the first use and kept.

    `directory` is a diffusers pipeline folder that has at least the family's text components.
    """

    def __init__(self, family: Family, directory: Path, text_tokens: int) -> None:
        self._family = family
        self._directory = directory
        self._text_tokens = text_tokens
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
            self._pipeline = self._load(wrapper)
        return self._encoded(wrapper, prompts)

    def _load(self, wrapper: Wrapper) -> Any:
        try:
            return wrapper.load_text_pipeline(str(self._directory))
        except (OSError, ValueError) as error:
            raise BundleError(
                f"the prompt encoders in {self._directory} cannot be loaded: "
                f"{str(error).splitlines()[0]}; restore the folder or build the bundle again"
            ) from error

    def _encoded(self, wrapper: Wrapper, prompts: Sequence[str]) -> dict[str, NDArray[Any]]:
        import torch  # noqa: PLC0415  rendering from ready embeddings must not need it

        with torch.inference_mode():
            tensors = wrapper.encode_prompts(self._pipeline, prompts, self._text_tokens)
        return {
            name: (tensor.float() if tensor.is_floating_point() else tensor).numpy()
            for name, tensor in tensors.items()
        }


def _wrapper(family: Family) -> Wrapper:
    try:
        return family.wrapper()
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"encoding prompts needs torch, diffusers and transformers ({error}); install "
            "meancache-trt[text], or render from embeddings that were encoded before"
        ) from error
