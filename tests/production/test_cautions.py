"""What is said of a picture that may be wrong, and nothing of one that is not."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from meancache_trt.meancache.evidence import Evidence, Fidelity, Summary
from meancache_trt.meancache.schedule import Schedule, bake
from meancache_trt.meancache.sigmas import make_grid
from meancache_trt.production.cautions import cautions_of
from tests.production.tickets import SCHEDULE

PROMPTS = ["large plain red circle left gray", "small striped blue star right pink", "", "a cat"]


def fidelity(mean: float, p5: float) -> Fidelity:
    one = Summary(mean=1.0, p5=1.0, worst=1.0)
    return Fidelity(psnr=Summary(mean=mean, p5=p5, worst=p5), ssim=one, latent_error=0.1)


def calibrated(mean: float = 40.0, p5: float = 30.0, euler: float = 35.0) -> Schedule:
    evidence = Evidence(
        samples=8, seconds=1.0, fidelity=fidelity(mean, p5), euler=fidelity(euler, euler)
    )
    return msgspec.structs.replace(SCHEDULE, calibration=evidence)


GOOD = calibrated()


@pytest.mark.parametrize("schedule", ["full", "b10", "b6"])
def test_an_ordinary_picture_gives_no_caution(pipeline, schedule):
    for made in pipeline.render(PROMPTS, seed=[0, 1, 2, 3], schedule=schedule):
        assert cautions_of(made.pixels, GOOD) == ()


@pytest.mark.parametrize("level", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(32, 32, 3), (5, 32, 32, 3)])
def test_a_single_colour_is_noticed_also_with_a_decoders_noise(level, shape):
    noise = np.random.default_rng(0).standard_normal(shape) / 255
    pixels = np.clip(level + noise, 0, 1).astype(np.float32)
    assert cautions_of(pixels, GOOD) == ("the picture is of a single colour",)


def test_a_faint_picture_is_no_single_colour():
    ramp = np.linspace(0.4, 0.45, 32, dtype=np.float32)
    assert cautions_of(np.tile(ramp[:, None], (32, 1, 3)), GOOD) == ()


@pytest.mark.parametrize(("share", "count"), [(0.45, 0), (0.55, 1)])
def test_a_picture_that_is_mostly_clipped_is_noticed(share, count):
    pixels = np.random.default_rng(0).uniform(0.2, 0.8, (100, 100, 3)).astype(np.float32)
    pixels[: int(100 * share), :, 1] = 1.0
    found = cautions_of(pixels, GOOD)
    assert len(found) == count
    assert all("55%" in caution for caution in found)


def test_pixels_may_be_missing():
    assert cautions_of(None, GOOD) == ()


@pytest.mark.parametrize("calibration", [None, Evidence(samples=1, seconds=0.0)])
def test_a_schedule_whose_fidelity_is_not_known_is_named(calibration):
    schedule = msgspec.structs.replace(SCHEDULE, calibration=calibration)
    (caution,) = cautions_of(None, schedule)
    assert "'b3' has no calibration" in caution
    assert "all 10 steps" in caution


def test_every_step_by_euler_needs_no_calibration():
    grid = make_grid(10, shift=3.0)
    assert cautions_of(None, bake("euler", grid, range(10))) == ()
    assert len(cautions_of(None, bake("ab2", grid, range(10)))) == 1


def test_a_schedule_that_is_far_from_all_steps_is_named():
    assert cautions_of(None, calibrated(p5=20.0)) == ()
    (caution,) = cautions_of(None, calibrated(p5=19.9))
    assert "one calibration sample in twenty below 19.9 dB" in caution


def test_a_schedule_that_plain_euler_beats_is_named():
    (caution,) = cautions_of(None, calibrated(euler=41.0))
    assert "plain Euler on the nodes of schedule 'b3' comes closer" in caution
