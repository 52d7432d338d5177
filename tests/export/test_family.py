from __future__ import annotations

from pathlib import Path

import pytest

from meancache_trt.errors import InputError
from meancache_trt.export.checkpoint import Checkpoint
from meancache_trt.export.family import Configs, Size, check_size, resolution
from meancache_trt.export.flux import FLUX


@pytest.fixture(scope="module")
def configs(flux_folder: Path) -> Configs:
    return Checkpoint(flux_folder).configs(("transformer", "vae", "scheduler", "tokenizer_2"))


@pytest.mark.parametrize(
    ("height", "width", "message"),
    [
        (30, 32, "height is 30; .* multiple of 8 .* use 24 or 32"),
        (32, 33, "width is 33; .* use 32 or 40"),
        (4, 32, "height is 4; .* use 8$"),
        (0, 32, "height is 0; .* use 8$"),
        (32, -8, "width is -8; .* use 8$"),
        (4104, 32, "height is 4104; .* pixels between 8 and 4096; use 4096$"),
    ],
)
def test_impossible_size_is_told_with_the_nearest_valid_ones(
    configs: Configs, height: int, width: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        check_size(FLUX, configs, Size(height, width, 12))


def test_text_longer_than_the_pipeline_takes_is_refused(configs: Configs) -> None:
    with pytest.raises(InputError, match="text_tokens is 513; expected at most 512"):
        check_size(FLUX, configs, Size(32, 32, 513))


def test_a_picture_has_no_frames(configs: Configs) -> None:
    with pytest.raises(InputError, match="frames is 9, but the flux family makes pictures"):
        check_size(FLUX, configs, Size(32, 32, 12, 9))


def test_text_needs_a_token(configs: Configs) -> None:
    with pytest.raises(InputError, match="text_tokens is 0"):
        check_size(FLUX, configs, Size(32, 32, 0))


def test_resolution_gives_one_samples_shapes_and_every_symbol(configs: Configs) -> None:
    record = resolution(FLUX, configs, Size(32, 48, 12))

    assert record.noise_shape == (4, 8, 12)
    assert record.latent_shape == (24, 16)
    assert record.decode_shape == (4, 6, 16)
    assert record.symbols == {
        "height": 32,
        "width": 48,
        "latent_height": 8,
        "latent_width": 12,
        "latent_rows": 4,
        "latent_columns": 6,
        "image_tokens": 24,
        "text_tokens": 12,
    }
