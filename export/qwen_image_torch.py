"""The wrapper of Qwen-Image: modules to trace, and diffusers' own code as the oracle."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from diffusers import QwenImagePipeline
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import (
    QwenImageCausalConv3d,
    QwenImageUpsample,
)
from diffusers.models.transformers import transformer_qwenimage
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope
from torch import Tensor, nn
from torch.nn.functional import conv2d, interpolate, pad

from meancache_trt.errors import InputError
from meancache_trt.export import module_arguments
from meancache_trt.export.family import Configs
from meancache_trt.export.packing import PACK, pack, unpack
from meancache_trt.export.patching import replaced
from meancache_trt.export.qwen_image import AXIS_POSITIONS, PIPELINE_MAX_TEXT_TOKENS, rope_axes
from meancache_trt.export.rotation import real, rotated
from meancache_trt.export.timesteps import Times, exact_times, fixed_timestep_frequencies

graph_inputs = module_arguments.graph_inputs

POSITION_ARGUMENTS: tuple[str, ...] = ("img_shapes",)

_ROPE_THETA = 10000  # QwenImageTransformer2DModel.__init__, which centres the positions too


class _GivenRope(nn.Module):
    """Stands in for `QwenEmbedRope`: the "shapes" it is called with are finished tables."""

    def forward(
        self, tables: tuple[Tensor, Tensor], max_txt_seq_len: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        del max_txt_seq_len, device
        return tables


def _rotate(value: Tensor, table: Tensor, *, use_real: bool) -> Tensor:
    """`apply_rotary_emb_qwen` in real numbers: value (B, S, heads, D), table (S, D) cos and sin."""
    assert not use_real  # what the attention processor passes; it means a complex table there
    return rotated(value, table)


def _text_length(text: Tensor, mask: Tensor) -> tuple[int, None, Tensor]:
    """`compute_text_seq_len_from_mask` without its check of the shape, which would freeze it."""
    return text.shape[1], None, mask


_FUNCTIONS = {"apply_rotary_emb_qwen": _rotate, "compute_text_seq_len_from_mask": _text_length}


class _Transformer(nn.Module):
    def __init__(self, network: nn.Module, times: Times) -> None:
        super().__init__()
        self.network = network
        self._times = times

    def forward(
        self,
        *,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor,
        timestep: Tensor,
        image_rope: Tensor,
        text_rope: Tensor,
    ) -> Tensor:
        dtype = next(self.network.parameters()).dtype
        self._times.values = (timestep,)
        velocity: Tensor = self.network(
            hidden_states=hidden_states.to(dtype),
            encoder_hidden_states=encoder_hidden_states.to(dtype),
            encoder_hidden_states_mask=encoder_hidden_states_mask,
            timestep=timestep,
            img_shapes=(image_rope, text_rope),
            return_dict=False,
        )[0]
        return velocity.float()


@contextmanager
def transformer_graph(network: nn.Module) -> Iterator[nn.Module]:
    """`QwenImageTransformer2DModel` with real position tables as inputs.

    Replaces functions of diffusers' module meanwhile, so no other Qwen-Image may run then.
    """
    functions = [(transformer_qwenimage, name, value) for name, value in _FUNCTIONS.items()]
    rope = (network, "pos_embed", _GivenRope())
    with (
        replaced(rope, *functions),
        fixed_timestep_frequencies(network),
        exact_times(network.get_submodule("time_text_embed")) as times,
    ):
        yield _Transformer(network, times)


class _Prepare(nn.Module):
    """Packs noise, and assembles RoPE from diffusers' table of positions -P to Q.

    Rows and columns are numbered from the picture's centre, the text goes on from its corner.
    """

    def __init__(self, embedding: Any, axes: Sequence[int]) -> None:
        super().__init__()
        self.axes = [width // 2 for width in axes]
        self.origin = AXIS_POSITIONS // 2
        positive = embedding.pos_freqs[: self.origin + PIPELINE_MAX_TEXT_TOKENS]
        table = torch.cat([embedding.neg_freqs[-self.origin :], positive])
        self.register_buffer("cos", table.real.contiguous(), persistent=False)
        self.register_buffer("sin", table.imag.contiguous(), persistent=False)

    def _image(self, table: Tensor, rows: int, columns: int) -> Tensor:
        frame, row, column = torch.split(table, self.axes, dim=-1)
        top, left = self.origin - (rows - rows // 2), self.origin - (columns - columns // 2)
        parts = (
            frame[self.origin, None, None].expand(rows, columns, -1),
            row[top : top + rows, None].expand(-1, columns, -1),
            column[None, left : left + columns].expand(rows, -1, -1),
        )
        return torch.cat(parts, dim=-1).flatten(0, 1)

    def forward(self, noise: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor, ...]:
        rows, columns = (extent // PACK for extent in noise.shape[3:])
        tables = (self.get_buffer("cos"), self.get_buffer("sin"))
        image = torch.cat([self._image(table, rows, columns) for table in tables], dim=-1)
        # Python's max would choose one of them while tracing.
        first = self.origin + torch.sym_max(rows // 2, columns // 2)  # type: ignore[no-untyped-call]
        last = first + encoder_hidden_states.shape[1]
        text = torch.cat([table[first:last] for table in tables], dim=-1)
        latent = pack(noise.flatten(1, 2))
        return latent, torch.cat([latent, latent]), image, text


def prepare_graph(network: nn.Module, configs: Configs) -> nn.Module:
    """Noise and text (for its length) to packed latent, the same twice, image and text RoPE."""
    return _Prepare(network.get_submodule("pos_embed"), rope_axes(configs))


def _convolve_frame(convolution: Any, video: Tensor, cache_x: None = None) -> Tensor:
    """`QwenImageCausalConv3d` of a first frame, before which there are only zeros.

    So one slice of the kernel is all that counts, and a third of the work.
    """
    assert cache_x is None
    assert video.shape[2] == 1
    frame = pad(video[:, :, 0], convolution._padding[:4])
    return conv2d(frame, convolution.weight[:, :, -1], convolution.bias)[:, :, None]


def _double(_: Any, frame: Tensor) -> Tensor:
    """`QwenImageUpsample`, whose "nearest-exact" ONNX lacks; at twice the size "nearest" is it."""
    return interpolate(frame, scale_factor=2.0, mode="nearest")


_OF_ONE_FRAME = (
    (QwenImageCausalConv3d, "forward", _convolve_frame),
    (QwenImageUpsample, "forward", _double),
)


def one_frame() -> AbstractContextManager[None]:
    """Within, an `AutoencoderKLQwenImage`'s encoder and decoder take one frame, at a third."""
    return replaced(*_OF_ONE_FRAME)


class _Decoder(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.network = vae
        for name in ("mean", "std"):
            values = torch.tensor(vae.config[f"latents_{name}"]).view(1, -1, 1, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def forward(self, latent: Tensor) -> Tensor:
        vae: Any = self.network
        # As QwenImagePipeline has it, where the second division rounds otherwise than a product.
        unscaled = unpack(latent)[:, :, None] / (1.0 / self.get_buffer("std"))
        unscaled = (unscaled + self.get_buffer("mean")).to(vae.dtype)
        # AutoencoderKLQwenImage.decode clips a whole picture, but not the tiles that it blends.
        with one_frame():
            image: Tensor = vae.decoder(vae.post_quant_conv(unscaled))[:, :, 0]
        return image.float() * 0.5 + 0.5  # VaeImageProcessor.denormalize, which clips afterwards


def decoder_graph(vae: nn.Module) -> nn.Module:
    """Packed latent with rows and columns apart to pictures, black 0 and white 1, not clipped."""
    return _Decoder(vae)


def _shapes(symbols: Mapping[str, int]) -> list[list[tuple[int, int, int]]]:
    return [[(1, symbols["latent_rows"], symbols["latent_columns"])]]


def reference_velocity(
    network: nn.Module, feeds: Mapping[str, Tensor], symbols: Mapping[str, int]
) -> Tensor:
    """The unpatched transformer, called as QwenImagePipeline calls it."""
    inputs = {name: value for name, value in feeds.items() if not name.endswith("_rope")}
    shapes = _shapes(symbols) * len(feeds["timestep"])
    velocity: Tensor = network(**inputs, img_shapes=shapes, return_dict=False)[0]
    return velocity


def reference_preparation(
    network: nn.Module, feeds: Mapping[str, Tensor], symbols: Mapping[str, int]
) -> dict[str, Tensor]:
    """What QwenImagePipeline and `QwenEmbedRope` compute, by the prepare graph's output names."""
    noise, embed = feeds["noise"], network.get_submodule("pos_embed")
    batch, _, channels, height, width = noise.shape
    latent = QwenImagePipeline._pack_latents(noise, batch, channels, height, width)
    image, text = embed(
        _shapes(symbols), max_txt_seq_len=symbols["text_tokens"], device=noise.device
    )
    return {
        "latent": latent,
        "model_input": torch.cat([latent, latent]),
        "image_rope": real(image),
        "text_rope": real(text),
    }


def reference_image(vae: nn.Module, latent: Tensor, symbols: Mapping[str, int]) -> Tensor:
    """What QwenImagePipeline does after the loop, up to the picture in [0, 1]."""
    model: Any = vae
    factor = symbols["height"] // symbols["latent_height"]
    packed = latent.flatten(1, 2)
    unpacked = QwenImagePipeline._unpack_latents(
        packed, symbols["height"], symbols["width"], factor
    )
    shape = (1, model.config.z_dim, 1, 1, 1)
    mean = torch.tensor(model.config.latents_mean).view(shape)
    inverse = 1.0 / torch.tensor(model.config.latents_std).view(shape)
    image: Tensor = model.decode(unpacked / inverse + mean, return_dict=False)[0][:, :, 0]
    return (image * 0.5 + 0.5).clamp(0, 1)


def encode_prompts(pipeline: Any, prompts: Sequence[str], text_tokens: int) -> dict[str, Tensor]:
    """Features (B, text_tokens, D), zero where padded, and mask (B, text_tokens), bool.

    Each prompt is encoded alone, so that its features do not depend on the others' lengths.
    """
    features, masks = [], []
    for prompt in prompts:
        found, _ = pipeline.encode_prompt(prompt, device="cpu", max_sequence_length=text_tokens)
        missing = text_tokens - found.shape[1]
        features.append(pad(found, (0, 0, 0, missing)))
        masks.append(torch.arange(text_tokens)[None] < found.shape[1])
    return {
        "encoder_hidden_states": torch.cat(features),
        "encoder_hidden_states_mask": torch.cat(masks),
    }


def positions(arguments: Mapping[str, Any]) -> tuple[tuple[tuple[int, ...], ...], int]:
    """(frames, rows, columns) of each picture of a sample, and text tokens.

    Raises `InputError` where samples differ in size, for which diffusers would compute the
    positions of the first.
    """
    shapes = arguments["img_shapes"]
    samples = shapes if isinstance(shapes, list) else [shapes]
    if any(sample != samples[0] for sample in samples):
        raise InputError(
            f"expected pictures of one size in img_shapes, found {samples}; call the pipeline once "
            "for each size"
        )
    pictures = samples[0] if isinstance(samples[0], list) else samples[:1]
    return tuple(map(tuple, pictures)), arguments["encoder_hidden_states"].shape[1]


@functools.cache
def _embedding(axes: tuple[int, ...]) -> Any:
    """One for all calls, because diffusers keeps its tables for as long as the process runs."""
    return QwenEmbedRope(theta=_ROPE_THETA, axes_dim=list(axes), scale_rope=True)


def position_tables(
    configs: Configs, pictures: Sequence[tuple[int, ...]], text_tokens: int
) -> dict[str, Tensor]:
    """Cosines, then sines, of any number of pictures a sample."""
    image, text = _embedding(rope_axes(configs))(
        [list(pictures)], max_txt_seq_len=text_tokens, device=torch.device("cpu")
    )
    return {"image_rope": real(image), "text_rope": real(text)}
