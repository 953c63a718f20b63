from __future__ import annotations

import json

import pytest

from evaluators.metric import Metric

METRIC = Metric("perplexity", 12.5, None, 1, "", higher_is_better=False)


def test_json_both_ways() -> None:
    assert Metric.from_json(json.loads(json.dumps(METRIC.to_json()))) == METRIC


@pytest.mark.parametrize("change", [{"extra": 1}, {"n": None}])
def test_wrong_keys_are_refused(change: dict[str, int | None]) -> None:
    data = METRIC.to_json() | change
    if change == {"n": None}:
        del data["n"]
    with pytest.raises(ValueError, match="allowed exactly"):
        Metric.from_json(data)
