"""The tiny pipelines of every family, with bundles that the tests share."""

from __future__ import annotations

import pytest
from diffusers import DiffusionPipeline

from tests.engine_transformer.subjects import Subject
from tests.export.families import shared_export


def made(name: str, factory: pytest.TempPathFactory) -> Subject:
    tiny = shared_export(name, factory)
    pipeline = DiffusionPipeline.from_pretrained(tiny.checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    return Subject(pipeline, tiny.bundle)


@pytest.fixture(scope="session")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return made("flux", tmp_path_factory)


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return made("qwen_image", tmp_path_factory)


@pytest.fixture(scope="session")
def hunyuan(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return made("hunyuan_video", tmp_path_factory)


@pytest.fixture(scope="session")
def z_image(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return made("z_image", tmp_path_factory)


@pytest.fixture(scope="session")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return made("sd3", tmp_path_factory)


@pytest.fixture(scope="session")
def flux2(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return made("flux2", tmp_path_factory)


@pytest.fixture(scope="session")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return made("wan", tmp_path_factory)
