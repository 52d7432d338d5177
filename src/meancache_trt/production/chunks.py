"""A job list cut into chunks, which is what a process takes on at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from meancache_trt.meancache.files import encode_json
from meancache_trt.meancache.hashing import digest_of
from meancache_trt.production.tickets import Group, Ticket


@dataclass(frozen=True)
class Chunk:
    """Jobs of one group, to be rendered in batches of at most `batch_size`.

    `name` is the SHA-256 of what the batches follow from: the jobs, in order, and the batch size.
    """

    name: str
    tickets: tuple[Ticket, ...]
    batch_size: int

    @property
    def group(self) -> Group:
        """What its jobs have in common."""
        return self.tickets[0].group


def group_name(ticket: Ticket) -> str:
    """A text that two tickets of a bundle share where their groups are equal."""
    group = ticket.group
    return f"{group.schedule.name} {group.resolution.size} {ticket.schedule_digest[:16]}"


def chunks_of(
    tickets: Iterable[Ticket],
    batch_size: Callable[[Group], int],
    batches_a_chunk: Callable[[Group], int],
) -> list[Chunk]:
    """Cut jobs into chunks, ordered by their first jobs; a group's jobs keep their order.

    The same tickets and sizes give the same chunks in every process, so give all jobs of a file
    also where some are done. The sizes are asked for once a group.
    """
    groups: dict[str, list[Ticket]] = {}  # by name: to hash a schedule's tables takes long
    for ticket in tickets:
        groups.setdefault(group_name(ticket), []).append(ticket)
    chunks = []
    for members in groups.values():
        size = batch_size(members[0].group)
        length = size * batches_a_chunk(members[0].group)
        chunks += [_chunk(part, size) for part in _cut(members, length)]
    return sorted(chunks, key=lambda chunk: chunk.tickets[0].index)


def _chunk(tickets: tuple[Ticket, ...], batch_size: int) -> Chunk:
    content = [batch_size, [(ticket.job.id, ticket.digest) for ticket in tickets]]
    return Chunk(digest_of(encode_json(content)), tickets, batch_size)


def _cut(tickets: Sequence[Ticket], length: int) -> list[tuple[Ticket, ...]]:
    return [tuple(tickets[start : start + length]) for start in range(0, len(tickets), length)]
