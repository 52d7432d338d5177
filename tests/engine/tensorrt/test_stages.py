"""Stages in threads of their own, on lanes of one runtime."""

from __future__ import annotations

import numpy as np

from meancache_trt.conditioning import joined
from meancache_trt.graphs import Graphs
from meancache_trt.meancache.noise import draw_noise
from meancache_trt.meancache.schedule import Schedule
from meancache_trt.production.jobs import Job
from meancache_trt.production.stages import Conveyor, Stage
from meancache_trt.production.tickets import Group, Settings, Ticket
from meancache_trt.production.work import Decode, Denoise, Encoded, Pictures
from tests.engine.tensorrt.conftest import SCALE, Opened, inputs_of, schedule_of, session_on

BATCHES = 12
SETTINGS = Settings()


def ticket(fake: Opened, schedule: Schedule, index: int) -> Ticket:
    return Ticket(
        index=index,
        job=Job(id=f"job-{index}", prompt="a prompt"),
        seed=index,
        negative_prompt="",
        guidance_scale=SCALE,
        group=Group(schedule, fake.bundle.export.resolution),
        schedule_digest=schedule.name,
        digest=str(index),
    )


def batch_of(fake: Opened, schedule: Schedule, first: int, size: int) -> Encoded:
    indices = range(first, first + size)
    tensors = tuple(inputs_of(fake.bundle, 1, index)[1] for index in indices)
    tickets = tuple(ticket(fake, schedule, index) for index in indices)
    return Encoded(tickets, fake.bundle.export.text_tokens, tensors)


def alone(fake: Opened, encoded: Encoded) -> np.ndarray:
    """Pictures by ONNX Runtime, one after the other in one thread."""
    from meancache_trt.engine.onnxruntime import OnnxRuntime  # noqa: PLC0415

    group = encoded.tickets[0].group
    with OnnxRuntime(1) as runtime:
        session = session_on(fake.bundle, runtime, group.schedule)
        pictures = [
            session.run(
                draw_noise("philox", ticket.seed, group.resolution.noise_shape)[None],
                joined([tensors]),
                SCALE,
            ).pictures[0]
            for ticket, tensors in zip(encoded.tickets, encoded.conditionings, strict=True)
        ]
    return np.stack(pictures)


def test_lanes_in_threads_give_what_one_thread_gives(fake: Opened) -> None:
    """Denoising and decoding are under way together; the fake breaks where memory is shared."""
    graphs = Graphs(fake.bundle, fake.runtime)
    schedules = [schedule_of(budget) for budget in (2, 3)]
    batches = [
        batch_of(fake, schedules[number % 2], 4 * number, 1 + number % 2)
        for number in range(BATCHES)
    ]
    made: dict[int, np.ndarray] = {}

    def keep(item: object) -> list[None]:
        assert isinstance(item, Pictures), item
        found = zip(item.tickets, item.renderings, strict=True)
        made.update({ticket.index: rendering.pixels for ticket, rendering in found})
        return []

    def fail(item: object, error: Exception) -> None:
        raise error

    stages = [
        Stage("denoise", lambda: Denoise(graphs, SETTINGS)),
        Stage("decode", lambda: Decode(graphs.lane(), SETTINGS)),
        Stage("keep", lambda: keep),
    ]
    with Conveyor(stages, room=1, on_failure=fail) as conveyor:
        for encoded in batches:
            conveyor.put(encoded)
    for encoded in batches:
        found = np.stack([made[ticket.index] for ticket in encoded.tickets])
        assert np.array_equal(found, alone(fake, encoded))
