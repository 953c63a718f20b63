"""The run folder: made once, written in one step, removed only when it is one."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from pruning import shards
from pruning.plan import Plan
from selfpruner import pipeline
from selfpruner.arena import Arena
from selfpruner.config import RunConfig, load_config
from selfpruner.environment import environment
from selfpruner.run_folder import RunFolder, is_run_folder

CONFIG = RunConfig(model="m", seed=5)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "runs" / "a", CONFIG)


def test_a_new_folder_holds_configuration_and_environment(folder: RunFolder) -> None:
    assert load_config(folder.config) == CONFIG
    assert folder.read_json("environment.json")["seed"] == 5
    assert is_run_folder(folder.path)
    assert sorted(p.name for p in folder.path.iterdir()) == ["config.yaml", "environment.json"]
    assert folder / "x" == folder.path / "x" == Path(folder) / "x"


def test_an_existing_folder_is_refused_in_one_line(folder: RunFolder) -> None:
    with pytest.raises(ValueError, match=r"exists; `selfpruner resume .*--replace") as refusal:
        RunFolder.create(folder.path, CONFIG)
    assert "\n" not in str(refusal.value)


def test_replace_starts_afresh(folder: RunFolder) -> None:
    folder.write_text("candidates.jsonl", "{}\n")
    again = RunFolder.create(folder.path, CONFIG, replace=True)
    assert not folder.candidates.exists()
    assert folder.config.exists()
    # One that never began is no run to bring back: what lies aside is still the first.
    again = RunFolder.create(folder.path, CONFIG, replace=True)
    again.remove_if_unused()
    assert folder.candidates.read_text("utf-8") == "{}\n"
    again = RunFolder.create(folder.path, CONFIG, replace=True)
    again.keep()
    again.remove_if_unused()
    assert not any(folder.path.parent.iterdir())


def test_a_stop_while_it_is_made_leaves_what_was_there(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.write_text("candidates.jsonl", "{}\n")

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("selfpruner.run_folder.environment", stopped)
        with pytest.raises(KeyboardInterrupt):
            RunFolder.create(folder.path, CONFIG, replace=True)
    assert folder.candidates.read_text("utf-8") == "{}\n"
    assert [x.name for x in folder.path.parent.iterdir()] == [folder.path.name]


def test_what_was_killed_while_it_was_made_gives_way(folder: RunFolder) -> None:
    folder.config.unlink()
    (folder / ".config.yaml.1.tmp").touch()
    assert is_run_folder(RunFolder.begun(folder.path, CONFIG).path)
    folder.write_text("candidates.jsonl", "{}\n")
    again = RunFolder.create(folder.path, CONFIG, replace=True)
    again.config.unlink()
    with pytest.raises(ValueError, match="--replace removes it"):  # what was replaced is back
        RunFolder.create(folder.path, CONFIG)
    assert folder.candidates.read_text("utf-8") == "{}\n"


def test_what_a_run_replaces_counts_as_free(folder: RunFolder) -> None:
    folder.write_text("candidates.jsonl", "x" * 5000)
    again = RunFolder.create(folder.path, CONFIG, replace=True)
    assert 5000 < again.replaced_bytes < 10_000
    again.keep()
    assert again.replaced_bytes == 0


def test_replace_removes_nothing_but_run_folders(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work", encoding="utf-8")
    (tmp_path / "config.yaml").write_text("model: m", encoding="utf-8")
    with pytest.raises(ValueError, match="not a run folder, so --replace does not remove it"):
        RunFolder.create(tmp_path, CONFIG, replace=True)
    assert (tmp_path / "thesis.tex").read_text("utf-8") == "years of work"


def test_replace_spares_the_current_folder(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.path)
    with pytest.raises(ValueError, match="holds the current folder"):
        RunFolder.create(folder.path, CONFIG, replace=True)


def test_a_link_or_file_is_never_followed(tmp_path: Path, folder: RunFolder) -> None:
    link = tmp_path / "link"
    link.symlink_to(folder.path)
    with pytest.raises(ValueError, match="exists and is not a folder"):
        RunFolder.create(link, CONFIG, replace=True)
    assert folder.config.exists()


def test_an_empty_folder_will_do(tmp_path: Path) -> None:
    assert RunFolder.create(tmp_path, CONFIG).config.exists()


def test_opening_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a run folder"):
        RunFolder.open(tmp_path)


def test_a_failed_write_leaves_the_old_file(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.write_text("plan.json", "old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"the disk is full; could not write .*plan\.json"):
        folder.write_text("plan.json", "new")
    assert folder.plan.read_text("utf-8") == "old"
    assert not list(folder.path.glob(".*"))


def test_other_write_errors_keep_their_words(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("os.fsync", failing)
    with pytest.raises(OSError, match="Input/output error"):
        folder.write_text("plan.json", "new")


def test_json_is_plain_and_comes_back(folder: RunFolder) -> None:
    data = {"ä": [1, 2.5, None]}
    assert folder.write_json("results.json", data) == folder.results
    assert folder.read_json("results.json") == data
    with pytest.raises(ValueError, match=r"results\.json: not plain JSON"):
        folder.write_json("results.json", {"x": float("nan")})
    assert folder.read_json("results.json") == data


def test_reading_what_is_not_there_or_torn(folder: RunFolder) -> None:
    with pytest.raises(ValueError, match=r"results\.json: missing; has the run finished\?"):
        folder.read_json("results.json")
    folder.write_text("results.json", '{"a": ')
    with pytest.raises(ValueError, match=r"results\.json: not JSON"):
        folder.read_json("results.json")


def test_environment_names_hardware_and_versions_but_no_host() -> None:
    import platform

    found = environment(3)
    assert found["seed"] == 3
    assert found["cores"] >= 1
    assert found["memory_bytes"] > 2**28
    assert {"torch", "transformers", "selfpruner"} <= set(found["versions"])
    assert platform.python_version() == found["python"]
    text = json.dumps(found)
    assert str(Path.home()) not in text
    assert platform.node() not in text


def test_a_disk_that_fills_up_under_the_ranking_is_an_error_of_the_system(
    opened: tuple[Arena, RunFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which the command tells in one line; safetensors has an error of its own for it."""

    def full(*_: Any) -> None:
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(shards, "save_file", full)
    bench, prunable = opened[0].bench, opened[0].prunable
    plan = Plan.dense(bench.architecture)
    with pytest.raises(OSError, match="No space left on device"):
        pipeline._write_plan(bench, prunable, plan, RunFolder(tmp_path))
