"""The command `evaluate`: which way models are opened, and that it makes no difference."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pruning import loading
from selfpruner import inspection
from selfpruner.config import load_config
from selfpruner.progress import Progress


def _evaluate(model: str, spread: bool | None, baseline: str | None = None) -> None:
    with Progress() as progress:
        inspection.evaluate_command(
            model,
            baseline=baseline,
            tasks=["arc_easy"],
            samples=6,
            batch_size=4,
            spread=spread,
            trust_remote_code=False,
            progress=progress,
        )


@pytest.mark.parametrize(
    ("asked", "gpus", "opener"),
    [
        (None, 0, "load"),
        (None, 1, "load"),
        (None, 2, "load_spread"),
        (True, 0, "load_spread"),
        (False, 8, "load"),
    ],
)
def test_models_are_spread_where_several_gpus_are_or_when_asked(
    monkeypatch: pytest.MonkeyPatch, asked: bool | None, gpus: int, opener: str
) -> None:
    def refuse(name: str) -> Any:
        def opened(*_args: object, **_options: object) -> None:
            raise ValueError(name)

        return opened

    for name in ("load", "load_spread"):
        monkeypatch.setattr(inspection, name, refuse(name))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ValueError, match=f"^{opener}$"):
        _evaluate("m", asked)


def test_layers_on_disk_change_no_figure(
    tiny_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load_config(tiny_run).model
    _evaluate(model, spread=False)
    whole = capsys.readouterr()
    monkeypatch.setattr(loading, "_free", lambda _: {"cpu": 45_000})
    _evaluate(model, spread=True)
    spread = capsys.readouterr()
    assert "on disk" in spread.err
    assert "on disk" not in whole.err
    assert re.search(r"mean .*\d\d\.\d\d", whole.out)
    assert spread.out == whole.out


def test_beside_a_baseline_every_task_has_its_p_value(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Equal models disagree on no item: p is 1 and the mean has not moved."""
    model = load_config(tiny_run).model
    shutil.copytree(model, tmp_path / "same")
    _evaluate(str(tmp_path / "same"), spread=False, baseline=model)
    out = " ".join(capsys.readouterr().out.split())
    assert "McNemar p" in out
    assert "1.000" in out
    assert "paired by item. The mean has not moved." in out
