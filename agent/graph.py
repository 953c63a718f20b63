"""The search as a graph: wiring, and the one function that runs it."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.errors import GraphDrained
from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.runtime import RunControl
from langgraph.types import RetryPolicy

from agent import nodes, probes, standing
from agent.candidate import Candidate
from agent.state import SearchContext, SearchState

Event = dict[str, Any]
SearchGraph = StateGraph[SearchState, SearchContext, SearchState, SearchState]
Runnable = CompiledStateGraph[SearchState, SearchContext, SearchState, SearchState]

_THREAD: RunnableConfig = {"configurable": {"thread_id": "search"}}

# Drivers retry their calls; whatever else fails in a node would fail again.
_ONCE = RetryPolicy(max_attempts=1, retry_on=())


class SearchDrainedError(Exception):
    """The search was asked to stop and did so between two steps; calling again resumes it."""


@dataclass(frozen=True)
class SearchResult:
    """What a search came to.

    Attributes:
        best: the first of the candidates that have seen all sequences of their window.
        finalists: the best ones, `best` first, and the first plan of all: for fresh tokens.
        leaders: `(generation, candidate)`, the best one after each generation.
        generations: `{generation, best_fitness, accuracy, speedup}` of each generation's best.
        evaluations: distinct plans scored.
        equivalents: full evaluations charged, by the sequences that the plans have seen.
        slopes: those of them that slopes were charged as.
        llm_calls, llm_tokens, llm_cost: paid for, repairs, failed calls and prompts included.
        llm_failures: calls that brought no reply.
        duplicates: replies in order whose plan was known already.
        fallbacks: candidates that the LLM was asked for and the classical operator made.
        origins: candidates per origin.
        seconds: time spent, resumed parts included.
        stopped: the limit reached (evaluations, calls, tokens, cost or seconds), no new plans,
            or no search.
    """

    best: Candidate
    finalists: tuple[Candidate, ...]
    leaders: tuple[tuple[int, Candidate], ...]
    generations: tuple[dict[str, Any], ...]
    evaluations: int
    equivalents: float
    slopes: float
    llm_calls: int
    llm_tokens: int
    llm_cost: float
    llm_failures: int
    duplicates: int
    fallbacks: int
    origins: dict[str, int]
    seconds: float
    stopped: str

    @property
    def lowest_fitness(self) -> float:
        """Of the best plan of every generation; that of `best` where there are no windows."""
        return min(float(x["best_fitness"]) for x in self.generations)


def build_graph() -> SearchGraph:
    """Return the uncompiled search graph."""
    graph: SearchGraph = StateGraph(SearchState, context_schema=SearchContext)
    graph.set_node_defaults(retry_policy=_ONCE)
    graph.add_node("generate", nodes.generate)
    graph.add_node("evaluate", nodes.evaluate)
    graph.add_node("record", nodes.record)
    graph.add_node("select", nodes.select)
    graph.add_node("crossover", nodes.crossover)
    graph.add_node("mutate", nodes.mutate)
    graph.add_edge(START, "generate")
    graph.add_edge("generate", "evaluate")
    graph.add_edge("evaluate", "record")
    graph.add_conditional_edges("record", goes_on, {"budget left": "select", "budget spent": END})
    graph.add_edge("select", "crossover")
    graph.add_edge("crossover", "mutate")
    graph.add_edge("mutate", "evaluate")
    return graph


def goes_on(state: SearchState) -> Literal["budget left", "budget spent"]:
    """Return whether the search goes on."""
    return "budget spent" if state["stopped"] else "budget left"


def graph() -> Runnable:
    """Return the graph as `langgraph dev` opens it; the server brings the checkpoints."""
    return build_graph().compile(name="search")


def picture() -> str:
    """Return the graph as a mermaid drawing, as the README shows it."""
    return graph().get_graph().draw_mermaid(with_styles=False).strip()


def run_search(
    context: SearchContext,
    checkpoint_path: Path,
    *,
    on_event: Callable[[Event], None] = lambda _: None,
    control: RunControl | None = None,
) -> SearchResult:
    """Return the outcome of the search, which starts or goes on where it stood.

    Args:
        context: the search's handles.
        checkpoint_path: SQLite file; with the ledger of the context, all that a resume needs.
        on_event: told of every probe, candidate, generation and call of the LLM.
        control: asks for a stop between two steps.

    Raises:
        ValueError: an allocator with an LLM lacks a driver or a strategy, or the probes leave no
            evaluation.
        SearchDrainedError: `control` asked for the stop.
        DriverError: all drivers gave up.
    """
    if context.settings.asks_llm and (not context.driver or not context.strategy):
        name = context.settings.allocator
        raise ValueError(f"search.allocator: {name} needs a driver and a strategy, driver is none")
    probes.check(context)
    with closing(sqlite3.connect(checkpoint_path, check_same_thread=False)) as connection:
        runnable = build_graph().compile(checkpointer=SqliteSaver(connection), name="search")
        stopped = _run(runnable, context, on_event, control)
    return _result(context, stopped)


def _run(
    runnable: Runnable,
    context: SearchContext,
    on_event: Callable[[Event], None],
    control: RunControl | None,
) -> str:
    """Run the graph to its end and return why it stopped."""
    # Six steps a generation, and every generation but the last scores a plan on one sequence.
    pairs = context.settings.evaluations * context.per_evaluation
    config: RunnableConfig = {**_THREAD, "recursion_limit": 10 + 6 * pairs}
    here = runnable.get_state(config)
    context.spending.earlier = here.values.get("seconds", 0.0)
    # Not `here.next`: it is also empty where a node ended but its step did not.
    if not here.values.get("stopped"):
        stream = runnable.stream(
            None if here.values else _first_state(),
            config,
            context=context,
            stream_mode="custom",
            durability="sync",
            control=control,
        )
        # Closed before the checkpoints' connection is, whatever happens: nodes run in a thread.
        with closing(cast(Generator[Event, None, None], stream)) as events:
            try:
                for event in events:
                    on_event(event)
            except GraphDrained as drained:
                raise SearchDrainedError(str(drained)) from None
    return str(runnable.get_state(config).values["stopped"])


def _first_state() -> SearchState:
    return {
        "generation": 0,
        "pending": [],
        "scores": [],
        "parents": [],
        "stopped": None,
        "seconds": 0.0,
    }


def _result(context: SearchContext, stopped: str) -> SearchResult:
    """Return the outcome as the ledger tells it."""
    candidates, spending = context.ledger.candidates(), context.spending
    lines, charge = context.ledger.lines(), context.ledger.charged()
    accepted = sum(1 for x in lines if x.outcome == "accepted" and x.operator != "select")
    origins = Counter(x.origin for x in candidates)
    finalists = standing.finalists(context)
    numbers = sorted({x.generation for x in candidates})
    best = {
        n: min(
            (x for x in candidates if x.generation == n),
            key=lambda x: (not x.is_complete, x.fitness, x.id),
        )
        for n in numbers
    }
    return SearchResult(
        best=finalists[0],
        finalists=tuple(finalists),
        leaders=tuple(standing.leaders(context)),
        generations=tuple(nodes.generation_line(n, best[n]) for n in numbers),
        evaluations=spending.evaluations,
        equivalents=float(spending.equivalents),
        slopes=float(sum(x.charge for x in context.ledger.slopes())),
        llm_calls=charge.calls,
        llm_tokens=charge.tokens,
        llm_cost=charge.cost,
        llm_failures=sum(1 for x in lines if x.reply is None and not x.is_skipped),
        duplicates=accepted - origins["llm"] - origins["llm_repaired"],
        fallbacks=origins["fallback"],
        origins={str(x): n for x, n in sorted(origins.items())},
        seconds=spending.seconds,
        stopped=stopped,
    )
