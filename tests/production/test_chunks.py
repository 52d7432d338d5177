"""Chunks: every job in one of them, the same in every process, whatever was done before."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from meancache_trt.production.chunks import chunks_of, group_name
from meancache_trt.production.tickets import Group, Ticket
from tests.production.made import B5, FULL, make_ticket

KINDS = [(B5, (64, 64)), (FULL, (64, 64)), (B5, (128, 64))]


def tickets_of(kinds: list[int]) -> list[Ticket]:
    return [
        make_ticket(index, schedule=KINDS[kind][0], size=KINDS[kind][1])
        for index, kind in enumerate(kinds)
    ]


lists_of_kinds = st.lists(st.sampled_from(range(len(KINDS))), max_size=40)


@given(kinds=lists_of_kinds, batch_size=st.integers(1, 5), batches=st.integers(1, 3))
def test_each_job_is_in_one_chunk_of_its_group(
    kinds: list[int], batch_size: int, batches: int
) -> None:
    tickets = tickets_of(kinds)
    chunks = chunks_of(tickets, lambda _: batch_size, lambda _: batches)
    assert sorted(t.index for chunk in chunks for t in chunk.tickets) == list(range(len(kinds)))
    assert len({chunk.name for chunk in chunks}) == len(chunks)
    firsts = [chunk.tickets[0].index for chunk in chunks]
    assert firsts == sorted(firsts)
    for chunk in chunks:
        assert all(ticket.group == chunk.group for ticket in chunk.tickets)
        assert chunk.batch_size == batch_size
    for kind in set(kinds):
        own = [c for c in chunks if kinds[c.tickets[0].index] == kind]
        assert [len(c.tickets) for c in own[:-1]] == [batch_size * batches] * (len(own) - 1)
        in_order = [t.index for c in own for t in c.tickets]
        assert in_order == [index for index, found in enumerate(kinds) if found == kind]


@given(kinds=lists_of_kinds)
def test_chunks_follow_from_the_jobs_alone(kinds: list[int]) -> None:
    first, second = (chunks_of(tickets_of(kinds), lambda _: 2, lambda _: 2) for _ in range(2))
    assert first == second


def test_a_group_has_its_own_sizes_and_is_asked_for_them_once() -> None:
    asked: list[Group] = []

    def batch_size(group: Group) -> int:
        asked.append(group)
        return 3 if group.schedule == B5 else 1

    chunks = chunks_of(tickets_of([0, 1, 0, 1, 0, 0]), batch_size, lambda _: 1)
    assert [[t.index for t in chunk.tickets] for chunk in chunks] == [[0, 2, 4], [1], [3], [5]]
    assert [chunk.batch_size for chunk in chunks] == [3, 1, 1, 3]
    assert [group.schedule for group in asked] == [B5, FULL]


def test_a_chunk_is_named_after_its_jobs_and_batch_size() -> None:
    def name(*tickets: Ticket, batch_size: int = 2) -> str:
        (chunk,) = chunks_of(tickets, lambda _: batch_size, lambda _: 8)
        return chunk.name

    first, second = make_ticket(0), make_ticket(1)
    others = [
        name(second, first),
        name(first),
        name(first, second, batch_size=3),
        name(first, make_ticket(1, seed=9)),
        name(first, make_ticket(1, job_id="other")),
    ]
    assert len({name(first, second), *others}) == 6
    assert name(first, second) == name(make_ticket(0), make_ticket(7, job_id="job1"))
    assert len(name(first)) == 64


def test_equal_groups_have_one_name_and_others_another() -> None:
    kinds = [make_ticket(0, schedule=schedule, size=size) for schedule, size in KINDS]
    kinds.append(make_ticket(0, schedule_digest="e" * 64))
    for one, other in itertools.combinations(kinds, 2):
        assert group_name(one) != group_name(other)
    assert group_name(make_ticket(1, guidance_scale=7.0, seed=4)) == group_name(kinds[0])
    assert group_name(kinds[0]).startswith("b5 64x64 ")
