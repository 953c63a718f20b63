"""Measuring on tiny models: shapes, caches and clocks; no figure of this machine is asserted."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from pruning.families import family_of
from pruning.plan import Grid, LayerPlan, Plan
from pruning.shaping import shaped
from pruning.slicing import layer_plan
from selfpruner import profiling, stopwatch
from selfpruner.latency_table import Detail, LatencyTable, Workload
from selfpruner.profiling import cache_folder, known_table, measure, random_plans
from selfpruner.progress import Progress
from selfpruner.run_folder import RunFolder

DECODE, PREFILL = Workload("decode", 2, 12), Workload("prefill", 2, 12)
QUICK = Detail(attention=3, mlp=3, rounds=2, calibration=2, graphs=True)
PLAN = Plan((LayerPlan(1, 2, 16), LayerPlan(2, 2, 48), LayerPlan(2, 2, 8)))


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen2", "qwen3"])
def model(
    make_model: Callable[[str], PreTrainedModel], request: pytest.FixtureRequest
) -> PreTrainedModel:
    return make_model(request.param)


@pytest.fixture(scope="module")
def llama(make_model: Callable[[str], PreTrainedModel]) -> PreTrainedModel:
    return make_model("llama")


def test_shaped_models_have_the_widths_and_no_memory(model: PreTrainedModel) -> None:
    found = shaped(model, PLAN)
    assert layer_plan(found) == PLAN
    own = {x.untyped_storage().data_ptr() for x in model.parameters()}
    for name, weight in found.named_parameters():
        assert weight.untyped_storage().data_ptr() in own, name
        assert weight.is_contiguous()
    assert torch.isfinite(found(torch.zeros(1, 4, dtype=torch.long)).logits).all()


def test_the_dense_shape_is_the_dense_model(model: PreTrainedModel) -> None:
    _, architecture = family_of(model)
    tokens = torch.arange(8).unsqueeze(0)
    found = shaped(model, Plan.dense(architecture))
    assert torch.equal(found(tokens).logits, model(tokens).logits)


def test_a_timed_prefill_is_the_stock_one(model: PreTrainedModel) -> None:
    run = stopwatch.Pass(model, family_of(model)[0], PREFILL)
    stock = model(torch.zeros(2, 12, dtype=torch.long), logits_to_keep=1).logits
    assert torch.allclose(run(), stock, atol=1e-5)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_timed_token_is_the_stock_one(model: PreTrainedModel, in_place: bool) -> None:
    """With zeros in the cache: a stock model is given the same cache."""
    from transformers import DynamicCache

    family, architecture = family_of(model)
    run = stopwatch.Pass(model, family, DECODE, in_place=in_place)
    cache = DynamicCache()
    for index in range(architecture.layers):
        zeros = torch.zeros(2, 2, 12, 8)
        cache.update(zeros, zeros, index)
    token = torch.zeros(2, 1, dtype=torch.long)
    stock = model(token, past_key_values=cache, use_cache=True).logits
    for _ in range(3):  # the token of one call is forgotten before the next
        run.reset()
        assert torch.allclose(run(), stock, atol=1e-5)


def test_a_timed_token_of_a_shaped_model(llama: PreTrainedModel) -> None:
    for in_place in (False, True):
        run = stopwatch.Pass(shaped(llama, PLAN), family_of(llama)[0], DECODE, in_place=in_place)
        run.reset()
        assert run().shape == (2, 1, 96)


def test_models_take_turns_there_and_back(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that charges 10 ms a call of the wide model and 4 of the narrow one, three times as
    much while another process runs: from the second round on."""
    clock, visits = [0.0], []
    wide, narrow = Plan((LayerPlan(2, 2, 48),) * 3), PLAN

    def called(self: stopwatch.Pass) -> None:
        is_wide = layer_plan(self._model) == wide
        visits.append("wide" if is_wide else "narrow")
        clock[0] += (0.010 if is_wide else 0.004) * (3 if rounds else 1)

    rounds: list[int] = []
    seen: list[int] = []

    def visited() -> None:
        seen.append(len(visits))
        rounds.extend([1] * (len(seen) == 2))

    monkeypatch.setattr(stopwatch.Pass, "__call__", called)
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    models = [shaped(llama, wide), shaped(llama, narrow)]
    family = family_of(llama)[0]
    found = stopwatch.take_turns(models, family, DECODE, 2, graphs=True, on_visit=visited)
    assert found[:, 1] / found[:, 0] == pytest.approx([0.4, 0.4])
    by_visit = [visits[a:b] for a, b in pairwise([2, *seen])]
    assert [set(x) for x in by_visit] == [set(), {"wide", "narrow"}, {"wide", "narrow"}, set()]
    assert by_visit[1] == ["narrow", *["wide", "narrow"] * 10]


def _linear(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """A machine that takes 5 ms, 2 a KV group and 0.25 a channel; the plans that it timed."""
    timed: list[Plan] = []

    def measured(
        _: Any, plans: list[Plan], _workload: Any, detail: Detail, on_visit: Any
    ) -> NDArray[np.float64]:
        timed.extend(plans)
        row = [
            5 + sum(2 * x.kv_groups + 0.25 * x.mlp_channels for x in plan.layers) for plan in plans
        ]
        on_visit()
        return np.array([row] * detail.rounds)

    monkeypatch.setattr(profiling, "timed", measured)
    return timed


def test_a_linear_machine_is_found(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = _linear(monkeypatch)
    grid = Grid.of(family_of(llama)[1], 8)
    table = measure(llama, grid, DECODE, QUICK, Progress())
    assert len(timed) == len(set(timed))
    assert (table.offset, table.slope) == (pytest.approx(0, abs=1e-9), pytest.approx(1))
    assert table.repeatability == 0
    unseen = [x for x in random_plans(grid, 3, 10, seed=7) if x not in timed]
    assert len(unseen) == 10
    for plan in unseen:
        by_hand = 5 + sum(2 * x.kv_groups + 0.25 * x.mlp_channels for x in plan.layers)
        assert table.milliseconds(plan) == pytest.approx(by_hand)


def test_more_than_a_window_is_refused(
    make_model: Callable[[str], PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    mistral = make_model("mistral")
    grid = Grid.of(family_of(mistral)[1], 8)
    monkeypatch.setattr(mistral.config, "sliding_window", 12)
    with pytest.raises(ValueError, match=r"^tokens: got 12, .* within a window of 12; .*$"):
        measure(mistral, grid, DECODE, QUICK, Progress())


@pytest.mark.parametrize("workload", [DECODE, PREFILL])
@pytest.mark.parametrize("unit", ["kv_group", "query_head"])
def test_a_real_measurement_is_sound(llama: PreTrainedModel, workload: Workload, unit: Any) -> None:
    grid = Grid.of(family_of(llama)[1], 8, unit)
    table = measure(llama, grid, workload, QUICK, Progress())
    assert table.workload == workload
    assert table.unit == unit
    assert table.slope >= 0
    assert table.repeatability >= 0
    assert [x for x, _ in table.attention] == [1, 2]
    assert [x for x, _ in table.mlp][::2] == [8, 48]
    assert table.dense_milliseconds > 0
    assert table.speedup(Plan.dense(family_of(llama)[1])) == 1
    assert LatencyTable.from_json(json.loads(json.dumps(table.to_json()))) == table


def test_tables_are_measured_once(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SELFPRUNER_CACHE", str(tmp_path / "cache"))
    timed = _linear(monkeypatch)
    grid = Grid.of(family_of(llama)[1], 8)

    def count(*args: Any, **options: Any) -> int:
        timed.clear()
        known_table(*args, Progress(), **options)
        return len(timed)

    assert count(llama, grid, DECODE, QUICK) > 0
    assert count(llama, grid, DECODE, QUICK) == 0
    assert count(llama, grid, DECODE, QUICK, again=True) > 0
    # What times depend on: the workload, how finely, the shape, the dtype and the threads.
    assert count(llama, grid, PREFILL, QUICK) > 0
    assert count(llama, grid, DECODE, Detail(3, 3, 3, 2, True)) > 0
    assert count(llama, Grid.of(family_of(llama)[1], 16), DECODE, QUICK) > 0
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    assert count(llama, grid, DECODE, QUICK) > 0
    torch.set_num_threads(before)
    assert count(llama, grid, DECODE, QUICK) == 0
    with monkeypatch.context() as patch:  # another CPU that goes by the same name
        patch.setattr(profiling, "cpu_instructions", lambda: "avx2")
        assert count(llama, grid, DECODE, QUICK) > 0
    files = list((tmp_path / "cache" / "latency").iterdir())
    assert len(files) == 6
    assert {"device", "threads", "torch", "transformers", "dtype", "architecture"} <= set(
        json.loads(files[0].read_text())["key"]
    )


def test_a_cache_that_cannot_be_written_is_no_failure(
    llama: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SELFPRUNER_CACHE", str(tmp_path / "file"))
    _linear(monkeypatch)
    grid = Grid.of(family_of(llama)[1], 8)
    assert known_table(llama, grid, DECODE, QUICK, Progress()).base > 0
    assert "the latency table is not kept" in capsys.readouterr().err


def test_the_cache_is_the_users_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SELFPRUNER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "selfpruner"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "selfpruner"


def test_a_run_keeps_the_table_it_began_with(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert profiling.stored_table(None) is None
    assert profiling.stored_table(folder) is None
    table = LatencyTable(
        DECODE, "kv_group", LayerPlan(2, 2, 48), 3, 1.0, ((1, 1.0), (2, 2.0)), ((8, 1.0), (48, 6.0))
    )
    profiling.store_table(table, folder)
    assert profiling.stored_table(folder) == table


def test_random_plans_are_of_all_sizes() -> None:
    grid = Grid("kv_group", (1, 2, 3, 4), tuple(range(8, 65, 8)), LayerPlan(4, 2, 64))
    plans = random_plans(grid, 16, 12, seed=1)
    sizes = [sum(x.mlp_channels for x in plan.layers) for plan in plans]
    assert len(set(plans)) == 12
    assert sizes[-1] - sizes[0] > 0.4 * 16 * 64
    assert plans == random_plans(grid, 16, 12, seed=1)
    assert plans != random_plans(grid, 16, 12, seed=2)
