"""The C++ host, built and installed once, and the stand-ins' bundles that it renders.

The build folder is build/host in the checkout, so that a second run compiles what changed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from numpy.typing import NDArray
from scripts.host.building import ROOT, build, build_host, missing, openvino_folder

from meancache_trt import build as stages
from meancache_trt.bundle import Bundle
from meancache_trt.conditioning import Conditioning
from meancache_trt.engine.native import NativeLibrary
from meancache_trt.meancache.schedule import bake
from meancache_trt.render import Pipeline
from tests.conftest import OFFICIAL, STEPS
from tests.export import tiny_flux2, tiny_wan, tiny_z_image

WITHOUT_STANDIN = {
    "z_image": tiny_z_image.tiny_pipeline,
    "wan": tiny_wan.tiny_a14b,
    "flux2": tiny_flux2.tiny_pipeline,
}
PROMPT, NEGATIVE = "a small red circle at the top left", "a blue square"


@dataclass(frozen=True)
class Host:
    """The build folder, the prefix that the host was installed to, and the built examples."""

    build: Path

    @property
    def prefix(self) -> Path:
        return self.build / "prefix"

    @property
    def examples(self) -> Path:
        return self.build / "examples"

    @property
    def library(self) -> Path:
        return self.prefix / "lib" / "libmeancache_trt.so"


def require_tools() -> None:
    """Skip where there is nothing to build with, saying what is missing."""
    lacking = missing()
    if lacking:
        pytest.skip(f"the C++ host needs {', '.join(lacking)}; scripts/install says how")


@pytest.fixture(scope="session")
def host() -> Host:
    """The host with OpenVINO, tested by CTest and installed; the examples built from there."""
    require_tools()
    if openvino_folder() is None:
        pytest.skip("the C++ host is tested with the OpenVINO of its wheel, which is not installed")
    built = Host(ROOT / "build" / "host")
    built.build.mkdir(parents=True, exist_ok=True)
    warnings = "-Wall -Wextra -Wpedantic -Werror"
    with FileLock(built.build / ".lock"):
        build_host(built.build)
        options = [
            f"-DCMAKE_PREFIX_PATH={built.prefix}",
            f"-DCMAKE_CXX_FLAGS={warnings}",
            f"-DCMAKE_C_FLAGS={warnings}",
        ]
        build(built.examples, options, source=ROOT / "examples")
    return built


@pytest.fixture(scope="session")
def library(host: Host) -> NativeLibrary:
    return NativeLibrary(host.library)


@dataclass(frozen=True)
class Subject:
    """A stand-in's bundle and one encoded prompt, with its negative prompt where it takes one."""

    bundle: Path
    conditioning: Conditioning

    @property
    def tensors(self) -> Mapping[str, NDArray[np.float32]]:
        return self.conditioning.tensors


@pytest.fixture(scope="session", params=["flux", "qwen_image", "hunyuan_video", *WITHOUT_STANDIN])
def subject(
    request: pytest.FixtureRequest, shared_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Subject:
    """Each of the three stand-ins: an image, true CFG, and a video; and without a stand-in tables
    of each sample, a video by two transformers with true CFG on UniPC's grid, and another mu.
    """
    if request.param == "flux":
        return _subject(shared_bundle)
    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    bundle = root / f"host-{request.param}.mcb"
    with FileLock(f"{bundle}.lock"):
        if not bundle.exists():
            _export(request.param, bundle)
    return _subject(bundle)


@pytest.fixture(scope="session")
def flux(shared_bundle: Path) -> Subject:
    return _subject(shared_bundle)


def _subject(bundle: Path) -> Subject:
    with Pipeline(Bundle.open(bundle), threads=1, embedding_cache="off") as pipeline:
        prompt = pipeline.encode([PROMPT])
        if not pipeline.bundle.export.guidance.is_classifier_free:
            return Subject(bundle, prompt)
        return Subject(bundle, prompt.followed_by(pipeline.encode([NEGATIVE])))


def _model(name: str, folder: Path) -> str:
    """The stand-in, or of a family that has none a tiny random pipeline."""
    if name not in WITHOUT_STANDIN:
        return f"standin/{name}"
    WITHOUT_STANDIN[name]().save_pretrained(folder)
    return str(folder)


def _export(name: str, path: Path) -> None:
    checkpoint = stages.find_model(_model(name, path.with_suffix("")))
    # What is compared here are two hosts on one set of graphs, which other tests compare with
    # diffusers.
    side = 64 if name == "flux2" else None  # by default 512, too large for a test
    options = stages.ExportOptions(
        size=stages.picture_size(checkpoint, side, side), is_parity_checked=False
    )
    bundle = stages.export(checkpoint, path, options, note=lambda _: None, is_forced=False)
    with Pipeline(bundle) as pipeline:
        grid = pipeline.grid(STEPS)
    nodes, spans = OFFICIAL["b10"]
    bundle.add_schedule(bake("euler", grid, range(STEPS), name="full"))
    bundle.add_schedule(bake("official", grid, nodes, spans, name="b10"))
