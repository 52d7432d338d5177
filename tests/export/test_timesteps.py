from __future__ import annotations

import pytest
import torch
from diffusers.models.embeddings import Timesteps
from torch import nn

from meancache_trt.export.timesteps import fixed_timestep_frequencies


@pytest.mark.parametrize("is_cosine_first", [True, False])
@pytest.mark.parametrize(("shift", "scale"), [(0, 1), (1, 1000)])
def test_fixed_frequencies_give_the_same_bits(
    *, is_cosine_first: bool, shift: int, scale: int
) -> None:
    network = nn.Sequential(Timesteps(256, is_cosine_first, shift, scale))
    timesteps = torch.linspace(0, 1000, 101)
    expected = network(timesteps)
    with fixed_timestep_frequencies(network):
        assert not isinstance(network[0], Timesteps)
        assert torch.equal(network(timesteps), expected)
    assert isinstance(network[0], Timesteps)
