from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from meancache_trt import standins
from meancache_trt.bundle import Bundle
from meancache_trt.errors import BundleError, InputError
from meancache_trt.export.checkpoint import Checkpoint
from meancache_trt.export.pipeline import resolutions_of
from meancache_trt.manifest import Resolution
from meancache_trt.meancache.noise import philox_normal
from meancache_trt.render import Pipeline
from meancache_trt.session import Session
from meancache_trt.shapes import PictureSize
from tests.test_bundle import small_schedule
from tests.test_cli import PROMPT, only_error, run

__all__ = ["run"]  # a fixture

TEXT_TOKENS = 32  # the stand-in's


def resolutions(*sizes: str) -> tuple[Resolution, ...]:
    """What a bundle of the stand-in records of these sizes."""
    checkpoint = Checkpoint(standins.path("flux"))
    return resolutions_of(checkpoint, [PictureSize.parse(size) for size in sizes], TEXT_TOKENS)


def contents(bundle: Path) -> dict[str, bytes]:
    """Every file of a bundle but its manifest and its lock."""
    files = (path for path in bundle.rglob("*") if path.is_file())
    return {
        str(path.relative_to(bundle)): path.read_bytes()
        for path in files
        if path.name not in ("manifest.json", ".lock")
    }


def test_a_resolution_added_later_changes_the_manifest_alone(run, bundle, tmp_path):
    before, bundle_id = contents(bundle), Bundle.open(bundle).manifest.bundle_id
    status, _, err = run("export", "standin/flux", "-o", bundle, "--resolution", "128x64")
    assert status == 0
    assert f"added 128x64 to {bundle}, whose graphs serve every resolution" in err
    opened = Bundle.open(bundle)
    assert list(map(str, opened.export.sizes)) == ["64x64", "128x64"]
    assert opened.manifest.bundle_id == bundle_id
    assert contents(bundle) == before
    common = ("render", bundle, "--prompt", PROMPT, "-o", tmp_path / "out", "--schedule", "b6")
    status, out, _ = run(*common, "--width", 128, "--json")
    assert status == 0
    with Pipeline(opened) as pipeline:
        (expected,) = pipeline.render([PROMPT], schedule="b6", height=64, width=128)
        assert expected.pixels.shape == (64, 128, 3)
        expected.save(tmp_path / "expected.png")
    (row,) = json.loads(out)["images"]
    assert Path(row["path"]).read_bytes() == (tmp_path / "expected.png").read_bytes()


@pytest.mark.parametrize("sizes", [[], ["--resolution", "64x64"], ["--height", 64, "--width", 64]])
def test_what_is_listed_already_is_not_added_again(run, bundle, sizes):
    manifest = (bundle / "manifest.json").read_bytes()
    status, _, err = run("export", "standin/flux", "-o", bundle, *sizes)
    assert status == 0
    assert "already there" in err
    assert (bundle / "manifest.json").read_bytes() == manifest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resolution", "128x64", "--resolution", "70x64"], "width is 70"),
        (["--resolution", "64x64x9"], "makes pictures"),
        (["--resolution", "128x64", "--text-tokens", 16], "32 text tokens against 16"),
        (["--resolution", "128x64", "--weights", "copy"], "linked weights against copied"),
    ],
)
def test_what_cannot_be_added_changes_nothing(run, bundle, arguments, message):
    manifest = (bundle / "manifest.json").read_bytes()
    error = only_error(run("export", "standin/flux", "-o", bundle, *arguments))
    assert message in error
    assert (bundle / "manifest.json").read_bytes() == manifest


def test_a_resolution_of_another_checkpoint_is_not_added(run, bundle, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(standins.path("flux"), other)
    config = other / "transformer" / "config.json"
    config.write_text(config.read_text() + "\n")
    error = only_error(run("export", other, "-o", bundle, "--resolution", "128x64"))
    assert "a bundle of something else: checkpoint flux" in error
    assert len(Bundle.open(bundle).export.resolutions) == 1


def test_concurrent_additions_of_resolutions_and_schedules_are_all_kept(bundle):
    sizes = [f"{64 + 8 * index}x64" for index in range(1, 7)]
    opened = [Bundle.open(bundle) for _ in range(12)]
    changes = [
        *((one.extend, (resolutions(size),)) for one, size in zip(opened, sizes, strict=False)),
        *((one.add_schedule, (small_schedule(f"s{n}"),)) for n, one in enumerate(opened[6:])),
    ]
    threads = [threading.Thread(target=change, args=given) for change, given in changes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = Bundle.open(bundle)
    assert str(found.export.resolution.size) == "64x64"
    assert set(map(str, found.export.sizes)) == {"64x64", *sizes}
    assert {f"s{n}" for n in range(6)} <= set(found.schedule_names())


def test_the_same_resolution_added_by_two_is_listed_once(bundle):
    first, second = Bundle.open(bundle), Bundle.open(bundle)
    assert len(first.extend(resolutions("128x64"))) == 1
    assert second.extend(resolutions("128x64", "64x64")) == []
    assert second.export.sizes == Bundle.open(bundle).export.sizes == first.export.sizes


def test_a_full_disk_while_adding_leaves_the_manifest_as_it_was(bundle, monkeypatch):
    opened = Bundle.open(bundle)

    def fail(*_: object) -> None:
        raise InputError("no space")

    monkeypatch.setattr("meancache_trt.bundle.write_json", fail)
    with pytest.raises(InputError, match="no space"):
        opened.extend(resolutions("128x64"))
    assert len(opened.export.resolutions) == len(Bundle.open(bundle).export.resolutions) == 1


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, "64x64"),
        ({"height": 64}, "64x64"),
        ({"height": 128}, "64x128"),
        ({"width": 128}, "128x64"),
        ({"height": 128, "width": 128}, "128x128"),
    ],
)
def test_a_render_takes_the_first_resolution_that_has_what_is_given(bundle, given, found):
    opened = Bundle.open(bundle)
    opened.extend(resolutions("128x64", "64x128", "128x128"))
    with Pipeline(opened) as pipeline:
        assert str(pipeline.resolution(**given).size) == found


@pytest.mark.parametrize(("given", "asked"), [({"width": 72}, "72x64"), ({"height": 32}, "64x32")])
def test_a_resolution_that_is_not_there_is_told_with_those_that_are(bundle, given, asked):
    opened = Bundle.open(bundle)
    opened.extend(resolutions("128x64"))
    message = f"renders 64x64, 128x64, found {asked}; add it .*export MODEL.* --resolution {asked}"
    with Pipeline(opened) as pipeline, pytest.raises(BundleError, match=message):
        pipeline.render([PROMPT], schedule="b6", **given)


def test_a_session_renders_batches_at_each_resolution_and_beyond_what_plans_are_for(bundle):
    opened = Bundle.open(bundle)
    opened.extend(resolutions("128x64"))
    assert opened.export.ranges.batch.max == 1
    with Pipeline(opened) as pipeline:
        prompts = pipeline.encode([PROMPT, "small striped blue star right pink"])
        for resolution in opened.export.resolutions:
            schedule = pipeline.schedule("b6", resolution=resolution)
            noise = np.stack([philox_normal(seed, resolution.noise_shape) for seed in range(2)])
            session = Session(pipeline.graphs, schedule, resolution, batch=2)
            both = session.run(noise, prompts.tensors, 3.5)
            for index in range(2):
                given = (noise[index][None], prompts.select(index).tensors, 3.5)
                single = pipeline.session(schedule, resolution).run(*given)
                # float32 matrix products may be blocked otherwise at another batch
                np.testing.assert_allclose(
                    both.latents[index], single.latents[0], rtol=0, atol=2e-5
                )


def test_the_batch_that_plans_are_for_is_recorded_and_changes_no_id(run, bundle):
    bundle_id = Bundle.open(bundle).manifest.bundle_id
    status, out, err = run("export", "standin/flux", "-o", bundle, "--batch", "1/2/4", "--json")
    assert status == 0
    assert "now meant for batches of 1/2/4" in err
    assert json.loads(out)["ranges"]["batch"] == {"min": 1, "opt": 2, "max": 4}
    run("export", "standin/flux", "-o", bundle, "--resolution", "128x64")
    opened = Bundle.open(bundle)
    assert str(opened.export.batch) == "1/2/4"
    assert opened.manifest.bundle_id == bundle_id


def test_inspect_prints_resolutions_and_ranges(run, bundle):
    Bundle.open(bundle).extend(resolutions("128x64"))
    facts = json.loads(run("inspect", bundle, "--json")[1])
    assert [(one["width"], one["height"]) for one in facts["resolutions"]] == [(64, 64), (128, 64)]
    assert facts["ranges"]["width"] == {"min": 64, "opt": 64, "max": 128}
    assert facts["ranges"]["frames"] is None
    out = run("inspect", bundle)[1]
    assert "resolutions 64x64, 128x64" in out
    assert "batch 1/1/1, height 64/64/64, width 64/64/128, text tokens 32/32/32" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "--resolution", "64x64", "--height", 64], "not both"),
        (["build", "--resolution", "64x64", "--frames", 9], "not both"),
        (["calibrate", "--resolution", "64x64", "--width", 64], "not both"),
        (["calibrate", "--resolution", "64x64", "--resolution", "128x64"], "one resolution"),
        (["export", "--resolution", "64"], "WIDTHxHEIGHT, such as"),
        (["build", "--batch", "4/2/1"], "ascending"),
    ],
)
def test_wrong_usage_of_sizes_has_status_2(run, tmp_path, arguments, message):
    command, *given = arguments
    status, out, err = run(command, "standin/flux", "-o", tmp_path / "new.mcb", *given)
    assert status == 2
    assert out == ""
    assert message in " ".join(err.split())
    assert list(tmp_path.iterdir()) == []


def test_each_resolution_is_checked_before_any_work(run, tmp_path):
    given = ("--resolution", "64x64", "--resolution", "64x70")
    error = only_error(run("export", "standin/flux", "-o", tmp_path / "new.mcb", *given))
    assert "height is 70; this checkpoint needs a multiple of 8" in error
    assert list(tmp_path.iterdir()) == []


def test_a_schedule_can_be_calibrated_for_another_resolution(run, bundle, tmp_path):
    Bundle.open(bundle).extend(resolutions("128x64"))
    for size in ("64x64", "128x64"):
        given = ("-o", tmp_path / size, "--resolution", size, "--steps", 4, "--samples", 2)
        assert run("calibrate", "standin/flux", *given)[0] == 0
        made = ("--calibration", tmp_path / size, "--budget", 2, "--bundle", bundle)
        assert run("bake", *made)[0] == 0
    opened = Bundle.open(bundle)
    assert {"b2", "b2-128x64"} <= set(opened.schedule_names())
    with Pipeline(opened) as pipeline:
        # both belong to the stand-in's one grid: each is preferred at its own size
        assert pipeline.schedule(2).name == "b2"
        wide = pipeline.resolution(width=128)
        assert pipeline.schedule(2, resolution=wide).name == "b2-128x64"
    facts = json.loads(run("inspect", bundle, "--json")[1])
    found = {one["name"]: one["calibrated_at"] for one in facts["schedules"]}
    assert found["b2-128x64"] == "128x64"
    assert found["b6"] is None
