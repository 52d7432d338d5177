"""Jobs against a bundle: what is filled in, what is refused, and what a digest depends on."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from scripts.production.fuzz_jobs import fuzz

from meancache_trt.bundle import MANIFEST, Bundle
from meancache_trt.errors import BundleError, InputError, ScheduleError
from meancache_trt.manifest import Guidance
from meancache_trt.meancache.evidence import Evidence, Fidelity, Summary
from meancache_trt.meancache.files import encode_json, write_json
from meancache_trt.meancache.hashing import digest_of
from meancache_trt.meancache.schedule import Schedule, bake, save_schedule
from meancache_trt.production.job_files import Line
from meancache_trt.production.jobs import Job, Limits
from meancache_trt.production.tickets import Checker, Defaults, Settings, Ticket, check_all
from meancache_trt.render import Pipeline
from tests.test_resolutions import resolutions

STEPS = 12
SIZES = ("64x64", "128x64", "128x128")


@pytest.fixture
def checker(pipeline: Pipeline) -> Checker:
    return Checker(pipeline, Settings(), Defaults(), Limits())


def changed_bundle(source: Path, target: Path, **changes: Any) -> Bundle:
    """A copy of a bundle that says something else of its export, without schedules."""
    shutil.copytree(source, target)
    manifest = Bundle.open(target).manifest
    export = msgspec.structs.replace(manifest.export, **changes)
    changed = msgspec.structs.replace(manifest, export=export, additions={})
    write_json(target / MANIFEST, changed.sealed())
    return Bundle.open(target)


@pytest.fixture
def guided(shared_bundle: Path, tmp_path: Path) -> Iterator[Pipeline]:
    """A pipeline whose bundle says that it has classifier-free guidance."""
    rule = Guidance("classifier_free", 4.0)
    bundle = changed_bundle(shared_bundle, tmp_path / "guided.mcb", guidance=rule)
    with Pipeline(bundle) as opened:
        bundle.add_schedule(bake("euler", opened.grid(STEPS), range(4), name="b4"))
        yield opened


@pytest.fixture
def sized(shared_bundle: Path, tmp_path: Path) -> Iterator[Pipeline]:
    """A bundle of three sizes, each with a grid of its own, and no schedules."""
    config = {**Bundle.open(shared_bundle).export.scheduler, "use_dynamic_shifting": True}
    bundle = changed_bundle(
        shared_bundle,
        tmp_path / "sized.mcb",
        scheduler=config,
        resolutions=resolutions(*SIZES),
    )
    with Pipeline(bundle) as opened:
        yield opened


def job(**fields: Any) -> Job:
    return Job(**{"id": "a", "prompt": "a red circle", **fields})


def kept(pipeline: Pipeline, budget: int, mean: float, p5: float, **fields: Any) -> Schedule:
    """A schedule with evidence of these PSNR, calibrated at a size of the bundle."""
    size = fields.pop("size", pipeline.bundle.export.resolution)
    psnr = Summary(mean=mean, p5=p5, worst=p5)
    fidelity = Fidelity(psnr=psnr, ssim=psnr, latent_error=0.0)
    evidence = Evidence(samples=16, seconds=1.0, fidelity=fidelity)
    schedule = bake(
        "euler",
        pipeline.grid(STEPS, size),
        range(budget),
        **{"name": f"k{budget}-{size.size}", "calibration": evidence, **fields},
    )
    pipeline.bundle.add_schedule(schedule)
    return schedule


def test_a_job_that_says_nothing_is_rendered_as_render_does(pipeline, checker):
    ticket = checker.check(3, job())
    schedule = pipeline.schedule()
    assert ticket == Ticket(
        index=3,
        job=job(),
        seed=0,
        negative_prompt="",
        guidance_scale=pipeline.guidance(None, schedule),
        group=ticket.group,
        schedule_digest=digest_of(encode_json(schedule)),
        digest=ticket.digest,
    )
    assert ticket.group.schedule == schedule
    assert ticket.group.resolution == pipeline.resolution()


def test_defaults_are_for_what_jobs_leave_out(pipeline, tmp_path):
    path = tmp_path / "mine.json"
    save_schedule(bake("euler", pipeline.grid(50), range(7), name="mine"), path)
    defaults = Defaults(seed=7, guidance_scale=2.0, schedule=path, height=64, width=64)
    checker = Checker(pipeline, Settings(), defaults, Limits())
    ticket = checker.check(0, job())
    assert (ticket.seed, ticket.guidance_scale, ticket.group.schedule.name) == (7, 2.0, "mine")
    own = checker.check(0, job(seed=0, guidance_scale=3, schedule="b6"))
    assert (own.seed, own.guidance_scale, own.group.schedule.name) == (0, 3.0, "b6")


@pytest.mark.parametrize("given", ["name", "object", "budget", "file"])
def test_a_default_schedule_may_be_given_in_any_way(pipeline, tmp_path, given):
    save_schedule(pipeline.schedule("b6"), tmp_path / "b6.json")
    ways = {
        "name": "b6",
        "object": pipeline.schedule("b6"),
        "budget": 6,
        "file": tmp_path / "b6.json",
    }
    checker = Checker(pipeline, Settings(), Defaults(schedule=ways[given]), Limits())
    plain = Checker(pipeline, Settings(), Defaults(), Limits()).check(0, job(schedule="b6"))
    assert checker.check(0, job()).digest == plain.digest


@pytest.mark.parametrize(
    ("fields", "kind", "reason"),
    [
        ({"schedule": "b7"}, BundleError, "no schedule 'b7'; expected one of full, b10, b6"),
        ({"schedule": 7}, BundleError, "no schedule of 7 evaluations"),
        ({"resolution": "128x64"}, BundleError, "renders 64x64, found 128x64"),
        ({"frames": 9}, InputError, "this bundle makes pictures, found 9 frames"),
        ({"guidance_scale": 1001.0}, InputError, "a guidance scale is 0 to 1000"),
        ({"negative_prompt": "fog"}, InputError, "no classifier-free guidance"),
        ({"target_psnr": 30.0}, InputError, "30 dB on average .* it has none that was measured"),
        ({"id": "../x"}, InputError, "an id is"),
        ({"seed": -1}, InputError, "seed is 0"),
        ({"seed": 10**5000}, InputError, "a number of more than 20 digits"),
        ({"prompt": "x" * 10_001}, InputError, "the limit is 10,000"),
        ({"schedule": "/etc/passwd"}, InputError, "never a file"),
    ],
)
def test_a_job_that_the_bundle_cannot_render_is_refused_each_time(checker, fields, kind, reason):
    for _ in range(2):
        with pytest.raises(kind, match=reason):
            checker.check(0, job(**fields))


def test_a_schedule_file_that_a_job_names_is_not_read(pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_schedule(pipeline.schedule("b6"), tmp_path / "mine.json")
    checker = Checker(pipeline, Settings(), Defaults(schedule="mine.json"), Limits())
    assert checker.check(0, job()).group.schedule.name == "b6"
    with pytest.raises(InputError, match=r"never a file; found 'mine\.json'"):
        checker.check(0, job(schedule="mine.json"))


@pytest.mark.parametrize(
    ("defaults", "reason"),
    [
        (Defaults(seed=-1), "seed is 0"),
        (Defaults(negative_prompt="fog"), "no classifier-free guidance"),
        (Defaults(guidance_scale=-1.0), "a guidance scale is 0 to 1000"),
    ],
)
def test_defaults_that_no_job_could_have_are_refused_at_once(pipeline, defaults, reason):
    with pytest.raises(InputError, match=reason):
        Checker(pipeline, Settings(), defaults, Limits())


def test_pictures_larger_than_the_limit_are_refused(pipeline):
    exact = Checker(pipeline, Settings(), Defaults(), Limits(pixels=64 * 64))
    assert exact.check(0, job()).group.resolution.size.height == 64
    small = Checker(pipeline, Settings(), Defaults(), Limits(pixels=64 * 64 - 1))
    with pytest.raises(InputError, match="64x64 is 4,096 pixels, the limit is 4,095"):
        small.check(0, job())


def test_negative_prompts_are_for_models_with_classifier_free_guidance(guided):
    checker = Checker(guided, Settings(), Defaults(negative_prompt="fog"), Limits())
    assert checker.check(0, job()).negative_prompt == "fog"
    assert checker.check(0, job(negative_prompt="")).negative_prompt == ""
    assert checker.check(0, job()).guidance_scale == 4.0
    with pytest.raises(InputError, match="at least 1"):
        checker.check(0, job(guidance_scale=0.5))
    with pytest.raises(InputError, match="at least 1"):
        Checker(guided, Settings(), Defaults(guidance_scale=0.5), Limits())


def test_jobs_choose_among_the_sizes_of_the_bundle(sized):
    sized.bundle.add_schedule(bake("official", sized.grid(STEPS), [0, 1, 4], [1, 1], name="b3"))
    checker = Checker(sized, Settings(), Defaults(height=128), Limits())
    for text, expected in ((None, "128x128"), ("128x64", "128x64"), ("64x64", "64x64")):
        group = checker.check(0, job(resolution=text)).group
        assert str(group.resolution.size) == expected
        assert group.schedule == sized.schedule("b3", resolution=group.resolution)


def test_equal_groups_are_one_object(checker):
    tickets = [
        checker.check(0, job(schedule=wanted, guidance_scale=scale, resolution=size))
        for wanted in ("b10", 10)
        for scale in (None, 2.0)
        for size in (None, "64x64")
    ]
    assert len({id(ticket.group) for ticket in tickets}) == 1
    assert {ticket.group for ticket in tickets} != {checker.check(0, job(schedule=6)).group}


def test_a_combination_is_resolved_once(shared_bundle, tmp_path):
    """So that a million jobs are checked in seconds: the bundle is read for the first of them."""
    shutil.copytree(shared_bundle, tmp_path / "copy.mcb")
    with Pipeline(Bundle.open(tmp_path / "copy.mcb")) as pipeline:
        checker = Checker(pipeline, Settings(), Defaults(), Limits())
        first = checker.check(0, job(schedule="b10"))
        shutil.rmtree(pipeline.bundle.directory)
        for scale in (None, 2.0, 3.0):
            again = checker.check(1, job(schedule="b10", guidance_scale=scale))
            assert again.group is first.group


def test_a_target_takes_the_fewest_evaluations_that_reached_it(sized):
    _, wide, large = sized.bundle.export.resolutions
    for budget, mean, p5 in ((3, 30.0, 20.0), (5, 36.0, 29.0), (4, 33.0, 31.0), (8, 40.0, 35.0)):
        kept(sized, budget, mean, p5)
    kept(sized, 2, 50.0, 50.0, size=wide)
    sized.bundle.add_schedule(bake("euler", sized.grid(STEPS), range(STEPS), name="full"))
    checker = Checker(sized, Settings(), Defaults(schedule="full"), Limits())

    def budget(target: float, percentile: float | None = None, size: str = "64x64") -> int:
        wanted = job(target_psnr=target, percentile=percentile, resolution=size)
        return checker.check(0, wanted).group.schedule.budget

    assert [budget(psnr) for psnr in (1, 30, 30.5, 33, 35, 40)] == [3, 3, 4, 4, 5, 8]
    assert [budget(psnr, 5) for psnr in (20, 29, 30, 31, 32)] == [3, 4, 4, 4, 8]
    assert budget(45, 5, "128x64") == 2
    with pytest.raises(InputError) as failure:
        budget(41, 5)
    assert "41 dB at percentile 5" in str(failure.value)
    assert "k8-64x64 35.00 dB, k5-64x64 29.00 dB" in str(failure.value)
    assert "--target-psnr 41" in str(failure.value)
    with pytest.raises(InputError, match="none that was measured"):
        budget(10, None, str(large.size))


def test_of_sizes_that_share_a_grid_each_is_judged_by_its_own_evidence(shared_bundle, tmp_path):
    bundle = changed_bundle(shared_bundle, tmp_path / "own.mcb", resolutions=resolutions(*SIZES))
    with Pipeline(bundle) as pipeline:
        square, wide, large = bundle.export.resolutions
        kept(pipeline, 2, 50.0, 50.0, size=square)
        kept(pipeline, 3, 30.0, 20.0, size=wide)
        checker = Checker(pipeline, Settings(), Defaults(), Limits())
        found = [
            checker.check(0, job(target_psnr=25.0, resolution=str(each.size))).group.schedule.name
            for each in (square, wide, large)
        ]
    assert found == ["k2-64x64", "k3-128x64", "k2-64x64"]


def test_of_equal_budgets_the_better_one_reaches_a_target(sized):
    kept(sized, 3, 30.0, 20.0, name="a")
    kept(sized, 3, 31.0, 20.0, name="b")
    checker = Checker(sized, Settings(), Defaults(), Limits())
    assert checker.check(0, job(target_psnr=29.0)).group.schedule.name == "b"


def test_a_target_counts_schedules_of_its_guidance_scale_alone(sized):
    kept(sized, 3, 30.0, 20.0, guidance_scale=2.0)
    kept(sized, 5, 30.0, 20.0, guidance_scale=3.0)
    checker = Checker(sized, Settings(), Defaults(), Limits())
    for scale, budget in ((None, 3), (2.0, 3), (3.0, 5)):
        ticket = checker.check(0, job(target_psnr=29.0, guidance_scale=scale))
        assert ticket.group.schedule.budget == budget
        assert ticket.guidance_scale == ticket.group.schedule.guidance_scale
    with pytest.raises(InputError, match="none that was measured"):
        checker.check(0, job(target_psnr=29.0, guidance_scale=5.0))
    with pytest.raises(ScheduleError, match=r"calibrated for guidance scale 2\.0, found 5\.0"):
        checker.check(0, job(schedule=3, guidance_scale=5.0))


PIXELS = {
    "prompt": {"prompt": "a red circlE"},
    "negative prompt": {"negative_prompt": "fog"},
    "seed": {"seed": 1},
    "guidance scale": {"guidance_scale": 4.5},
    "schedule": {"schedule": "b3"},
}


def test_digests_change_with_everything_that_pixels_follow_from(guided, shared_bundle):
    guided.bundle.add_schedule(bake("euler", guided.grid(STEPS), range(3), name="b3"))

    def digest(fields: dict[str, Any], settings: Settings | None = None) -> str:
        checker = Checker(guided, settings or Settings(), Defaults(schedule="b4"), Limits())
        return checker.check(0, job(**fields)).digest

    found = [digest({}), *(digest(fields) for fields in PIXELS.values())]
    found += [digest({}, Settings(noise="torch")), digest({}, Settings(vae_tiling=True))]
    guided.bundle.manifest = msgspec.structs.replace(guided.bundle.manifest, bundle_id="other")
    found.append(digest({}))
    guided.bundle.add_schedule(bake("euler", guided.grid(STEPS), (0, 1, 2, 4), name="b4"))
    found.append(digest({}))
    assert len(set(found)) == len(found)
    assert all(len(each) == 64 for each in found)


def test_digests_of_sizes_differ_though_their_schedules_are_equal(shared_bundle, tmp_path):
    bundle = changed_bundle(shared_bundle, tmp_path / "own.mcb", resolutions=resolutions(*SIZES))
    with Pipeline(bundle) as pipeline:
        bundle.add_schedule(bake("euler", pipeline.grid(STEPS), range(3), name="b3"))
        checker = Checker(pipeline, Settings(), Defaults(), Limits())
        tickets = [checker.check(0, job(resolution=size)) for size in SIZES]
    assert len({ticket.schedule_digest for ticket in tickets}) == 1
    assert len({id(ticket.group.schedule) for ticket in tickets}) == 1
    assert len({ticket.digest for ticket in tickets}) == len({t.group for t in tickets}) == 3


def test_digests_change_with_nothing_else(pipeline, checker):
    """With no id or place, nor with the way in which the same thing was asked for."""
    scale = pipeline.guidance(None, pipeline.schedule("b10"))
    same = [
        job(schedule="b10"),
        job(schedule="b10", id="another"),
        job(schedule=10),
        job(schedule="b10", seed=0, negative_prompt="", resolution="64x64"),
        job(schedule="b10", guidance_scale=scale),
    ]
    digests = {checker.check(index, each).digest for index, each in enumerate(same)}
    defaults = Defaults(schedule="b10", guidance_scale=scale, height=64)
    digests.add(Checker(pipeline, Settings(), defaults, Limits()).check(9, job()).digest)
    assert len(digests) == 1


def test_a_zero_is_a_zero_in_whichever_order_it_was_asked_for(pipeline):
    def digests(*scales: float) -> list[str]:
        checker = Checker(pipeline, Settings(), Defaults(), Limits())
        return [checker.check(0, job(guidance_scale=scale)).digest for scale in scales]

    assert len({*digests(0, -0.0, 0.0), *digests(-0.0, 0.0, 0)}) == 1


def lines() -> list[Line]:
    bad = [Line(number, None, "prompt is empty") for number in range(3, 25)]
    return [
        Line(1, job(id="a")),
        Line(2, job(id="b", schedule="none")),
        *bad,
        Line(30, job(id="c")),
    ]


def test_faults_are_told_by_line_before_anything_is_rendered(checker):
    with pytest.raises(InputError) as failure:
        check_all(lines(), checker, skip_bad=False)
    first, *told, last = str(failure.value).splitlines()
    assert first == "23 of 25 jobs cannot be rendered; nothing was:"
    assert told[0].startswith("  line 2: ")
    assert "no schedule 'none'" in told[0]
    assert told[1:] == [f"  line {number}: prompt is empty" for number in range(3, 22)]
    assert last == "  and 3 more"


def test_faults_may_be_skipped_and_leave_the_places_of_the_others(checker):
    tickets, faults = check_all(lines(), checker, skip_bad=True)
    assert [(ticket.index, ticket.job.id) for ticket in tickets] == [(0, "a"), (24, "c")]
    assert [fault.number for fault in faults] == list(range(2, 25))


def test_nothing_but_faults_is_an_error_even_where_they_may_be_skipped(checker):
    with pytest.raises(InputError, match="23 of 23 jobs cannot be rendered"):
        check_all(lines()[1:-1], checker, skip_bad=True)


def test_hostile_lines_are_faults_or_harmless_jobs(pipeline, checker):
    counts = fuzz(2000, 0, checker)
    assert counts["lines"] == 2000
    assert min(counts["faults"], counts["tickets"]) > 500
    assert counts["accepted"] > counts["tickets"]
    assert 0 < counts["refused"] < 50
    assert fuzz(2000, 0, checker) == counts
