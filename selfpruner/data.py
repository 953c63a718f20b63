"""All text of a run: token windows for four disjoint roles, and commonsense items."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from selfpruner.choices import load_choice_items
from selfpruner.overlap import check_roles
from selfpruner.sources import REPORT_ONLY, load_corpus, load_documents

if TYPE_CHECKING:
    from torch import LongTensor

    from selfpruner.config import RunConfig

__all__ = ["TextData", "load_choice_items", "load_texts", "role_of"]

Role = Literal["calibrate", "search", "select", "report"]

# Upper ends of the roles' shares of all documents: 50, 15, 10 and 25 per cent.
_SHARES: tuple[tuple[Role, float], ...] = (
    ("calibrate", 0.50),
    ("search", 0.65),
    ("select", 0.75),
    ("report", 1.00),
)


class Tokenizer(Protocol):
    """What is asked of a tokenizer; those of transformers provide it."""

    eos_token_id: int | None

    def __call__(
        self, text: str, *, add_special_tokens: bool = True, verbose: bool = True
    ) -> Mapping[str, Any]:
        """Return at least `input_ids`, the tokens of `text`."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens."""


@dataclass(frozen=True)
class TextData:
    """Token windows `(windows, length)` of each role, and of each reported text by name."""

    calibrate: LongTensor
    search: LongTensor
    select: LongTensor
    report: Mapping[str, LongTensor] = field(default_factory=dict)


def load_texts(config: RunConfig, tokenizer: Tokenizer) -> TextData:
    """Return the token windows that `config.data` asks for.

    Each document of a source belongs to one role by a hash of its text, so roles never share a
    document, and what one role holds does not depend on what another asks for. That no role holds
    the text of another in other documents, or from another source, is checked (`overlap`).

    Raises:
        ValueError: a text is not at hand, has fewer tokens than asked, or stands in two roles.
    """
    reader = _Reader(tokenizer, config.data.root, config.seed)
    data = config.data
    names = _report_names([(text.source, text.length) for text in data.report])
    texts = TextData(
        calibrate=reader.windows(
            data.calibrate.source, "calibrate", data.calibrate.tokens, data.length
        ),
        search=reader.windows(data.search.source, "search", data.search.tokens, data.length),
        select=reader.windows(data.select.source, "select", data.select.tokens, data.length),
        report={
            name: reader.windows(text.source, "report", text.tokens, text.length)
            for name, text in zip(names, data.report, strict=True)
        },
    )
    check_roles(
        {
            "calibrate": {data.calibrate.source: texts.calibrate.flatten().numpy()},
            "search": {data.search.source: texts.search.flatten().numpy()},
            "select": {data.select.source: texts.select.flatten().numpy()},
            "report": {name: windows.flatten().numpy() for name, windows in texts.report.items()},
        },
        tokenizer.decode,
    )
    return texts


def role_of(text: str) -> Role:
    """Return the role that a document has for good; white space does not change it."""
    digest = hashlib.sha256(" ".join(text.split()).encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    return next(role for role, end in _SHARES if share < end)


class _Reader:
    """Reads each source once and cuts windows from it."""

    def __init__(self, tokenizer: Tokenizer, root: str | None, seed: int) -> None:
        self._tokenizer = tokenizer
        self._root = root
        self._seed = seed
        self._documents: dict[str, dict[Role, list[str]]] = {}

    def windows(self, source: str, role: Role, tokens: int | None, length: int) -> LongTensor:
        """Return the first `tokens // length` windows of the role's text, or all of them."""
        if source in REPORT_ONLY:
            ids = self._corpus_tokens(source, role)
        else:
            ids = self._document_tokens(source, role, tokens)
        asked = len(ids) if tokens is None else tokens
        if len(ids) < max(asked, length):
            raise ValueError(
                f"data.{role}: source {source} has {len(ids)} tokens for this role, "
                f"asked {max(asked, length)}; ask fewer tokens or name a larger source"
            )
        return _cut(ids, asked // length, length)

    def _corpus_tokens(self, source: str, role: Role) -> list[int]:
        """Return the tokens of a whole corpus, tokenised once with special tokens."""
        if role != "report":
            raise ValueError(f"data.{role}.source: got {source}; it is reported only")
        text = load_corpus(source, self._root)
        return list(self._tokenizer(text, verbose=False)["input_ids"])

    def _document_tokens(self, source: str, role: Role, tokens: int | None) -> list[int]:
        """Return at least `tokens` tokens of the role's documents, the end token between."""
        between = self._tokenizer.eos_token_id
        ids: list[int] = []
        for document in self._shared_out(source)[role]:
            if tokens is not None and len(ids) >= tokens:
                break
            if ids and between is not None:
                ids.append(between)
            ids += self._tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _shared_out(self, source: str) -> dict[Role, list[str]]:
        """Return the documents of each role in an order that only the seed and they decide."""
        if source not in self._documents:
            roles: dict[Role, list[str]] = {role: [] for role, _ in _SHARES}
            for document in sorted(load_documents(source, self._root)):
                roles[role_of(document)].append(document)
            for index, documents in enumerate(roles.values()):
                rng = np.random.default_rng((self._seed, index))
                documents[:] = [documents[i] for i in rng.permutation(len(documents))]
            self._documents[source] = roles
        return self._documents[source]


def _cut(ids: list[int], count: int, length: int) -> LongTensor:
    """Return `count` windows of `length` tokens that follow one another."""
    import torch

    windows: LongTensor = torch.tensor(ids[: count * length]).view(count, length)  # type: ignore[assignment]
    return windows


def _report_names(texts: list[tuple[str, int]]) -> list[str]:
    """Return one name a reported text: the source, with `@length` where it occurs twice."""
    counts = Counter(source for source, _ in texts)
    names = [s if counts[s] == 1 else f"{s}@{length}" for s, length in texts]
    if len(set(names)) < len(names):
        raise ValueError(f"data.report: got {names}; each source and length may stand once")
    return names
