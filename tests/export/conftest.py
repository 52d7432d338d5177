"""Tiny folders and exports of them, which the tests share and do not change."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import FluxPipeline

from meancache_trt.bundle import Bundle
from meancache_trt.export import export_components
from meancache_trt.manifest import Exported
from tests.export import wan_subject
from tests.export.tiny_flux import tiny_pipeline
from tests.export.tiny_wan import tiny_a14b

HEIGHT, WIDTH = 32, 48


@pytest.fixture(scope="session")
def pipeline() -> FluxPipeline:
    built = tiny_pipeline()
    built.set_progress_bar_config(disable=True)
    return built


@pytest.fixture(scope="session")
def flux_folder(pipeline: FluxPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux") / "tiny-flux"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def export_folder(flux_folder: Path) -> Path:
    return flux_folder.parent / "exported"


@pytest.fixture(scope="session")
def exported(flux_folder: Path, export_folder: Path) -> Exported:
    return export_components(flux_folder, export_folder, height=HEIGHT, width=WIDTH)


@pytest.fixture(scope="session")
def a14b(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Bundle]:
    """A checkpoint of two transformers, and its bundle."""
    scale = ("--guidance-scale-2", str(wan_subject.SCALE_2))
    return wan_subject.exported(tiny_a14b(), tmp_path_factory.mktemp("a14b"), *scale)
