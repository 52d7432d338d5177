"""Ranges to shapes, for the published configurations of every family."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np
import pytest

from meancache_trt.errors import InputError
from meancache_trt.export.family import Configs, Family, Signature, Size, resolution
from meancache_trt.export.flux import FLUX
from meancache_trt.export.flux2 import FLUX2
from meancache_trt.export.hunyuan_video import HUNYUAN_VIDEO
from meancache_trt.export.profiles import ShapeRange, profile
from meancache_trt.export.qwen_image import QWEN_IMAGE
from meancache_trt.export.sd3 import SD3
from meancache_trt.export.update import update_signature
from meancache_trt.export.wan import WAN
from meancache_trt.export.z_image import Z_IMAGE
from meancache_trt.manifest import Component, batch_symbols
from meancache_trt.shapes import PictureSize, Range, Ranges, text_buckets
from meancache_trt.tiling import levels, pieces
from tests.export import test_flux2, test_hunyuan_video, test_sd3, test_wan, test_z_image

# black-forest-labs/FLUX.1-dev and Qwen/Qwen-Image, without what is unused
FLUX_DEV: Configs = {
    "transformer": {
        "guidance_embeds": True,
        "in_channels": 64,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
    },
    "vae": {
        "block_out_channels": [128, 256, 512, 512],
        "latent_channels": 16,
        "sample_size": 1024,
    },
}
QWEN: Configs = {
    "transformer": {"in_channels": 64, "joint_attention_dim": 3584},
    "vae": {"temperal_downsample": [False, True, True], "z_dim": 16},
}
HUNYUAN: Configs = test_hunyuan_video.PUBLISHED

BATCH = Range(1, 2, 4)
CASES: dict[str, tuple[Family, Configs, tuple[str, ...], int]] = {
    "flux": (FLUX, FLUX_DEV, ("1024x1024", "1024x512", "512x1280"), 512),
    "qwen_image": (QWEN_IMAGE, QWEN, ("1328x1328", "1664x928", "928x1664"), 512),
    "z_image": (Z_IMAGE, test_z_image.PUBLISHED, ("1024x1024", "1296x720"), 512),
    "hunyuan_video": (HUNYUAN_VIDEO, HUNYUAN, ("1280x720x129", "544x960x61"), 256),
    "sd3": (SD3, test_sd3.MEDIUM, ("1024x1024", "1440x768"), 256),
    "flux2": (FLUX2, test_flux2.DEV, ("1024x1024", "1360x768"), 512),
    "wan": (WAN, test_wan.A14B, ("832x480x81", "1280x720x49"), 512),
}


def graphs(family: Family, configs: Configs) -> Iterator[tuple[str, Component]]:
    """Every graph of a family as a manifest records it."""
    signatures = family.signatures(configs)
    (latent,) = (r for r in signatures.prepare.outputs.values() if r.role == "latent")
    parts: dict[str, Signature] = {
        "prepare": signatures.prepare,
        "transformer": signatures.transformer,
        "vae_decoder": signatures.vae_decoder,
        "update/h4": update_signature(family.guidance(configs).rule, latent, 4),
    }
    for name, signature in parts.items():
        yield name, Component(f"{name}.onnx", signature.inputs, signature.outputs)


def ranges(sizes: tuple[str, ...], text_tokens: int) -> Ranges:
    listed = [PictureSize.parse(size) for size in sizes]
    return Ranges.covering(listed, text_tokens=text_tokens, batch=BATCH)


def profiles(name: str) -> dict[str, dict[str, ShapeRange]]:
    family, configs, sizes, text_tokens = CASES[name]
    wanted = ranges(sizes, text_tokens)
    return {
        graph: profile(component, family, configs, wanted)
        for graph, component in graphs(family, configs)
    }


def test_flux_shapes_follow_from_height_and_width_together() -> None:
    found = profiles("flux")
    # tokens are 16 x 16 pixels: 32 x 32 of the smallest sides, 64 x 80 of the largest
    tokens = (32 * 32, 64 * 64, 64 * 80)
    assert found["transformer"] == {
        "hidden_states": ((1, tokens[0], 64), (2, tokens[1], 64), (4, tokens[2], 64)),
        "encoder_hidden_states": ((1, 512, 4096), (2, 512, 4096), (4, 512, 4096)),
        "pooled_projections": ((1, 768), (2, 768), (4, 768)),
        "timestep": ((1,), (2,), (4,)),
        "guidance": ((1,), (2,), (4,)),
        "image_rope": tuple((count, 256) for count in tokens),
        "text_rope": ((512, 256),) * 3,
    }
    noise = ((1, 16, 64, 64), (2, 16, 128, 128), (4, 16, 160, 128))
    assert found["prepare"]["noise"] == noise
    # 80 rows may be decoded in tiles of 64, the last of which may have one
    latent = ((1, 1, 32, 64), (2, 64, 64, 64), (4, 80, 64, 64))
    assert found["vae_decoder"] == {"latent": latent}
    assert found["update/h4"]["weights"] == ((4,), (4,), (4,))


def test_classifier_free_guidance_feeds_the_network_twice_the_batch() -> None:
    found = profiles("qwen_image")
    tokens = (58 * 58, 83 * 83, 104 * 104)
    expected = tuple((2 * n, count, 64) for n, count in zip((1, 2, 4), tokens, strict=True))
    assert found["transformer"]["hidden_states"] == expected
    assert found["transformer"]["timestep"] == ((2,), (4,), (8,))
    mask = ((2, 512), (4, 512), (8, 512))
    assert found["transformer"]["encoder_hidden_states_mask"] == mask
    assert found["prepare"]["noise"].opt == (2, 1, 16, 166, 166)
    assert found["update/h4"]["model_output"].max == (8, tokens[2], 64)
    assert found["update/h4"]["latent"].max == (4, tokens[2], 64)
    assert found["update/h4"]["guidance_scale"] == ((1,), (2,), (4,))


def test_tokens_that_pad_a_picture_are_in_its_table() -> None:
    found = profiles("z_image")["transformer"]
    latent = ((2, 16, 90, 128), (4, 16, 128, 128), (8, 16, 128, 162))
    assert found["hidden_states"] == latent
    # 45 x 64 and 64 x 64 tokens need no padding, 64 x 81 neither; 45 x 81 would
    tokens = (45 * 64, 64 * 64, 64 * 81)
    expected = tuple((2 * n, count, 128) for n, count in zip((1, 2, 4), tokens, strict=True))
    assert found["image_rope"] == expected


def test_video_shapes_follow_from_frames_too() -> None:
    found = profiles("hunyuan_video")
    # 61 and 129 frames are 16 and 33 latent ones, of 8 x 8 pixels
    latent = ((1, 16, 16, 90, 68), (2, 16, 33, 90, 160), (4, 16, 33, 120, 160))
    assert found["transformer"]["hidden_states"] == latent
    # decoded in tiles of 5 latent frames, the last of 1; in space tiled on request
    tile = ((1, 16, 1, 1, 1), (2, 16, 5, 90, 160), (4, 16, 5, 120, 160))
    assert found["vae_decoder"] == {"latent": tile}
    rope = ((16, 45, 34, 128), (33, 45, 80, 128), (33, 60, 80, 128))
    assert found["transformer"]["rope_cos"] == rope
    assert found["transformer"]["encoder_attention_mask"] == ((1, 256), (2, 256), (4, 256))


@pytest.mark.parametrize("name", CASES)
def test_every_resolution_and_batch_lies_within_its_profile(name: str) -> None:
    family, configs, sizes, text_tokens = CASES[name]
    found = profiles(name)
    listed = [PictureSize.parse(size) for size in sizes]
    for index, size in enumerate(listed):
        record = resolution(
            family, configs, Size(size.height, size.width, text_tokens, size.frames)
        )
        for batch in BATCH.ends:
            symbols = {**record.symbols, **batch_symbols(batch)}
            for graph, component in graphs(family, configs):
                if graph == "vae_decoder":  # fed tiles: below
                    continue
                for tensor, fed in component.inputs.items():
                    smallest, usual, largest = map(np.array, found[graph][tensor])
                    shape = np.array(fed.resolved(symbols))
                    assert (smallest <= shape).all(), (graph, tensor)
                    assert (shape <= largest).all(), (graph, tensor)
                    if (index, batch) == (0, BATCH.opt):  # the default is what is usual
                        assert (shape == usual).all(), (graph, tensor)


@pytest.mark.parametrize("is_space_tiled", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_every_tile_of_every_resolution_lies_within_the_decoders_profile(
    name: str, is_space_tiled: bool
) -> None:
    family, configs, sizes, text_tokens = CASES[name]
    smallest, _, largest = profiles(name)["vae_decoder"]["latent"]
    assert family.tiling is not None
    axes = [
        axis
        for level in levels(family.tiling(configs), is_space_tiled=is_space_tiled)
        for axis in level
    ]
    for listed in map(PictureSize.parse, sizes):
        size = Size(listed.height, listed.width, text_tokens, listed.frames)
        shape = (1, *resolution(family, configs, size).decode_shape)
        for axis in axes:
            extent = shape[axis.latent_axis]
            parts = pieces(axis, extent) if extent > axis.longest_whole else []
            lengths = [part.latent.stop - part.latent.start for part in parts] or [extent]
            assert smallest[axis.latent_axis] <= min(lengths)
            assert max(lengths) <= largest[axis.latent_axis]


def test_unpacked_latents_and_all_text_tokens_have_shapes_of_their_own() -> None:
    found = profiles("sd3")
    latent = ((2, 16, 96, 128), (4, 16, 128, 128), (8, 16, 128, 180))
    assert found["transformer"] == {
        "hidden_states": latent,
        # 77 of CLIP before the 256 of T5
        "encoder_hidden_states": ((2, 333, 4096), (4, 333, 4096), (8, 333, 4096)),
        "pooled_projections": ((2, 2048), (4, 2048), (8, 2048)),
        "timestep": ((2,), (4,), (8,)),
    }
    assert found["prepare"] == {"noise": tuple((n // 2, *shape) for n, *shape in latent)}
    assert found["update/h4"]["model_output"] == latent


# SD3 has no text mask, so that nobody shortens its text.
@pytest.mark.parametrize("name", sorted(CASES.keys() - {"sd3"}))
def test_text_tokens_are_a_symbol_that_no_other_depends_on(name: str) -> None:
    family, configs, sizes, text_tokens = CASES[name]
    size = PictureSize.parse(sizes[0])
    for length in text_buckets(text_tokens):
        record, at_length = (
            resolution(family, configs, Size(size.height, size.width, tokens, size.frames))
            for tokens in (text_tokens, length)
        )
        assert record.with_text(length) == at_length


@pytest.mark.parametrize("name", CASES)
def test_every_text_length_lies_within_the_profile(name: str) -> None:
    family, configs, sizes, text_tokens = CASES[name]
    buckets = text_buckets(text_tokens)
    over = Range(buckets[0], buckets[1], buckets[-1])
    wanted = msgspec.structs.replace(ranges(sizes, text_tokens), text_tokens=over)
    size = PictureSize.parse(sizes[0])
    record = resolution(family, configs, Size(size.height, size.width, text_tokens, size.frames))
    for _, component in graphs(family, configs):
        found = profile(component, family, configs, wanted)
        for length in buckets:
            symbols = {**record.with_text(length).symbols, **batch_symbols(BATCH.opt)}
            for tensor, fed in component.inputs.items():
                if fed.role == "latent_grid":  # fed tiles: above
                    continue
                smallest, _, largest = map(np.array, found[tensor])
                shape = np.array(fed.resolved(symbols))
                assert (smallest <= shape).all(), tensor
                assert (shape <= largest).all(), tensor


def test_an_end_that_the_family_cannot_take_is_refused() -> None:
    _, component = next(graphs(FLUX, FLUX_DEV))
    side, one = Range.parse("1024"), Range.parse("1")
    odd = Ranges(height=Range(512, 1024, 1030), width=side, text_tokens=one)
    with pytest.raises(InputError, match=r"height is 1030; .* use 1024 or 1040"):
        profile(component, FLUX, FLUX_DEV, odd)
    film = Ranges(height=side, width=side, frames=one, text_tokens=one)
    with pytest.raises(InputError, match="makes pictures"):
        profile(component, FLUX, FLUX_DEV, film)
