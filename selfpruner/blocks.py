"""Blocks of work: plans that share layers, on sequences that are scored together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from pruning.plan import Plan


@dataclass(frozen=True)
class Block:
    """Plans and sequences whose scores one worker computes.

    Attributes:
        rows: where the plans stand among those asked for.
        plans: the plans.
        start: where the sequences begin among those asked for.
        sequences: the sequences.
    """

    rows: tuple[int, ...]
    plans: tuple[Plan, ...]
    start: int
    sequences: tuple[int, ...]


def blocks(
    plans: Sequence[Plan],
    sequences: Sequence[int],
    workers: int,
    batch_size: int,
    *,
    each: int = 2,
) -> list[Block]:
    """Return the blocks of a score, about `each` a worker.

    Two, so that none waits long for another; one where each block reads its layers from disk.

    Plans are shared out by the layers that a trie of them has, neighbours in the trie together.
    Only where there are fewer groups of plans than workers are sequences, too, and then between
    two micro-batches: no sum is rounded otherwise than in one block.
    """
    groups = _groups(plans, each * workers)
    parts = list(_parts(sequences, -(-workers // max(len(groups), 1)), batch_size))
    return [
        Block(tuple(rows), tuple(plans[i] for i in rows), start, part)
        for rows in groups
        for start, part in parts
    ]


def _groups(plans: Sequence[Plan], count: int) -> list[list[int]]:
    """Return the positions of the plans in at most `count` groups of about as many new layers."""
    order = sorted(range(len(plans)), key=lambda i: plans[i].to_json())
    if not order:
        return []
    costs = [len(plans[order[0]].layers)]
    costs += [_new_layers(plans[a], plans[b]) for a, b in pairwise(order)]
    total, before, numbers = sum(costs), 0, {}
    for position, cost in zip(order, costs, strict=True):
        numbers[position] = before * count // total
        before += cost
    return [list(group) for _, group in groupby(order, key=numbers.__getitem__)]


def _new_layers(before: Plan, plan: Plan) -> int:
    """Return the layers of a plan from the first one on that differs from its neighbour's."""
    pairs = enumerate(zip(before.layers, plan.layers, strict=True))
    first = next((i for i, (a, b) in pairs if a != b), len(plan.layers))
    return len(plan.layers) - first


def _parts(
    sequences: Sequence[int], count: int, batch_size: int
) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Yield start and sequences of at most `count` parts, each of whole micro-batches."""
    batches = -(-len(sequences) // batch_size)
    size = batch_size * max(1, -(-batches // count))
    for start in range(0, len(sequences), size):
        yield start, tuple(sequences[start : start + size])
