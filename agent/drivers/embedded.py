"""A driver in this process: a transformers model that decodes a batch under JSON grammars.

Shapes: N requests of a batch, T tokens, V vocabulary, K KV heads, G query heads a KV head, D the
size of a head.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import xgrammar
from jinja2.exceptions import TemplateError
from transformers import AttentionInterface, LogitsProcessor, LogitsProcessorList
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from agent.drivers.driver import Completion, MayRetry, Message, Request

_ATTENTION = "selfpruner_decode"


class EmbeddedDriver:
    """Batched sampling with left padding, one compiled grammar and one random stream a request.

    Sampling draws from a generator of the request's own seed, so neither the global random state
    nor the seeds of neighbours in the batch matter. The model is used as it is and never changed.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str, batch: int = 8) -> None:
        """Take a causal language model in evaluation mode and its tokenizer.

        `name` is what completions report; `batch` the requests decoded at once, at least 1.
        """
        self._model, self._tokenizer = model, tokenizer
        self._name, self._batch = name, batch
        self._stops = _stop_tokens(model, tokenizer)
        vocabulary = int(model.get_output_embeddings().weight.shape[0])
        self._compiler = xgrammar.GrammarCompiler(
            xgrammar.TokenizerInfo.from_huggingface(
                tokenizer, vocab_size=vocabulary, stop_token_ids=self._stops
            )
        )
        self._grammars: dict[str, Any] = {}
        self._vocabulary = vocabulary

    def complete(self, requests: Sequence[Request], may_retry: MayRetry) -> Iterator[Completion]:
        """Yield one completion for each request, in order, batch by batch; no try fails.

        Raises:
            ValueError: a prompt and its longest reply do not fit into the model's context.
        """
        del may_retry
        prompts = [self._tokens(x) for x in requests]
        for start in range(0, len(requests), self._batch):
            end = start + self._batch
            batch = self._complete_batch(requests[start:end], prompts[start:end])
            yield from (replace(x, request=start + x.request) for x in batch)

    def close(self) -> None:
        """Do nothing: the model belongs to whoever gave it."""

    def _complete_batch(
        self, requests: Sequence[Request], prompts: Sequence[list[int]]
    ) -> list[Completion]:
        began = time.perf_counter()
        ids_NT, mask_NT = self._padded(prompts)
        sampler = _GrammarSampler(
            requests, [self._matcher(x) for x in requests], self._vocabulary, self._stops[0]
        )
        with torch.no_grad(), _fast_decoding(self._model):
            output = self._model.generate(
                input_ids=ids_NT,
                attention_mask=mask_NT,
                max_new_tokens=max(x.max_tokens for x in requests),
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=self._stops,
                pad_token_id=self._stops[0],
                logits_processor=LogitsProcessorList([sampler]),
            )
        replies = [self._reply(row) for row in output[:, ids_NT.shape[1] :].tolist()]
        seconds = (time.perf_counter() - began) / len(requests)
        return [
            Completion(
                request=i,
                text=self._tokenizer.decode(reply, skip_special_tokens=True),
                prompt_tokens=len(prompt),
                completion_tokens=len(reply),
                seconds=seconds,
                model=self._name,
            )
            for i, (prompt, reply) in enumerate(zip(prompts, replies, strict=True))
        ]

    def _tokens(self, request: Request) -> list[int]:
        """Return the prompt's tokens, which are never truncated."""
        text = _rendered(self._tokenizer, request.messages)
        has_template = self._tokenizer.chat_template is not None
        ids = list(self._tokenizer(text, add_special_tokens=not has_template)["input_ids"])
        context = int(self._model.config.max_position_embeddings)
        if len(ids) + request.max_tokens > context:
            raise ValueError(
                f"driver {self._name}: prompt of {len(ids)} tokens and driver.max_tokens "
                f"{request.max_tokens} exceed its context of {context}"
            )
        return ids

    def _padded(self, prompts: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(len(x) for x in prompts)
        pad = self._stops[0]
        ids_NT = torch.tensor([[pad] * (width - len(x)) + x for x in prompts])
        mask_NT = torch.tensor([[0] * (width - len(x)) + [1] * len(x) for x in prompts])
        device = self._model.device
        return ids_NT.to(device), mask_NT.to(device)

    def _matcher(self, request: Request) -> Any:
        """Return a fresh matcher of the request's schema, None for free text."""
        if not request.schema:
            return None
        key = json.dumps(request.schema)
        if key not in self._grammars:
            self._grammars[key] = self._compiler.compile_json_schema(
                key, any_whitespace=False, separators=(",", ":")
            )
        return xgrammar.GrammarMatcher(self._grammars[key])

    def _reply(self, tokens: list[int]) -> list[int]:
        """Return the tokens before the first stop token."""
        stop = next((i for i, x in enumerate(tokens) if x in self._stops), len(tokens))
        return tokens[:stop]


class _GrammarSampler(LogitsProcessor):  # type: ignore[misc]
    """Leaves only the token that it has sampled for each row, within the row's grammar."""

    def __init__(
        self, requests: Sequence[Request], matchers: Sequence[Any], vocabulary: int, stop: int
    ) -> None:
        self._requests, self._matchers = requests, matchers
        self._generators = [torch.Generator().manual_seed(x.seed) for x in requests]
        self._bitmask = xgrammar.allocate_token_bitmask(1, vocabulary)
        self._stop, self._step = stop, 0
        self._ended = [False] * len(requests)

    def __call__(self, _: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores (N, V) that are 0 at the chosen token and -inf elsewhere."""
        logits_NV = scores.to("cpu", torch.float32)
        chosen = [self._choose(i, row) for i, row in enumerate(logits_NV)]
        self._step += 1
        result = torch.full_like(scores, float("-inf"))
        index = torch.tensor(chosen, device=scores.device)[:, None]
        return result.scatter_(1, index, 0.0)

    def _choose(self, row: int, logits_V: torch.Tensor) -> int:
        request, matcher = self._requests[row], self._matchers[row]
        if self._ended[row] or self._step >= request.max_tokens:
            return self._stop
        if matcher is not None:
            matcher.fill_next_token_bitmask(self._bitmask)
            logits_V = logits_V.clone()[None]
            xgrammar.apply_token_bitmask_inplace(logits_V, self._bitmask, backend="cpu")
            logits_V = logits_V[0]
        token = self._sample(row, logits_V, request.temperature)
        if matcher is not None:
            assert matcher.accept_token(token)
            self._ended[row] = matcher.is_terminated()
        else:
            self._ended[row] = token == self._stop
        return token

    def _sample(self, row: int, logits_V: torch.Tensor, temperature: float) -> int:
        if temperature == 0:
            return int(logits_V.argmax())
        chances_V = torch.softmax(logits_V / temperature, dim=0)
        return int(torch.multinomial(chances_V, 1, generator=self._generators[row]))


@contextmanager
def _fast_decoding(model: Any) -> Iterator[None]:
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
    """Return attention (N, T, K * G, D); one new token goes by two matrix products a KV head.

    The fused CPU kernel takes some 20 times as long for a single bfloat16 query on one core.
    """
    batch, heads, tokens, size = query.shape
    masked = attention_mask is not None and attention_mask.dtype != torch.bool
    if tokens > 1 or masked:
        result, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return result, None
    groups, scaling = key.shape[1], options.get("scaling")
    query_NKGD = query.reshape(batch, groups, heads // groups, size)
    scores_NKGT = query_NKGD @ key.transpose(2, 3) * (size**-0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores_NKGT = scores_NKGT.masked_fill(~attention_mask, float("-inf"))
    weights_NKGT = torch.softmax(scores_NKGT.float(), dim=-1).to(query.dtype)
    return (weights_NKGT @ value).reshape(batch, 1, heads, size), None


def _stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Return the ids that end a reply, the tokenizer's own first."""
    configured = model.generation_config.eos_token_id
    more = configured if isinstance(configured, list) else [configured]
    ids = dict.fromkeys(x for x in [tokenizer.eos_token_id, *more] if x is not None)
    if not ids:
        raise ValueError("driver: the tokenizer and the model name no end-of-text token")
    return [int(x) for x in ids]


def _rendered(tokenizer: Any, messages: Sequence[Message]) -> str:
    """Return the prompt by the chat template; without one, the contents in order."""
    if tokenizer.chat_template is None:
        return "\n\n".join(x["content"] for x in messages) + "\n\n"
    settings = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
    try:
        return str(tokenizer.apply_chat_template(list(messages), **settings))
    except TemplateError:
        return str(tokenizer.apply_chat_template(_without_system(messages), **settings))


def _without_system(messages: Sequence[Message]) -> list[Message]:
    """Return the messages with the system's words at the head of the first user message."""
    system = "\n\n".join(x["content"] for x in messages if x["role"] == "system")
    rest = [dict(x) for x in messages if x["role"] != "system"]
    rest[0]["content"] = f"{system}\n\n{rest[0]['content']}"
    return rest
