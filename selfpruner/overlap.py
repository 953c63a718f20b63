"""Text that two roles share: found before anything is computed, and refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from selfpruner.choices import ChoiceItem

# Measured over whole sources, 0.4 to 1.0 million tokens each: C4 and books share no run of 50
# tokens between roles, passages at most 178 tokens (encyclopaedia and news quote one another).
RUN = 50
ALLOWED = 256

_BASE = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Shared:
    """What two token streams share: how many tokens of the first, and the first such run."""

    tokens: int
    run: tuple[int, ...]


def check_roles(
    roles: Mapping[str, Mapping[str, NDArray[np.int64]]], decode: Callable[[Sequence[int]], str]
) -> None:
    """Refuse roles of which one holds text of another.

    Two roles may share at most ALLOWED tokens in runs of RUN tokens or more: below that lie
    quotations and boilerplate, which are no leak. Seen is a text that was tokenised alike from its
    first words on, wherever it begins in either role; not seen are short items, paraphrases, other
    spacing or case, and what one role holds twice itself.

    Args:
        roles: token ids in reading order, by role and by source.
        decode: token ids to text, for the quotation.

    Raises:
        ValueError: two roles share more; one line with both and a quotation.
    """
    texts = [
        (role, f"data.{role} ({source})", tokens, run_hashes(tokens))
        for role, sources in roles.items()
        for source, tokens in sources.items()
    ]
    for (role, name, tokens, hashes), (other_role, other, _, others) in combinations(texts, 2):
        found = shared(tokens, hashes, others) if role != other_role else None
        if found is not None and found.tokens > ALLOWED:
            quotation = " ".join(decode(found.run).split())[:80]
            raise ValueError(
                f"{name} and {other} share {found.tokens} tokens in runs of {RUN} or more, such as "
                f'"{quotation}"; allowed: {ALLOWED}; name sources that do not hold the same text'
            )


def run_hashes(tokens: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return the hash of the run of RUN tokens at every offset; empty for a shorter stream.

    A polynomial in an odd base modulo 2**64: for a million runs the chance of any false match is
    about 1e-7, and it would take a false match at every one of 200 offsets in a row to matter.
    """
    count = max(0, len(tokens) - RUN + 1)
    hashes = np.zeros(count, np.uint64)
    ids = tokens.astype(np.uint64) + np.uint64(1)
    for offset in range(RUN):
        hashes = hashes * _BASE + ids[offset : offset + count]
    return hashes


def shared(
    tokens: NDArray[np.int64], hashes: NDArray[np.uint64], others: NDArray[np.uint64]
) -> Shared | None:
    """Return what `tokens` shares with the stream of the hashes `others`; None for nothing."""
    starts = np.flatnonzero(np.isin(hashes, others))
    if not starts.size:
        return None
    covered = np.zeros(len(tokens) + 1, np.int64)
    np.add.at(covered, starts, 1)
    np.add.at(covered, starts + RUN, -1)
    first = int(starts[0])
    run = tuple(int(x) for x in tokens[first : first + RUN])
    return Shared(int((np.cumsum(covered) > 0).sum()), run)


def check_items(items: Sequence[ChoiceItem], tasks: Mapping[str, Sequence[str]]) -> None:
    """Refuse commonsense items of the search whose context stands in a reported task.

    Compared are words, without case and punctuation; an item put in other words is not seen.

    Args:
        items: those that the search is told its accuracy on.
        tasks: every text of every item, by task.

    Raises:
        ValueError: a context is there in both; one line.
    """
    contexts = {_words(x["context"]): x["context"] for x in items}
    for task, texts in tasks.items():
        found = next((x for text in texts if (x := _words(text)) in contexts), None)
        if found is not None:
            quotation = " ".join(contexts[found].split())[:80]
            raise ValueError(
                f"data.choices: an item of the search stands in the reported task {task}: "
                f'"{quotation}"; set data.choices to 0 or leave {task} out of evaluation.tasks'
            )


def _words(text: str) -> str:
    """Return the words of a context or of a question, without the frame of a prompt."""
    words = re.findall(r"\w+", text.lower())
    return " ".join(words).removeprefix("question ").removesuffix(" answer")
