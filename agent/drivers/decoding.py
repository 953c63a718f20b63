"""Decoding of a batch under grammars: what a grammar leaves no choice about is never asked for.

Most of a JSON reply is fixed by its schema: keys, quotes, brackets. Such a stretch is appended as
tokens at once and enters the model together with the next token that has to be chosen, so that a
reply takes as many forward passes as it has choices. Rows get on by different numbers of tokens;
each is padded on its left to the widest, and the padding stays masked in the cache.

Shapes: N rows of a batch, T new tokens, S tokens in the cache, V vocabulary, K KV heads, G query
heads a KV head, D the size of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
import xgrammar
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

Encode = Callable[[str], list[int]]

_ATTENTION = "selfpruner_decode"


class Row:
    """One reply as it grows: its grammar, its random stream, its tokens.

    Attributes:
        reply: tokens so far, the stop token never among them.
        ended: whether it is complete or as long as it may be.
    """

    def __init__(
        self,
        stops: Sequence[int],
        max_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        matcher: Any = None,
        encode: Encode | None = None,
    ) -> None:
        """Begin a reply.

        Args:
            stops: tokens that end it.
            max_tokens: longest reply, at least 1.
            temperature: 0 takes the likeliest token.
            seed: of its random stream.
            matcher: follows the grammar; None for free text.
            encode: tokens of a text, for what the grammar forces; None forces nothing.
        """
        self.reply: list[int] = []
        self.ended = False
        self._stops, self._max_tokens = stops, max_tokens
        self._temperature, self._generator = temperature, torch.Generator().manual_seed(seed)
        self._matcher, self._encode = matcher, encode

    def choose(self, logits_V: torch.Tensor) -> list[int]:
        """Sample a token of the grammar and return what is new: it and what it leads to."""
        if self._matcher is not None:
            bitmask = xgrammar.allocate_token_bitmask(1, len(logits_V))
            self._matcher.fill_next_token_bitmask(bitmask)
            logits_V = logits_V.clone()
            xgrammar.apply_token_bitmask_inplace(logits_V[None], bitmask, backend="cpu")
        token = self._sample(logits_V)
        if self._matcher is not None:
            assert self._matcher.accept_token(token)
        if token in self._stops:
            self.ended = True
            return []
        self._append(token)
        return [token, *self.forced()]

    def forced(self) -> list[int]:
        """Append what the grammar leaves no choice about, and return it.

        A tokenizer that begins every text with a space has no tokens for it, and none is appended.
        """
        if self._matcher is None or self._encode is None or self.ended:
            return []
        appended = []
        for token in self._encode(self._matcher.find_jump_forward_string()):
            if self.ended or not self._matcher.accept_token(token):
                break
            self._append(token)
            appended.append(token)
        return appended

    def _append(self, token: int) -> None:
        self.reply.append(token)
        self.ended = len(self.reply) == self._max_tokens

    def _sample(self, logits_V: torch.Tensor) -> int:
        if self._temperature == 0:
            return int(logits_V.argmax())
        chances_V = torch.softmax(logits_V / self._temperature, dim=0)
        return int(torch.multinomial(chances_V, 1, generator=self._generator))


@torch.no_grad()
def decode(model: Any, prompts: Sequence[list[int]], rows: Sequence[Row], pad: int) -> None:
    """Let a causal language model write the rows to their ends; `prompts` are their tokens."""
    new = [[*prompt, *row.forced()] for prompt, row in zip(prompts, rows, strict=True)]
    mask_NS = torch.zeros((len(rows), 0), dtype=torch.long)
    cache = None
    last = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
    with _fast_attention(model):
        while not all(row.ended for row in rows):
            ids_NT, mask_NT = _padded(new, pad)
            mask_NS = torch.cat([mask_NS, mask_NT], dim=1)
            positions_NS = (mask_NS.cumsum(1) - 1).clamp_min(0)
            output = model(
                input_ids=ids_NT.to(model.device),
                attention_mask=mask_NS.to(model.device),
                position_ids=positions_NS[:, -ids_NT.shape[1] :].to(model.device),
                past_key_values=cache,
                use_cache=True,
                **last,
            )
            cache = output.past_key_values
            logits_NV = output.logits[:, -1].to("cpu", torch.float32)
            new = [
                [] if row.ended else row.choose(logits_V)
                for row, logits_V in zip(rows, logits_NV, strict=True)
            ]


def _padded(rows: Sequence[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask (N, T), each row at the right."""
    width = max(len(x) for x in rows)
    ids_NT = torch.tensor([[pad] * (width - len(x)) + x for x in rows])
    mask_NT = torch.tensor([[0] * (width - len(x)) + [1] * len(x) for x in rows])
    return ids_NT, mask_NT


@contextmanager
def _fast_attention(model: Any) -> Iterator[None]:
    """Give a model on the CPU `_decode_attention` for a while, if it attends by `sdpa`."""
    before = model.config._attn_implementation
    if model.device.type != "cpu" or before != "sdpa":
        yield
        return
    AttentionInterface.register(_ATTENTION, _decode_attention)
    AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
    model.config._attn_implementation = _ATTENTION
    try:
        yield
    finally:
        model.config._attn_implementation = before


def _decode_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Return attention (N, T, K * G, D); few new tokens go by two matrix products a KV head.

    The fused CPU kernel takes some 20 times as long for a single bfloat16 query on one core. A
    prompt goes there all the same: its padding sees nothing, which the kernel knows how to bear.
    """
    batch, heads, tokens, size = query.shape
    unmasked = attention_mask is None and tokens > 1
    if tokens == key.shape[2] or unmasked or _is_additive(attention_mask):
        result, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return result, None
    groups, scaling = key.shape[1], options.get("scaling")
    query_NKMD = query.reshape(batch, groups, heads // groups * tokens, size)
    scores_NKMS = query_NKMD @ key.transpose(2, 3) * (size**-0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores_NKGTS = scores_NKMS.unflatten(2, (heads // groups, tokens))
        scores_NKGTS = scores_NKGTS.masked_fill(~attention_mask[:, :, None], float("-inf"))
        scores_NKMS = scores_NKGTS.flatten(2, 3)
    weights_NKMS = torch.softmax(scores_NKMS.float(), dim=-1).to(query.dtype)
    result_NHTD = (weights_NKMS @ value).reshape(batch, heads, tokens, size)
    return result_NHTD.transpose(1, 2).contiguous(), None


def _is_additive(mask: torch.Tensor | None) -> bool:
    return mask is not None and mask.dtype != torch.bool
