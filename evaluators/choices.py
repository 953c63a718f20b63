"""Log-probability margins of multiple-choice items: a cheap accuracy signal inside the search.

Shapes: B rows a micro-batch, T tokens, V vocabulary, P scored positions of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class ChoiceItem:
    """One question: a context, the texts that may follow it after one space, the right one."""

    context: str
    choices: tuple[str, ...]
    gold: int

    def __post_init__(self) -> None:
        if not self.context or len(self.choices) < 2 or not all(self.choices):
            raise ValueError(
                f"choice item: got context {self.context!r} and choices {self.choices!r}, "
                "need a context and at least two choices, none of them empty"
            )
        if not 0 <= self.gold < len(self.choices):
            raise ValueError(
                f"choice item: got gold {self.gold}, allowed 0..{len(self.choices) - 1}"
            )


@dataclass(frozen=True)
class _MicroBatch:
    """Right-padded rows and, for every scored token, where its prediction is made."""

    ids: Tensor  # (B, T)
    row: Tensor  # (P,) row within the micro-batch
    position: Tensor  # (P,)
    target: Tensor  # (P,) token id
    rows: Tensor  # (B,) row within all rows


@dataclass(frozen=True)
class EncodedChoices:
    """Items tokenised once: `rows` are (item, choice) pairs in order, batched by length."""

    batches: tuple[_MicroBatch, ...]
    characters: NDArray[np.float64]
    item_of_row: NDArray[np.int64]
    gold: NDArray[np.int64]

    @property
    def num_items(self) -> int:
        """Number of items."""
        return len(self.gold)


def encode_choices(
    tokenizer: Any, items: Sequence[ChoiceItem], batch_size: int = 16, max_tokens: int | None = None
) -> EncodedChoices:
    """Tokenises items for `choice_margins`.

    Args:
        tokenizer: A transformers tokenizer; context and choice are encoded together and split at
            the length of the encoded context, as lm-evaluation-harness does.
        items: At least one item.
        batch_size: Rows a micro-batch.
        max_tokens: Longer rows lose tokens on the left; None keeps all.
    """
    if not items:
        raise ValueError("choices: got no item, need at least one")
    rows = [
        _encode_row(tokenizer, item.context, choice, max_tokens)
        for item in items
        for choice in item.choices
    ]
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row][0]))
    starts = range(0, len(order), batch_size)
    return EncodedChoices(
        batches=tuple(_pad(rows, order[start : start + batch_size]) for start in starts),
        characters=np.array([float(len(c)) for item in items for c in item.choices]),
        item_of_row=np.repeat(np.arange(len(items)), [len(item.choices) for item in items]),
        gold=np.array([item.gold for item in items]),
    )


def choice_margins(
    trunk: Callable[[Sequence[Tensor]], Iterable[Tensor]],
    head_VD: Tensor,
    encoded: EncodedChoices,
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Margins (items,) and whether the right choice wins (items,).

    The score of a choice is its log-probability in nats given the context, divided by its number
    of characters (the normalisation of `acc_norm`; the joining space does not count). The margin
    is the score of the right choice minus the best score of the others: positive means right.

    Args:
        trunk: Micro-batches of token ids (B, T), right-padded, each of its own length, to what
            enters the head (B, T, D) of a causal model, one by one. Padding follows the tokens, so
            no mask is needed.
        head_VD: The head; it meets scored positions only, a small share of B x T.
        encoded: From `encode_choices`.
    """
    log_probs = torch.zeros(len(encoded.characters), dtype=torch.float64)
    with torch.inference_mode():
        hidden = trunk([batch.ids for batch in encoded.batches])
        for batch, hidden_BTD in zip(encoded.batches, hidden, strict=True):
            log_probs[batch.rows] = _row_log_probs(hidden_BTD, head_VD, batch)
    scores = log_probs.numpy() / encoded.characters
    starts = np.searchsorted(encoded.item_of_row, np.arange(encoded.num_items))
    gold_rows = starts + encoded.gold
    others = scores.copy()
    others[gold_rows] = -np.inf
    margins = scores[gold_rows] - np.maximum.reduceat(others, starts)
    return margins, margins > 0


def _row_log_probs(hidden_BTD: Tensor, head_VD: Tensor, batch: _MicroBatch) -> Tensor:
    """Summed log-probability of the scored tokens of each row, shape (B,), float64 on the CPU."""
    device = hidden_BTD.device
    hidden_PD = hidden_BTD[batch.row.to(device), batch.position.to(device)]
    scored_PV = hidden_PD @ head_VD.T
    scored_PV = scored_PV if scored_PV.dtype == torch.float64 else scored_PV.float()
    target_P1 = batch.target.to(device)[:, None]
    chosen_P = scored_PV.gather(1, target_P1)[:, 0] - scored_PV.logsumexp(dim=1)
    sums_B = torch.zeros(len(batch.rows), dtype=torch.float64)
    return sums_B.index_add_(0, batch.row, chosen_P.double().cpu())


def _encode_row(
    tokenizer: Any, context: str, choice: str, max_tokens: int | None
) -> tuple[list[int], int]:
    """Token ids of context and choice, and how many at the end belong to the choice."""
    context = context.rstrip()
    whole = list(tokenizer.encode(f"{context} {choice}"))
    scored = len(whole) - len(tokenizer.encode(context))
    if scored < 1 or scored >= len(whole):
        raise ValueError(
            f"choices: {choice!r} adds no token of its own to the context {context[-40:]!r}"
        )
    kept = whole if max_tokens is None else whole[-max_tokens:]
    return kept, min(scored, len(kept) - 1)


def _pad(rows: list[tuple[list[int], int]], chosen: list[int]) -> _MicroBatch:
    length = max(len(rows[row][0]) for row in chosen)
    ids_BT = torch.zeros((len(chosen), length), dtype=torch.long)
    row_P: list[int] = []
    position_P: list[int] = []
    target_P: list[int] = []
    for index, row in enumerate(chosen):
        ids, scored = rows[row]
        ids_BT[index, : len(ids)] = torch.tensor(ids)
        row_P += [index] * scored
        position_P += range(len(ids) - scored - 1, len(ids) - 1)
        target_P += ids[len(ids) - scored :]
    return _MicroBatch(
        ids_BT,
        torch.tensor(row_P),
        torch.tensor(position_P),
        torch.tensor(target_P),
        torch.tensor(chosen),
    )
