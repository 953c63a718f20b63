"""What a search will ask of its LLM, before the first call."""

from __future__ import annotations

import math
from dataclasses import dataclass

from agent import descent
from agent.operators import is_asked
from agent.questions import Slot, plan_question
from agent.state import SearchContext

_BYTES_PER_TOKEN = 3.5  # of prompts that hold many numbers
_REPAIRS = 1.25  # calls for one proposal, as a guess
_SEEN = 0.4  # share of the sequences that a plan sees in a race, as a guess


@dataclass(frozen=True)
class Estimate:
    """About how many calls, tokens and how much money a whole search takes."""

    calls: int
    tokens: int
    cost: float


def estimate(context: SearchContext) -> Estimate:
    """Return a guess from the first prompt, the longest reply being used to a half."""
    settings, driver = context.settings, context.driver_settings
    if not settings.asks_llm:
        return Estimate(0, 0, 0.0)
    seen = 1 if settings.racing.is_off else _SEEN
    slopes = float(descent.charge(context))
    plans = math.ceil(max(1.0, settings.evaluations - slopes) / seen)
    first = min(settings.population, plans)
    brood = settings.crossover + settings.mutate
    beside = int(settings.window is not None) + slopes / seen
    generations = math.ceil((plans - first) / (brood + beside))
    slots = [Slot(0, i, "generate") for i in range(math.ceil(plans - beside * generations))]
    asked = sum(is_asked(context, x) for x in slots)
    calls = math.ceil((asked + generations) * _REPAIRS)
    calls = calls if settings.calls is None else min(calls, settings.calls)
    messages = plan_question(context, Slot(0, 1, "generate")).messages
    prompt = round(sum(len(m["content"].encode()) for m in messages) / _BYTES_PER_TOKEN)
    reply = driver.max_tokens // 2
    return Estimate(calls, calls * (prompt + reply), calls * driver.price.of(prompt, reply))
