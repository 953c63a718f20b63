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
        rows = [
            Row(
                self._stops,
                x.max_tokens,
                temperature=x.temperature,
                seed=x.seed,
                matcher=self._matcher(x),
                encode=self._encode,
            )
            for x in requests
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
