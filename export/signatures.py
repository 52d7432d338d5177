"""Signatures of a family's three graphs, from what differs: latent shapes, conditioning, tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from meancache_trt.export.family import Signature, Signatures, Size, float32
from meancache_trt.export.packing import PACK
from meancache_trt.manifest import Role, TensorRecord

Axes = tuple[int | str, ...]
_PICTURE, _VIDEO = (3, "height", "width"), (3, "frames", "height", "width")


@dataclass(frozen=True)
class Latents:
    """One sample's shapes, with symbols: noise, the loop's latent, the decoder's, and the image."""

    noise: Axes
    latent: Axes
    grid: Axes
    image: Axes = _PICTURE


def packed(channels: int) -> Latents:
    """Pictures whose latent of so many channels is packed by 2 x 2 into tokens."""
    width = channels * PACK * PACK
    return Latents(
        noise=(channels, "latent_height", "latent_width"),
        latent=("image_tokens", width),
        grid=("latent_rows", "latent_columns", width),
    )


def unpacked(channels: int) -> Latents:
    """Pictures whose latent the loop has as it is."""
    shape = (channels, "latent_height", "latent_width")
    return Latents(shape, shape, shape)


def video(channels: int) -> Latents:
    """Videos whose latent the loop has as it is."""
    shape = (channels, "latent_frames", "latent_height", "latent_width")
    return Latents(shape, shape, shape, _VIDEO)


@dataclass(frozen=True)
class Text:
    """What prompts are encoded to, by the transformer input's name: one sample's shapes.

    `mask` names the input that tells a prompt's tokens from padding, if there is one.
    """

    features: Mapping[str, Axes]
    mask: str | None = None

    def records(self, batch: str) -> dict[str, TensorRecord]:
        """The inputs, in order, the mask last."""
        inputs = {
            name: float32("conditioning", batch, *axes) for name, axes in self.features.items()
        }
        if self.mask is not None:
            inputs[self.mask] = TensorRecord("bool", (batch, "text_tokens"), "text_mask")
        return inputs


def signatures(
    latents: Latents,
    text: Text,
    tables: Mapping[str, Axes] = MappingProxyType({}),
    *,
    is_guided: bool = False,
    is_embedded: bool = False,
    sizes_from: Sequence[str] = (),
) -> Signatures:
    """The graphs of a family.

    Args:
        latents: see there.
        text: see there.
        tables: shapes of the position tables, which the prepare graph makes.
        is_guided: whether the transformer is called on 2 B samples, which the prepare graph and the
            updates then make of B.
        is_embedded: whether it is fed the guidance scale.
        sizes_from: inputs of the transformer that the prepare graph has too.
    """
    batch = "two_batch" if is_guided else "batch"
    fed: Role = "model_input" if is_guided else "latent"
    prepared = {name: float32("prepared", *axes) for name, axes in tables.items()}
    inputs = {
        "hidden_states": float32(fed, batch, *latents.latent),
        **text.records(batch),
        "timestep": float32("timestep", batch),
        **({"guidance": float32("guidance_scale", batch)} if is_embedded else {}),
        **prepared,
    }
    made = {"latent": float32("latent", "batch", *latents.latent)}
    if is_guided:
        made["model_input"] = inputs["hidden_states"]
    image = "video" if latents.image == _VIDEO else "image"
    return Signatures(
        Signature(inputs, {"velocity": float32("velocity", batch, *latents.latent)}),
        Signature(
            {
                "noise": float32("noise", "batch", *latents.noise),
                **{name: inputs[name] for name in sizes_from},
            },
            {**made, **prepared},
        ),
        Signature(
            {"latent": float32("latent_grid", "batch", *latents.grid)},
            {image: float32("image", "batch", *latents.image)},
        ),
    )


def grid_symbols(
    size: Size, *, unit: int, patch: int = PACK, frame_stride: int | None = None
) -> dict[str, int]:
    """Every symbol of `signatures` at a size.

    A token has `unit` pixels a side, and `patch` positions of the unpacked latent; a video's latent
    has one frame for the first and one for every further `frame_stride`.
    """
    rows, columns = size.height // unit, size.width // unit
    symbols = {
        "height": size.height,
        "width": size.width,
        "latent_height": patch * rows,
        "latent_width": patch * columns,
        "latent_rows": rows,
        "latent_columns": columns,
        "image_tokens": rows * columns,
        "text_tokens": size.text_tokens,
    }
    if frame_stride is None:
        return symbols
    assert size.frames is not None  # `check_size` sees to it
    frames = (size.frames - 1) // frame_stride + 1
    symbols["image_tokens"] *= frames
    return {**symbols, "frames": size.frames, "latent_frames": frames}
