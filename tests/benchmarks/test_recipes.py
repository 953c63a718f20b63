"""The table of whole recipes: what stands in it, and what it says of targets."""

from __future__ import annotations

import math

import pytest

from benchmarks import recipes
from selfpruner.cells import Row
from selfpruner.config import RunConfig


def _row(name: str, share: float, losses: list[float]) -> Row:
    mean = sum(losses) / len(losses)
    figures = {"perplexity": math.exp(mean), "dense": math.exp(1.0), "losses": losses}
    return {"cell": {"row": name, "share": share}, "figures": figures | {"machine": "one"}}


def test_the_better_rival_counts_and_intervals_are_paired() -> None:
    ours = [2.0, 4.0, 3.0]
    near, far = [x + 0.5 for x in ours], [x + 1.0 for x in ours]
    rows = [_row(recipes.DEFAULT, 0.7, ours)]
    rows += [_row(name, 0.7, x) for name, x in zip(recipes.UNIFORM, (far, near), strict=True)]
    *_, last = recipes._table(rows).splitlines()
    ratio = f"{math.exp(-0.5):.3f}"
    assert (
        last == f"0.7: {ratio} ({ratio} to {ratio}; target 0.75: reached) of {recipes.UNIFORM[1]}"
    )


def test_rows_that_were_not_asked_for_are_left_out() -> None:
    rows = [_row(recipes.DEFAULT, 0.5, [3.0, 3.5]), _row("flap", 0.5, [3.0, 3.25])]
    lines = recipes._table(rows).splitlines()
    assert lines[0] == "| recipe | 0.5 kept |"
    assert [x.split(" |")[0] for x in lines[2:4]] == [f"| {recipes.DEFAULT}", "| flap"]
    assert len(lines) == 6
    assert lines[-1].endswith("missed) of flap")


def test_rows_of_different_machines_are_said_to_be() -> None:
    rows = [_row(recipes.DEFAULT, 0.5, [3.0, 3.5]), _row("flap", 0.5, [3.0, 3.25])]
    assert "machines" not in recipes._table(rows)
    rows[1]["figures"]["machine"] = "another"
    assert "rows are of different machines: another, one" in recipes._table(rows).splitlines()


@pytest.mark.parametrize("row", list(recipes.ROWS))
def test_every_row_is_a_sound_configuration(row: str) -> None:
    settings = recipes.ROWS[row] | {"budget.parameters": 0.5}
    config = recipes._config(settings)
    assert config.budget.parameters == 0.5
    assert config.data.calibrate.tokens == 32_768
    less = recipes._scaled(recipes._config, settings, 0.25)
    assert less.data.calibrate.tokens == 8192
    assert [x.tokens for x in less.data.report] == [8192]
    assert less.search.evaluations == config.search.evaluations / 4
    assert less.pruning == config.pruning


def test_searches_cost_the_same_tokens_at_every_scale() -> None:
    """An evaluation is a window of the default's search, and all search tokens of the paper's."""
    spent: dict[str, list[int]] = {"best": [], "self_pruner": []}
    for row, found in spent.items():
        settings = recipes.ROWS[row] | {"budget.parameters": 0.7}
        for scale in (1, 0.25):
            config = recipes._scaled(recipes._config, settings, scale)
            data, window = config.data, config.search.window
            each = data.search.tokens if window is None else window * data.length
            found.append(config.search.evaluations * each)
    assert spent["best"] == spent["self_pruner"]
    assert spent["best"][0] == 4 * spent["best"][1]


def test_a_cell_knows_its_settings_and_not_where_the_data_lies() -> None:
    settings = recipes.ROWS["best"] | {"budget.parameters": 0.7}
    one, two = (recipes._digest(recipes._config(settings, root=x)) for x in ("a", "b"))
    other = recipes._config(settings | {"search.slopes": 2}, root="a")
    assert one == two != recipes._digest(other)


@pytest.mark.parametrize("row", list(recipes.ROWS))
def test_rows_share_one_arena_that_may_be_streamed(row: str) -> None:
    settings = recipes.ROWS[row] | recipes.STREAMED | {"budget.parameters": 0.5}
    if row not in recipes.STREAMABLE:
        with pytest.raises(ValueError, match="streamed"):
            recipes._config(settings)
        return
    shared = RunConfig.model_validate_json(recipes._shared(recipes._config(settings)))
    assert shared.memory == "streamed"
    assert not shared.search.asks_llm
