"""Searches that are killed, drained and resumed end as those that nobody disturbed."""

from __future__ import annotations

import itertools
import json
import random
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.runtime import RunControl

from agent import ledger
from agent.graph import Event, SearchDrainedError, run_search
from agent.settings import RacingSettings
from tests.agent import soak_search

HOUSE = Path(__file__).parents[2]
EVALUATIONS = 80
LATEST = 60.0  # seconds in which a process starts


def rows(path: Path) -> list[dict[str, Any]]:
    return [{**json.loads(x), "seconds": 0} for x in path.read_text().splitlines()]


def calls(folder: Path) -> list[dict[str, Any]]:
    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[x] for x in ("generation", "operator", "slot", "attempt"))

    return sorted(rows(folder / "llm.jsonl"), key=place)


def check_same(cut: Path, whole: Path) -> None:
    """Check that both folders tell the same, and nothing twice."""
    assert rows(cut / "candidates.jsonl") == rows(whole / "candidates.jsonl")
    assert calls(cut) == calls(whole)
    places = Counter((x["generation"], x["slot"], x["attempt"]) for x in calls(cut))
    assert set(places.values()) == {1}
    keys = Counter(x["key"] for x in rows(cut / "candidates.jsonl"))
    assert set(keys.values()) == {1}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a search that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    assert len(rows(folder / "candidates.jsonl")) == EVALUATIONS
    assert {x["attempt"] for x in calls(folder)} == {0, 1}
    return folder


def run(folder: Path, **options: Any) -> None:
    context = soak_search.context_in(folder, evaluations=EVALUATIONS)
    run_search(context, folder / "checkpoints.sqlite", **options)


def started(folder: Path) -> subprocess.Popen[str]:
    """Return the script at the moment at which its search goes on."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.agent.soak_search", str(folder), str(EVALUATIONS)],
        cwd=HOUSE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], LATEST)[0]
    assert process.stdout.readline() == "ready\n"
    return process


def ended(process: subprocess.Popen[str], limit: float) -> int | None:
    """Return the status of the script, None if it runs on after `limit` seconds."""
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None


def killed(folder: Path, kills: int, span: float, rng: random.Random) -> int:
    """Start the script until it ends, kill it within `span` seconds `kills` times; count those."""
    done = 0
    while True:
        process = started(folder)
        status = ended(process, rng.uniform(0, span) if done < kills else LATEST)
        if status is None:
            process.kill()
            status = process.wait()
        if status != -signal.SIGKILL:
            assert status == 0
            return done
        done += 1


def test_a_search_survives_kills(whole: Path, tmp_path: Path) -> None:
    assert killed(tmp_path, 3, 0.8, random.Random(0)) == 3
    check_same(tmp_path, whole)


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(2))
def test_a_search_survives_many_kills(whole: Path, tmp_path: Path, seed: int) -> None:
    assert killed(tmp_path, 25, 0.25, random.Random(seed)) == 25
    check_same(tmp_path, whole)


@pytest.mark.parametrize(
    ("name", "number"),
    [("llm.jsonl", 0), ("llm.jsonl", 20), ("candidates.jsonl", 3), ("candidates.jsonl", 25)],
)
def test_a_line_torn_by_a_kill_is_written_again(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    count, append = itertools.count(), ledger._append

    def torn(path: Path, data: dict[str, Any]) -> None:
        if path.name == name and next(count) == number:
            with path.open("a") as file:
                file.write(json.dumps(data)[:-7])
            raise KeyboardInterrupt
        append(path, data)

    monkeypatch.setattr(ledger, "_append", torn)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert not (tmp_path / name).read_text().endswith("\n")
    run(tmp_path)
    check_same(tmp_path, whole)


@pytest.mark.parametrize("method", ["put", "put_writes"])
@pytest.mark.parametrize("number", [0, 1, 2, 3, 4, 5, 17])
def test_a_kill_while_a_checkpoint_is_written_changes_nothing(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, number: int
) -> None:
    """A step is two writes, what its node returned and where that leads to."""
    count, write = itertools.count(), getattr(SqliteSaver, method)

    def dying(*args: Any) -> Any:
        if next(count) == number:
            raise KeyboardInterrupt
        return write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(SqliteSaver, method, dying)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    run(tmp_path)
    check_same(tmp_path, whole)


def test_sigterm_drains_and_the_search_goes_on(whole: Path, tmp_path: Path) -> None:
    for wait in (0.0, 0.7):
        process = started(tmp_path)
        time.sleep(wait)
        process.send_signal(signal.SIGTERM)
        assert ended(process, LATEST) == soak_search.DRAINED
        ledger.Ledger(tmp_path)
    assert ended(started(tmp_path), LATEST) == 0
    check_same(tmp_path, whole)


@pytest.mark.parametrize("events", [0, 1, 5, 9, 30, 90])
def test_a_search_that_was_asked_to_stop_goes_on(whole: Path, tmp_path: Path, events: int) -> None:
    control, seen = RunControl(), []
    if events == 0:
        control.request_drain()

    def on_event(event: Event) -> None:
        seen.append(event)
        if len(seen) == events:
            control.request_drain()

    with pytest.raises(SearchDrainedError):
        run(tmp_path, control=control, on_event=on_event)
    assert len(rows_if(tmp_path / "candidates.jsonl")) < EVALUATIONS
    run(tmp_path, control=RunControl())
    check_same(tmp_path, whole)


def rows_if(path: Path) -> list[dict[str, Any]]:
    return rows(path) if path.exists() else []


def test_a_search_that_drains_after_every_step_comes_to_the_same_end(
    whole: Path, tmp_path: Path
) -> None:
    steps = 0
    while True:
        control = RunControl()
        context = soak_search.context_in(tmp_path, evaluations=EVALUATIONS)

        def on_event(_: Event, control: RunControl = control) -> None:
            control.request_drain()

        try:
            run_search(context, tmp_path / "checkpoints.sqlite", control=control, on_event=on_event)
        except SearchDrainedError:
            steps += 1
        else:
            break
    assert steps >= 10
    check_same(tmp_path, whole)


def race_in(folder: Path, stop: int = -1) -> None:
    """Run a search that races; the call `stop` of its score is interrupted."""
    context = soak_search.context_in(folder, evaluations=EVALUATIONS, racing=RacingSettings())
    count, score = itertools.count(), context.score

    def stopping(*args: Any) -> Any:
        if next(count) == stop:
            raise KeyboardInterrupt
        return score(*args)

    object.__setattr__(context, "score", stopping)
    run_search(context, folder / "checkpoints.sqlite")


@pytest.fixture(scope="module")
def raced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a search that raced and that nobody disturbed."""
    folder = tmp_path_factory.mktemp("raced")
    race_in(folder)
    seen = {x["scores"]["sequences"] for x in rows(folder / "candidates.jsonl")}
    assert {2, 4} <= seen
    return folder


@pytest.mark.parametrize("call", [0, 1, 3, 5, 12, 30])
def test_a_race_that_is_interrupted_is_run_again(raced: Path, tmp_path: Path, call: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        race_in(tmp_path, call)
    race_in(tmp_path)
    check_same(tmp_path, raced)


@pytest.mark.parametrize("number", [0, 5, 9, 40])
@pytest.mark.parametrize("forgets", [False, True])
def test_a_generation_half_on_file_is_raced_to_the_same_end(
    raced: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, forgets: bool
) -> None:
    """Without its checkpoints, a search goes through all races again by what is on file."""
    count, append = itertools.count(), ledger._append

    def dying(path: Path, data: dict[str, Any]) -> None:
        if path.name == "candidates.jsonl" and next(count) == number:
            raise KeyboardInterrupt
        append(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(ledger, "_append", dying)
        with pytest.raises(KeyboardInterrupt):
            race_in(tmp_path)
    if forgets:
        for path in tmp_path.glob("checkpoints.sqlite*"):
            path.unlink()
    race_in(tmp_path)
    check_same(tmp_path, raced)


def test_the_checkpoints_grow_as_the_generations_do(tmp_path: Path) -> None:
    sizes = {}
    for generations in (10, 20, 40):
        folder = tmp_path / str(generations)
        context = soak_search.context_in(
            folder, evaluations=6 * generations, population=6, crossover=2, mutate=4
        )
        result = run_search(context, folder / "checkpoints.sqlite")
        assert len(result.generations) == generations
        sizes[generations] = sum(x.stat().st_size for x in folder.glob("checkpoints.sqlite*"))
    first, second = sizes[20] - sizes[10], sizes[40] - sizes[20]
    assert 0.8 < second / (2 * first) < 1.2
    assert sizes[40] < 40 * 2**20
