"""Strategies: what is on disk loads, what is wrong is named in one line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from prompts import library
from prompts.library import load_strategy

HOME = Path(library.__file__).parent / "strategies"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(HOME / "moves", tmp_path / "mine"))


@pytest.mark.parametrize("name", [x.name for x in sorted(HOME.iterdir()) if x.is_dir()])
def test_packaged_strategies_load(name: str) -> None:
    strategy = load_strategy(name)
    assert strategy.name == name
    assert strategy.description
    assert set(strategy.forms) == set(library.OPERATORS)
    assert strategy.hint(0)
    assert strategy.hint(len(strategy.hints)) == strategy.hint(0)


def test_a_path_loads_too(folder: Path) -> None:
    assert load_strategy(str(folder)).texts == load_strategy("moves").texts


def test_unknown_strategy_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"search\.strategy: got 'nope'.*moves, paper"):
        load_strategy("nope")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("mutate.md", "{parent} {example} {secret}", r"mutate\.md: unknown placeholder {secret}"),
        ("mutate.md", "{example}", r"mutate\.md: placeholder {parent} is missing, allowed: "),
        ("repair.md", "again", r"repair\.md: placeholder {error} is missing"),
        ("system.md", "{error}", r"system\.md: unknown placeholder {error}"),
        ("strategy.yaml", "description: x", r"strategy\.yaml: got description, want exactly"),
        ("strategy.yaml", "[", r"strategy\.yaml: not YAML"),
    ],
)
def test_mistakes_are_named_in_one_line(folder: Path, file: str, text: str, message: str) -> None:
    (folder / file).write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_strategy(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("mutate: moves", "mutate: poems", "forms.mutate: got 'poems', allowed vectors, moves"),
        ("accuracy, ", "beauty, ", "shows: got 'beauty', allowed accuracy, speedup, sensitivity"),
        ("select: select, ", "", "forms wants exactly the keys generate, select"),
    ],
)
def test_mistakes_in_the_settings_are_named(folder: Path, old: str, new: str, message: str) -> None:
    path = folder / "strategy.yaml"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message):
        load_strategy(str(folder))


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "select.md").unlink()
    with pytest.raises(ValueError, match=r"select\.md: this file of the strategy is missing"):
        load_strategy(str(folder))


def test_values_are_filled_once_and_never_run(folder: Path) -> None:
    (folder / "repair.md").write_text('{error} {"json": {"x": 1}} {{ 1 + 1 }} %s')
    strategy = load_strategy(str(folder))
    text = strategy.render("repair", {"error": "{units} {{ evil }} \\1"})
    assert text == '{units} {{ evil }} \\1 {"json": {"x": 1}} {{ 1 + 1 }} %s'
