"""Judging two models: which side is which."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from evaluators.tasks import TaskScore
from selfpruner import judge
from selfpruner.config import EvaluationSettings


def _score(*correct: int) -> TaskScore:
    share, rows = sum(correct) / len(correct), tuple(range(len(correct)))
    return TaskScore(share, share, 0.1, 0.1, len(correct), "validation", correct, rows)


def test_a_loss_is_below_zero() -> None:
    found = judge.difference({"boolq": _score(1, 1)}, {"boolq": _score(1, 0)}, seed=0)
    assert found is not None
    assert found.points == -50
    assert judge.difference({}, {}, seed=0) is None


def test_both_models_are_timed_under_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def compare_latency(models: dict[str, nn.Module], **_: Any) -> list[dict[str, Any]]:
        seen.update(models)
        return []

    monkeypatch.setattr(judge, "compare_latency", compare_latency)
    monkeypatch.setattr(judge, "is_streamed", lambda _: False)
    dense, pruned = nn.Linear(2, 2), nn.Linear(2, 1)
    judge.speed_rows(dense, pruned, EvaluationSettings(), seed=0)
    assert seen == {"dense": dense, "pruned": pruned}
