"""The tiles that families name, with real decoders, against diffusers' own tiled decoding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from meancache_trt.export.family import Configs, Family, Wrapper
from meancache_trt.export.flux import FLUX
from meancache_trt.export.flux2 import FLUX2
from meancache_trt.export.hunyuan_video import HUNYUAN_VIDEO
from meancache_trt.export.qwen_image import QWEN_IMAGE
from meancache_trt.export.sd3 import SD3
from meancache_trt.export.wan import WAN
from meancache_trt.manifest import Tiling
from meancache_trt.tiling import Array, decode_tiled, levels
from tests.export.test_flux import DEV
from tests.export.test_flux2 import DEV as FLUX2_DEV
from tests.export.test_hunyuan_video import PUBLISHED
from tests.export.test_sd3 import MEDIUM
from tests.export.test_wan import A14B
from tests.export.tiny_flux import tiny_vae as tiny_flux_vae
from tests.export.tiny_flux2 import tiny_vae as tiny_flux2_vae
from tests.export.tiny_qwen_image import tiny_vae as tiny_qwen_vae
from tests.export.tiny_wan import tiny_vae as tiny_wan_vae

# Qwen/Qwen-Image, vae/config.json, without what is unused
QWEN: Configs = {"vae": {"temperal_downsample": [False, True, True], "z_dim": 16}}


def tiling_of(family: Family, configs: Configs) -> Tiling:
    assert family.tiling is not None
    return family.tiling(configs)


def test_published_hunyuan_video_decodes_17_frames_of_256_pixels_at_a_time() -> None:
    tiling = tiling_of(HUNYUAN_VIDEO, PUBLISHED)
    time = tiling.time
    assert time is not None
    assert (time.longest_whole, time.tile, time.stride, time.blend) == (4, 5, 3, 4)
    for axis in tiling.space:
        assert (axis.longest_whole, axis.tile, axis.stride, axis.blend) == (32, 32, 24, 64)


@pytest.mark.parametrize(
    ("family", "configs", "tile", "stride", "blend"),
    [
        (FLUX, {**DEV, "vae": {**DEV["vae"], "sample_size": 1024}}, 64, 48, 256),
        (QWEN_IMAGE, QWEN, 16, 12, 64),
        (SD3, MEDIUM, 128, 96, 256),
        (FLUX2, FLUX2_DEV, 64, 48, 256),
        (WAN, A14B, 32, 24, 64),
    ],
)
def test_published_picture_models_have_tiles_of_whole_tokens(
    family: Family, configs: Configs, tile: int, stride: int, blend: int
) -> None:
    tiling = tiling_of(family, configs)
    assert tiling.time is None
    for axis in tiling.space:
        assert (axis.longest_whole, axis.tile, axis.stride, axis.blend) == (
            tile,
            tile,
            stride,
            blend,
        )


def test_flux_whose_tiles_begin_within_a_token_has_none() -> None:
    configs = {**DEV, "vae": {**DEV["vae"], "sample_size": 1032}}
    assert tiling_of(FLUX, configs).space == ()


def decoded(
    vae: nn.Module, wrapper: Wrapper, tiling: Tiling, latent: Array, *, is_clipped_early: bool
) -> Array:
    graph = wrapper.decoder_graph(vae)

    def decode(tile: Array) -> Array:
        with torch.inference_mode():
            made: Array = graph(torch.from_numpy(tile)).numpy().copy()
        return made.clip(0, 1) if is_clipped_early else made

    return decode_tiled(latent, levels(tiling, is_space_tiled=True), decode).clip(0, 1)


def test_wan_with_patches_has_none() -> None:
    configs = {**A14B, "vae": {**A14B["vae"], "patch_size": 2, "scale_factor_spatial": 16}}
    assert tiling_of(WAN, configs) == Tiling()


def vivid(vae: Any) -> Any:
    """The autoencoder with a range that is several times what it should be, so that much clips."""
    with torch.no_grad():
        vae.decoder.conv_out.weight *= 4
    return vae


# Rows and columns of tokens, of which a tile has 4 and 32 a side: too long a side, two of them, a
# last tile of one token, and a side that would fit into a tile but is divided with the other one.
@pytest.mark.parametrize(
    ("family", "vae", "rows", "columns"),
    [
        (FLUX, vivid(tiny_flux_vae()), 4, 6),
        (FLUX, vivid(tiny_flux_vae()), 7, 5),
        (FLUX, vivid(tiny_flux_vae()), 2, 13),
        (QWEN_IMAGE, vivid(tiny_qwen_vae()), 33, 8),
        (QWEN_IMAGE, vivid(tiny_qwen_vae()), 25, 35),
        (SD3, vivid(tiny_flux_vae(16)), 7, 5),
        (FLUX2, vivid(tiny_flux2_vae(sample_size=32)), 7, 5),
    ],
)
def test_pictures_are_what_diffusers_decodes_in_tiles(
    family: Family, vae: Any, rows: int, columns: int
) -> None:
    tiling = tiling_of(family, {"vae": vae.config, "transformer": {}})
    generator = torch.Generator().manual_seed(rows)
    is_packed = tiling.space[0].latent_axis == 1
    shape = (1, rows, columns, 16) if is_packed else (1, 16, 2 * rows, 2 * columns)
    grid = 2 * torch.randn(shape, generator=generator)
    sizes = {"height": 8 * rows, "width": 8 * columns, "latent_height": 2 * rows}
    sizes |= {"latent_rows": rows, "latent_columns": columns, "text_tokens": 1}
    with torch.inference_mode():
        whole = family.wrapper().reference_image(vae, grid, sizes).numpy()
        vae.enable_tiling()
        expected = family.wrapper().reference_image(vae, grid, sizes).numpy()
        vae.disable_tiling()
    found, other = (
        decoded(vae, family.wrapper(), tiling, grid.numpy(), is_clipped_early=is_clipped_early)
        for is_clipped_early in (False, True)
    )
    # float32 kernels at another size; black and white are set before blending, not after it
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert np.abs(whole - expected).max() > 1e-2
    assert np.abs(other - expected).max() > 1e-3


# Rows and columns of the latent, of which a tile has 32 a side.
@pytest.mark.parametrize(("rows", "columns"), [(33, 20), (26, 35)])
def test_videos_are_what_wan_decodes_in_tiles(rows: int, columns: int) -> None:
    vae, wrapper = vivid(tiny_wan_vae()), WAN.wrapper()
    tiling = tiling_of(WAN, {"vae": vae.config, "transformer": {}})
    latent = 2 * torch.randn(1, 4, 2, rows, columns, generator=torch.Generator().manual_seed(rows))
    with torch.inference_mode():
        whole = wrapper.reference_image(vae, latent, {}).numpy()
        vae.enable_tiling()
        expected = wrapper.reference_image(vae, latent, {}).numpy()
    found = decoded(vae, wrapper, tiling, latent.numpy(), is_clipped_early=False)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert np.abs(whole - expected).max() > 1e-2
