from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from evaluators.choices import ChoiceItem, choice_margins, encode_choices

Factory = Callable[..., LlamaForCausalLM]
Trunk = Callable[[Sequence[torch.Tensor]], Iterable[torch.Tensor]]
ITEMS = [
    ChoiceItem("The sky is", ("blue", "a fish of the sea"), 0),
    ChoiceItem("Two and two make  ", ("three", "four", "twenty two"), 1),
    ChoiceItem("Q", ("x", "yy"), 1),
]


def _parts(model: LlamaForCausalLM) -> tuple[Trunk, torch.Tensor]:
    """Return a model's trunk and head."""
    return (
        lambda batches: (model.model(input_ids=ids).last_hidden_state for ids in batches),
        model.lm_head.weight,
    )


def _hand_margin(model: LlamaForCausalLM, item: ChoiceItem) -> float:
    """Characters are tokens here, so every probability can be looked up one by one."""
    scores = []
    for choice in item.choices:
        context = item.context.rstrip()
        ids = [ord(letter) for letter in f"{context} {choice}"]
        log_probs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        total = sum(log_probs[t - 1, ids[t]].item() for t in range(len(context), len(ids)))
        scores.append(total / len(choice))
    gold = scores.pop(item.gold)
    return gold - max(scores)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_equals_hand_computation(tiny_llama: Factory, tokenizer: Any, batch_size: int) -> None:
    model = tiny_llama().double()
    encoded = encode_choices(tokenizer, ITEMS, batch_size)
    margins, correct = choice_margins(*_parts(model), encoded)
    with torch.no_grad():
        expected = [_hand_margin(model, item) for item in ITEMS]
    assert margins.dtype == np.float64
    assert margins.tolist() == pytest.approx(expected, abs=1e-10)
    assert correct.tolist() == [margin > 0 for margin in expected]


def test_sign_follows_the_distribution(tokenizer: Any) -> None:
    """A model that always expects the letter x."""

    head = torch.zeros(128, 1)
    head[ord("x")] = 50.0
    right, wrong = ChoiceItem("a", ("xx", "zz"), 0), ChoiceItem("a", ("xx", "zz"), 1)
    margins, correct = choice_margins(
        lambda batches: [torch.ones(*ids.shape, 1) for ids in batches],
        head,
        encode_choices(tokenizer, [right, wrong]),
    )
    # Both choices pay 50 for the space, per two characters; zz pays 100 more.
    assert margins.tolist() == pytest.approx([50.0, -50.0], rel=1e-5)
    assert correct.tolist() == [True, False]


def test_only_scored_positions_matter(tiny_llama: Factory, tokenizer: Any) -> None:
    model = tiny_llama()
    encoded = encode_choices(tokenizer, ITEMS, 3)
    plain, _ = choice_margins(*_parts(model), encoded)

    trunk, head = _parts(model)

    def spoiled(batches: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        for ids_BT, hidden in zip(batches, trunk(batches), strict=True):
            yield hidden.masked_fill((ids_BT == 0)[..., None], torch.nan)  # padding

    assert choice_margins(spoiled, head, encoded)[0].tolist() == plain.tolist()


def test_batches_pad_little(tokenizer: Any) -> None:
    encoded = encode_choices(tokenizer, ITEMS, 2)
    lengths = [batch.ids.shape[1] for batch in encoded.batches]
    assert lengths == sorted(lengths, reverse=True)
    assert encoded.num_items == 3
    assert len(encoded.batches) == 4


def test_long_rows_keep_their_end(tiny_llama: Factory, tokenizer: Any) -> None:
    model = tiny_llama()
    parts = _parts(model)
    cut = encode_choices(tokenizer, [ChoiceItem("abcdefgh", ("x", "z"), 0)], max_tokens=5)
    assert [batch.ids.shape[1] for batch in cut.batches] == [5]
    short = encode_choices(tokenizer, [ChoiceItem("fgh", ("x", "z"), 0)])
    assert choice_margins(*parts, cut)[0] == pytest.approx(choice_margins(*parts, short)[0])


@pytest.mark.parametrize(
    ("context", "choices", "gold", "message"),
    [
        ("", ("a", "b"), 0, "need a context"),
        ("c", ("a",), 0, "at least two"),
        ("c", ("a", ""), 0, "none of them empty"),
        ("c", ("a", "b"), 2, r"allowed 0\.\.1"),
    ],
)
def test_bad_items_are_refused(
    context: str, choices: tuple[str, ...], gold: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ChoiceItem(context, choices, gold)


def test_no_item_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="got no item"):
        encode_choices(tokenizer, [])
