"""A driver in this process: a transformers model that decodes a batch under JSON grammars."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import xgrammar
from jinja2.exceptions import TemplateError

from agent.drivers.decoding import Row, decode
from agent.drivers.driver import Completion, MayRetry, Message, Request

_LEAST_REPLY = 16  # tokens of the context; a prompt that leaves fewer is not answered


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
        self._stops = stop_tokens(model, tokenizer)
        vocabulary = int(model.get_output_embeddings().weight.shape[0])
        self._compiler = xgrammar.GrammarCompiler(
            xgrammar.TokenizerInfo.from_huggingface(
                tokenizer, vocab_size=vocabulary, stop_token_ids=self._stops
            )
        )
        self._grammars: dict[str, Any] = {}

    def complete(self, requests: Sequence[Request], may_retry: MayRetry) -> Iterator[Completion]:
        """Yield one completion for each request, batch by batch.

        A reply ends where the model's context does. A prompt is never truncated: one that leaves
        too little of the context fails, and no other try would help it.
        """
        del may_retry
        prompts = [self._tokens(x) for x in requests]
        fitting = [i for i, prompt in enumerate(prompts) if self._room(prompt) >= _LEAST_REPLY]
        for i in sorted(set(range(len(requests))) - set(fitting)):
            yield self._too_long(i, len(prompts[i]))
        for start in range(0, len(fitting), self._batch):
            asked = fitting[start : start + self._batch]
            batch = self._complete_batch([requests[i] for i in asked], [prompts[i] for i in asked])
            yield from (replace(x, request=asked[x.request]) for x in batch)

    def close(self) -> None:
        """Do nothing: the model belongs to whoever gave it."""

    def _complete_batch(
        self, requests: Sequence[Request], prompts: Sequence[list[int]]
    ) -> list[Completion]:
        began = time.perf_counter()
        rows = [
            Row(
                self._stops,
                min(x.max_tokens, self._room(prompt)),
                temperature=x.temperature,
                seed=x.seed,
                matcher=self._matcher(x),
                encode=self._encode,
            )
            for x, prompt in zip(requests, prompts, strict=True)
        ]
        decode(self._model, prompts, rows, pad=self._stops[0])
        seconds = (time.perf_counter() - began) / len(requests)
        return [
            Completion(
                request=i,
                text=self._tokenizer.decode(row.reply, skip_special_tokens=True),
                prompt_tokens=len(prompt),
                completion_tokens=len(row.reply),
                seconds=seconds,
                model=self._name,
            )
            for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True))
        ]

    def _tokens(self, request: Request) -> list[int]:
        text = _rendered(self._tokenizer, request.messages)
        has_template = self._tokenizer.chat_template is not None
        return list(self._tokenizer(text, add_special_tokens=not has_template)["input_ids"])

    def _room(self, prompt: Sequence[int]) -> int:
        """Return the tokens of the context that a prompt leaves for its reply."""
        return int(self._model.config.max_position_embeddings) - len(prompt)

    def _too_long(self, number: int, tokens: int) -> Completion:
        context = int(self._model.config.max_position_embeddings)
        reason = f"a prompt of {tokens} tokens leaves no room for a reply in a context of {context}"
        return Completion(number, None, 0, 0, 0.0, self._name, failure=reason)

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

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


def stop_tokens(model: Any, tokenizer: Any) -> list[int]:
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
