from __future__ import annotations

import math
import threading
import time
from dataclasses import replace

from meancache_trt.production.forecast import Forecast, Shape
from meancache_trt.production.waiting import Entry, WaitingRoom, joined
from meancache_trt.production.work import Encoded
from tests.production.tickets import make_ticket

EVALUATION_S = 10.0
"""Of one picture; make_ticket's schedule has three evaluations."""
GROUP = make_ticket().group


def make_room(*sizes: int, batch_wait_s: float = 0.0) -> WaitingRoom:
    forecast = Forecast()
    for size in sizes:
        shape = Shape.of(make_ticket(), 32, size)
        forecast.note_loop(shape, 1e3 * EVALUATION_S * size, preparation_ms=0.0)
    return WaitingRoom(forecast, sizes, batch_wait_s)


def make_entry(
    index: int, *, priority: int = 0, deadline_s: float = math.inf, schedule: str = "b3"
) -> Entry:
    ticket = make_ticket(str(index), index=index, schedule=schedule)
    if schedule == "b3":
        ticket = replace(ticket, group=GROUP)
    now = time.monotonic()
    return Entry(ticket, priority, now + deadline_s, now, text_tokens=32, encoding_ms=0.0)


def put_ready(room: WaitingRoom, entry: Entry, text_tokens: int = 32) -> Entry:
    room.put(entry)
    assert room.next_to_encode() is entry
    room.make_ready(entry, Encoded((entry.ticket,), text_tokens, ({},)))
    return entry


def taken(room: WaitingRoom) -> list[list[int]]:
    """Batches in order, by their jobs' indices."""
    batches = []
    while (batch := room.take()[0]) != []:
        batches.append([entry.ticket.index for entry in batch])
    return batches


def test_higher_priorities_go_first_and_equal_ones_in_order_of_arrival():
    room = make_room(1)
    for index, priority in enumerate([0, 5, 0, 5, 9]):
        put_ready(room, make_entry(index, priority=priority))
    assert taken(room) == [[4], [1], [3], [0], [2]]


def test_prompts_of_higher_priority_are_encoded_first():
    room = make_room(1)
    low, high = make_entry(0), make_entry(1, priority=1)
    room.put(low)
    room.put(high)
    assert [room.next_to_encode() for _ in range(3)] == [high, low, None]


def test_a_job_that_is_not_encoded_is_not_taken():
    room = make_room(1)
    room.put(make_entry(0))
    put_ready(room, make_entry(1, priority=1))
    assert taken(room) == [[1]]


def test_jobs_of_a_kind_share_batches_of_the_sizes_there_are():
    room = make_room(1, 2, 4)
    for index in range(7):
        put_ready(room, make_entry(index))
    assert taken(room) == [[0, 1, 2, 3], [4, 5], [6]]


def test_jobs_of_other_schedules_or_text_lengths_are_batches_of_their_own():
    room = make_room(1, 2, 4)
    put_ready(room, make_entry(0))
    put_ready(room, make_entry(1, schedule="other"))
    put_ready(room, make_entry(2), text_tokens=8)
    put_ready(room, make_entry(3))
    assert taken(room) == [[0, 3], [1], [2]]


def test_a_batch_is_no_larger_than_the_deadlines_of_its_jobs_allow():
    room = make_room(1, 2, 4)  # 30, 60 and 120 s
    put_ready(room, make_entry(0, deadline_s=100.0))
    for index in range(1, 4):
        put_ready(room, make_entry(index))
    assert taken(room) == [[0, 1], [2, 3]]


def test_a_job_whose_deadline_forbids_a_batch_is_left_for_its_own():
    room = make_room(1, 2)
    put_ready(room, make_entry(0))
    put_ready(room, make_entry(1, deadline_s=45.0))
    put_ready(room, make_entry(2))
    assert taken(room) == [[0, 2], [1]]


def test_a_job_that_cannot_meet_its_deadline_any_more_is_given_up():
    room = make_room(1)
    hopeless = put_ready(room, make_entry(0, deadline_s=29.0))
    hopeful = put_ready(room, make_entry(1, deadline_s=60.0))
    assert room.take() == ([hopeful], [hopeless])


def test_a_job_that_left_is_not_taken():
    room = make_room(1)
    entry = put_ready(room, make_entry(0))
    room.remove(entry)
    assert room.take() == ([], [])


def test_a_job_is_held_back_until_its_batch_is_full():
    room = make_room(1, 2, batch_wait_s=600.0)
    put_ready(room, make_entry(0))
    batches = []
    taker = threading.Thread(target=lambda: batches.append(room.take()[0]))
    taker.start()
    put_ready(room, make_entry(1))
    taker.join()
    assert [entry.ticket.index for entry in batches[0]] == [0, 1]


def test_a_job_is_not_held_back_where_it_would_be_late_or_nobody_can_come():
    room = make_room(1, 2, batch_wait_s=600.0)
    put_ready(room, make_entry(0, deadline_s=30.6))
    assert taken(room) == [[0]]
    put_ready(room, make_entry(1))
    room.close()
    assert taken(room) == [[1]]


def test_what_would_be_done_before_a_job_is_counted_in_batches():
    room = make_room(1, 2)
    for index in range(3):
        put_ready(room, make_entry(index))
    before_ms, times = room.forecast(make_entry(3))
    assert (before_ms, times.total) == (60e3, 60e3)  # with job 2
    before_ms, times = room.forecast(make_entry(4, schedule="other"))
    assert (before_ms, times.total) == (90e3, 30e3)
    before_ms, times = room.forecast(make_entry(5, schedule="other", priority=1))
    assert (before_ms, times.total) == (0.0, 30e3)


def test_joined_jobs_are_one_batch_in_order():
    room = make_room(1, 2)
    entries = [put_ready(room, make_entry(index), text_tokens=8) for index in range(2)]
    batch = joined(entries, None)
    assert batch.tickets == tuple(entry.ticket for entry in entries)
    assert batch.text_tokens == 8
    assert len(batch.conditionings) == 2
