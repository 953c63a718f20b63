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
        ("accuracy, ", "beauty, ", "shows: got 'beauty', allowed sensitivity, accuracy, speedup"),
        ("accuracy, ", "worst, ", "shows: worst is on, but no text has {worst} or {facts}"),
        ("hints:", "reasons: poems\nhints:", "reasons: got 'poems', allowed none, why, reflection"),
        ("hints:", "reasons: [why]\nhints:", r"reasons: got \['why'\], allowed none"),
        (
            "hints:",
            "tone: kind\nhints:",
            "got description, forms, shows, tone, hints, want exactly",
        ),
        ("select: select, ", "", "forms wants exactly the keys generate, select"),
    ],
)
def test_mistakes_in_the_settings_are_named(folder: Path, old: str, new: str, message: str) -> None:
    path = folder / "strategy.yaml"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message):
        load_strategy(str(folder))


@pytest.mark.parametrize("name", [*library.FACTS, "sensitivity", "statistics", "margins"])
def test_a_placeholder_whose_switch_is_off_is_refused(folder: Path, name: str) -> None:
    path = folder / "strategy.yaml"
    path.write_text(path.read_text().replace(", sensitivity", ""))
    text = (folder / "mutate.md").read_text()
    (folder / "mutate.md").write_text(f"{text}{{{name}}}")
    switch = name if name in library.SHOWN else "sensitivity"
    with pytest.raises(
        ValueError, match=rf"mutate\.md: {{{name}}} needs {switch} in shows, which is off$"
    ) as caught:
        load_strategy(str(folder))
    assert "\n" not in str(caught.value)
    path.write_text(path.read_text().replace("speedup", f"speedup, {switch}"))
    assert name in load_strategy(str(folder)).placeholders("mutate")


@pytest.mark.parametrize("name", ["effects", "lessons"])
@pytest.mark.parametrize("reasons", ["none", "why"])
def test_effects_and_lessons_need_reflection(folder: Path, name: str, reasons: str) -> None:
    path = folder / "strategy.yaml"
    path.write_text(f"{path.read_text()}\nreasons: {reasons}\n")
    (folder / "select.md").write_text(f"{{candidates}} {{wanted}} {{example}} {{{name}}}")
    with pytest.raises(
        ValueError, match=rf"select\.md: {{{name}}} needs reasons: reflection, got {reasons}$"
    ):
        load_strategy(str(folder))
    path.write_text(path.read_text().replace(f"reasons: {reasons}", "reasons: reflection"))
    assert load_strategy(str(folder)).words("mutate") == ("lesson", "hypothesis")


def test_replies_carry_no_words_unless_asked(folder: Path) -> None:
    strategy = load_strategy(str(folder))
    assert strategy.reasons == "none"
    assert all(strategy.words(x) == () for x in library.OPERATORS)


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "select.md").unlink()
    with pytest.raises(ValueError, match=r"select\.md: this file of the strategy is missing"):
        load_strategy(str(folder))


def test_a_file_that_is_not_text_is_named(folder: Path) -> None:
    (folder / "select.md").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"select\.md: cannot be read as UTF-8 text: "):
        load_strategy(str(folder))
    (folder / "select.md").unlink()
    (folder / "select.md").mkdir()
    with pytest.raises(ValueError, match=r"select\.md: cannot be read as UTF-8 text: "):
        load_strategy(str(folder))


def test_lines_left_empty_are_dropped(folder: Path) -> None:
    (folder / "repair.md").write_text("One\n\n{error}\n{example} {units}\nTwo {error}\n")
    strategy = load_strategy(str(folder))
    text = strategy.render("repair", {"error": "", "example": "", "units": ""})
    assert text == "One\n\nTwo"


def test_values_are_filled_once_and_never_run(folder: Path) -> None:
    (folder / "repair.md").write_text('{error} {"json": {"x": 1}} {{ 1 + 1 }} %s')
    strategy = load_strategy(str(folder))
    text = strategy.render("repair", {"error": "{units} {{ evil }} \\1"})
    assert text == '{units} {{ evil }} \\1 {"json": {"x": 1}} {{ 1 + 1 }} %s'
