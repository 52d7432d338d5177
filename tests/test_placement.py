"""Every method from the command line: placed, baked into a bundle, rendered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from meancache_trt.bundle import Bundle
from meancache_trt.calibration.baking import bakeable_methods
from meancache_trt.cli import main
from meancache_trt.render import Pipeline
from tests.test_cli import PROMPT, run

__all__ = ["run"]  # a fixture

STEPS = 6


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("calibration")
    arguments = ("calibrate", "standin/flux", "-o", directory, "--steps", STEPS, "--samples", 2)
    main([str(argument) for argument in arguments])
    return directory


def test_build_makes_the_schedules_of_a_solver(run: Any, bundle: Path, tmp_path: Path) -> None:
    recorded = ("--steps", STEPS, "--samples", 1, "--budget", 3)
    assert run("build", "standin/flux", "-o", bundle, "--method", "dpmpp2m", *recorded)[0] == 0
    opened = Bundle.open(bundle)
    made = opened.schedule("b3")
    assert (made.method, made.grid.steps, made.nodes) == ("dpmpp2m", 3, (0, 1, 2))
    with Pipeline(opened) as pipeline:
        assert made.grid.difference(pipeline.grid(3)) is None
    assert (
        run("render", bundle, "--prompt", PROMPT, "--schedule", 3, "-o", tmp_path / "out")[0] == 0
    )
    (picture,) = (tmp_path / "out").glob("*.png")
    with Image.open(picture) as opened_picture:
        assert opened_picture.size == (64, 64)


@pytest.mark.parametrize("method", [name for name in bakeable_methods() if name != "fitted"])
def test_bake_makes_a_schedule_of_every_method(run: Any, calibration: Path, method: str) -> None:
    given = ("--calibration", calibration, "--budget", 3, "--method", method, "--json")
    status, out, _ = run("bake", *given)
    assert status == 0
    assert len(json.loads(out)["nodes"]) == 3


def test_a_schedule_is_named_after_a_placement_that_is_not_its_methods_own(
    run: Any, calibration: Path, bundle: Path
) -> None:
    given = ("--calibration", calibration, "--budget", 3, "--bundle", bundle)
    for chosen in (
        "--method ab2",
        "--method ab2 --placement path",
        "--method official --placement even",
    ):
        assert run("bake", *given, *chosen.split())[0] == 0
    opened = Bundle.open(bundle)
    names = {"ab2-b3", "ab2-path-b3", "official-even-b3"}
    assert names <= set(opened.schedule_names())
    assert opened.schedule("ab2-b3").grid.steps == 3
    assert opened.schedule("ab2-path-b3").grid.steps == STEPS
    assert opened.schedule("official-even-b3").nodes == (0, 2, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "0,1", "--placement", "even"], "--placement does not apply to --nodes"),
        (["--calibration", "x", "--budget", "2", "--placement", "evn"], "'path', 'minimax'"),
    ],
)
def test_wrong_usage_of_placements_has_status_2(
    run: Any, arguments: list[str], message: str
) -> None:
    status, _, err = run("bake", *arguments)
    assert status == 2
    assert message in " ".join(err.split())
