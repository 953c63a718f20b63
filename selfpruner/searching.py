"""The search as a stage of a run: judges, driver, signals and what the user sees of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing

import numpy as np
from langgraph.runtime import RunControl

from agent.estimate import estimate
from agent.graph import Event, SearchDrainedError, SearchResult, run_search
from agent.ledger import Ledger, Probe
from agent.state import SearchContext
from prompts.library import load_strategy
from pruning.elastic import ElasticModel
from pruning.plan import Plan
from selfpruner.arena import Arena
from selfpruner.config import RunConfig
from selfpruner.driving import check_drivers, open_driver
from selfpruner.progress import Progress
from selfpruner.run_folder import RunFolder
from selfpruner.stopping import draining, raise_if_asked, stop_of

_MEASURED = ("probe", "slopes")  # events that cost evaluations and are no candidates


def check_words_and_drivers(config: RunConfig) -> None:
    """Refuse prompts and drivers that would not do, before anything is computed.

    Raises:
        ValueError: one line.
    """
    if config.search.asks_llm:
        shows = load_strategy(config.search.strategy).shows
        if config.search.placebo == "name" and "model" not in shows:
            raise ValueError(
                f"search.placebo: got 'name'; search.strategy {config.search.strategy} tells no "
                "name that could be hidden, allowed are strategies that show the model"
            )
        check_drivers(config.driver.chain)


def search(
    arena: Arena,
    config: RunConfig,
    folder: RunFolder,
    progress: Progress,
    starts: Sequence[Plan] = (),
    probes: Sequence[Probe] = (),
) -> SearchResult:
    """Return the outcome of the search of `config`, begun or gone on with in `folder`.

    `starts` are plans that its first generation scores beside the seed plan; `probes` are those of
    another search of this arena, for one that makes none.

    Raises:
        KeyboardInterrupt: a signal asked for a stop; TerminatedError for SIGTERM.
        DriverError: all drivers gave up.
    """
    with ExitStack() as stack:
        context = _context(arena, config, folder, progress, starts, probes)
        if context.driver is not None:
            stack.enter_context(closing(context.driver))
        _announce(context, progress)
        limit, done = config.search.evaluations, int(context.ledger.equivalents())
        advance = stack.enter_context(progress.stage("search", limit, done))
        control = RunControl()
        stack.enter_context(draining(control, progress.note))
        tell = narrator(advance, progress, done)
        try:
            found = run_search(context, folder.checkpoints, on_event=tell, control=control)
        except SearchDrainedError as drained:
            raise stop_of(str(control.drain_reason)) from drained
        raise_if_asked()  # the signal came in the last step of the search
        return found


def _context(
    arena: Arena,
    config: RunConfig,
    folder: RunFolder,
    progress: Progress,
    starts: Sequence[Plan],
    probes: Sequence[Probe],
) -> SearchContext:
    bench, asks = arena.bench, config.search.asks_llm
    facts = arena.prunable.facts if isinstance(arena.prunable, ElasticModel) else None
    return SearchContext(
        settings=config.search,
        driver_settings=config.driver,
        seed=config.seed,
        grid=bench.grid,
        budget=bench.budget,
        score=arena.score,
        sequences=meeting_order(arena.score.num_sequences, config.seed),
        sensitivity=arena.errors,
        assess=arena.assess,
        driver=open_driver(bench, config.driver.chain, folder, progress) if asks else None,
        strategy=load_strategy(config.search.strategy) if asks else None,
        ledger=Ledger(folder.path),
        clock=time.monotonic,
        unit_latency=arena.speed.per_unit(bench.grid),
        outliers=() if facts is None else facts.outliers,
        unit_scores=() if facts is None else tuple(zip(facts.attention, facts.mlp, strict=True)),
        starts=starts,
        model_name=config.model,
        slopes=arena.slopes if arena.score.has_slopes else None,
        earlier_probes=probes,
    )


def meeting_order(num_sequences: int, seed: int) -> tuple[int, ...]:
    """Return the sequences in the order in which plans meet them.

    Sequences that follow one another are of one document; the first ones shall speak for all.
    """
    return tuple(np.random.default_rng(seed).permutation(num_sequences).tolist())


def _announce(context: SearchContext, progress: Progress) -> None:
    """Say what the LLM will cost, or what an earlier process has left."""
    done = len(context.ledger.candidates())
    if done:
        progress.note(f"resumed: {done} plans are scored already")
    elif context.driver is not None:
        guess = estimate(context)
        cost = f", {guess.cost:.2f} at driver.price" if guess.cost else ""
        progress.note(f"estimate: {guess.calls} calls of the LLM, {guess.tokens} tokens{cost}")


def narrator(
    advance: Callable[..., None], progress: Progress, done: int
) -> Callable[[Event], None]:
    """Return a listener that moves the bar and prints a line a generation and a failure.

    Candidates are told one by one when their whole generation is scored. The bar moves once for
    all of them: after the first one it would show a generation's time for a single plan.

    `done`: full evaluations that the bar shows already.
    """
    now = done
    told = set[str]()  # reasons why the LLM is down

    def tell(event: Event) -> None:
        nonlocal done, now
        if event["kind"] in ("candidate", *_MEASURED):
            now = int(event["equivalents"])
        if event["kind"] in ("generation", *_MEASURED):
            advance(now - done)
            done = now
        if event["kind"] == "llm" and event["outcome"].startswith(("failed", "skipped")):
            progress.note(f"LLM call of generation {event['generation']}: {event['outcome']}")
        elif event["kind"] == "down" and event["reason"] not in told:
            told.add(event["reason"])
            progress.note(f"no LLM from here on: {event['reason']}")
        elif event["kind"] == "generation":
            progress.note(_generation(event))

    return tell


def _generation(event: Event) -> str:
    facts = [f"generation {event['generation']}: fitness {event['best_fitness']:.4f}"]
    if event["accuracy"] is not None:
        facts.append(f"accuracy {event['accuracy']:.2f}")
    if event["speedup"] is not None:
        facts.append(f"predicted speedup {event['speedup']:.2f}x")
    return ", ".join(facts)
