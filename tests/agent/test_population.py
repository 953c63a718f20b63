"""Classical operators: neighbours, children and random plans stay within and tight."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from agent import population
from agent.projection import Space
from agent.settings import Granularity
from pruning.architecture import Architecture
from pruning.budget import Budget
from pruning.plan import Grid

ARCHITECTURE = Architecture("llama", 30, 576, 9, 3, 64, 1536, 49152, True)


@pytest.fixture
def space() -> Space:
    grid = Grid.of(ARCHITECTURE, 32)
    return Space(grid, Budget.of(ARCHITECTURE, grid, "parameters", 0.7))


@pytest.mark.parametrize("granularity", ["block", "layer"])
def test_operators_keep_the_budget(space: Space, granularity: Granularity) -> None:
    rng = np.random.default_rng(0)
    first = population.random_plan(space, rng, granularity)
    second = population.random_plan(space, rng, granularity)
    for _ in range(100):
        first = population.mutate(first, space, rng, granularity)
        child = population.crossover(first, second, space, rng, granularity)
        for levels in (first, second, child):
            assert space.budget.is_within(levels)
            assert space.budget.is_tight(levels)


def test_mutation_is_a_small_step(space: Space) -> None:
    rng = np.random.default_rng(1)
    parent = population.random_plan(space, rng)
    changed = []
    for _ in range(200):
        child = population.mutate(parent, space, rng)
        pairs = list(zip(parent, child, strict=True))
        if [a for a, _ in parent] == [a for a, _ in child]:
            changed.append(sum(x != y for x, y in pairs))
            assert sum(m for _, m in parent) == sum(m for _, m in child)
    assert len(changed) > 50
    assert max(changed) <= 6


def test_children_have_their_parents_blocks(space: Space) -> None:
    """Where both parents agree in attention the child agrees too; both parents contribute."""
    rng = np.random.default_rng(2)
    first = space.hold([2] * 30, rng.uniform(0.3, 0.9, 30))
    second = space.hold([2] * 30, rng.uniform(0.3, 0.9, 30))
    child = population.crossover(first, second, space, rng)
    assert [a for a, _ in child] == [2] * 30
    nearer = Counter(
        abs(c - x) < abs(c - y)
        for (_, x), (_, y), (_, c) in zip(first, second, child, strict=True)
        if x != y
    )
    assert min(nearer[True], nearer[False]) >= 5


def test_one_rate_a_layer_means_both_blocks_alike(space: Space) -> None:
    rng = np.random.default_rng(3)
    levels = population.mutate(population.random_plan(space, rng, "layer"), space, rng, "layer")
    by_mlp = sorted(levels, key=lambda x: x[1])
    assert [a for a, _ in by_mlp] == sorted(a for a, _ in levels)


def test_generators_are_streams_of_their_own() -> None:
    draws = {
        population.generator(*key).integers(2**60)
        for key in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 0, 1)]
    }
    assert len(draws) == 5
    again = population.generator(0, 1, 0).integers(2**60)
    assert again in draws


def test_tournament_has_the_best_first_and_prefers_good_ones() -> None:
    fitness = [5.0, 1.0, 4.0, 2.0, 3.0]
    chosen = [population.tournament(fitness, 3, np.random.default_rng(i)) for i in range(300)]
    assert all(x[0] == 1 and len(set(x)) == 3 for x in chosen)
    counts = Counter(i for x in chosen for i in x)
    assert counts[3] > counts[4] > counts[2] > counts[0]
    assert sorted(population.tournament(fitness, 9, np.random.default_rng(0))) == list(range(5))
