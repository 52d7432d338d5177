"""The packaged stand-in from prompt to picture, text encoders included, on the fake TensorRT."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from meancache_trt.bundle import Bundle
from meancache_trt.engine.tensorrt.runtime import TensorRtRuntime
from meancache_trt.render import Pipeline
from tests.fakes.cuda import FakeDevice
from tests.fakes.plans import plan_everything
from tests.fakes.tensorrt import fake_library

PROMPTS = ["large plain red circle left gray", "small striped blue star right pink"]


def test_its_pictures_have_the_bits_of_onnx_runtime_with_one_launch_an_image(
    shared_bundle: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own.mcb"
    shutil.copytree(shared_bundle, own, symlinks=True)
    bundle = Bundle.open(own)
    plan_everything(bundle)
    device = FakeDevice()
    library, _ = fake_library(device)
    with (
        TensorRtRuntime(bundle, library, device, cache_directory=tmp_path / "cache") as runtime,
        Pipeline(bundle, runtime=runtime, embedding_cache="off") as pipeline,
    ):
        made = [pipeline.render([prompt], seed=3, schedule="b6")[0] for prompt in [*PROMPTS] * 2]
    assert device.launches == len(made) - 1  # all but the first
    assert not device.violations
    with Pipeline(bundle, backend="onnxruntime", threads=1, embedding_cache="off") as pipeline:
        wanted = pipeline.render(PROMPTS, seed=3, schedule="b6")
    for found, expected in zip(made, [*wanted] * 2, strict=True):
        assert np.array_equal(found.latent, expected.latent)
        assert np.array_equal(found.pixels, expected.pixels)
