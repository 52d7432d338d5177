"""The wrapper of HunyuanVideo: modules to trace, and diffusers' own code as the oracle.

The decoder graph decodes what it is given at once. diffusers decodes a video of more than 13 frames
in overlapping pieces of 17 and blends them (`use_framewise_decoding`), and in tiles of 256 pixels
where `enable_tiling` was called. Hosts do the same with one graph, by the record that the spec's
`tiling` gives. Without tiles in space, the memory that decoding needs grows with the square of rows
x columns (attention in the middle block).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoRotaryPosEmbed
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.overrides import TorchFunctionMode

from meancache_trt.export import grid_rope_torch
from meancache_trt.export.family import Configs
from meancache_trt.export.grid_rope_torch import GridPreparation, grid_tables
from meancache_trt.export.hunyuan_video import AXIS_POSITIONS, GUIDANCE_UNITS, rope_axes
from meancache_trt.export.timesteps import fixed_timestep_frequencies

positions = grid_rope_torch.positions

POSITION_ARGUMENTS: tuple[str, ...] = ()


class _GivenRope(nn.Module):
    """Stands in for `HunyuanVideoRotaryPosEmbed`; gives the tables that it was handed."""

    tables: tuple[Tensor, Tensor]

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        return self.tables


class _BooleanFill(TorchFunctionMode):
    """Within it, `masked_fill(mask, False)` of booleans is a logical and.

    It would become a Where of booleans, which ONNX Runtime does not have.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.masked_fill and args[0].dtype == torch.bool and args[2:] == (False,):
            return args[0] & ~args[1]
        return func(*args, **(kwargs or {}))


class _Transformer(nn.Module):
    def __init__(self, network: nn.Module, rope: _GivenRope) -> None:
        super().__init__()
        self.network = network
        self._rope = rope

    def forward(
        self,
        *,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        pooled_projections: Tensor,
        rope_cos: Tensor,
        rope_sin: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        dtype = next(self.network.parameters()).dtype
        self._relate_sizes(hidden_states, rope_cos, rope_sin)
        self._rope.tables = (rope_cos.flatten(0, 2), rope_sin.flatten(0, 2))
        with _BooleanFill():
            velocity: Tensor = self.network(
                hidden_states=hidden_states.to(dtype),
                timestep=timestep,
                encoder_hidden_states=encoder_hidden_states.to(dtype),
                encoder_attention_mask=encoder_attention_mask,
                pooled_projections=pooled_projections.to(dtype),
                guidance=None if guidance is None else guidance * GUIDANCE_UNITS,
                return_dict=False,
            )[0]
        return velocity.float()

    def _relate_sizes(self, latent: Tensor, *tables: Tensor) -> None:
        """Tell the tracer that a latent's extents are so many times those of its tables.

        Otherwise every layer carries their quotients, rounded down, and tracing takes time that
        grows with the square of the layers.
        """
        network, check = cast("Any", self.network), cast("Any", torch._check)
        patch = network.config.patch_size
        for table in tables:
            for axis, extent in enumerate((1, patch, patch)):
                check(latent.shape[axis + 2] == extent * table.shape[axis])


@contextmanager
def transformer_graph(network: nn.Module) -> Iterator[nn.Module]:
    """`HunyuanVideoTransformer3DModel`, its position tables inputs, its frequencies constants."""
    embedding, given = network.rope, _GivenRope()
    network.rope = given
    try:
        with fixed_timestep_frequencies(network):
            yield _Transformer(network, given)
    finally:
        network.rope = embedding


def prepare_graph(network: nn.Module, configs: Configs) -> nn.Module:
    """Noise to the loop's latent, which is the same, and the two RoPE tables."""
    rope: Any = network.rope
    return GridPreparation(
        rope, rope_axes(configs), positions=AXIS_POSITIONS, patch=rope.patch_size
    )


def _upsample(upsampler: Any, hidden: Tensor) -> Tensor:
    """`HunyuanVideoUpsampleCausal3D`, for any number of frames without a branch.

    It repeats every frame in time but the first; here that one's repetition is cut off.
    """
    repeats = int(upsampler.upsample_factor[0])
    repeated = interpolate(hidden, scale_factor=upsampler.upsample_factor, mode="nearest")
    video: Tensor = upsampler.conv(repeated[:, :, repeats - 1 :])
    return video


def _attend(attention: Any, hidden: Tensor) -> Tensor:
    """Each position to all of its own and earlier frames, as `HunyuanVideoMidBlock3D` does.

    Its `prepare_causal_attention_mask` repeats frame numbers by a size, which exports wrongly.
    """
    batch, _, frames, height, width = hidden.shape
    frame = torch.arange(frames)[:, None].expand(-1, height * width).flatten()
    mask = torch.where(frame[:, None] >= frame, 0.0, -torch.inf).to(hidden.dtype)
    tokens = hidden.permute(0, 2, 3, 4, 1).flatten(1, 3)
    attended: Tensor = attention(tokens, attention_mask=mask.expand(batch, -1, -1))
    return attended.reshape(batch, frames, height, width, -1).permute(0, 4, 1, 2, 3)


def _middle(block: Any, hidden: Tensor) -> Tensor:
    first, *others = block.resnets
    hidden = first(hidden)
    for attention, resnet in zip(block.attentions, others, strict=True):
        hidden = resnet(hidden if attention is None else _attend(attention, hidden))
    return hidden


class _Decoder(nn.Module):
    """`AutoencoderKLHunyuanVideo.decode` in one piece, and the frames' black to 0, white to 1."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.network = vae

    def forward(self, latent: Tensor) -> Tensor:
        vae: Any = self.network
        decoder = vae.decoder
        unscaled = (latent / vae.config.scaling_factor).to(vae.dtype)
        hidden = decoder.conv_in(vae.post_quant_conv(unscaled))
        hidden = _middle(decoder.mid_block, hidden)
        for block in decoder.up_blocks:
            for resnet in block.resnets:
                hidden = resnet(hidden)
            for upsampler in block.upsamplers or ():
                hidden = _upsample(upsampler, hidden)
        video: Tensor = decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(hidden)))
        return video.float() * 0.5 + 0.5  # VaeImageProcessor.denormalize, which clips afterwards


def decoder_graph(vae: nn.Module) -> nn.Module:
    """Latent to a video in one piece, black 0 and white 1, not clipped."""
    return _Decoder(vae)


def reference_velocity(
    network: nn.Module,
    feeds: Mapping[str, Tensor],
    symbols: Mapping[str, int],  # noqa: ARG001
) -> Tensor:
    """The unpatched transformer, called as HunyuanVideoPipeline calls it."""
    inputs = {name: value for name, value in feeds.items() if not name.startswith("rope_")}
    if "guidance" in inputs:
        inputs["guidance"] = inputs["guidance"] * 1000.0
    velocity: Tensor = network(**inputs, return_dict=False)[0]
    return velocity


def reference_preparation(
    network: nn.Module,
    feeds: Mapping[str, Tensor],
    symbols: Mapping[str, int],  # noqa: ARG001
) -> dict[str, Tensor]:
    """The noise itself and what `HunyuanVideoRotaryPosEmbed` computes for it."""
    rope: Any = network.rope
    return {"latent": feeds["noise"], **grid_tables(rope, feeds["noise"], rope.patch_size)}


def reference_image(
    vae: nn.Module,
    latent: Tensor,
    symbols: Mapping[str, int],  # noqa: ARG001
) -> Tensor:
    """What HunyuanVideoPipeline does after the loop, up to the video in [0, 1]."""
    model: Any = vae
    video: Tensor = model.decode(latent / model.config.scaling_factor, return_dict=False)[0]
    return (video * 0.5 + 0.5).clamp(0, 1)


def encode_prompts(pipeline: Any, prompts: Sequence[str], text_tokens: int) -> dict[str, Tensor]:
    """Llama's features (B, text_tokens, D), their mask, bool, and CLIP's pooled feature (B, P).

    The pipeline puts prompts into its template, and cuts the template off again.
    """
    features, pooled, mask = pipeline.encode_prompt(
        list(prompts), device="cpu", max_sequence_length=text_tokens
    )
    return {
        "encoder_hidden_states": features,
        "encoder_attention_mask": mask.bool(),
        "pooled_projections": pooled,
    }


def graph_inputs(configs: Configs, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The guidance scale in the pipeline's units; diffusers hands it to every checkpoint."""
    inputs = dict(arguments)
    if not configs["transformer"]["guidance_embeds"]:
        inputs.pop("guidance", None)
    if "guidance" in inputs:
        inputs["guidance"] = inputs["guidance"].float() / GUIDANCE_UNITS
    return inputs


def position_tables(configs: Configs, extents: tuple[int, ...]) -> dict[str, Tensor]:
    """Cosines and sines, (frames, rows, columns, width)."""
    config = configs["transformer"]
    patch = config["patch_size"]
    embed = HunyuanVideoRotaryPosEmbed(
        patch, config["patch_size_t"], config["rope_axes_dim"], config["rope_theta"]
    )
    return grid_tables(embed, torch.empty(1, 1, *extents), patch)
