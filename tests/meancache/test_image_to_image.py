"""MeanCacheScheduler.for_strength inside unmodified image-to-image and inpainting pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    QwenImageImg2ImgPipeline,
    QwenImageInpaintPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    ZImageImg2ImgPipeline,
    ZImageInpaintPipeline,
)
from tests.export import tiny_flux, tiny_qwen_image, tiny_sd3, tiny_z_image

from meancache_trt.errors import ScheduleError
from meancache_trt.meancache.diffusers_scheduler import MeanCacheScheduler
from meancache_trt.meancache.evidence import Evidence
from meancache_trt.meancache.schedule import Schedule, bake
from meancache_trt.meancache.sigmas import make_grid
from meancache_trt.meancache.strength import begin_at, first_step

STEPS, HEIGHT, WIDTH = 12, 32, 48
NODES, SPANS = (0, 1, 3, 6, 9), (1, 2, 3, 2)
PIPELINES = (
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    QwenImageImg2ImgPipeline,
    QwenImageInpaintPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    ZImageImg2ImgPipeline,
    ZImageInpaintPipeline,
)


@pytest.fixture(scope="module")
def components() -> dict[str, dict[str, Any]]:
    """Of one tiny pipeline a family, by the beginning of its classes' names."""
    made = {
        "Flux": tiny_flux,
        "Qwen": tiny_qwen_image,
        "ZIma": tiny_z_image,
        "Stab": tiny_sd3,
    }
    return {name: module.tiny_pipeline().components for name, module in made.items()}


@pytest.fixture(params=PIPELINES, ids=lambda found: found.__name__)
def pipeline(request: pytest.FixtureRequest, components: dict[str, dict[str, Any]]) -> Any:
    return made(request.param, components)


def made(kind: Any, components: dict[str, dict[str, Any]]) -> Any:
    built = kind(**components[kind.__name__[:4]])
    built.set_progress_bar_config(disable=True)
    return built


def render(pipeline: Any, strength: float, **changes: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    arguments: dict[str, Any] = {
        "prompt": "a red dog",
        "image": torch.rand(1, 3, HEIGHT, WIDTH, generator=generator),
        "height": HEIGHT,
        "width": WIDTH,
        "num_inference_steps": STEPS,
        "generator": generator,
        "output_type": "latent",
    }
    if "Inpaint" in type(pipeline).__name__:
        mask = torch.zeros(1, 1, HEIGHT, WIDTH)
        mask[..., WIDTH // 2 :] = 1
        arguments["mask_image"] = mask
    if type(pipeline).__name__.startswith("Flux"):
        arguments["max_sequence_length"] = tiny_flux.TEXT_TOKENS
    else:
        is_qwen = type(pipeline).__name__.startswith("Qwen")
        scale = "true_cfg_scale" if is_qwen else "guidance_scale"
        arguments |= {"negative_prompt": "blurry", scale: 3.0}
    latent: torch.Tensor = pipeline(strength=strength, **{**arguments, **changes}).images
    return latent


def whole(pipeline: Any) -> float:
    """The strength at which a pipeline leaves the beginning to its scheduler.

    At 1 StableDiffusion3InpaintPipeline begins with noise alone, whatever its scheduler says.
    """
    return 0.9999 if isinstance(pipeline, StableDiffusion3InpaintPipeline) else 1.0


def scheduled(pipeline: Any, method: str, nodes: Any, spans: Any = None) -> MeanCacheScheduler:
    schedule = bake(method, make_grid(STEPS), nodes, spans)
    return MeanCacheScheduler.from_schedule(schedule, pipeline.scheduler)


@pytest.mark.parametrize("strength", [0.6, 0.3, 1.0])
def test_every_step_evaluated_is_the_stock_scheduler_at_that_strength(
    pipeline: Any, strength: float
) -> None:
    expected = render(pipeline, strength)
    pipeline.scheduler = scheduled(pipeline, "euler", range(STEPS)).for_strength(strength)
    # the same arithmetic on the same numbers, so the same bits
    assert torch.equal(render(pipeline, whole(pipeline)), expected)
    assert pipeline.num_timesteps == STEPS - first_step(STEPS, strength)


class ByHand(FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
    """The authors' rule, one estimate for each skipped step, in float64, in a pipeline's loop.

    The pipeline calls it at every step; velocities at steps that are no nodes are thrown away.
    """

    def start(self, nodes: tuple[int, ...], spans: tuple[int, ...]) -> ByHand:
        self.nodes, self.spans = nodes, dict(zip(nodes, spans, strict=False))
        self.first, self.span = -1, 1
        self.x: dict[int, torch.Tensor] = {}
        self.v: dict[int, torch.Tensor] = {}
        return self

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor,
        sample: torch.Tensor,
        *,
        return_dict: bool,
    ) -> tuple[torch.Tensor]:
        assert not return_dict
        if self.step_index is None:
            self._init_step_index(timestep)
        i, sigmas = self.step_index, self.sigmas.double()
        if not self.x:
            self.first = i
        self.x[i] = sample.double()
        if i == self.first or i in self.nodes:
            self.v[i] = model_output.double()
            self.span = min(self.spans.get(i, 1), i - self.first + 1)
        else:
            begin, h = max(i - self.span, self.first), sigmas[i + 1] - sigmas[i]
            w = sigmas[i] - sigmas[begin]
            drift = ((self.x[i] - self.x[begin]) / w - self.v[begin]) / w
            self.v[i] = self.v[i - 1] + (h * drift if i - begin > 1 else 0)
        self._step_index += 1
        return ((self.x[i] + (sigmas[i + 1] - sigmas[i]) * self.v[i]).float(),)


@pytest.mark.parametrize("strength", [0.9, 0.75, 0.6])
@pytest.mark.parametrize(
    "kind", [FluxImg2ImgPipeline, QwenImageImg2ImgPipeline, StableDiffusion3Img2ImgPipeline]
)
def test_a_schedule_is_its_rule_stepped_by_hand_from_there(
    kind: Any, components: dict[str, dict[str, Any]], strength: float
) -> None:
    pipeline = made(kind, components)
    stock = pipeline.scheduler
    pipeline.scheduler = scheduled(pipeline, "official", NODES, SPANS).for_strength(strength)
    found = render(pipeline, 1.0)
    evaluated = pipeline.num_timesteps
    begin = first_step(STEPS, strength)
    assert evaluated == len({begin, *(node for node in NODES if node >= begin)})

    pipeline.scheduler = ByHand.from_config(stock.config).start(NODES, SPANS)
    by_hand = render(pipeline, strength)
    assert pipeline.num_timesteps == STEPS - begin > evaluated
    # float32 sums in another order, over at most five evaluations; measured 1e-6
    torch.testing.assert_close(found, by_hand, rtol=0, atol=1e-5)


def test_what_the_mask_leaves_out_is_the_picture(components: dict[str, dict[str, Any]]) -> None:
    pipeline = made(FluxInpaintPipeline, components)
    pipeline.scheduler = scheduled(pipeline, "official", NODES, SPANS).for_strength(0.6)
    found = render(pipeline, 1.0).unflatten(1, (4, 6))
    nothing = render(pipeline, 1.0, mask_image=torch.zeros(1, 1, HEIGHT, WIDTH)).unflatten(
        1, (4, 6)
    )
    assert torch.equal(found[:, :, :3], nothing[:, :, :3])
    assert (found[:, :, 3:] - nothing[:, :, 3:]).abs().max() > 0.1


def test_strength_changes_the_picture(components: dict[str, dict[str, Any]]) -> None:
    pipeline = made(FluxImg2ImgPipeline, components)
    scheduler = scheduled(pipeline, "official", NODES, SPANS)
    latents = []
    for strength in (0.3, 0.6):
        pipeline.scheduler = scheduler.for_strength(strength)
        latents.append(render(pipeline, 1.0))
    assert (latents[0] - latents[1]).abs().max() > 0.1


def test_two_pictures_of_one_prompt(components: dict[str, dict[str, Any]]) -> None:
    pipeline = made(FluxImg2ImgPipeline, components)
    expected = render(pipeline, 0.5, num_images_per_prompt=2)
    pipeline.scheduler = scheduled(pipeline, "euler", range(STEPS)).for_strength(0.5)
    assert torch.equal(render(pipeline, 1.0, num_images_per_prompt=2), expected)
    assert not torch.equal(expected[0], expected[1])


def started(strength: float = 0.6) -> MeanCacheScheduler:
    base = FlowMatchEulerDiscreteScheduler(shift=3.0)
    schedule = bake("official", make_grid(STEPS, shift=3.0), NODES, SPANS)
    return MeanCacheScheduler.from_schedule(schedule, base).for_strength(strength)


def test_the_schedule_is_cut_at_once_and_again_for_the_pipelines_grid() -> None:
    scheduler, step = started(), first_step(STEPS, 0.6)
    whole = bake("official", make_grid(STEPS, shift=3.0), NODES, SPANS)
    assert scheduler.schedule == begin_at(whole, step)
    base = FlowMatchEulerDiscreteScheduler(shift=5.0)
    other = MeanCacheScheduler.from_schedule(whole, base).for_strength(0.6)
    other.set_timesteps(sigmas=np.linspace(1.0, 1 / STEPS, STEPS))
    refolded = begin_at(bake("official", make_grid(STEPS, shift=5.0), NODES, SPANS), step)
    assert other.schedule.weights == refolded.weights
    assert other.sigmas.tolist() == refolded.sigmas().tolist()


def test_a_calibrated_schedule_begins_midway_on_its_own_grid_only() -> None:
    evidence = Evidence(samples=1, seconds=0.0)
    whole = bake("official", make_grid(STEPS, shift=3.0), NODES, SPANS, calibration=evidence)
    sigmas = np.linspace(1.0, 1 / STEPS, STEPS)
    schedulers = {
        shift: MeanCacheScheduler.from_schedule(
            whole, FlowMatchEulerDiscreteScheduler(shift=shift)
        ).for_strength(0.6)
        for shift in (3.0, 5.0)
    }
    schedulers[3.0].set_timesteps(sigmas=sigmas)
    assert schedulers[3.0].schedule == begin_at(whole, first_step(STEPS, 0.6))
    with pytest.raises(ScheduleError, match="calibrated on another grid"):
        schedulers[5.0].set_timesteps(sigmas=sigmas)


def test_a_scheduler_makes_others_for_any_strength_and_stays_as_it_is() -> None:
    whole = started(1.0)
    again = whole.for_strength(0.3).for_strength(0.8)
    assert whole.schedule.nodes == NODES
    assert again.schedule == whole.for_strength(0.8).schedule
    assert again.for_strength(1.0).schedule == whole.schedule


def test_strength_and_schedule_survive_the_configuration_file(tmp_path: Path) -> None:
    scheduler = started()
    scheduler.save_pretrained(tmp_path)
    loaded = MeanCacheScheduler.from_pretrained(tmp_path)
    assert loaded.schedule == scheduler.schedule
    assert loaded.for_strength(1.0).schedule.nodes == NODES
    assert FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path).shift == 3.0


def test_another_schedule_begins_at_its_start_again() -> None:
    schedule: Schedule = bake("euler", make_grid(STEPS, shift=3.0), [0, 6])
    assert MeanCacheScheduler.from_schedule(schedule, started()).schedule == schedule


@pytest.mark.parametrize("strength", [0.0, -1.0, 1.5, float("nan")])
def test_a_strength_outside_its_range_is_refused(strength: float) -> None:
    with pytest.raises(ScheduleError, match="above 0 and at most 1"):
        started(strength)


def test_a_strength_given_to_the_pipeline_is_refused_and_the_way_is_told(
    components: dict[str, dict[str, Any]],
) -> None:
    pipeline = made(FluxImg2ImgPipeline, components)
    scheduler = scheduled(pipeline, "euler", range(STEPS))
    for given in (scheduler, scheduler.for_strength(0.6)):
        pipeline.scheduler = given
        with pytest.raises(ScheduleError, match=r"for_strength\(strength\) .*strength=1\.0"):
            render(pipeline, 0.6)
