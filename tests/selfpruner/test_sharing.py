"""A fitness shared out to processes: every pair once, the numbers of one process, bit for bit."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from io import StringIO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from langgraph.runtime import RunControl

from pruning.elastic import ElasticModel
from pruning.elastic_layerwise import LayerwiseElastic
from pruning.plan import LayerPlan, Plan
from selfpruner.arena import Arena
from selfpruner.blocks import blocks
from selfpruner.cluster import places
from selfpruner.fitness import Fitness
from selfpruner.progress import Progress
from selfpruner.resident import Post, opened_arena, score_block
from selfpruner.run_folder import RunFolder
from selfpruner.sharing import SharedFitness
from selfpruner.stopping import TerminatedError, draining
from selfpruner.workforce import Workforce, threads_set

Draw = Callable[[Arena, int], list[Plan]]

PLANS = st.lists(st.integers(1, 3), min_size=3, max_size=3).map(
    lambda widths: Plan(tuple(LayerPlan(1, 1, width) for width in widths))
)


@given(st.lists(PLANS, max_size=20), st.integers(0, 17), st.integers(1, 5), st.integers(1, 8))
def test_blocks_hold_every_pair_once(
    plans: list[Plan], num_sequences: int, workers: int, batch_size: int
) -> None:
    sequences = [100 + i for i in range(num_sequences)]
    pairs = []
    for block in blocks(plans, sequences, workers, batch_size):
        assert [plans[i] for i in block.rows] == list(block.plans)
        assert block.start % batch_size == 0
        end = block.start + len(block.sequences)
        assert end == num_sequences or end % batch_size == 0
        assert block.sequences == tuple(sequences[block.start : end])
        pairs += [(i, s) for i in block.rows for s in block.sequences]
    assert sorted(pairs) == [(i, s) for i in range(len(plans)) for s in sequences]


def test_plans_that_share_layers_stay_together() -> None:
    widths = [(1, 1, 1), (2, 1, 1), (1, 1, 2), (2, 1, 2), (1, 1, 3), (2, 1, 3)]
    plans = [Plan(tuple(LayerPlan(1, 1, w) for w in row)) for row in widths]
    found = {block.rows for block in blocks(plans, range(2), 1, 8)}
    assert found == {(0, 2, 4), (1, 3, 5)}


def test_sequences_are_shared_out_where_plans_are_few() -> None:
    plan = Plan((LayerPlan(1, 1, 1),))
    assert [x.start for x in blocks([plan], range(32), 4, 4)] == [0, 8, 16, 24]
    assert [x.start for x in blocks([plan], range(4), 4, 4)] == [0]


def _node(alive: bool = True, **resources: float) -> dict[str, object]:
    return {"Alive": alive, "Resources": resources}


def test_a_cluster_has_a_place_for_each_gpu_or_each_so_many_cores() -> None:
    nodes = [_node(CPU=6.0), _node(CPU=3.0, GPU=2.0), _node(alive=False, CPU=64.0, GPU=8.0)]
    assert places(nodes, 1, on_gpus=False) == 9
    assert places(nodes, 2, on_gpus=False) == 4
    assert places(nodes, 4, on_gpus=True) == 2
    with pytest.raises(ValueError, match="--threads: got 7; allowed: up to 6"):
        places(nodes, 7, on_gpus=False)
    with pytest.raises(ValueError, match="the cluster has no GPU"):
        places(nodes[:1], 1, on_gpus=True)


def test_processes_score_as_one_does(opened: tuple[Arena, RunFolder], plans_of: Draw) -> None:
    arena, folder = opened
    plans, sequences = plans_of(arena, 9), [3, 0, 1, 6, 7]
    assert isinstance(arena.score, Fitness)
    post = Post.of(arena.bench, folder, 1)
    own = Workforce(2, asked_threads=1)
    with threads_set(1), own.residents(partial(score_block, post), False, print) as crew:
        shared = SharedFitness(arena.score, crew, 2, print)
        assert shared.num_sequences == 8
        assert np.array_equal(shared(plans, sequences), arena.score(plans, sequences))
        assert np.array_equal(shared(plans[:1], range(8)), arena.score(plans[:1], range(8)))
        assert shared([], sequences).shape == (0, 5)


def test_a_model_that_goes_layer_by_layer_scores_the_empty_block_of_a_worker_that_opens(
    opened: tuple[Arena, RunFolder],
) -> None:
    arena = opened[0]
    assert isinstance(arena.score, Fitness)
    assert isinstance(arena.prunable, ElasticModel)
    layerwise = arena.score.of(LayerwiseElastic(arena.prunable, 2))
    assert layerwise([], []).shape == (0, 0)


def test_a_worker_that_ranks_otherwise_is_refused(
    opened: tuple[Arena, RunFolder], plans_of: Draw
) -> None:
    arena, folder = opened
    post = Post.of(arena.bench, folder, 1)
    other = tuple((n, '{"order_hash": "0"}' if n == "order.json" else x) for n, x in post.began)
    work = partial(score_block, Post(post.config, other, 1))
    with Workforce(2).residents(work, False, print) as crew:
        assert isinstance(arena.score, Fitness)
        shared = SharedFitness(arena.score, crew, 2, print)
        with pytest.raises(ValueError, match=r"the ranking came out as .*, the run began with 0"):
            shared(plans_of(arena, 2), [0])


@pytest.mark.usefixtures("importable")
def test_a_batch_that_kills_is_given_up(opened: tuple[Arena, RunFolder], plans_of: Draw) -> None:
    from scoring_workers import doomed  # type: ignore[import-not-found]

    arena, told = opened[0], list[str]()
    assert isinstance(arena.score, Fitness)
    with Workforce(1).residents(doomed, False, told.append) as crew:
        shared = SharedFitness(arena.score, crew, 2, told.append)
        with pytest.raises(ValueError, match="3 workers died over one batch of 1 plans"):
            shared(plans_of(arena, 1), [0])
    assert told == ["a worker died; its batch is scored again"] * 2


@pytest.mark.usefixtures("importable")
def test_a_worker_that_dies_after_a_stop_was_asked_for_ends_the_search(
    opened: tuple[Arena, RunFolder], plans_of: Draw
) -> None:
    from scoring_workers import doomed  # type: ignore[import-not-found]

    arena, told = opened[0], list[str]()
    assert isinstance(arena.score, Fitness)
    with (
        Workforce(1).residents(doomed, False, told.append) as crew,
        draining(RunControl(), told.append),
    ):
        shared = SharedFitness(arena.score, crew, 2, told.append)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(TerminatedError):
            shared(plans_of(arena, 1), [0])
    assert told == ["SIGTERM: stopping after this step; once more stops at once"]


def test_one_process_alone_scores_itself(opened: tuple[Arena, RunFolder]) -> None:
    arena, folder = opened
    with opened_arena(arena.bench, folder, Progress(StringIO()), Workforce()) as found:
        assert isinstance(found.score, Fitness)
