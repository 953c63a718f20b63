"""The messages of a prompt: the strategy's texts with what they name filled in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial

from agent import briefing, facts, margins, reflections, trajectory
from agent.candidate import Candidate
from agent.drivers.driver import Message
from agent.standing import ranked
from agent.view import View
from prompts.library import FACTS

_NOTHING = "none"


def messages(view: View, text: str, more: Mapping[str, str]) -> tuple[Message, ...]:
    """Return the system's words and the text called `text`; only what they name is worked out.

    `more` are values that the view does not know, such as the hint and the example.
    """
    strategy = view.context.strategy
    assert strategy is not None
    view, named = standpoint(view, text), _named(view, text)
    told = {name: teller() for name, teller in _tellers(view).items() if name in named - {*more}}
    values = {**briefing.common(view.context), **told, **more}
    return (
        {"role": "system", "content": strategy.render("system", values)},
        {"role": "user", "content": strategy.render(text, values)},
    )


def standpoint(view: View, text: str) -> View:
    """Return the view of the text called `text`, which knows what candidates it shows."""
    if not view.context.disguise.is_about_fitness:
        return view
    shown = {x.id: x for name in _named(view, text) for x in _candidates(view, name)}
    return replace(view, shown=tuple(shown.values()))


def _named(view: View, text: str) -> frozenset[str]:
    """Return the placeholders of the system's words and of a text."""
    strategy = view.context.strategy
    assert strategy is not None
    return strategy.placeholders("system") | strategy.placeholders(text)


def _candidates(view: View, name: str) -> Iterable[Candidate]:
    """Return the candidates of which a placeholder tells the fitness."""
    if name == "facts":
        return [x for fact in facts.switched_on(view) for x in facts.candidates(view, fact)]
    pickers: dict[str, Callable[[], Iterable[Candidate]]] = {
        **{fact: partial(facts.candidates, view, fact) for fact in FACTS},
        **dict.fromkeys(("parent", "margins", "first", "second"), lambda: view.parents),
        "history": partial(trajectory.last, view),
        "effects": partial(reflections.measured, view),
        "candidates": partial(_others, view),
    }
    return pickers[name]() if name in pickers else ()


def _tellers(view: View) -> dict[str, Callable[[], str]]:
    """Return what tells each placeholder but the common ones."""
    context = view.context
    past = {
        **{name: partial(facts.fact, view, name) for name in FACTS},
        "history": partial(trajectory.history, view),
        "effects": partial(reflections.effects, view),
        "lessons": partial(reflections.lessons, view),
        "candidates": partial(_list, view),
    }
    return {
        **{name: partial(_or_nothing, teller) for name, teller in past.items()},
        "facts": partial(facts.facts, view),
        "sensitivity": partial(briefing.sensitivity, context),
        "statistics": partial(margins.statistics, context, view.base),
        "margins": lambda: _headed(view, margins.margins(context, view.base)),
        "parent": lambda: _headed(view, _plan(view)),
        "first": lambda: _told(view, view.parents[0]),
        "second": partial(_second, view),
    }


def _or_nothing(teller: Callable[[], str]) -> str:
    return teller() or _NOTHING


def _list(view: View) -> str:
    """Return the listed candidates, the best first."""
    return "\n".join(map(view.told, view.ranked(_others(view))))


def _others(view: View) -> Iterable[Candidate]:
    """Return the candidates to be listed, or else the best ones that are not shown anyway."""
    if view.listed:
        return view.listed
    shown = view.context.settings.shown
    pool = ranked(view.context, shown + 2, view.generation)
    return [x for x in pool if x not in view.parents][:shown]


def _headed(view: View, plan: str) -> str:
    """Return the plan to be changed, headed by its fitness where it has one."""
    return "\n".join([*map(view.header, view.parents), plan])


def _plan(view: View) -> str:
    if view.form == "vectors":
        return briefing.vectors(view.context, view.base)
    return briefing.table(view.context, view.base)


def _told(view: View, parent: Candidate) -> str:
    """Return a plan to be crossed; the rows of a mix follow its second plan."""
    return view.told(parent) if view.form == "vectors" else view.header(parent)


def _second(view: View) -> str:
    """Return the second plan to be crossed, for a mix where it differs from the first."""
    second = view.parents[1]
    if view.form == "vectors":
        return _told(view, second)
    rows = briefing.rows_that_differ(view.context, view.base, view.levels(second))
    return f"{_told(view, second)}\n{rows}"
