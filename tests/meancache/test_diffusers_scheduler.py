"""MeanCacheScheduler inside an unmodified FluxPipeline with a small random transformer."""

from __future__ import annotations

import copy
import gc
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)

from meancache_trt.errors import InputError, MeanCacheError, ScheduleError
from meancache_trt.meancache.diffusers_scheduler import MeanCacheScheduler
from meancache_trt.meancache.euler_scheduler import stock_grid
from meancache_trt.meancache.evidence import Evidence
from meancache_trt.meancache.schedule import Schedule, bake, save_schedule
from meancache_trt.meancache.sigmas import SecondStage, make_grid

SHIFT = 3.0
STEPS = 50
NODES = (0, 1, 3, 7, 14, 21, 28, 35, 42, 49)
SPANS = (1, 2, 1, 3, 1, 6, 1, 2, 4)
SIDE = 32


def tiny_pipeline(**options: Any) -> FluxPipeline:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": SHIFT, **options}),
        transformer=transformer.eval(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipeline() -> FluxPipeline:
    return tiny_pipeline()


def official(steps: int = STEPS) -> Schedule:
    return bake("official", make_grid(steps, shift=SHIFT), NODES, SPANS)


def prompt_inputs(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "prompt_embeds": torch.randn(1, 4, 16, generator=generator).to(dtype),
        "pooled_prompt_embeds": torch.randn(1, 16, generator=generator).to(dtype),
    }


def render(
    pipeline: FluxPipeline,
    steps: int = STEPS,
    dtype: torch.dtype = torch.float32,
    callback_on_step_end: Callable[..., Any] | None = None,
) -> torch.Tensor:
    latent: torch.Tensor = pipeline(
        **prompt_inputs(dtype),
        num_inference_steps=steps,
        guidance_scale=3.5,
        height=SIDE,
        width=SIDE,
        generator=torch.Generator().manual_seed(2),
        output_type="latent",
        callback_on_step_end=callback_on_step_end,
    ).images
    return latent


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_dynamic", [False, True])
def test_every_step_evaluated_bit_equals_the_stock_scheduler(
    dtype: torch.dtype, is_dynamic: bool
) -> None:
    pipeline = tiny_pipeline(use_dynamic_shifting=is_dynamic).to(dtype)
    expected = render(pipeline, dtype=dtype)
    schedule = bake("euler", make_grid(STEPS, shift=SHIFT), range(STEPS))
    pipeline.scheduler = MeanCacheScheduler.from_schedule(schedule, pipeline.scheduler)
    found = render(pipeline, dtype=dtype)
    assert found.dtype == dtype
    assert torch.equal(found, expected)


def test_network_is_evaluated_at_the_nodes_only(pipeline: FluxPipeline) -> None:
    sigmas: list[float] = []

    def note(_module: Any, _args: Any, inputs: dict[str, torch.Tensor]) -> None:
        sigmas.append(float(inputs["timestep"][0]))

    pipeline.transformer.register_forward_pre_hook(note, with_kwargs=True)
    pipeline.scheduler = MeanCacheScheduler.from_schedule(official(), pipeline.scheduler)
    render(pipeline)
    # float32 rounding of sigma x 1000 / 1000, which the pipeline does
    np.testing.assert_allclose(sigmas, official().sigmas()[:-1], rtol=3e-7)


def recursion(
    velocity: Callable[[torch.Tensor, float], torch.Tensor],
    latent: torch.Tensor,
    sigmas: Sequence[float],
) -> torch.Tensor:
    """The authors' rule as their scripts run it: one estimate for each skipped step, float64."""
    spans = dict(zip(NODES, SPANS, strict=False))
    latents, velocities, span = [latent.double()], [], 1
    for i in range(STEPS):
        x, h = latents[i], sigmas[i + 1] - sigmas[i]
        if i in NODES:
            v = velocity(x, sigmas[i]).double()
            span = spans.get(i, 1)
        else:
            i0 = i - span
            w = sigmas[i] - sigmas[i0]
            v = velocities[-1] + h * ((x - latents[i0]) / w - velocities[i0]) / w
        velocities.append(v)
        latents.append(x + h * v)
    return latents[-1]


def test_official_schedule_equals_the_recursion_run_step_by_step(pipeline: FluxPipeline) -> None:
    inputs = prompt_inputs()

    def velocity(latent: torch.Tensor, sigma: float) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = pipeline.transformer(
                hidden_states=latent.float(),
                encoder_hidden_states=inputs["prompt_embeds"],
                pooled_projections=inputs["pooled_prompt_embeds"],
                timestep=torch.tensor([sigma]),
                guidance=torch.tensor([3.5]),
                img_ids=torch.cartesian_prod(*map(torch.arange, (1, 2, 2))).float(),
                txt_ids=torch.zeros(4, 3),
                return_dict=False,
            )[0]
        return found

    noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    packed = noise.view(1, 4, 2, 2, 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, 4, 16)
    expected = recursion(velocity, packed, make_grid(STEPS, shift=SHIFT).sigmas)
    pipeline.scheduler = MeanCacheScheduler.from_schedule(official(), pipeline.scheduler)
    # float32 latents and networks differ from float64 accumulation by some 1e-6
    torch.testing.assert_close(render(pipeline).double(), expected, rtol=0, atol=1e-5)


def test_one_scheduler_serves_many_images(pipeline: FluxPipeline) -> None:
    pipeline.scheduler = MeanCacheScheduler.from_schedule(official(), pipeline.scheduler)
    first = render(pipeline)

    def interrupt(*_: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        render(pipeline, callback_on_step_end=interrupt)
    assert torch.equal(render(pipeline), first)


def test_a_saved_scheduler_keeps_its_schedule(pipeline: FluxPipeline, tmp_path: Path) -> None:
    save_schedule(official(), tmp_path / "b10.json")
    scheduler = MeanCacheScheduler.from_file(tmp_path / "b10.json", pipeline.scheduler)
    pipeline.scheduler = scheduler
    expected = render(pipeline)
    scheduler.save_pretrained(tmp_path / "saved")
    pipeline.scheduler = MeanCacheScheduler.from_pretrained(tmp_path / "saved")
    assert pipeline.scheduler.schedule == official()
    assert torch.equal(render(pipeline), expected)
    pipeline.scheduler = copy.deepcopy(scheduler)
    assert torch.equal(render(pipeline), expected)


def test_a_schedule_can_replace_another(pipeline: FluxPipeline) -> None:
    first = MeanCacheScheduler.from_schedule(official(), pipeline.scheduler)
    euler = bake("euler", make_grid(STEPS, shift=SHIFT), [0, 25])
    assert MeanCacheScheduler.from_schedule(euler, first).schedule == euler


def test_an_analytic_schedule_is_refolded_for_the_pipelines_grid() -> None:
    pipeline = tiny_pipeline(use_dynamic_shifting=True)
    scheduler = MeanCacheScheduler.from_schedule(official(), pipeline.scheduler)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / STEPS, STEPS), mu=0.8)
    grid = make_grid(STEPS, mu=0.8)
    assert scheduler.schedule.grid == grid
    assert scheduler.schedule.weights == bake("official", grid, NODES, SPANS).weights
    assert scheduler.sigmas.tolist() == [*np.array(grid.sigmas)[list(NODES)], 0.0]
    assert scheduler.timesteps.tolist() == np.array(grid.timesteps)[list(NODES)].tolist()


def test_a_grid_made_from_a_count_is_recognised() -> None:
    base = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    grid = make_grid(STEPS, convention="count", shift=SHIFT)
    scheduler = MeanCacheScheduler.from_schedule(bake("euler", grid, [0, 9]), base)
    scheduler.set_timesteps(STEPS)
    assert scheduler.schedule.grid == grid


@pytest.mark.parametrize("steps", [3, 30, 50])
def test_the_grid_of_hunyuan_video_is_recognised(steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    sigmas = np.linspace(1.0, 0.0, steps + 1)[:-1]
    scheduler.set_timesteps(sigmas=sigmas)
    grid = stock_grid(scheduler, sigmas, None)
    assert grid == make_grid(steps, convention="linspace_to_zero", shift=7.0)


def calibrated(schedule: Schedule) -> Schedule:
    return msgspec.structs.replace(schedule, calibration=Evidence(samples=1, seconds=0.0))


def test_a_calibrated_schedule_is_refused_on_another_grid() -> None:
    base = FlowMatchEulerDiscreteScheduler(shift=5.0)
    scheduler = MeanCacheScheduler.from_schedule(calibrated(official()), base)
    with pytest.raises(ScheduleError, match="shift 3 against 50 steps, shift 5"):
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / STEPS, STEPS))


def test_the_number_of_evaluations_is_not_the_number_of_steps(pipeline: FluxPipeline) -> None:
    pipeline.scheduler = MeanCacheScheduler.from_schedule(official(), pipeline.scheduler)
    with pytest.raises(ScheduleError, match=r"grid of 50.*makes one of 10.*num_inference_steps=50"):
        render(pipeline, steps=10)


def started() -> MeanCacheScheduler:
    scheduler = MeanCacheScheduler.from_schedule(
        official(), FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    )
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / STEPS, STEPS))
    return scheduler


def live_tensors(shape: tuple[int, ...]) -> int:
    gc.collect()
    return sum(type(found) is torch.Tensor and found.shape == shape for found in gc.get_objects())


def test_velocities_are_kept_as_long_as_they_are_read() -> None:
    scheduler, shape = started(), (3, 17)
    latent = torch.zeros(shape)
    for timestep in scheduler.timesteps:
        latent = scheduler.step(torch.ones(shape), timestep, latent).prev_sample
        assert live_tensors(shape) <= scheduler.schedule.history + 1
    assert live_tensors(shape) == 1


def test_stepping_past_the_last_node_is_an_error() -> None:
    scheduler, latent = started(), torch.zeros(1, 2)
    for timestep in scheduler.timesteps:
        scheduler.step(latent, timestep, latent)
    with pytest.raises(ScheduleError, match="10 nodes and all are done"):
        scheduler.step(latent, scheduler.timesteps[-1], latent)


def test_entering_the_grid_midway_is_an_error() -> None:
    scheduler, latent = started(), torch.zeros(1, 2)
    with pytest.raises(ScheduleError, match="starts at node 0, but the pipeline starts at node 4"):
        scheduler.set_begin_index(4)
    with pytest.raises(ScheduleError, match="starts at node 3"):
        scheduler.step(latent, scheduler.timesteps[3], latent)


def test_per_token_timesteps_are_an_error() -> None:
    scheduler, latent = started(), torch.zeros(1, 2)
    with pytest.raises(ScheduleError, match="per_token_timesteps"):
        scheduler.step(latent, scheduler.timesteps[0], latent, per_token_timesteps=latent)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "stochastic_sampling"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas"),
        (DDIMScheduler(), "found DDIMScheduler"),
    ],
)
def test_an_unsuitable_scheduler_is_an_error(base: Any, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        MeanCacheScheduler.from_schedule(official(), base)


def damaged_files(directory: Path) -> Iterator[tuple[Path, type[MeanCacheError]]]:
    yield directory / "missing.json", InputError
    truncated = directory / "truncated.json"
    truncated.write_bytes(msgspec.json.encode(official())[:400])
    yield truncated, ScheduleError


def test_a_damaged_file_is_an_error(tmp_path: Path) -> None:
    for path, error in damaged_files(tmp_path):
        with pytest.raises(error, match=path.name):
            MeanCacheScheduler.from_file(path, FlowMatchEulerDiscreteScheduler())


@pytest.mark.parametrize("edit", [{"schedule": None}, {"schedule": {"nodes": [0]}}])
def test_a_configuration_without_a_valid_schedule_is_an_error(
    tmp_path: Path, edit: dict[str, Any]
) -> None:
    started().save_pretrained(tmp_path)
    file = tmp_path / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **edit}))
    with pytest.raises(ScheduleError, match="schedule"):
        MeanCacheScheduler.from_pretrained(tmp_path)


def test_a_schedule_of_two_transformers_runs_where_no_scheduler_sees_the_boundary() -> None:
    """The pipeline chooses its transformer itself, by the timesteps that it is given."""
    pipeline = tiny_pipeline()
    stage = SecondStage(boundary_timestep=800.0)
    schedule = bake(
        "official",
        make_grid(STEPS, shift=SHIFT, second_stage=stage),
        NODES,
        SPANS,
        calibration=Evidence(samples=1, seconds=0.0),
    )
    pipeline.scheduler = MeanCacheScheduler.from_schedule(schedule, pipeline.scheduler)
    found = render(pipeline)
    assert pipeline.scheduler.schedule == schedule
    pipeline.scheduler = MeanCacheScheduler.from_schedule(official(), pipeline.scheduler)
    assert torch.equal(found, render(pipeline))
