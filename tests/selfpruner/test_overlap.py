"""Roles that share text are refused, and small quotations are not; so are reported items."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from evaluators.tasks import TASKS, task_texts
from selfpruner.choices import ChoiceItem, load_choice_items
from selfpruner.config import RunConfig
from selfpruner.data import load_texts
from selfpruner.overlap import ALLOWED, RUN, check_items, check_roles, run_hashes, shared
from selfpruner.sources import SECTION_CHARACTERS


def _words(ids: Sequence[int]) -> str:
    return " ".join(f"w{x}" for x in ids)


def _noise(size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 50_000, size)


@pytest.mark.parametrize("length", [RUN, RUN + 1, 3 * RUN, ALLOWED])
def test_shared_tokens_are_those_of_a_search_by_hand(length: int) -> None:
    text = _noise(length, 9)
    one = np.concatenate([_noise(501, 1), text, _noise(83, 2)])
    other = np.concatenate([_noise(40, 3), text, _noise(777, 4)])
    found = shared(one, run_hashes(one), run_hashes(other))
    assert found is not None
    assert found.tokens == length
    assert found.run == tuple(text[:RUN])


@pytest.mark.parametrize("length", [0, 1, RUN - 1])
def test_shorter_runs_are_not_seen(length: int) -> None:
    text = _noise(length, 9)
    one, other = (np.concatenate([_noise(99, s), text, _noise(99, s + 1)]) for s in (1, 5))
    assert shared(one, run_hashes(one), run_hashes(other)) is None
    assert len(run_hashes(text)) == 0


@pytest.mark.parametrize(
    ("parts", "refused"), [([ALLOWED], False), ([ALLOWED + 1], True), ([100, 100], False),
                           ([100, 100, 100], True)]
)  # fmt: skip
def test_what_two_roles_share_is_summed_up(parts: list[int], refused: bool) -> None:
    texts = [_noise(size, 20 + i) for i, size in enumerate(parts)]
    search = np.concatenate([x for i, t in enumerate(texts) for x in (_noise(70, 40 + i), t)])
    report = np.concatenate([x for i, t in enumerate(texts) for x in (t, _noise(70, 60 + i))])
    roles = {"search": {"a.txt": search}, "report": {"ptb": _noise(300, 7), "b.txt": report}}
    if not refused:
        check_roles(roles, _words)
        return
    with pytest.raises(
        ValueError, match=r"data\.search \(a\.txt\) and data\.report \(b\.txt\)"
    ) as e:
        check_roles(roles, _words)
    message = str(e.value)
    assert f"share {sum(parts)} tokens" in message
    assert f'"w{texts[0][0]} w{texts[0][1]} ' in message
    assert "\n" not in message
    assert len(message) < 300


def test_one_role_may_hold_a_text_twice() -> None:
    check_roles({"report": {"x@256": _noise(999, 1), "x@128": _noise(999, 1)}}, _words)


def test_a_hundred_thousand_tokens_take_well_under_a_second() -> None:
    roles = {name: {"x": _noise(100_000, i)} for i, name in enumerate(("a", "b", "c", "d"))}
    started = time.process_time()
    check_roles(roles, _words)
    assert time.process_time() - started < 1.0


class Words:
    """A word is a token and its own number."""

    eos_token_id: int | None = None

    def __call__(
        self, text: str, *, add_special_tokens: bool = True, verbose: bool = True
    ) -> dict[str, list[int]]:
        del add_special_tokens, verbose
        return {"input_ids": [int(word.removeprefix("w")) for word in text.split()]}

    def decode(self, token_ids: Sequence[int]) -> str:
        return _words(token_ids)


def test_a_text_in_two_sources_is_refused_at_the_start(tmp_path: Path) -> None:
    """The same book cut into other sections: no document is equal, the text is."""
    book = " ".join(f"w{x}" for x in _noise(40_000, 3))
    per_section = SECTION_CHARACTERS // 4
    pieces = [book[i : i + per_section] for i in range(0, len(book), per_section)]
    (tmp_path / "book.txt").write_text("\n\n".join(x.rstrip("w") for x in pieces))
    rows = [
        json.dumps({"text": " ".join(book.split()[i : i + 900])}) for i in range(0, 39_000, 900)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    book_source, rows_source = str(tmp_path / "book.txt"), str(tmp_path / "rows.jsonl")
    data = {
        "length": 64,
        "calibrate": {"source": book_source, "tokens": 8192},
        "search": {"source": book_source, "tokens": 1024},
        "select": {"source": book_source, "tokens": 1024},
        "report": [{"source": book_source, "tokens": 1024, "length": 64}],
    }
    load_texts(RunConfig.model_validate({"model": "m", "data": data}), Words())
    data["report"] = [{"source": rows_source, "tokens": 4096, "length": 64}]
    with pytest.raises(
        ValueError, match=r"data\.calibrate .*book\.txt\) and data\.report .*rows\."
    ):
        load_texts(RunConfig.model_validate({"model": "m", "data": data}), Words())


def test_an_item_of_the_search_in_a_reported_task_is_refused() -> None:
    item: ChoiceItem = {"context": "Question: Why is it so?\nAnswer:", "choices": ["a"], "gold": 0}
    check_items([item], {"boolq": ["Why it is so."]})
    with pytest.raises(ValueError, match=r"data\.choices: .* reported task piqa: .Question: Why"):
        check_items([item], {"boolq": ["else"], "piqa": ["else", "why is IT so"]})


def test_no_packaged_item_of_the_search_is_reported() -> None:
    check_items(load_choice_items(400, 0), task_texts(TASKS))
