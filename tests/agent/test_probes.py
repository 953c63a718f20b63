"""Probes: which cuts, what they cost, what is on file, and the curves that they give scale to."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent import ledger, probes
from agent.graph import run_search
from agent.ledger import Ledger, Probe
from agent.loss_curves import loss_curves
from agent.settings import RacingSettings
from agent.state import SearchContext

Scene = Callable[..., SearchContext]

# The scene has 6 layers, 3 attention levels below the dense one, and 4 sequences.
CUTS = 1 + 6 * (3 + 1)


def run(context: SearchContext, folder: Path, **options: Any) -> Any:
    return run_search(context, folder / "checkpoints.sqlite", **options)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(x) for x in (folder / "probes.jsonl").read_text().splitlines()]


def test_every_block_is_cut_near_the_target(scene: Scene) -> None:
    space = scene().space
    found = probes.cuts(space)
    assert len(found) == len(set(found)) == CUTS
    assert found[0] == (None, None, None)
    assert found[1:5] == [(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 10)]  # 11 of 16 steps: 69 %
    dense = [(3, 15)] * 6
    assert probes.levels(space, found[0]) == dense
    assert probes.levels(space, (4, 1, 10)) == [*dense[:4], (3, 10), dense[5]]
    assert probes.levels(space, (2, 0, 1)) == [*dense[:2], (1, 15), *dense[3:]]


def test_probes_come_first_and_are_charged(scene: Scene, tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    context = scene(folder=tmp_path, probes=2)
    result = run(context, tmp_path, on_event=events.append)
    assert [x["kind"] for x in events[:CUTS]] == ["probe"] * CUTS
    assert events[CUTS - 1]["equivalents"] == CUTS / 2
    assert (result.evaluations, result.equivalents) == (27, 27 + CUTS / 2)
    rows = lines(tmp_path)
    assert all(len(x["values"]) == 2 and x["of"] == 4 for x in rows)
    assert list(rows[0]) == ["layer", "block", "level", "of", "values"]
    assert context.ledger.equivalents(before=0) == context.ledger.equivalents() - 27


def test_without_probes_there_is_no_file(scene: Scene, tmp_path: Path) -> None:
    run(scene(folder=tmp_path), tmp_path)
    assert not (tmp_path / "probes.jsonl").exists()


def test_probes_that_leave_no_evaluation_are_refused(scene: Scene, tmp_path: Path) -> None:
    """25 plans on 2 of 4 sequences are 12.5 evaluations: 14 leave one, 13 do not."""
    message = (
        r"search\.probes: 25 plans on 2 of 4 sequences come to 12\.5 evaluations, "
        r"search\.evaluations is 13 and one must be left"
    )
    with pytest.raises(ValueError, match=message):
        run(scene(folder=tmp_path, probes=2, evaluations=13), tmp_path)
    assert not (tmp_path / "probes.jsonl").exists()
    result = run(scene(folder=tmp_path, probes=2, evaluations=14), tmp_path)
    assert (result.evaluations, result.equivalents) == (1, 13.5)


@pytest.mark.parametrize("racing", [RacingSettings(), RacingSettings(bound=None)])
@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("number", [0, 1, 7, 24])
def test_probes_survive_kills(
    scene: Scene,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    torn: bool,
    racing: RacingSettings,
) -> None:
    whole = scene(folder=tmp_path / "whole", probes=2, racing=racing)
    run(whole, tmp_path / "whole")
    count, append = itertools.count(), ledger._append

    def dying(path: Path, data: dict[str, Any]) -> None:
        if path.name == "probes.jsonl" and next(count) == number:
            if torn:
                with path.open("a") as file:
                    file.write(json.dumps(data)[:-7])
            raise KeyboardInterrupt
        append(path, data)

    folder = tmp_path / "cut"
    with monkeypatch.context() as patch:
        patch.setattr(ledger, "_append", dying)
        with pytest.raises(KeyboardInterrupt):
            run(scene(folder=folder, probes=2, racing=racing), folder)
    again = scene(folder=folder, probes=2, racing=racing)
    assert len(again.ledger.probes()) == number
    run(again, folder)
    for name in ("probes.jsonl", "candidates.jsonl"):
        rows = [
            [{**json.loads(x), "seconds": 0} for x in (path / name).read_text().splitlines()]
            for path in (folder, tmp_path / "whole")
        ]
        assert rows[0] == rows[1]
    scored = [x.key for x in again.score.plans]  # type: ignore[attr-defined]
    assert len(scored) - len(whole.score.plans) == -number  # type: ignore[attr-defined]


def test_a_line_that_is_no_probe_is_refused(tmp_path: Path) -> None:
    probe = Probe(0, 1, 2, 4, (0.5,))
    Ledger(tmp_path).add_probe(probe)
    assert Ledger(tmp_path).probes() == [probe]
    with (tmp_path / "probes.jsonl").open("a") as file:
        file.write('{"layer": 0}\n')
    with pytest.raises(ValueError, match=r"probes\.jsonl, line 2: not a probe"):
        Ledger(tmp_path)


def test_curves_go_through_the_probes() -> None:
    """Cut errors 4, 1, 0 of two layers; the first one's probes lost twice and three times that."""
    shape = [[[4.0, 1.0, 0.0], [9.0, 4.0, 1.0, 0.0]]] * 2
    found = [
        Probe(None, None, None, 2, (1.0, 2.0)),
        Probe(0, 0, 0, 2, (9.0, 10.0)),
        Probe(0, 0, 1, 2, (4.0, 5.0)),
        Probe(0, 1, 1, 2, (3.0, 4.0)),
        Probe(1, 1, 1, 2, (0.0, 1.0)),
    ]
    curves = loss_curves(shape, found)
    np.testing.assert_allclose(curves[0][0], [8.0, 3.0, 0.0])
    np.testing.assert_allclose(curves[0][1], [4.5, 2.0, 0.5, 0.0])
    # No probe: the median of its kind; a probe below the dense model: a tenth of it.
    np.testing.assert_allclose(curves[1][0], [10.0, 2.5, 0.0])
    np.testing.assert_allclose(curves[1][1], [0.45, 0.2, 0.05, 0.0])


def test_curves_without_probes_are_the_cut_errors() -> None:
    shape = [[[3.0, 1.5, 0.5], [float("nan"), 2.0, float("inf"), 0.0]], [[0.0], [float("nan")]]]
    curves = loss_curves(shape, [])
    np.testing.assert_allclose(curves[0][0], [2.5, 1.0, 0.0])
    np.testing.assert_allclose(curves[0][1], [2.0, 2.0, 2.0, 0.0])
    np.testing.assert_allclose(np.concatenate(curves[1]), [0.0, 0.0])
