"""Facts about a search that a strategy switches on: as single values or as labelled lines."""

from __future__ import annotations

from collections.abc import Callable

from agent import trajectory
from agent.candidate import Candidate
from agent.ledger import ORDER
from agent.standing import ranked
from agent.view import View
from prompts.library import FACTS

_LABELS = {
    "model": "Model: ",
    "best": "Best so far: ",
    "worst": "Worst of the population: ",
    "failed": "Changes that did not help (m5-2: two MLP steps fewer in layer 5; a: attention):\n",
    "latency": "Time of a forward pass: ",
    "remaining": "Left: ",
}


def facts(view: View) -> str:
    """Return a line for each fact that the strategy shows and that there is yet."""
    told = {name: fact(view, name) for name in switched_on(view)}
    return "\n".join(f"{_LABELS[name]}{text}" for name, text in told.items() if text)


def fact(view: View, name: str) -> str:
    """Return the value of one of `FACTS`, nothing where there is none yet."""
    tellers = {
        "model": model,
        "best": best,
        "worst": worst,
        "failed": trajectory.failed,
        "latency": latency,
        "remaining": remaining,
    }
    return tellers[name](view)


def switched_on(view: View) -> list[str]:
    """Return the names of the facts that the strategy shows."""
    strategy = view.context.strategy
    return [name for name in FACTS if strategy is not None and name in strategy.shows]


def candidates(view: View, name: str) -> list[Candidate]:
    """Return the candidates of which one of `FACTS` tells the fitness."""
    pickers: dict[str, Callable[[View], list[Candidate]]] = {
        "best": _best,
        "worst": _worst,
        "failed": lambda view: [x for pair in trajectory.failures(view) for x in pair],
    }
    return pickers[name](view) if name in pickers else []


def model(view: View) -> str:
    """Return the name and the size of the model that is pruned."""
    context = view.context
    return f"{context.disguise.model(context.model_name)}, {context.space.layers} layers"


def best(view: View) -> str:
    """Return the fittest candidate."""
    return "".join(view.told(view.bearer(x)) for x in _best(view))


def worst(view: View) -> str:
    """Return the least fit of the candidates that survive, where that is not the best as well."""
    return "".join(view.told(view.bearer(x)) for x in _worst(view))


def latency(view: View) -> str:
    """Return the microseconds that a unit of either block takes."""
    cost = view.context.unit_latency
    if cost is None:
        return "not measured"
    mlp = f"an MLP step takes {cost[1]:.3g} us"
    if len(view.context.grid.attention) == 1:
        return mlp
    return f"an attention unit takes {cost[0]:.3g} us, {mlp}"


def remaining(view: View) -> str:
    """Return what this generation and the later ones may spend, of every limit that is set."""
    settings, spent = view.context.settings, view.context.ledger.charged(view.generation, ORDER[0])
    limits = {
        "evaluations": (
            settings.evaluations,
            float(view.context.ledger.equivalents(before=view.generation)),
        ),
        "calls": (settings.calls, spent.calls),
        "tokens": (settings.tokens, spent.tokens),
        "money": (settings.cost, spent.cost),
    }
    return ", ".join(
        f"{max(0, limit - used):.7g} of {limit:.7g} {name}"
        for name, (limit, used) in limits.items()
        if limit is not None
    )


def _best(view: View) -> list[Candidate]:
    return ranked(view.context, 1, view.generation)


def _worst(view: View) -> list[Candidate]:
    count = view.context.settings.population
    pool = ranked(view.context, count, view.generation)
    return pool[-1:] if len(pool) > 1 else []
