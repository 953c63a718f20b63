"""Classical operators on levels: pure NumPy, one generator in, one plan out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from agent.projection import Levels, Space
from agent.settings import Granularity

Generator = np.random.Generator

_ATTENTION_SWITCH = 0.3
_EXCHANGE = 0.25
_LARGEST_JUMP = 8  # a switch moves at most this part of all MLP levels


def generator(seed: int, generation: int, slot: int, attempt: int = 0) -> Generator:
    """Return the random generator of one slot of one generation."""
    key = (seed, generation, slot, attempt) if attempt else (seed, generation, slot)
    return np.random.default_rng(key)


def random_plan(space: Space, rng: Generator, granularity: Granularity = "block") -> Levels:
    """Return a plan of random rates around the target, some even and some wild."""
    spread = rng.uniform(0.05, 0.4)
    shares = space.target + spread * rng.standard_normal((space.layers, 2))
    shares[:, 0] += rng.uniform(-0.2, 0.5)
    if granularity == "layer":
        shares[:, 0] = shares[:, 1]
    return space.project(shares)


def mutate(
    levels: Sequence[tuple[int, int]],
    space: Space,
    rng: Generator,
    granularity: Granularity = "block",
) -> Levels:
    """Return a neighbour by level switches (EvoPress, arXiv 2410.14649, section 3).

    n = min(U{1..3}, U{1..3}) times, one block gives levels to another block of its kind; now and
    then an attention unit is exchanged for MLP steps everywhere.
    """
    if granularity == "layer":
        return _mutate_rates(levels, space, rng)
    can_attention = space.bounds[0][0] < space.bounds[0][1]
    child = list(levels)
    if can_attention and rng.random() < _EXCHANGE:
        return _exchange(child, space, rng)
    for _ in range(min(rng.integers(1, 4), rng.integers(1, 4))):
        block = 0 if can_attention and rng.random() < _ATTENTION_SWITCH else 1
        size = 1 if block == 0 else _jump(space, rng)
        child = _switch(child, block, size, space, rng)
    return space.settle(child)


def crossover(
    first: Sequence[tuple[int, int]],
    second: Sequence[tuple[int, int]],
    space: Space,
    rng: Generator,
    granularity: Granularity = "block",
) -> Levels:
    """Return a child that has each block (or layer) from either parent, then projected."""
    picks = rng.random((space.layers, 2)) < 0.5
    if granularity == "layer":
        picks[:, 0] = picks[:, 1]
    mixed = np.where(picks, space.shares(first), space.shares(second))
    if granularity == "layer":
        mixed[:, 0] = mixed[:, 1]
    return space.project(mixed)


def tournament(fitness: Sequence[float], count: int, rng: Generator) -> list[int]:
    """Return `count` distinct indices: the best one, then winners of tournaments of two."""
    left = sorted(range(len(fitness)), key=lambda i: (fitness[i], i))
    chosen = left[:1]
    left = left[1:]
    while left and len(chosen) < count:
        winner = int(min(rng.integers(len(left)), rng.integers(len(left))))
        chosen.append(left.pop(winner))
    return chosen


def _jump(space: Space, rng: Generator) -> int:
    """Return how many MLP levels a switch moves: a power of two, small ones as likely as large."""
    largest = max(1, len(space.grid.mlp) // _LARGEST_JUMP)
    return 1 << int(rng.integers(largest.bit_length()))


def _switch(levels: Levels, block: int, size: int, space: Space, rng: Generator) -> Levels:
    """Return `levels` with `size` levels moved between two blocks of one kind, where possible."""
    low, high = space.bounds[block]
    givers = [i for i, pair in enumerate(levels) if pair[block] > low]
    takers = [i for i, pair in enumerate(levels) if pair[block] < high]
    if not givers or not takers:
        return levels
    giver, taker = int(rng.choice(givers)), int(rng.choice(takers))
    if giver == taker:
        return levels
    size = min(size, levels[giver][block] - low, high - levels[taker][block])
    return shifted(shifted(levels, giver, block, -size), taker, block, size)


def shifted(levels: Sequence[tuple[int, int]], layer: int, block: int, by: int) -> Levels:
    """Return `levels` with one level changed by `by`; the caller keeps it in range."""
    result = list(levels)
    attention, mlp = result[layer]
    result[layer] = (attention + by, mlp) if block == 0 else (attention, mlp + by)
    return result


def _exchange(levels: Levels, space: Space, rng: Generator) -> Levels:
    """Return `levels` with one attention unit more or less, paid by or given to the MLPs."""
    low, high = space.bounds[0]
    moves = [(i, d) for i, (a, _) in enumerate(levels) for d in (-1, 1) if low <= a + d <= high]
    layer, by = moves[int(rng.integers(len(moves)))]
    return space.settle(shifted(levels, layer, 0, by))


def _mutate_rates(levels: Sequence[tuple[int, int]], space: Space, rng: Generator) -> Levels:
    """Return a neighbour where a layer gives some of its rate to another, both blocks alike."""
    rates = space.shares(levels)[:, 1].copy()
    for _ in range(min(rng.integers(1, 4), rng.integers(1, 4))):
        giver, taker = rng.integers(space.layers, size=2)
        amount = _jump(space, rng) / len(space.grid.mlp)
        rates[giver] -= amount
        rates[taker] += amount
    return space.project(np.stack([rates, rates], axis=1))
