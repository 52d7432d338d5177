"""Tiles and their blending, against diffusers' own loops around a decoder that is cheap.

It repeats each latent position, which tiles cannot change, and adds what stands in the tile's
corners, which differs from tile to tile: so where tiles lie and how they are blended both count.
"""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLHunyuanVideo, AutoencoderKLQwenImage
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from meancache_trt.errors import InputError
from meancache_trt.export.tiles import causal_time_axis, space_axes
from meancache_trt.manifest import TiledAxis, Tiling
from meancache_trt.tiling import Array, Level, decode_tiled, is_divided, levels, pieces
from tests.export.tiny_flux import tiny_vae as tiny_flux_vae
from tests.export.tiny_hunyuan_video import tiny_vae as tiny_hunyuan_vae
from tests.export.tiny_qwen_image import tiny_vae as tiny_qwen_vae

FRAMES, PIXELS = 4, 2
"""Samples of a latent position; the tiny autoencoders are told so."""


def repeated(latent: Array) -> Array:
    """(B, C, F, H, W) to (B, C, 1 + FRAMES (F - 1), PIXELS H, PIXELS W), without neighbours."""
    image = latent.repeat(PIXELS, axis=-1).repeat(PIXELS, axis=-2)
    return image.repeat(FRAMES, axis=2)[:, :, FRAMES - 1 :] if latent.ndim == 5 else image


def cheap(latent: Array) -> Array:
    corners = latent[:, :, :1, :1, :1] + latent[:, :, -1:, -1:, -1:]
    return np.asarray(repeated(latent) + corners, np.float32)


class Cheap(nn.Module):
    """`cheap` for diffusers, which decodes four axes where there is no time."""

    def forward(self, latent: torch.Tensor, **_: object) -> torch.Tensor:
        if latent.dim() == 4:
            return self.forward(latent[:, :, None])[:, :, 0]
        return torch.from_numpy(cheap(latent.numpy()))


@cache
def hunyuan() -> AutoencoderKLHunyuanVideo:
    vae = tiny_hunyuan_vae()
    vae.decoder, vae.post_quant_conv = Cheap(), nn.Identity()
    vae.spatial_compression_ratio = PIXELS
    return vae


@cache
def qwen() -> AutoencoderKLQwenImage:
    vae = tiny_qwen_vae()
    vae.decoder, vae.post_quant_conv = Cheap(), nn.Identity()
    vae.spatial_compression_ratio = PIXELS
    return vae


@cache
def flux() -> AutoencoderKL:
    vae = tiny_flux_vae()
    vae.decoder = Cheap()
    return vae


def random_latent(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).standard_normal((1, 2, *shape)).astype(np.float32)


def tiles(unit: int) -> st.SearchStrategy[tuple[int, int]]:
    """Extents and strides of tiles in samples, also where more than two of them overlap."""
    pairs = st.tuples(st.integers(1, 6), st.integers(1, 6))
    return pairs.map(lambda pair: (unit * max(pair), unit * min(pair)))


def time_axis(tile: tuple[int, int]) -> TiledAxis:
    return causal_time_axis(*tile, unit=FRAMES, latent_axis=2, image_axis=2)


def space(tile: tuple[int, int]) -> Level:
    return space_axes(*tile, unit=PIXELS, latent_axis=3, image_axis=3)


@given(st.integers(1, 40), tiles(FRAMES), tiles(PIXELS))
def test_pieces_cover_every_sample_exactly_once(
    positions: int, frames: tuple[int, int], pixels: tuple[int, int]
) -> None:
    for axis, samples in (
        (time_axis(frames), 1 + FRAMES * (positions - 1)),
        (space(pixels)[0], PIXELS * positions),
    ):
        bounds = [(piece.image.start, piece.image.stop) for piece in pieces(axis, positions)]
        assert bounds[0][0] == 0
        assert bounds[-1][1] == samples
        assert all(start < stop for start, stop in bounds)
        assert all(one[1] == other[0] for one, other in itertools.pairwise(bounds))


@settings(deadline=None)
@given(
    st.tuples(st.integers(1, 14), st.integers(1, 14), st.integers(1, 14)),
    tiles(FRAMES),
    tiles(PIXELS),
)
def test_what_tiles_agree_on_comes_out_as_the_whole_does(
    extents: tuple[int, int, int], frames: tuple[int, int], pixels: tuple[int, int]
) -> None:
    latent = random_latent(*extents)
    chosen = [(time_axis(frames),), space(pixels)]
    found = decode_tiled(latent, chosen, repeated)
    # Shares that sum to one, each rounded once, as are two products and a sum, in three blends.
    np.testing.assert_allclose(found, repeated(latent), rtol=0, atol=3e-6)


@settings(deadline=None)
@given(
    st.tuples(st.integers(1, 20), st.integers(1, 14), st.integers(1, 14)),
    tiles(FRAMES),
    tiles(PIXELS),
    st.booleans(),
)
def test_video_is_decoded_as_diffusers_decodes_it_bit_for_bit(
    extents: tuple[int, int, int],
    frames: tuple[int, int],
    pixels: tuple[int, int],
    is_space_tiled: bool,
) -> None:
    vae, latent = hunyuan(), random_latent(*extents)
    vae.tile_sample_min_num_frames, vae.tile_sample_stride_num_frames = frames
    vae.tile_sample_min_height, vae.tile_sample_stride_height = pixels
    vae.tile_sample_min_width, vae.tile_sample_stride_width = pixels
    vae.use_tiling = is_space_tiled
    tiling = Tiling(time_axis(frames), space(pixels))
    found = decode_tiled(latent, levels(tiling, is_space_tiled=is_space_tiled), cheap)
    expected = vae.decode(torch.from_numpy(latent)).sample
    assert np.array_equal(found, expected.numpy())


@settings(deadline=None)
@given(st.tuples(st.integers(1, 14), st.integers(1, 14)), tiles(PIXELS))
def test_pictures_are_decoded_as_qwen_images_autoencoder_does_bit_for_bit(
    extents: tuple[int, int], pixels: tuple[int, int]
) -> None:
    vae, latent = qwen(), random_latent(1, *extents)
    vae.tile_sample_min_height, vae.tile_sample_stride_height = pixels
    vae.tile_sample_min_width, vae.tile_sample_stride_width = pixels
    vae.use_tiling = True
    chosen = [space(pixels)]
    expected = vae.decode(torch.from_numpy(latent)).sample.numpy()
    found = decode_tiled(latent, chosen, cheap)
    if not is_divided(latent.shape, chosen):  # diffusers clips whole pictures, but not tiles
        found = found.clip(-1, 1)
    assert np.array_equal(found, expected)


@settings(deadline=None)
@given(st.tuples(st.integers(1, 20), st.integers(1, 20)), st.sampled_from([8, 16, 24]))
def test_pictures_are_decoded_as_fluxs_autoencoder_does_bit_for_bit(
    extents: tuple[int, int], tile: int
) -> None:
    vae, latent = flux(), random_latent(1, *extents)
    vae.tile_sample_min_size, vae.tile_latent_min_size = tile, tile // PIXELS
    vae.use_tiling = True
    expected = vae.decode(torch.from_numpy(latent[:, :, 0])).sample.numpy()
    found = decode_tiled(latent, [space((tile, tile * 3 // 4))], cheap)
    assert np.array_equal(found[:, :, 0], expected)


def test_tile_of_which_nothing_is_kept_is_not_decoded() -> None:
    shapes = []

    def decode(tile: Array) -> Array:
        shapes.append(tile.shape[2])
        return repeated(tile)

    decode_tiled(random_latent(7, 1, 1), [(time_axis((16, 12)),)], decode)
    assert shapes == [5, 4]  # and not a third of one latent frame, whose only frame is dropped


def test_short_latent_is_handed_over_as_it_is() -> None:
    latent = random_latent(4, 3, 3)
    chosen = levels(Tiling(time_axis((16, 12)), space((6, 4))), is_space_tiled=True)
    assert not is_divided(latent.shape, chosen)
    assert decode_tiled(latent, chosen, lambda given: given) is latent


def test_tiles_that_begin_between_positions_are_none() -> None:
    assert space_axes(16, 12, unit=8, latent_axis=1, image_axis=2) == ()


@pytest.mark.parametrize("tiling", [None, Tiling(), Tiling(time_axis((16, 12)))])
def test_tiles_in_space_are_refused_where_there_are_none(tiling: Tiling | None) -> None:
    with pytest.raises(InputError, match=r"VAE tiling was asked for, .* render without it"):
        levels(tiling, is_space_tiled=True)


def test_tiles_in_time_need_not_be_asked_for() -> None:
    time, rows_and_columns = time_axis((16, 12)), space((6, 4))
    assert levels(None, is_space_tiled=False) == ()
    assert levels(Tiling(time, rows_and_columns), is_space_tiled=False) == ((time,),)
    asked_for = levels(Tiling(time, rows_and_columns), is_space_tiled=True)
    assert asked_for == ((time,), rows_and_columns)
