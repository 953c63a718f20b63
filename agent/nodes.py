"""The nodes of the search graph: small functions from state to a part of it."""

from __future__ import annotations

from typing import Any, cast

from langgraph.config import get_stream_writer
from langgraph.runtime import Runtime

from agent import descent, population, probes
from agent.candidate import Candidate, Scores
from agent.classical import operators_of
from agent.ledger import Probe
from agent.operators import Proposal, choose_parents, propose
from agent.questions import Slot
from agent.scoring import score_pending
from agent.state import SearchContext, SearchState
from pruning.plan import Plan

Update = dict[str, Any]

_PAIRS = 9_973  # keeps the draws of parents apart from those of the operators


def generate(state: SearchState, runtime: Runtime[SearchContext]) -> Update:
    """Propose the first generation, after the probes; without a search, its one plan."""
    context, generation = runtime.context, state["generation"]
    for probe in probes.measured(context):
        _tell_probe(context, probe)
    _measure_slopes(context, after=-1)
    fixed = context.fixed_plan
    if fixed is not None:
        slot = Slot(generation, 0, context.settings.allocator)
        return _timed(context, {"pending": [Proposal(slot, "heuristic", fixed).to_json(context)]})
    slots = [Slot(generation, i, "generate") for i in range(context.settings.population)]
    return _extend(context, generation, [], slots)


def evaluate(state: SearchState, runtime: Runtime[SearchContext]) -> Update:
    """Score the pending plans together; what the ledger has is not scored again."""
    context = runtime.context
    scores = score_pending(context, state["generation"], state["pending"])
    return _timed(context, {"scores": scores})


def record(state: SearchState, runtime: Runtime[SearchContext]) -> Update:
    """Write the generation to the ledger and see whether the search goes on."""
    context = runtime.context
    record_generation(context, state["generation"], state["pending"], state["scores"])
    stopped = "no search" if context.fixed_plan else context.spending.reached()
    if not state["pending"]:
        stopped = stopped or "no new plans"
    return _timed(context, {"pending": [], "scores": [], "stopped": stopped})


def select(state: SearchState, runtime: Runtime[SearchContext]) -> Update:
    """Choose the parents of the next generation, and see which way is down from the best plan."""
    context = runtime.context
    _measure_slopes(context, after=state["generation"])
    generation = state["generation"] + 1
    slot = context.settings.crossover + context.settings.mutate
    parents = choose_parents(context, generation, slot)
    return _timed(context, {"generation": generation, "parents": [x.id for x in parents]})


def crossover(state: SearchState, runtime: Runtime[SearchContext]) -> Update:
    """Propose offspring of pairs of parents."""
    context, generation = runtime.context, state["generation"]
    if len(state["parents"]) < 2 or not operators_of(context).crosses:
        return {"pending": []}
    parents = _by_id(context, state["parents"])
    slots = []
    for index in range(context.settings.crossover):
        rng = population.generator(context.seed, generation, index, _PAIRS)
        pair = sorted(rng.choice(len(parents), 2, replace=False).tolist())
        slots.append(Slot(generation, index, "crossover", tuple(parents[i] for i in pair)))
    return _extend(context, generation, [], slots)


def mutate(state: SearchState, runtime: Runtime[SearchContext]) -> Update:
    """Propose offspring of single parents, every other one of the first; new plans without any."""
    context, generation = runtime.context, state["generation"]
    settings = context.settings
    parents = _by_id(context, state["parents"])
    first = settings.crossover if operators_of(context).crosses else 0
    numbers = range(first, settings.crossover + settings.mutate)
    if not parents:
        slots = [Slot(generation, i, "generate") for i in numbers]
    else:
        turns = [0 if i % 2 == 0 else (i // 2 + 1) % len(parents) for i in range(len(numbers))]
        slots = [
            Slot(generation, n, "mutate", (parents[t],))
            for n, t in zip(numbers, turns, strict=True)
        ]
    return _extend(context, generation, state["pending"], slots)


def record_generation(
    context: SearchContext,
    generation: int,
    pending: list[dict[str, Any]],
    scores: list[dict[str, Any]],
) -> None:
    """Append a generation to the ledger, its best plan assessed; known lines stay as they are."""
    if not pending:
        return
    ranks = [(x["sequences"] < x.get("of", 0), x["fitness"], i) for i, x in enumerate(scores)]
    best = min(ranks)[-1]
    for i, (proposal, score) in enumerate(zip(pending, scores, strict=True)):
        if context.ledger.find(proposal["key"]) is not None:
            continue
        facts: dict[str, float] = {}
        if i == best and context.assess is not None:
            facts = context.assess(Plan.from_json(proposal["genotype"]))
        candidate = Candidate(
            id=len(context.ledger.candidates()),
            generation=generation,
            slot=proposal["slot"],
            operator=proposal["operator"],
            origin=proposal["origin"],
            parents=tuple(proposal["parents"]),
            genotype=tuple((a, b, c) for a, b, c in proposal["genotype"]),
            key=proposal["key"],
            scores=cast(Scores, {k: v for k, v in score.items() if k != "seconds"}),
            accuracy=facts.get("accuracy"),
            speedup=facts.get("speedup"),
            tokens=proposal["tokens"],
            seconds=score["seconds"],
        )
        context.ledger.add_candidate(candidate)
        _tell(context, candidate)
    winner = context.ledger.find(pending[best]["key"])
    assert winner is not None
    get_stream_writer()({"kind": "generation", **generation_line(generation, winner)})


def generation_line(generation: int, best: Candidate) -> dict[str, Any]:
    """Return what a report says of a generation and its best candidate."""
    return {
        "generation": generation,
        "best_fitness": best.fitness,
        "accuracy": best.accuracy,
        "speedup": best.speedup,
    }


def _tell(context: SearchContext, candidate: Candidate) -> None:
    get_stream_writer()(
        {
            "kind": "candidate",
            "id": candidate.id,
            "generation": candidate.generation,
            "operator": candidate.operator,
            "origin": candidate.origin,
            "fitness": candidate.fitness,
            "best": context.ledger.best(1)[0].fitness,
            "evaluations": context.spending.evaluations,
            "equivalents": float(context.spending.equivalents),
            "limit": context.settings.evaluations,
        }
    )


def _tell_probe(context: SearchContext, probe: Probe) -> None:
    get_stream_writer()(
        {
            "kind": "probe",
            "layer": probe.layer,
            "block": probe.block,
            "level": probe.level,
            "equivalents": float(context.spending.equivalents),
            "limit": context.settings.evaluations,
        }
    )


def _measure_slopes(context: SearchContext, after: int) -> None:
    if descent.measure(context, after):
        get_stream_writer()(
            {
                "kind": "slopes",
                "generation": after,
                "equivalents": float(context.spending.equivalents),
                "limit": context.settings.evaluations,
            }
        )


def _extend(
    context: SearchContext, generation: int, pending: list[dict[str, Any]], slots: list[Slot]
) -> Update:
    """Return the pending plans with those of `slots` added, as many as may still be scored."""
    slots = slots[: context.spending.evaluations_left(generation, len(pending))]
    made = propose(context, generation, slots, [x["key"] for x in pending])
    return _timed(context, {"pending": [*pending, *(x.to_json(context) for x in made)]})


def _timed(context: SearchContext, update: Update) -> Update:
    """Return an update with the time spent so far: a search may be stopped after any node."""
    return {**update, "seconds": context.spending.seconds}


def _by_id(context: SearchContext, ids: list[int]) -> list[Candidate]:
    known = {x.id: x for x in context.ledger.candidates()}
    return [known[i] for i in ids]
