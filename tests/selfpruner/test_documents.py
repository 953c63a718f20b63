"""What the documents name exists: files of the tree, settings, commands, targets of make."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml

from agent.settings import DriverSettings
from selfpruner.cli import main
from selfpruner.complaints import _names
from selfpruner.config import RunConfig

HOUSE = Path(__file__).parents[2]
README = (HOUSE / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [README, (HOUSE / "CONTRIBUTING.md").read_text(encoding="utf-8")]


def tree_files() -> Iterator[str]:
    """Yield the paths that "The tree" names, wildcards and NAME included."""
    block = README.partition("## The tree")[2].split("```")[1]
    room = ""
    for line in block.strip().splitlines():
        start, text = line[:14], line[14:]
        room = start.strip() or room
        folder = ""
        for word in re.split(r"\s{2,}", text)[0].split():
            if "." not in word and "/" not in word:
                break
            folder = word.rpartition("/")[0] if word.count("/") and "." in word else folder
            yield room + (word if "/" in word or not folder else f"{folder}/{word}")


def is_there(path: str) -> bool:
    return any(HOUSE.glob(path.rstrip("/").replace("NAME", "*")))


@pytest.mark.parametrize("path", sorted(set(tree_files())))
def test_the_tree_names_what_is_there(path: str) -> None:
    room, _, rest = path.partition("/")
    beside = f"{room}/{rest.rpartition('/')[2]}"  # a file after those of a folder
    assert is_there(path) or is_there(beside), path


def is_file(name: str) -> bool:
    """Return whether a dotted name is a file's, or a module's or something's in one."""
    module = HOUSE.joinpath(*name.split("."))
    return name.endswith((".py", ".json")) or any(
        x.with_suffix(".py").is_file() for x in (module, module.parent)
    )


def test_settings_that_the_documents_name_exist() -> None:
    """Names in code spans, such as `search.window` or `front.targets: [0.9]`, and after --set."""
    known = set(_names(RunConfig))
    levels = {x.partition(".")[0] for x in known if "." in x}
    told = set()
    for text in DOCUMENTS:
        spans = re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?=[`:= ])", text)
        told |= {x for x in spans if x.partition(".")[0] in levels and not is_file(x)}
        told |= set(re.findall(r"--set ([a-z_.]+)=", text))
    told -= {"a.b"}
    assert len(told) > 20
    assert told <= known, told - known


def test_commands_and_options_in_the_usage_exist() -> None:
    usage = README.partition("## Use")[2].split("```")[1]
    commands = typer.main.get_command(main).commands  # type: ignore[attr-defined]
    lines = [x.split(maxsplit=2) for x in usage.strip().splitlines()]
    assert {x[1] for x in lines} == set(commands)
    for _, name, rest in lines:
        options = {y for x in commands[name].params for y in (*x.opts, *x.secondary_opts)}
        assert set(re.findall(r"--[a-z-]+", rest)) <= options, name


def test_targets_of_make_exist() -> None:
    makefile = (HOUSE / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    for text in DOCUMENTS:
        assert set(re.findall(r"`make ([a-z-]+)", text)) <= targets


def test_drivers_in_the_readme_are_all_there_are() -> None:
    table = README.partition("| kind | the LLM |")[2].partition("\n\n")[0]
    told = re.findall(r"^\| `([a-z]+)`", table, re.MULTILINE)
    kinds = DriverSettings.model_json_schema()["properties"]["kind"]["enum"]
    assert sorted(told) == sorted(kinds)


def test_the_configuration_in_the_readme_is_valid() -> None:
    example = next(x for x in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL) if "model:" in x)
    RunConfig.model_validate(yaml.safe_load(example))
