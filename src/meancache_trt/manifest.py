"""What an export says about itself: plain records, written into a bundle's manifest.

A host binds tensors by their role and never by the model's family.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

import msgspec

from meancache_trt.errors import BundleError, InputError
from meancache_trt.meancache.schedule import TRANSFORMERS, check_guidance_scale
from meancache_trt.meancache.sigmas import MuRule, SecondStage
from meancache_trt.shapes import ONE, PictureSize, Range, Ranges

Role = Literal[
    "noise",  # unpacked latent at sigma 1, one sample after another
    "latent",  # what the loop integrates, float32, packed as the transformer takes it
    "model_input",  # (2 B, ...), the latent twice: what classifier-free guidance feeds the network
    "latent_grid",  # the same memory, its token axis split as the decoder takes it
    "timestep",  # (B,), what the network is fed: a grid timestep times `timestep_scale`
    "guidance_scale",  # (B,)
    "token_ids",  # (B, tokens), int64, what a component's tokenizer makes of the prompts
    "conditioning",  # from the prompt encoder, by name
    "text_mask",  # (B, text tokens), 1 for the prompt's and 0 for padding; also from the encoder
    "prepared",  # an output of the prepare graph, by name, for the transformer input of that name
    "velocity",  # dx/dsigma as the network gives it, or after guidance in the update graph
    "history",  # velocities evaluated before, youngest first
    "weights",  # (H,), one schedule row, the new velocity's weight first
    "image",  # (B, 3, H, W), or (B, 3, frames, H, W) of a video; hosts clip it to [0, 1]
]
GuidanceRule = Literal[
    "embedded",
    "classifier_free",
    "classifier_free_rescaled",
    "classifier_free_from_conditional",
    "none",
]
GridRule = Literal["linspace", "linspace_to_zero", "count"]


class TensorRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A graph's input or output: NumPy dtype name, shape (a `str` is a symbol), role.

    The symbols are `batch_symbols` and those of a `Resolution`.
    """

    dtype: str
    shape: tuple[int | str, ...]
    role: Role

    def resolved(self, sizes: Mapping[str, int], *, skip: int = 0) -> tuple[int, ...]:
        """The shape without its first `skip` axes, with the symbols replaced by their sizes."""
        return tuple(sizes[d] if isinstance(d, str) else d for d in self.shape[skip:])


class WeightFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A safetensors file that a graph's initialisers point into.

    `path` is relative to the bundle; `is_linked` where it is the checkpoint's own, by a hard
    link, or a symbolic one to another file system.
    """

    path: str
    size_bytes: int
    sha256: str
    is_linked: bool


class Tokenizer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a prompt becomes the token ids that a text graph takes.

    `path`, relative to the bundle, is a tokenizer.json that the tokenizers library executes as it
    stands: it cuts and pads to `length` ids by itself.
    """

    path: str
    length: int


class Component(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A graph file, its tensors by name, and where its weights are.

    `weight_bytes` counts all initialisers, `shared_bytes` those that lie in `weights`. A text
    encoder has a `tokenizer`, which makes its token ids.
    """

    path: str
    inputs: dict[str, TensorRecord]
    outputs: dict[str, TensorRecord]
    precision: str = "float32"
    opset: int = 20
    weights: tuple[WeightFile, ...] = ()
    weight_bytes: int = 0
    shared_bytes: int = 0
    tokenizer: Tokenizer | None = None

    def input_named(self, role: Role) -> str:
        """The name of the only input with `role`; a `KeyError` where there is not exactly one."""
        return _only(self.inputs, role)

    def output_named(self, role: Role) -> str:
        """The name of the only output with `role`; a `KeyError` where there is not exactly one."""
        return _only(self.outputs, role)


class Resolution(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A picture size, and the size of every symbol but the batch at it.

    Shapes are those of one sample: `noise_shape` (C, Hl, Wl), `latent_shape` (S, C), and
    `decode_shape` (rows, columns, C), the latent's memory as the decoder takes it; of a video that
    is not packed, all three are (C, F, Hl, Wl). `frames` is null for pictures.
    """

    height: int
    width: int
    frames: int | None
    symbols: dict[str, int]
    noise_shape: tuple[int, ...]
    latent_shape: tuple[int, ...]
    decode_shape: tuple[int, ...]

    @property
    def size(self) -> PictureSize:
        """Its pixels and frames alone, which tell the resolutions of a bundle apart."""
        return PictureSize(self.height, self.width, self.frames)

    def with_text(self, text_tokens: int) -> Resolution:
        """The same pictures, of prompts of another length: no other symbol depends on it."""
        symbols = {**self.symbols, "text_tokens": text_tokens}
        return msgspec.structs.replace(self, symbols=symbols)


class TiledAxis(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An axis along which a decoder is run on overlapping tiles, as diffusers does it.

    The axis is `latent_axis` of the latent grid and `image_axis` of the image. Along it, a latent
    of more than `longest_whole` positions is decoded in tiles of `tile` positions, each beginning
    `stride` after the one before; the last ones are as short as the latent's end makes them. A
    tile's first position decodes to `first_samples` pixels or frames and every other one to
    `samples`. Of all tiles but the first, `dropped` samples at the head are thrown away; then its
    first `blend` samples go over from the end of the tile before to the tile itself, linearly.
    """

    latent_axis: int
    image_axis: int
    longest_whole: int
    tile: int
    stride: int
    samples: int
    first_samples: int
    dropped: int
    blend: int


class Tiling(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Along which axes diffusers decodes in tiles.

    `time`, if not null, is always tiled. `space`, rows and then columns, is tiled on request,
    each tile in time by itself: all its axes where the latent is too long along any of them.
    """

    time: TiledAxis | None = None
    space: tuple[TiledAxis, ...] = ()


class Guidance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a guidance scale acts; `default_scale` is null where the model takes none.

    "embedded": the network is fed the scale. "classifier_free": it is called once on 2 B samples,
    B with the prompts and then B with the negative prompts, and the update graph extrapolates.
    "classifier_free_rescaled" then gives each token the length of the prompt's velocity.
    "classifier_free_from_conditional" counts its scale from the prompt's velocity, as Z-Image does:
    0 and not 1 leaves the negative prompt without effect.
    """

    rule: GuidanceRule
    default_scale: float | None

    @property
    def is_classifier_free(self) -> bool:
        return is_classifier_free(self.rule)

    @property
    def least_scale(self) -> int:
        """The classifier-free scale at which the negative prompt has no effect."""
        return 0 if self.rule == "classifier_free_from_conditional" else 1


def check_guidance(guidance: Guidance, scale: float | None) -> None:
    """Raise `InputError` for a scale that a model with this guidance cannot take."""
    if guidance.rule == "none" and scale is not None:
        raise InputError(f"this model takes no guidance scale, found {scale}; leave it out")
    check_guidance_scale(scale)
    if guidance.is_classifier_free and scale is not None and scale < guidance.least_scale:
        raise InputError(
            f"a classifier-free guidance scale is at least {guidance.least_scale}, which leaves "
            f"the negative prompt without effect, found {scale}"
        )


class ParityRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A graph against the unpatched module: largest absolute difference over `sizes`.

    `tolerance` is what the difference had to stay below. `blocks` are those that were compared of a
    network that did not fit in memory; else empty.
    """

    component: str
    max_abs_error: float
    tolerance: float
    sizes: tuple[dict[str, int], ...]
    runtime: str
    blocks: tuple[str, ...] = ()


class LoraRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A LoRA that was merged: its file's name and SHA-256, and its scale."""

    name: str
    sha256: str
    scale: float

    def describe(self) -> str:
        """As it was given: the file's name, and the scale where it is not 1."""
        return self.name if self.scale == 1 else f"{self.name}:{self.scale:g}"


class Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which checkpoint: folder name or hub id, hub revision, and what schedules are made for.

    `digest` is the SHA-256 over the transformer's config.json, its weight files' digests, and
    digest and scale of each of the `loras` that were merged. `name` has their names too.
    """

    name: str
    revision: str | None
    digest: str
    loras: tuple[LoraRecord, ...] = ()


class Exported(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that a host needs to know of an export.

    `components` has "transformer", "prepare", "vae_decoder" and "update/h1" to
    "update/h64", and text encoders by their diffusers names where the family has graphs of them.
    Where they were asked for there are graphs with weights in other precisions too, such as
    "transformer/bfloat16", with the same inputs and outputs. Paths are relative to the bundle.
    `timestep_scale` is applied in float64 and the product rounded to float32. `grid` says what the
    pipeline hands its scheduler: "linspace" sigmas linspace(1, 1/T, T), "linspace_to_zero"
    linspace(1, 0, T + 1) without the 0, or "count" T alone. `encoder_weights` are the text
    encoders' files under pipeline/. `frames_per_second` is what a video model was trained at.
    `tiling` is how the VAE decoder is run in tiles; null where it is always run on the whole
    latent. `resolutions` share the graphs; the first is the default. `batch` is for those who
    prepare plans: the sizes of a session that are meant, not a limit, since ONNX Runtime has none.
    `text_buckets` are the lengths to which hosts may cut conditioning and mask, ascending, the last
    of them `text_tokens`; empty where nothing is ever cut, as in families without a text mask. `mu`
    says how a dynamic shift follows from the size: on a "line" through two points of the
    scheduler's configuration, or "empirical", as FLUX.2 has it, from T too. With a `second_stage`
    there is a "transformer_2", in the precisions, with the inputs and with the outputs of
    "transformer".
    """

    family: str
    model: Model
    components: dict[str, Component]
    encoder_weights: tuple[WeightFile, ...]
    resolutions: Annotated[tuple[Resolution, ...], msgspec.Meta(min_length=1)]
    guidance: Guidance
    grid: GridRule
    timestep_scale: float
    num_train_timesteps: int
    text_tokens: int
    scheduler: dict[str, Any]
    parity: tuple[ParityRecord, ...]
    frames_per_second: float | None = None
    tiling: Tiling | None = None
    batch: Range = ONE
    text_buckets: tuple[int, ...] = ()
    mu: MuRule = "line"
    second_stage: SecondStage | None = None

    @property
    def transformers(self) -> tuple[str, ...]:
        """The networks that schedules name: "transformer" and, in a second stage, another."""
        return TRANSFORMERS[: 1 if self.second_stage is None else 2]

    @property
    def second_guidance_scale(self) -> float | None:
        """The second stage's own; None where there is none, or the first one's acts in both."""
        return None if self.second_stage is None else self.second_stage.guidance_scale

    @property
    def resolution(self) -> Resolution:
        """The default resolution."""
        return self.resolutions[0]

    @property
    def sizes(self) -> list[PictureSize]:
        """Pixels and frames of every resolution, the default first."""
        return [resolution.size for resolution in self.resolutions]

    @property
    def ranges(self) -> Ranges:
        """What a plan must cover to serve every resolution and every length of text.

        The usual length is the middle one.
        """
        lengths = self.text_lengths
        text = Range(lengths[0], lengths[len(lengths) // 2], lengths[-1])
        covering = Ranges.covering(self.sizes, text_tokens=self.text_tokens, batch=self.batch)
        return msgspec.structs.replace(covering, text_tokens=text)

    @property
    def text_lengths(self) -> tuple[int, ...]:
        """The numbers of text tokens that the network is run with, ascending, the full one last."""
        return self.text_buckets or (self.text_tokens,)

    def weight_files(self) -> list[WeightFile]:
        """Every weight file of the bundle, once each."""
        parts = [file for component in self.components.values() for file in component.weights]
        return list(dict.fromkeys([*parts, *self.encoder_weights]))

    def parts(self) -> list[str]:
        """What there are graphs of, each once whatever its precisions."""
        names = [
            name.removesuffix(f"/{component.precision}")
            for name, component in self.components.items()
        ]
        return list(dict.fromkeys(names))

    def component_in(self, part: str, precisions: Sequence[str]) -> tuple[str, Component]:
        """A part's graph, and its name, in the first of `precisions` that there is.

        Raises `BundleError` where there is none.
        """
        names = [component_name(part, precision) for precision in precisions]
        for name in names:
            if name in self.components:
                return name, self.components[name]
        raise BundleError(
            f"expected a graph of {part} in {' or '.join(precisions)}, found none; export it with "
            f"`--precision {precisions[0]}`"
        )

    def text_graphs(self) -> dict[str, Component]:
        """The text encoders by name where they make all conditioning that the transformer takes.

        Empty where they do not: prompts are then encoded by torch.
        """
        graphs = {name: part for name, part in self.components.items() if part.tokenizer}
        made = {output for part in graphs.values() for output in part.outputs}
        transformer = self.components["transformer"].inputs
        wanted = {*_named(transformer, "conditioning"), *_named(transformer, "text_mask")}
        return graphs if wanted <= made else {}

    def update_for(self, history: int) -> Component:
        """The smallest update graph that holds `history` velocities; `KeyError` where none does."""
        fitting = [
            (len(_named(part.inputs, "history")) + 1, name)
            for name, part in self.components.items()
            if PurePosixPath(name).parts[0] == "update"
        ]
        sizes = sorted(pair for pair in fitting if pair[0] >= history)
        if not sizes:
            raise KeyError(f"no update graph holds {history} velocities")
        return self.components[sizes[0][1]]


def component_name(part: str, precision: str) -> str:
    """The name of a part's graph in a precision: the part's own in float32."""
    return part if precision == "float32" else f"{part}/{precision}"


def is_classifier_free(rule: GuidanceRule) -> bool:
    """Whether a guidance rule has the network called on each sample with two prompts."""
    return rule.startswith("classifier_free")


def batch_symbols(batch: int) -> dict[str, int]:
    """The symbols that depend on the batch alone, for every graph of an export."""
    return {"batch": batch, "two_batch": 2 * batch}


def _named(tensors: dict[str, TensorRecord], role: Role) -> list[str]:
    return [name for name, record in tensors.items() if record.role == role]


def _only(tensors: dict[str, TensorRecord], role: Role) -> str:
    names = _named(tensors, role)
    if len(names) != 1:
        raise KeyError(f"expected one tensor with role {role!r}, found {names}")
    return names[0]
