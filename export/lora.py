"""LoRA files: which, how strongly, and what they are recognised by."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from meancache_trt.errors import InputError
from meancache_trt.manifest import LoraRecord
from meancache_trt.meancache.hashing import verified_sha256


@dataclass(frozen=True)
class Lora:
    """A LoRA file and its scale, by which all that it adds to weights is multiplied."""

    path: Path
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Self:
        """FILE, or FILE:SCALE. A file whose own name has a colon is taken as it stands.

        Raises `InputError` where there is no such file, or the scale is none.
        """
        path, colon, scale = text.rpartition(":")
        if Path(text).exists() or not colon:
            return cls(_file(text))
        return cls(_file(path), _scale(scale, text))

    def record(self) -> LoraRecord:
        """What a bundle says of it. Raises `InputError` where the file cannot be read."""
        try:
            return LoraRecord(self.path.name, verified_sha256(self.path), self.scale)
        except OSError as error:
            raise InputError(f"{self.path} cannot be read: {error.strerror}") from error


def _file(name: str) -> Path:
    path = Path(name)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise InputError(
            f"a LoRA is given as FILE or FILE:SCALE, with a .safetensors file; {name} is {found}"
        )
    return path


def _scale(text: str, whole: str) -> float:
    try:
        scale = float(text)
    except ValueError:
        raise InputError(
            f"a LoRA is given as FILE or FILE:SCALE, such as style.safetensors:0.8; {whole} is no "
            f"such file, and {text!r} is no scale"
        ) from None
    if not math.isfinite(scale) or scale == 0:
        raise InputError(
            f"a LoRA's scale is a finite number other than 0, found {text}; leave a LoRA out "
            "that is to have no effect"
        )
    return scale
