"""Plain reuse on the path whose largest error is least (LeMiCa, arXiv 2511.00090).

LeMiCa measures an edge by what its reuse alone does to the finished picture, which takes a run of
the network for each edge, and compares paths lexicographically: by the largest error, then by the
next. Here edges have the costs of `calibration.costs`, which take no run, and paths of the same
largest error are compared by their sum. The weights are plain reuse; what differs is the choice of
nodes.
"""

from __future__ import annotations

from meancache_trt.meancache.methods.base import Method
from meancache_trt.meancache.methods.euler import fold_reuse

METHOD = Method(
    "lemica", "plain reuse, nodes by the least worst edge", fold_reuse, placement="minimax"
)
