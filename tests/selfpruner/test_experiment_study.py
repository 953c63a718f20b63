"""What an experiment says: read off alike, paired, adjusted; and when the LLM is said to help."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from selfpruner.experiment_charts import course
from selfpruner.experiment_page import write_experiment_page
from selfpruner.experiment_study import Study
from selfpruner.experiment_table import COLUMNS, lines, table, token_lines

Steps = list[tuple[float, int, float]]


def _row(arm: str, seed: int, tokens: int, steps: Steps, budget: str = "b") -> dict[str, Any]:
    names = ("evaluations", "tokens", "fitness")
    return {
        "cell": {"experiment": "e", "model": "m", "budget": budget, "arm": arm, "seed": seed},
        "figures": {
            "evaluations": 10.0,
            "llm_calls": 3,
            "llm_tokens": tokens,
            "fallbacks": 1,
            "duplicates": 0,
            "seconds": 2.0,
            "steps": [
                dict(zip(names, x, strict=True)) | {"selection_fitness": x[2] + 1} for x in steps
            ],
        },
    }


def _study(rows: Sequence[dict[str, Any]], roles: Mapping[str, Any], **more: Any) -> Study:
    placebos = more.pop("placebos", {})
    return Study("e", rows, roles, placebos, more.pop("control", None), len(rows))


COURSES = [
    _row("wordy", 0, 900, [(1, 100, 0.9), (5, 450, 0.5), (9, 900, 0.1)]),
    _row("wordy", 1, 800, [(1, 100, 0.9), (5, 450, 0.7), (9, 800, 0.3)]),
    _row("terse", 0, 500, [(1, 50, 0.8), (10, 500, 0.4)]),
    _row("genetic", 0, 0, [(1, 0, 0.9), (10, 0, 0.6)]),
]
ROLES = {"wordy": "llm", "terse": "llm", "genetic": "classical"}


def test_one_plan_is_no_search_and_sets_no_limit() -> None:
    one = _row("uniform", 0, 0, [(1, 0, 0.7)])
    one["figures"]["evaluations"] = 1.0
    study = _study([*COURSES, one], ROLES | {"uniform": "classical"})
    assert study.limit == 10
    assert study.values("uniform") == {("m", "b", 0): 1.7}
    assert _study([one], {"uniform": "classical"}).limit == 1
    one["figures"] |= {"evaluations": 4.75, "plans": 1}  # with probes before it
    assert _study([*COURSES, one], ROLES | {"uniform": "classical"}).limit == 10


def test_a_control_of_one_plan_is_not_there_later_than_it_is() -> None:
    """It has spent one evaluation, the arm five until it is as good."""
    one = _row("uniform", 0, 0, [(1, 0, 0.6)])
    one["figures"] |= {"evaluations": 1.0, "plans": 1}
    study = _study([*COURSES, one], ROLES | {"uniform": "classical"})
    assert study.sooner("wordy", "uniform") == pytest.approx(1 / 5)


def test_sooner_is_read_off_the_mean_course() -> None:
    study = _study(COURSES, ROLES)
    # One unit in common: the control ends with 0.6; wordy has 0.5 at 5, terse 0.4 at 10 of 10.
    assert study.sooner("wordy", "genetic") == 2
    assert study.sooner("terse", "genetic") == 1
    assert study.sooner("genetic", "terse") is None
    # Two units: 0.9, 0.9 and 0.5, 0.7 against the 0.2 it ends with itself, at 9.
    assert study.sooner("wordy", "wordy") == pytest.approx(10 / 9)


def test_a_lucky_moment_is_not_sooner() -> None:
    """Of a mean that rises again only the last descent counts."""
    row = _row("lucky", 0, 0, [(2, 0, 0.5), (5, 0, 0.9), (8, 0, 0.4)])
    assert _study([row, *_flat("genetic", [0.6])], ROLES | {"lucky": "classical"}).sooner(
        "lucky", "genetic"
    ) == pytest.approx(10 / 8)


def test_every_run_is_read_off_at_the_same_point() -> None:
    study = _study(COURSES, ROLES)
    assert study.limit == 10
    assert study.token_limit == 500
    rows = {x[0]: dict(zip(COLUMNS, x, strict=True)) for x in lines(study)}
    assert list(rows) == ["wordy", "terse", "genetic"]
    # 4.30265 and 12.7062 standard errors: 0.1 is that of 0.1 and 0.3.
    assert rows["wordy"]["fitness, fresh tokens"] == "1.2000 [-0.0706, 2.4706]"
    assert rows["wordy"]["fitness, search tokens"] == "0.2000 [-1.0706, 1.4706]"
    assert rows["terse"]["fitness, fresh tokens"] == "1.4000"
    assert rows["wordy"]["minus control, paired"] == "-0.5000"  # seed 0 is common
    assert rows["genetic"]["minus control, paired"] == "\N{EN DASH}"
    assert rows["wordy"]["llm tokens"] == "850"
    at_tokens = token_lines(study)
    assert [x[0] for x in at_tokens] == ["terse", "wordy"]
    assert at_tokens[1][2].startswith("1.6000 [")
    assert at_tokens[0] == ("terse", "1", "1.4000", "0.4000")


def test_a_course_holds_its_best_plan_until_the_next() -> None:
    points = course([x["figures"] for x in COURSES[:2]], "tokens")
    assert [(spent, round(mean, 6)) for spent, mean, _, _ in points] == [
        (100, 1.9),
        (450, 1.6),
        (800, 1.4),
    ]
    assert points[0][2:] == pytest.approx((1.9, 1.9))
    assert points[1][2] < 1.6 < points[1][3]


def _flat(arm: str, values: Sequence[float], tokens: int = 50) -> list[dict[str, Any]]:
    return [_row(arm, seed, tokens, [(1, 0, x)]) for seed, x in enumerate(values)]


def _race(units: int, llm: float, placebo: float | None) -> Study:
    """Return a study whose arms differ from the control by these gains and a little noise."""
    noise = [0.002 * (-1) ** i for i in range(units)]
    rows = _flat("genetic", [1 + 0.1 * i for i in range(units)], 0)
    rows += _flat("random", [1.3 + 0.1 * i for i in range(units)], 0)
    rows += _flat("moves", [1 + 0.1 * i - llm + x for i, x in enumerate(noise)])
    roles = {"genetic": "classical", "random": "classical", "moves": "llm"}
    if placebo is not None:
        rows += _flat("fake", [1 + 0.1 * i - placebo - x for i, x in enumerate(noise)])
        roles["fake"] = "placebo"
    return _study(rows, roles, placebos={"moves": ("fake",)})


def test_the_llm_helps_where_it_beats_the_best_control_and_its_placebo() -> None:
    study = _race(12, llm=0.05, placebo=0.0)
    verdict = study.verdict()
    assert study.best_control == "genetic"
    assert verdict.helps
    assert verdict.headline == "The LLM helps."
    assert verdict.reasons[0].startswith("moves: beats genetic by 0.0500 over 12 paired units")
    assert "fake removes the gain" in verdict.reasons[0]


def test_nothing_is_claimed_while_a_placebo_is_half_finished() -> None:
    whole = _race(20, llm=0.05, placebo=0.0)
    assert whole.verdict().helps
    rows = [x for x in whole.rows if x["cell"]["arm"] != "fake" or x["cell"]["seed"] < 10]
    verdict = _study(rows, whole.roles, placebos=whole.placebos).verdict()
    assert not verdict.helps
    assert "no placebo of it is finished" in verdict.reasons[0]


def test_budgets_of_one_seed_claim_nothing() -> None:
    """They share its draws: ten of them are not ten searches."""
    rows = [
        x
        | {
            "cell": x["cell"]
            | {"budget": f"b{x['cell']['seed'] // 2}", "seed": x["cell"]["seed"] % 2}
        }
        for x in _race(12, llm=0.05, placebo=0.0).rows
    ]
    roles = {"genetic": "classical", "random": "classical", "moves": "llm", "fake": "placebo"}
    verdict = _study(rows, roles, placebos={"moves": ("fake",)}).verdict()
    assert not verdict.helps
    assert "too few seeds" in verdict.reasons[0]
    assert "over 12 paired units of 2 seeds" in verdict.reasons[0]


def test_two_fixed_plans_differ_once_whatever_their_seeds() -> None:
    rows = _flat("uniform", [1.3] * 5, 0) + _flat("owl", [1.1] * 5, 0) + _flat("cma", [1.0] * 5, 0)
    for row in rows:
        row["figures"]["plans"] = 9 if row["cell"]["arm"] == "cma" else 1
    found = {
        x.arm: x
        for x in _study(rows, dict.fromkeys(("uniform", "owl", "cma"), "classical")).comparisons(
            "owl"
        )
    }
    assert (found["uniform"].units, found["uniform"].p) == (1, 1.0)
    assert found["cma"].units == 5


def test_figures_that_are_not_finite_are_said() -> None:
    rows = _flat("genetic", [1e30, 1.0], 0) + _flat("random", [1.2, 1.3], 0)
    study = _study(rows, {"genetic": "classical", "random": "classical"}, control="random")
    told = {x[0]: dict(zip(COLUMNS, x, strict=True)) for x in lines(study)}["genetic"]
    assert told["fitness, search tokens"] == "1 of 2 not finite"
    assert told["minus control, paired"] == "not finite"


@pytest.mark.parametrize(
    ("units", "llm", "placebo", "reason"),
    [
        (8, 0.05, 0.0, "too few units: its fitness is 0.0500 lower .* over 8 paired units"),
        (12, -0.05, 0.0, "no gain over genetic: its fitness is 0.0500 higher"),
        (12, 0.0005, 0.0, "no gain over genetic that chance does not explain"),
        (12, 0.05, 0.05, "its placebo fake keeps the gain: beats genetic"),
        (12, 0.05, 0.03, "its placebo fake keeps the gain"),
        (12, 0.05, None, "no placebo of it is finished"),
    ],
)
def test_the_llm_is_not_said_to_help(
    units: int, llm: float, placebo: float | None, reason: str
) -> None:
    verdict = _race(units, llm, placebo).verdict()
    assert not verdict.helps
    assert verdict.headline == "It is not shown that the LLM helps."
    assert re.search(rf"^moves: .*{reason}", verdict.reasons[0])


def test_an_arm_must_beat_its_placebo_also_where_that_one_is_no_gain() -> None:
    """A placebo between the two, noisy: it does not beat the control, nor the arm it."""
    units = 12
    rows = _flat("genetic", [1.0] * units, 0)
    rows += _flat("moves", [0.95 + 0.001 * i for i in range(units)])
    rows += _flat("fake", [0.95 + 0.3 * (-1) ** i for i in range(units)])
    roles = {"genetic": "classical", "moves": "llm", "fake": "placebo"}
    verdict = _study(rows, roles, placebos={"moves": ("fake",)}).verdict()
    assert not verdict.helps
    assert "it does not beat its placebo" in verdict.reasons[0]


def test_the_best_control_is_found_on_units_that_all_arms_have_finished() -> None:
    """An arm that waits for the hardest unit has a lower mean of its own, not a better plan."""
    rows = [_row("guided", seed, 0, [(1, 0, 1.0)]) for seed in range(2)]
    rows += [_row("guided", seed, 0, [(1, 0, 5.0)], "hard") for seed in range(2)]
    rows += [_row("genetic", seed, 0, [(1, 0, 1.2)]) for seed in range(2)]
    rows += [_row("genetic", 0, 0, [(1, 0, 5.2)], "hard")]
    study = _study(rows, {"guided": "classical", "genetic": "classical"})
    assert study.arms == ["guided", "genetic"]
    assert study.best_control == "guided"
    apart = [*rows[:2], _row("genetic", 2, 0, [(1, 0, 0.9)])]
    assert _study(apart, study.roles).arms == ["genetic", "guided"]


def test_nothing_is_claimed_before_all_placebos_are_finished() -> None:
    study = _race(12, llm=0.05, placebo=0.0)
    waiting = {"moves": ("fake", "other")}
    verdict = Study("e", study.rows, study.roles, waiting, None, 99).verdict()
    assert study.verdict().helps
    assert not verdict.helps
    assert "its placebo other is not finished" in verdict.reasons[0]


def test_nothing_is_claimed_before_all_classical_arms_are_finished() -> None:
    """One that has begun shrinks the common units, which may put a weaker control first."""
    moves = [1.1 + 0.001 * i for i in range(10)]
    fake = [1.21 + 0.001 * i for i in range(10)]
    rows = _flat("strong", [1.3, *[1.0] * 9], 0) + _flat("weak", [1.2] * 10, 0)
    rows += _flat("moves", moves) + _flat("fake", fake)
    roles = {"strong": "classical", "weak": "classical", "moves": "llm", "fake": "placebo"}
    whole = _study(rows, roles, placebos={"moves": ("fake",)})
    assert "no gain over strong" in whole.verdict().reasons[0]
    late = {**roles, "late": "classical"}
    for more in ([], _flat("late", [1.25], 0)):
        begun = [x for x in rows if x["cell"]["arm"] != "strong"] + more
        verdict = Study("e", begun, late, whole.placebos, None, 99).verdict()
        assert not verdict.helps
        assert "beats weak" in verdict.reasons[0]
        assert "strong is not finished" in verdict.reasons[0] or "late" in verdict.reasons[0]
    unsure = Study("e", [*rows, *_flat("late", [1.25], 0)], late, whole.placebos, None, 99)
    assert unsure.best_control == "weak"
    assert "late is not finished" in unsure.verdict().reasons[0]
    assert "41 of 99 cells are finished" in table(unsure)
    assert "cells are finished" not in table(whole)


def test_intervals_are_over_seeds_and_not_over_budgets() -> None:
    """Means of two budgets lie apart for certain; that is no doubt about either."""
    rows = [*_flat("genetic", [0.0, 0.2], 0)]
    rows += [_row("genetic", seed, 0, [(1, 0, x)], "c") for seed, x in enumerate([5.0, 5.2])]
    (line,) = lines(_study(rows, {"genetic": "classical"}))
    # Standard deviation 0.1414 within each, 2 degrees of freedom, four values.
    assert line[3] == "3.6000 [3.2958, 3.9042]"


def test_different_machines_are_told_of(tmp_path: Path) -> None:
    study = _race(12, llm=0.05, placebo=0.0)
    assert "different machines" not in table(study)
    for row in study.rows[:5]:
        row["figures"]["machine"] = "AMD <EPYC>"
    assert "different machines" not in table(study)
    study.rows[5]["figures"]["machine"] = "NVIDIA H200"
    told = "moves figures a little: 5 on AMD <EPYC>, 1 on NVIDIA H200."
    assert told in table(study)
    assert told in html.unescape(_page(tmp_path, study))


def test_without_arms_to_compare_nothing_is_claimed() -> None:
    rows = _flat("moves", [1.0] * 12)
    verdict = _study(rows, {"moves": "llm"}).verdict()
    assert (verdict.helps, verdict.reasons) == (
        False,
        ("No cell of a classical control is finished.",),
    )
    rows = _flat("genetic", [1.0], 0)
    verdict = _study(rows, {"genetic": "classical", "moves": "llm"}).verdict()
    assert verdict.reasons == ("No cell of an arm of role llm is finished.",)
    verdict = _study(rows, {"genetic": "classical"}).verdict()
    assert (verdict.helps, verdict.headline) == (False, "No arm asks an LLM.")


def test_units_are_paired_by_budget_and_seed_and_tests_adjusted_as_a_family() -> None:
    rows = []
    for budget, level in (("b", 1.0), ("c", 5.0)):
        for seed in range(5):
            rows.append(_row("genetic", seed, 0, [(1, 0, level)], budget))
            rows.append(_row("one", seed, 9, [(1, 0, level - 0.1)], budget))
            if seed:
                rows.append(_row("two", seed, 9, [(1, 0, level + 0.1)], budget))
    roles = {"genetic": "classical", "one": "llm", "two": "llm"}
    found = {x.arm: x for x in _study(rows, roles).comparisons("genetic")}
    assert (found["one"].units, found["two"].units) == (10, 8)
    assert (found["one"].mean, found["two"].mean) == pytest.approx((-0.1, 0.1))
    assert (found["one"].p, found["two"].p) == pytest.approx((2 / 2**10, 2 / 2**8))
    assert (found["one"].p_holm, found["two"].p_holm) == pytest.approx((4 / 2**10, 2 / 2**8))
    assert found["one"].is_gain
    assert not found["two"].is_gain


def test_a_named_control_is_compared_with_and_the_verdict_keeps_the_best() -> None:
    study = _race(12, llm=0.05, placebo=0.0)
    named = Study("e", study.rows, study.roles, study.placebos, "random", 9)
    assert named.control == "random"
    assert named.verdict() == study.verdict()
    assert "the control is random" in table(named)


def _page(tmp_path: Path, study: Study) -> str:
    file = tmp_path / "e.yaml"
    file.write_text("base: b.yaml  # <b>&\n")
    out = write_experiment_page(study, file, tmp_path / "experiment.html")
    return out.read_text(encoding="utf-8")


def test_the_page_and_the_terminal_say_the_same(tmp_path: Path) -> None:
    study = _race(12, llm=0.05, placebo=0.0)
    page = _page(tmp_path, study)
    text = " ".join(html.unescape(re.sub(r"<(style|svg)\b.*?</\1>|<[^>]*>", " ", page, flags=re.S))
                    .split())  # fmt: skip
    shown = table(study)
    for wanted in (study.verdict().headline, *study.verdict().reasons):
        assert wanted in text
        assert wanted in shown
    for row in lines(study):
        assert f"| {' | '.join(row)} |" in shown
        for cell in row:
            assert cell in text
    assert "base: b.yaml # <b>&" in text
    assert "results.json" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert str(tmp_path) not in page
    assert page.count("<svg") == 2 * 3
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_pages_of_the_same_rows_are_equal_byte_by_byte(tmp_path: Path) -> None:
    study = _race(11, llm=0.05, placebo=0.0)
    assert _page(tmp_path, study) == _page(tmp_path, study)


def test_hostile_names_are_text(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>$\\frac{"
    rows = [{**x, "cell": {**x["cell"], "model": evil}} for x in COURSES]
    page = _page(tmp_path, _study(rows, ROLES))
    assert "<script" not in page
    assert html.escape(evil) in page


def test_one_finished_cell_makes_a_page(tmp_path: Path) -> None:
    study = _study(COURSES[3:], ROLES)
    assert "No cell of an arm of role llm is finished." in _page(tmp_path, study)
    assert table(study).count("\n| genetic |") == 1
