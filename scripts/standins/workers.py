"""Data-parallel workers, one thread each, that meet once a step.

On a machine that is shared, threads of one process wait for each other at hundreds of
barriers a step; processes wait once.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence

import torch
from progress import Budget
from torch import distributed, nn


def join() -> None:
    """Joins the workers that `torch.distributed.run` started; alone, does nothing."""
    if "WORLD_SIZE" in os.environ:
        distributed.init_process_group("gloo")


def rank() -> int:
    """This worker's index."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def count() -> int:
    """How many workers there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def wait() -> None:
    """Returns when every worker has come here; what the first one wrote is then on disk."""
    if distributed.is_initialized():
        distributed.barrier()


def shared_budget(seconds: float) -> Budget:
    """A budget on the first worker's clock; only that worker prints."""
    return Budget(seconds, agreed_clock, every_s=30.0 if rank() == 0 else math.inf)


def agreed_clock() -> float:
    """The first worker's monotonic time in seconds."""
    now = torch.tensor(time.monotonic(), dtype=torch.float64)
    if distributed.is_initialized():
        distributed.broadcast(now, src=0)
    return now.item()


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replaces every gradient by its mean over the workers."""
    if not distributed.is_initialized():
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= count()
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, mean in zip(gradients, parts, strict=True):
        gradient.copy_(mean.view_as(gradient))
