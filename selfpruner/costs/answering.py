"""The time that the LLM of a search takes to answer, by the kind of its driver."""

from __future__ import annotations

import math
from dataclasses import replace

from selfpruner.config import RunConfig
from selfpruner.costs.known_models import architecture_by_name
from selfpruner.costs.llm import Asking
from selfpruner.costs.work import Running, Work

_ASKED_TOKENS = 0.4  # share of a reply that takes a forward pass; the grammar forces the rest
_SERVER_SECONDS = 60  # until a vLLM server answers
_API_TOKENS_A_SECOND = 50
_API_LATENCY = 1.0


def answering(config: RunConfig, asked: Asking, dense: Running) -> tuple[Work, ...]:
    """Return the work of answering all calls, on the same device but for an `api` or a `replay`.

    Calls of one operator are answered side by side. A server starts no layers one by one; how fast
    an endpoint answers is a guess.
    """
    driver = config.driver
    brood = max(config.search.crossover, config.search.mutate, 1)
    rows = max(1, min(driver.batch, brood, asked.calls))
    waves = math.ceil(asked.calls / rows)
    reply = asked.reply_tokens / asked.calls
    if driver.kind == "replay":
        return (Work(),)
    if driver.kind == "api":
        return (Work(waiting=waves * (_API_LATENCY + reply / _API_TOKENS_A_SECOND)),)
    model = driver_of(config, dense) or dense
    loaded = Work(disk=0.0 if driver.model in (None, config.model) else model.weight_bytes)
    prompt = max(1, asked.prompt_tokens // asked.calls)
    read = model.passes(asked.prompt_tokens, prompt, rows)
    if driver.kind == "vllm":
        written = replace(model.steps(waves * reply, rows), layers=0)
        return (Work(waiting=_SERVER_SECONDS), read, written)
    return (loaded, read, model.steps(_ASKED_TOKENS * waves * reply, rows))


def driver_of(config: RunConfig, dense: Running) -> Running | None:
    """Return the model that the driver holds beside the dense one, None where it holds none.

    One of which nothing is known counts as the dense one; a vLLM server holds one of its own.
    """
    kind, name = config.driver.kind, config.driver.model
    if not config.search.asks_llm or kind not in ("embedded", "vllm"):
        return None
    if name is None or name == config.model:
        return dense if kind == "vllm" else None
    try:
        return replace(dense, architecture=architecture_by_name(name))
    except ValueError:
        return dense
