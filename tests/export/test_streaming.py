"""Weights that are read while a module runs, on the tiny models of every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from meancache_trt.export.checkpoint import Checkpoint
from meancache_trt.export.family import Size
from meancache_trt.export.job import Job
from meancache_trt.export.networks import transformers
from meancache_trt.export.parity_inputs import parity_cases, random_feeds
from meancache_trt.export.registry import detect
from meancache_trt.export.streaming import stream_weights
from tests.export.families import TINY


@pytest.mark.parametrize("name", TINY)
def test_a_streamed_network_computes_what_a_loaded_one_does(name: str, tmp_path: Path) -> None:
    TINY[name]().save_pretrained(tmp_path / "tiny")
    source = Checkpoint(tmp_path / "tiny")
    family = detect(source.path)
    configs = source.model_configs(family.text_components)
    job = Job(source, family, configs, Size(32, 48, 12, 5), tmp_path, "link", lambda _: None)
    (model,) = transformers(job)
    case = parity_cases(family, configs)[1]
    feeds = {n: torch.from_numpy(v) for n, v in random_feeds(model.signature, case).items()}
    network = model.empty("float32")
    stream_weights(network, model.tensors)
    velocity = family.wrapper().reference_velocity
    with torch.inference_mode():
        found = velocity(network, feeds, case.symbols)
        expected = velocity(model.load(), feeds, case.symbols)
    assert torch.equal(found, expected)
    assert {name for name, value in network.state_dict().items() if not value.is_meta} == set()
