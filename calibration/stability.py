"""Whether samples agree on which edges are costly: what a schedule for all of them supposes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from meancache_trt.calibration.costs import CostRule, measure_costs
from meancache_trt.calibration.trajectories import Trajectories
from meancache_trt.meancache.evidence import Stability

_PLAIN = CostRule("euler", max_span=1)
"""What plain reuse of the velocity costs: no estimate of ours comes in."""


def edge_stability(trajectories: Trajectories) -> Stability | None:
    """Compare the costs of plain edges over samples, one sample in memory at a time.

    None for a single sample, and where T < 3. Edges of a single step cost nothing and are left
    out, so that fewer steps leave nothing to compare.
    """
    samples = len(trajectories)
    if samples < 2 or trajectories.grid.steps < 3:
        return None
    sigmas = trajectories.grid.array()
    costs = measure_costs(trajectories, sigmas, _PLAIN)
    is_edge = np.triu(np.ones(costs.mean.shape[:2], bool), k=2)
    mean = costs.mean[..., 0][is_edge]
    correlations = []
    for trajectory in trajectories:
        own = measure_costs([trajectory], sigmas, _PLAIN).mean[..., 0][is_edge]
        correlations.append(_rank_correlation(own, (samples * mean - own) / (samples - 1)))
    variation = costs.deviation()[..., 0][is_edge] / np.maximum(mean, np.finfo(float).tiny)
    return Stability(
        variation=float(np.median(variation)),
        correlation=float(np.mean(correlations)),
        worst_correlation=float(np.min(correlations)),
    )


def _rank_correlation(values: NDArray[np.float64], others: NDArray[np.float64]) -> float:
    """Spearman's ρ; costs are sums of floats, so that ties do not matter."""
    ranks = [array.argsort().argsort() for array in (values, others)]
    return float(np.asarray(np.corrcoef(ranks))[0, 1])
