"""The search as a graph: wiring, and the one function that runs it."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.graph import END, START, StateGraph

from agent import allocators, nodes
from agent.candidate import Candidate
from agent.operators import Proposal
from agent.projection import Levels
from agent.questions import Slot
from agent.state import SearchContext, SearchState

_THREAD: RunnableConfig = {"configurable": {"thread_id": "search"}}


@dataclass(frozen=True)
class SearchResult:
    """What a search came to.

    Attributes:
        best: lowest fitness on the search sequences.
        finalists: the best ones, `best` first, for scoring on fresh tokens.
        generations: `{generation, best_fitness, accuracy, speedup}` of each generation's best.
        evaluations: distinct plans scored.
        llm_calls, llm_tokens: paid for, repairs and prompts included.
        fallbacks: candidates that the LLM was asked for and the classical operator made.
        origins: candidates per origin.
        seconds: time spent, resumed parts included.
        stopped: evaluations, seconds, no new plans, or no search.
    """

    best: Candidate
    finalists: tuple[Candidate, ...]
    generations: tuple[dict[str, Any], ...]
    evaluations: int
    llm_calls: int
    llm_tokens: int
    fallbacks: int
    origins: dict[str, int]
    seconds: float
    stopped: str


def build_graph() -> StateGraph[SearchState, SearchContext, SearchState, SearchState]:
    """Return the uncompiled search graph."""
    graph = StateGraph(SearchState, context_schema=SearchContext)
    graph.add_node("generate", nodes.generate)
    graph.add_node("evaluate", nodes.evaluate)
    graph.add_node("record", nodes.record)
    graph.add_node("select", nodes.select)
    graph.add_node("crossover", nodes.crossover)
    graph.add_node("mutate", nodes.mutate)
    graph.add_edge(START, "generate")
    graph.add_edge("generate", "evaluate")
    graph.add_edge("evaluate", "record")
    graph.add_conditional_edges("record", goes_on, {"yes": "select", "no": END})
    graph.add_edge("select", "crossover")
    graph.add_edge("crossover", "mutate")
    graph.add_edge("mutate", "evaluate")
    return graph


def goes_on(state: SearchState) -> Literal["yes", "no"]:
    """Return whether the budget is left."""
    return "no" if state["stopped"] else "yes"


def run_search(context: SearchContext, checkpoint_path: Path) -> SearchResult:
    """Return the outcome of the search, which starts or goes on where it stood.

    The allocators uniform, uniform_mlp and heuristic score their one plan. A KeyboardInterrupt
    passes through; all that was scored is in the ledger, and calling again resumes.

    Raises:
        ValueError: the llm allocator lacks a driver or a strategy.
    """
    context.spending  # noqa: B018  the clock starts here
    fixed = _fixed(context)
    if fixed is not None:
        stopped = _score_fixed(context, fixed)
    else:
        if context.settings.allocator == "llm" and (not context.driver or not context.strategy):
            raise ValueError("search.allocator: llm needs a driver and a strategy, driver is none")
        stopped = _run_graph(context, checkpoint_path)
    return _result(context, stopped)


def _run_graph(context: SearchContext, checkpoint_path: Path) -> str:
    """Run the graph to its end and return why it stopped."""
    first: SearchState = {
        "generation": 0,
        "pending": [],
        "scores": [],
        "parents": [],
        "stopped": None,
    }
    # Six steps a generation, and every generation but the last scores a plan.
    steps = 10 + 6 * (context.settings.evaluations + 1)
    with closing(sqlite3.connect(checkpoint_path, check_same_thread=False)) as connection:
        graph = build_graph().compile(checkpointer=SqliteSaver(connection))
        config: RunnableConfig = {**_THREAD, "recursion_limit": steps}
        here = graph.get_state(config)
        if here.values and not here.next:
            return str(here.values["stopped"])
        end = graph.invoke(
            None if here.values else first, config, context=context, durability="sync"
        )
    return str(end["stopped"])


def _fixed(context: SearchContext) -> Callable[[], Levels] | None:
    """Return the allocator of a run without a search."""
    space = context.space
    makers: dict[str, Callable[[], Levels]] = {
        "uniform": lambda: allocators.uniform(space),
        "uniform_mlp": lambda: allocators.uniform_mlp(space),
        "heuristic": lambda: context.conform(allocators.heuristic(space, context.sensitivity)),
    }
    return makers.get(context.settings.allocator)


def _score_fixed(context: SearchContext, make: Callable[[], Levels]) -> str:
    """Score and record the one plan of `make`."""
    slot = Slot(0, 0, context.settings.allocator)
    pending = [Proposal(slot, "heuristic", make()).to_json(context)]
    nodes.record_generation(context, 0, pending, nodes.score_pending(context, pending))
    return "no search"


def _result(context: SearchContext, stopped: str) -> SearchResult:
    """Return the outcome as the ledger tells it."""
    candidates, spending = context.ledger.candidates(), context.spending
    origins = Counter(x.origin for x in candidates)
    finalists = context.ledger.best(context.settings.finalists)
    numbers = sorted({x.generation for x in candidates})
    best = {
        n: min((x for x in candidates if x.generation == n), key=lambda x: (x.fitness, x.id))
        for n in numbers
    }
    return SearchResult(
        best=finalists[0],
        finalists=tuple(finalists),
        generations=tuple(nodes.generation_line(n, best[n]) for n in numbers),
        evaluations=spending.evaluations,
        llm_calls=spending.llm_calls,
        llm_tokens=spending.llm_tokens,
        fallbacks=origins["fallback"],
        origins={str(x): n for x, n in sorted(origins.items())},
        seconds=spending.seconds,
        stopped=stopped,
    )
