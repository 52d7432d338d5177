"""Recording from an unmodified StableDiffusion3Pipeline with a small random transformer.

It hands its scheduler a count only, and combines classifier-free guidance before the step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UNet2DModel,
)

from meancache_trt.calibration.recording import (
    PipelineCall,
    PipelineSampler,
    RecordingScheduler,
    load_pipeline,
)
from meancache_trt.calibration.trajectories import Array, Prompt, record
from meancache_trt.errors import CalibrationError
from meancache_trt.meancache.sigmas import SecondStage, make_grid

STEPS = 8
GUIDANCE = 4.0
PROMPT = Prompt("a ring", seed=3)


@pytest.fixture
def pipeline() -> StableDiffusion3Pipeline:
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=4,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
    )
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def embeddings(text: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(text))
    shapes = {
        "prompt_embeds": (1, 5, 16),
        "pooled_prompt_embeds": (1, 16),
        "negative_prompt_embeds": (1, 5, 16),
        "negative_pooled_prompt_embeds": (1, 16),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


CALL = PipelineCall(steps=STEPS, height=32, width=48, guidance_scale=GUIDANCE, condition=embeddings)


def sample(pipeline: Any, call: PipelineCall = CALL) -> tuple[list[Array], Array, Array]:
    velocities: list[Array] = []
    ends = PipelineSampler(pipeline, call)(PROMPT, lambda _step, v: velocities.append(v))
    return velocities, *ends


def in_dtype(text: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: value.to(dtype) for name, value in embeddings(text).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_latents_bit_equal_the_stock_schedulers(pipeline: Any, dtype: torch.dtype) -> None:
    pipeline.to(dtype)
    call = PipelineCall(
        STEPS, 32, 48, guidance_scale=GUIDANCE, condition=lambda text: in_dtype(text, dtype)
    )
    expected = pipeline(**call.arguments(PROMPT)).images
    _, _, final = sample(pipeline, call)
    assert np.array_equal(final, expected.float().numpy())


def test_a_saved_scheduler_loads_and_steps_as_the_stock_one(tmp_path: Path) -> None:
    stock = FlowMatchEulerDiscreteScheduler(shift=3.0)
    RecordingScheduler.from_config(stock.config).save_pretrained(tmp_path)
    loaded = RecordingScheduler.from_pretrained(tmp_path)
    latent, velocity = torch.ones(1, 4), torch.full((1, 4), 0.3)
    moved = []
    for scheduler in (stock, loaded):
        scheduler.set_timesteps(STEPS)
        moved.append(scheduler.step(velocity, scheduler.timesteps[0], latent).prev_sample)
    assert torch.equal(*moved)


def test_recorded_velocities_are_those_after_guidance(pipeline: Any) -> None:
    velocities, initial, _ = sample(pipeline)
    inputs = embeddings(PROMPT.text)
    unconditional, conditional = (
        pipeline.transformer(
            hidden_states=torch.from_numpy(initial),
            encoder_hidden_states=inputs[f"{kind}prompt_embeds"],
            pooled_projections=inputs[f"{kind}pooled_prompt_embeds"],
            timestep=torch.tensor([1000.0]),
            return_dict=False,
        )[0].detach()
        for kind in ("negative_", "")
    )
    expected = unconditional + GUIDANCE * (conditional - unconditional)
    # one batch of two against two batches of one, in float32
    np.testing.assert_allclose(velocities[0], expected.numpy(), rtol=0, atol=1e-5)


def test_settings_have_the_grid_that_the_pipeline_makes(pipeline: Any) -> None:
    evaluations: list[int] = []
    pipeline.transformer.register_forward_hook(lambda *_: evaluations.append(1))
    settings = PipelineSampler(pipeline, CALL).settings(PROMPT, family="sd3")
    assert settings.grid == make_grid(STEPS, convention="count", shift=3.0, height=32, width=48)
    assert (settings.guidance_scale, settings.family) == (GUIDANCE, "sd3")
    assert len(evaluations) == 1


def test_settings_have_the_second_stage_that_no_scheduler_sees(pipeline: Any) -> None:
    stage = SecondStage(boundary_timestep=875.0)
    settings = PipelineSampler(pipeline, CALL).settings(PROMPT, second_stage=stage)
    assert settings.grid.second_stage == stage


def test_a_pipeline_records_to_disk(pipeline: Any, tmp_path: Path) -> None:
    sampler = PipelineSampler(pipeline, CALL)
    (trajectory,) = record(tmp_path, sampler.settings(PROMPT), sampler, [PROMPT])
    velocities, initial, final = sample(pipeline)
    assert np.array_equal(trajectory.velocities, np.reshape(velocities, (STEPS, -1)))
    assert np.array_equal(trajectory.initial, initial.ravel())
    assert np.array_equal(trajectory.final, final.ravel())


def test_a_saved_pipeline_is_loaded_in_float32(tmp_path: Path) -> None:
    network = UNet2DModel(
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )
    DDPMPipeline(network.half(), DDPMScheduler()).save_pretrained(tmp_path)
    loaded = load_pipeline(tmp_path)
    assert {parameter.dtype for parameter in loaded.unet.parameters()} == {torch.float32}


def test_a_folder_without_a_pipeline_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="expected a complete diffusers pipeline"):
        load_pipeline(tmp_path)


def test_the_pipelines_scheduler_is_put_back(pipeline: Any) -> None:
    def fail(step: int, velocity: Array) -> None:
        raise KeyboardInterrupt

    original = pipeline.scheduler
    sample(pipeline)
    assert pipeline.scheduler is original
    with pytest.raises(KeyboardInterrupt):
        PipelineSampler(pipeline, CALL)(PROMPT, fail)
    assert pipeline.scheduler is original


def test_guidance_and_frames_are_passed_under_the_pipelines_names() -> None:
    call = PipelineCall(
        STEPS, 32, 48, frames=9, guidance_scale=2.0, guidance_argument="true_cfg_scale"
    )
    arguments = call.arguments(PROMPT)
    assert (arguments["true_cfg_scale"], arguments["num_frames"]) == (2.0, 9)
    assert (arguments["prompt"], arguments["generator"].initial_seed()) == ("a ring", 3)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "stochastic_sampling"),
        (DDIMScheduler(), "found DDIMScheduler"),
    ],
)
def test_an_unsuitable_scheduler_is_an_error(pipeline: Any, base: Any, message: str) -> None:
    pipeline.scheduler = base
    with pytest.raises(CalibrationError, match=message):
        sample(pipeline)


def test_per_token_timesteps_are_an_error() -> None:
    scheduler = RecordingScheduler.around(FlowMatchEulerDiscreteScheduler(), sink=None)
    latent = torch.zeros(1, 2)
    with pytest.raises(CalibrationError, match="per_token_timesteps"):
        scheduler.step(latent, torch.tensor(1000.0), latent, per_token_timesteps=latent)
