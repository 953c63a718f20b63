"""Controls: what is hidden is in no prompt, the rest of a prompt and of a search stays as it is."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent import briefing, facts, reflections, trajectory, wording
from agent.candidate import Candidate
from agent.conversation import Question
from agent.disguise import Disguise
from agent.drivers.driver import Completion, MayRetry, Request
from agent.graph import run_search
from agent.ledger import Ledger
from agent.projection import Levels
from agent.questions import Slot, parents_question, plan_question
from agent.reply import ReplyError
from agent.state import SearchContext
from agent.view import View
from prompts.library import load_strategy

Scene = Callable[..., SearchContext]

STRATEGIES = [
    *("history", "knowledge", "moves", "paper", "reasoning", "reflection", "with_statistics")
]
HEADER = re.compile(r"plan (\d+): fitness ([\d.]+)")


@dataclass
class IndexedDriver:
    """Answers by the place of a request with true layers, under the indices that `disguise` tells.

    Its words name the place alone. It keeps how many requests it answered.
    """

    context: SearchContext
    disguise: Disguise
    answered: int = 0

    def complete(self, requests: Sequence[Request], _: MayRetry) -> Iterator[Completion]:
        for number, request in enumerate(requests):
            self.answered += 1
            yield Completion(number, json.dumps(self.reply(request)), 100, 20, 0.5, "fake")

    def reply(self, request: Request) -> dict[str, Any]:
        place, strategy = request.place, self.context.strategy
        assert strategy is not None
        said = {x: f"{x} {place.generation}.{place.slot}" for x in strategy.words(place.operator)}
        if place.operator == "select":
            known = request.schema["properties"]["parents"]["items"]["enum"]
            return {**said, "parents": known[:3]}
        form = strategy.forms[place.operator]
        return {**said, **self.answer(form, place.generation, place.slot)}

    def answer(self, form: str, generation: int, slot: int) -> dict[str, Any]:
        layers, layer = self.disguise.layers, self.disguise.layer
        if form == "mix":
            return {"from_second": [layer(slot % layers)]}
        if form == "vectors":
            rng = np.random.default_rng((generation, slot))
            rates = rng.integers(0, 90, (layers, 2)).tolist()
            if self.context.settings.granularity == "layer":
                return {"rates": [m for _, m in self.disguise.rows(rates)]}
            told = self.disguise.rows(rates)
            return {"attention": [a for a, _ in told], "mlp": [m for _, m in told]}
        take = (5 * slot + generation) % layers
        give = (take + 1 + slot % (layers - 1)) % layers
        move = {"block": "mlp", "take_from": layer(take), "give_to": layer(give)}
        return {"moves": [{**move, "units": 1 + slot % 3}]}

    def close(self) -> None:
        pass


@pytest.fixture
def asking(scene: Scene) -> Scene:
    """Return a maker of contexts whose driver knows the true layers behind the told ones."""

    def make(**settings: Any) -> SearchContext:
        context = scene(**{"allocator": "llm", "evaluations": 32, "tokens": 90_000, **settings})
        told = replace(context, unit_latency=(35.21, 8.074))
        object.__setattr__(told, "driver", IndexedDriver(told, told.disguise))
        return told

    return make


def run(context: SearchContext, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    run_search(context, folder / "checkpoints.sqlite")


def without_seconds(ledger: Ledger) -> list[dict[str, Any]]:
    return [{**x.to_json(), "seconds": 0} for x in ledger.candidates()]


def questions(context: SearchContext, generation: int) -> list[Question[Any]]:
    """Return a question of each operator, after a search."""
    best = context.ledger.best(6, before=generation)
    return [
        plan_question(context, Slot(generation, 0, "generate")),
        plan_question(context, Slot(generation, 1, "crossover", (best[0], best[3]))),
        plan_question(context, Slot(generation, 2, "mutate", (best[1],))),
        parents_question(context, Slot(generation, 3, "select"), best, 3),
    ]


def texts(asked: Sequence[Question[Any]]) -> list[str]:
    return ["\n".join(x["content"] for x in question.messages) for question in asked]


# The value itself


def test_what_is_told_and_what_is_true_are_inverse() -> None:
    for seed in range(20):
        disguise = Disguise("layers", seed, 30)
        assert sorted(disguise.order) == list(range(30))
        for i in range(30):
            assert disguise.true_layer(disguise.layer(i)) == i
            assert disguise.layer(disguise.true_layer(i)) == i
            assert disguise.rows(range(30))[disguise.layer(i)] == i
        assert disguise.true_rows(disguise.rows("abcdefghijklmnopqrstuvwxyz0123")) == list(
            "abcdefghijklmnopqrstuvwxyz0123"
        )
    orders = {Disguise("layers", seed, 30).order for seed in range(20)}
    assert len(orders) == 20


def test_every_layer_may_stand_at_every_place() -> None:
    places = Counter(Disguise("layers", seed, 4).order for seed in range(4800))
    assert len(places) == 24
    assert min(places.values()) > 140
    assert max(places.values()) < 260


@pytest.mark.parametrize("placebo", ["none", "fitness", "name"])
def test_layers_are_hidden_by_their_own_control_alone(placebo: Any) -> None:
    assert Disguise(placebo, 3, 30).order == tuple(range(30))


def test_told_fitness_says_nothing_about_who_has_it(scene: Scene, tmp_path: Path) -> None:
    """Every order is as likely as another: told and own fitness do not go together."""
    context = scene(evaluations=20)
    run(context, tmp_path)
    known = context.ledger.candidates()
    for count in range(1, 20):
        shown = known[:count]
        lenders = [
            Disguise("fitness", seed, 6).lenders(shown, generation)
            for seed, generation in [(0, 1), (0, 1), (0, 2), (1, 1)]
        ]
        for given in lenders:
            assert sorted(given) == sorted(x.id for x in given.values()) == list(range(count))
        assert lenders[0] == lenders[1]
        assert count < 9 or lenders[0] != lenders[2] != lenders[3]
        assert lenders[0] == Disguise("fitness", 0, 6).lenders(shown[::-1], 1)
    own = [x.fitness for x in known[:4]]
    orders = [Disguise("fitness", seed, 6).lenders(known[:4], 1) for seed in range(400)]
    told = [np.corrcoef(own, [given[i].fitness for i in range(4)])[0, 1] for given in orders]
    assert abs(np.mean(told)) < 0.1
    assert Disguise("fitness", 0, 6).lenders([], 1) == {}
    assert Disguise("layers", 0, 6).lenders(known, 1) == {x.id: x for x in known}


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct"),
        ("models/SmolLM2-135M-Instruct/", "SmolLM2-135M-Instruct"),
        ("tiny.gguf", "tiny.gguf"),
        ("", "a language model"),
        (".", "a language model"),
    ],
)
def test_a_model_is_told_without_where_it_lies(name: str, told: str) -> None:
    assert Disguise("none", 0, 6).model(name) == Disguise("layers", 0, 6).model(name) == told
    assert Disguise("name", 0, 6).model(name) == "a language model"


# Layers


@pytest.mark.parametrize("granularity", ["block", "layer"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_prompts_under_shuffled_layers_are_those_of_a_shuffled_model(
    asking: Scene, scene: Scene, tmp_path: Path, strategy: str, granularity: str
) -> None:
    """A model whose layers really stand in the told order gives the same words, all of them.

    So nothing of a prompt depends on where a layer lies.
    """
    settings = {"strategy": strategy, "granularity": granularity}
    hidden = asking(placebo="layers", **settings)
    order = hidden.disguise.order
    assert order != tuple(range(6))
    run(hidden, tmp_path)

    def moved(levels: Levels) -> Levels:
        return [levels[i] for i in order]

    shuffled = replace(
        scene(allocator="llm", evaluations=32, tokens=90_000, **settings),
        sensitivity=[hidden.sensitivity[i] for i in order],
        unit_latency=hidden.unit_latency,
    )
    shuffled.__dict__["first_plan"] = moved(hidden.first_plan)
    for candidate in hidden.ledger.candidates():
        plan = shuffled.grid.plan(moved(briefing.levels(hidden, candidate)))
        rows = tuple((a, b, c) for a, b, c in plan.to_json())
        shuffled.ledger.add_candidate(replace(candidate, genotype=rows, key=plan.key))
    for line in hidden.ledger.lines():
        shuffled.ledger.add_line(line)
    for generation in (1, 2):
        told = texts(questions(hidden, generation))
        assert told == texts(questions(shuffled, generation))
        plain = texts(questions(replace(hidden, settings=open_settings(hidden)), generation))
        assert all(a != b for a, b in zip(told[1:], plain[1:], strict=True))


def open_settings(context: SearchContext) -> Any:
    return context.settings.model_copy(update={"placebo": "none"})


def test_the_told_table_is_the_true_one_shuffled(asking: Scene, tmp_path: Path) -> None:
    hidden = asking(placebo="layers", evaluations=8)
    # A sensitivity of its own for each layer: its number can be read in its errors.
    rows = [[[9.0 * (i + 1), 0, 0, 0], [i + 1.0] * 15 + [0]] for i in range(6)]
    hidden = replace(hidden, sensitivity=rows)
    run(hidden, tmp_path)
    parent = hidden.ledger.best(1)[0]
    text = texts([plan_question(hidden, Slot(1, 4, "mutate", (parent,)))])[0]
    table = [line.split(",") for line in text.split("\n") if re.fullmatch(r"\d(,\d+){4}", line)]
    assert [int(row[0]) for row in table] == list(range(6))
    levels = briefing.levels(hidden, parent)
    for told, row in enumerate(table):
        true = hidden.disguise.true_layer(told)
        kept, errors = list(map(int, row[1:3])), list(map(int, row[3:]))
        assert kept == [levels[true][0] + 1, levels[true][1] + 1]
        assert errors[1] == round(99 * (true + 1) / 6)


@pytest.mark.parametrize("granularity", ["block", "layer"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_replies_by_told_indices_make_the_search_of_true_ones(
    asking: Scene, tmp_path: Path, strategy: str, granularity: str
) -> None:
    """A driver that means the same true layers gets the same ledger, whatever their names."""
    settings = {"strategy": strategy, "granularity": granularity}
    ledgers = []
    for placebo in ("none", "layers"):
        context = asking(placebo=placebo, folder=tmp_path / placebo, **settings)
        run(context, tmp_path / placebo)
        assert {x.origin for x in context.ledger.candidates()} >= {"heuristic", "llm"}
        ledgers.append(without_seconds(context.ledger))
    assert ledgers[0] == ledgers[1]


def test_moves_change_exactly_the_layers_that_were_meant(scene: Scene) -> None:
    context = scene(allocator="llm", replies=[], placebo="layers")
    disguise, base = context.disguise, context.first_plan
    question = plan_question(context, Slot(0, 1, "generate"))
    for told in range(6):
        true = disguise.true_layer(told)
        for other in range(6):
            taker = disguise.true_layer(other)
            if told == other or base[true][1] < 2 or base[taker][1] > 14:
                continue
            move = {"block": "mlp", "take_from": told, "give_to": other, "units": 1}
            made = question.interpret(json.dumps({"moves": [move]}))
            gaps = {i: m[1] - b[1] for i, (m, b) in enumerate(zip(made, base, strict=True))}
            assert {i: gap for i, gap in gaps.items() if gap} == {true: -1, taker: 1}


@pytest.mark.parametrize(
    ("block", "names", "word"),
    [("attention", ("take_from", "give_to"), "most"), ("mlp", ("give_to", "take_from"), "least")],
)
def test_what_is_wrong_with_a_move_is_said_by_its_told_index(
    scene: Scene, block: str, names: tuple[str, str], word: str
) -> None:
    context = scene(allocator="llm", replies=[], placebo="layers")
    question = plan_question(context, Slot(0, 1, "generate"))
    kind, bound = (0, 1) if block == "attention" else (1, 0)
    limit = context.space.bounds[kind][bound]
    stuck = [i for i, pair in enumerate(context.first_plan) if pair[kind] == limit]
    free = next(i for i, (a, m) in enumerate(context.first_plan) if a < 3 and 1 < m < 15)
    assert stuck
    assert any(context.disguise.layer(i) != i for i in stuck)
    for true in stuck:
        told, other = map(context.disguise.layer, (true, free))
        move = {"block": block, names[0]: other, names[1]: told, "units": 1}
        with pytest.raises(ReplyError, match=f"{block} {told} already keeps the {word}"):
            question.interpret(json.dumps({"moves": [move]}))


# Fitness


@pytest.fixture
def rotated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tell every plan with the fitness of one half the order on: a leak shows, none has its own."""

    def lenders(
        disguise: Disguise, shown: Sequence[Candidate], generation: int
    ) -> dict[int, Candidate]:
        del generation
        own = {x.id: x for x in shown}
        ids = sorted(own, key=lambda i: (own[i].fitness, i))
        half = len(ids) // 2 if disguise.is_about_fitness else 0
        others = [*ids[half:], *ids[:half]]
        return {i: own[other] for i, other in zip(ids, others, strict=True)}

    monkeypatch.setattr(Disguise, "lenders", lenders)


@pytest.mark.usefixtures("rotated")
@pytest.mark.parametrize("strategy", ["moves", "knowledge", "paper"])
def test_the_fitness_of_plans_is_mixed_among_those_shown(
    asking: Scene, tmp_path: Path, strategy: str
) -> None:
    context = asking(strategy=strategy)
    run(context, tmp_path)
    false = replace(context, settings=context.settings.model_copy(update={"placebo": "fitness"}))
    for generation in (1, 2):
        pairs = zip(questions(context, generation), questions(false, generation), strict=True)
        for honest, lying in list(pairs)[1:]:
            true, told = (dict(headers(x)) for x in (honest, lying))
            assert sorted(true) == sorted(told)
            assert sorted(true.values()) == sorted(told.values())
            assert all(true[i] != told[i] for i in true)
            for mark in ("accuracy 50 %", "speedup 1.25"):
                counts = [x.messages[1]["content"].count(mark) for x in (honest, lying)]
                assert counts[0] == counts[1]
        listed = [float(x) for _, x in headers(questions(false, generation)[3])]
        assert listed == sorted(listed)
        assert len(listed) == 6


def headers(question: Question[Any]) -> list[tuple[str, str]]:
    """Return numbers and fitness of plans as a prompt tells them."""
    return HEADER.findall(question.messages[1]["content"])


@pytest.mark.usefixtures("rotated")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_prompt_tells_a_true_fitness(asking: Scene, tmp_path: Path, strategy: str) -> None:
    """Whatever tells a fitness tells that of another plan, the same one all over the prompt."""
    context = asking(strategy=strategy, placebo="fitness")
    run(context, tmp_path)
    known = {x.id: x for x in context.ledger.candidates()}
    sent = [x for x in context.ledger.lines() if x.generation and not x.attempt]
    assert {x.operator for x in sent} == {"select", "crossover", "mutate"}
    for line in sent:
        told: dict[str, set[str]] = {}
        for number, fitness in HEADER.findall(line.messages[1]["content"]):
            told.setdefault(number, set()).add(fitness)
        assert all(len(values) == 1 for values in told.values())
        alone = len(told) < 2
        wrong = [i for i, x in told.items() if x != {f"{known[int(i)].fitness:.4g}"}]
        assert alone or len(wrong) == len(told)


@pytest.mark.parametrize("strategy", ["history", "reasoning", "reflection", "with_statistics"])
def test_false_facts_agree_with_each_other(asking: Scene, tmp_path: Path, strategy: str) -> None:
    """The best is the lowest told, failures rise, and what is better fell."""
    context = asking(strategy=strategy, placebo="fitness")
    run(context, tmp_path)
    judged = 0
    for line in context.ledger.lines():
        text = line.messages[1]["content"]
        values = [float(x) for _, x in HEADER.findall(text)]
        found = re.search(r"Best so far: plan \d+: fitness ([\d.]+)", text)
        assert found is None or float(found[1]) == min(values)
        for before, after, verdict in re.findall(r": ([\d.]+) -> ([\d.]+)(, [a-z ]+)?", text):
            judged += 1
            assert (float(after) < float(before)) == (verdict == ", better") or before == after
    assert judged > 10 or strategy == "history"


@pytest.mark.usefixtures("rotated")
def test_false_effects_are_mixed_and_keep_their_hypotheses(asking: Scene, tmp_path: Path) -> None:
    context = asking(strategy="reflection")
    run(context, tmp_path)
    false = replace(context, settings=context.settings.model_copy(update={"placebo": "fitness"}))
    parents = tuple(context.ledger.best(1, before=2))
    views = []
    for each in (context, false):
        base = briefing.levels(each, parents[0])
        views.append(wording.standpoint(View(each, 2, "moves", base, parents), "mutate"))
    honest, lying = (reflections.effects(x).split("\n") for x in views)

    def subjects(lines: list[str]) -> list[tuple[str, str]]:
        return sorted((x.partition(":")[0], x.rpartition("hypothesis: ")[2]) for x in lines)

    assert subjects(honest) == subjects(lying)
    assert sorted(honest) != sorted(lying)
    shown = views[1].shown
    values = Counter(x.fitness for x in shown)
    assert Counter(views[1].seen(x).fitness for x in shown) == values
    assert all(views[1].bearer(views[1].seen(x)).id != x.id for x in shown)
    assert all(views[1].bearer(x).fitness == x.fitness for x in shown)


@pytest.fixture
def lying(asking: Scene, tmp_path: Path) -> Callable[[str], View]:
    """Return a maker of views on three generations, of a prompt that changes the second best."""

    def make(strategy: str) -> View:
        context = asking(strategy=strategy)
        run(context, tmp_path)
        false = context.settings.model_copy(update={"placebo": "fitness"})
        context, parents = replace(context, settings=false), tuple(context.ledger.best(2)[1:])
        view = View(context, 3, "moves", briefing.levels(context, parents[0]), parents)
        return wording.standpoint(view, "mutate")

    return make


def test_a_false_history_tells_the_last_plans_with_the_fitness_of_others(
    lying: Callable[[str], View],
) -> None:
    view = lying("history")
    rows = [x.split("; fitness ") for x in trajectory.history(view).split("\n")]
    plans = {view.plan(x): x for x in trajectory.last(view)}
    assert sorted(plan for plan, _ in rows) == sorted(plans)
    assert all(fitness == f"{view.seen(plans[plan]).fitness:.4g}" for plan, fitness in rows)
    assert all(fitness != f"{plans[plan].fitness:.4g}" for plan, fitness in rows)
    told = [float(fitness) for _, fitness in rows]
    assert told == sorted(told, reverse=True)


@pytest.mark.parametrize(
    ("strategy", "tell"),
    [
        ("with_statistics", trajectory.failed),
        ("reasoning", trajectory.failed),
        ("reflection", reflections.effects),
    ],
)
def test_false_effects_are_of_plans_with_the_fitness_of_others(
    lying: Callable[[str], View], strategy: str, tell: Callable[[View], str]
) -> None:
    view = lying(strategy)
    true, false = (
        {trajectory.effect(view, x, y) for x in shown for y in shown if x.id != y.id}
        for shown in (view.shown, [view.seen(x) for x in view.shown])
    )
    rows = re.findall(r"(?m)^.*?: [\d.]+ -> [\d.]+", tell(view))
    assert len(rows) >= 4
    assert set(rows) <= false - true


def test_a_false_best_and_worst_have_the_fitness_of_the_true_ones(
    lying: Callable[[str], View],
) -> None:
    view = lying("with_statistics")
    pool = view.context.ledger.best(view.context.settings.population, before=3)
    for tell, true in [(facts.best, pool[0]), (facts.worst, pool[-1])]:
        ((number, fitness),) = HEADER.findall(tell(view))
        assert fitness == f"{true.fitness:.4g}"
        assert int(number) != true.id


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_false_lists_are_told_against_the_plan_that_stands_first(
    asking: Scene, tmp_path: Path, strategy: str
) -> None:
    context = asking(strategy=strategy, placebo="fitness")
    run(context, tmp_path)
    asked = [x for x in context.ledger.lines() if x.operator == "select"]
    firsts = [HEADER.findall(x.messages[1]["content"])[0][0] for x in asked]
    best = [str(context.ledger.best(1, before=x.generation)[0].id) for x in asked]
    assert firsts != best
    for line in asked:
        listed = [x for x in line.messages[1]["content"].split("\n") if x.startswith("plan ")]
        assert ["no changes" in x for x in listed] == [True, *[False] * (len(listed) - 1)]


def test_parents_that_the_llm_did_not_choose_are_not_affected(scene: Scene, tmp_path: Path) -> None:
    ledgers = []
    for placebo in ("none", "fitness", "layers", "name"):
        context = scene(allocator="llm", replies=["No."], placebo=placebo)
        run(context, tmp_path / placebo)
        ledgers.append([{**x, "tokens": 0} for x in without_seconds(context.ledger)])
    assert ledgers[0] == ledgers[1] == ledgers[2] == ledgers[3]
    fitness = {x["key"]: x["scores"]["fitness"] for x in ledgers[1]}
    truth = context.score
    for candidate in context.ledger.candidates():
        mean = truth([candidate.plan], range(4)).mean()
        assert fitness[candidate.key] == pytest.approx(mean, rel=1e-6)


# The name


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_name_is_told_where_it_is_switched_on_and_not_hidden(
    asking: Scene, tmp_path: Path, strategy: str
) -> None:
    context = asking(strategy=strategy)
    run(context, tmp_path)
    hidden = replace(context, settings=context.settings.model_copy(update={"placebo": "name"}))
    shows = "model" in load_strategy(strategy).shows
    assert shows == (strategy == "knowledge")
    told, neutral = (texts(questions(x, 2)) for x in (context, hidden))
    assert all(("Tiny-1M, 6 layers" in x) == shows for x in told)
    assert not any("Tiny" in x for x in neutral)
    assert [x.replace("Tiny-1M", "a language model") for x in told] == neutral


# The whole search


@pytest.mark.parametrize("strategy", ["moves", "paper", "reflection"])
@pytest.mark.parametrize("placebo", ["layers", "fitness", "name"])
def test_a_resumed_search_wears_the_same_disguise(
    asking: Scene, tmp_path: Path, placebo: str, strategy: str
) -> None:
    settings = {"placebo": placebo, "strategy": strategy}
    whole = asking(folder=tmp_path / "whole", **settings)
    run(whole, tmp_path / "whole")
    folder, answered = tmp_path / "cut", 0
    for stop in (9, 20):
        context = asking(folder=folder, **settings)
        interrupted(context, stop)
        with pytest.raises(KeyboardInterrupt):
            run(context, folder)
        answered += context.driver.answered  # type: ignore[union-attr]
    context = asking(folder=folder, **settings)
    run(context, folder)
    assert without_seconds(context.ledger) == without_seconds(whole.ledger)
    assert sent(context.ledger) == sent(whole.ledger)
    total = answered + context.driver.answered  # type: ignore[union-attr]
    assert total == whole.driver.answered  # type: ignore[union-attr]


def interrupted(context: SearchContext, stop: int) -> None:
    """Make the score of the plan after `stop` scored ones fail."""
    inner = context.score

    def score(plans: Any, sequences: Any) -> Any:
        if len(context.ledger.candidates()) + len(plans) > stop:
            raise KeyboardInterrupt
        return inner(plans, sequences)

    object.__setattr__(context, "score", score)


def sent(ledger: Ledger) -> list[tuple[Any, ...]]:
    return [(x.generation, x.slot, x.operator, x.attempt, x.prompt_hash) for x in ledger.lines()]


def test_one_order_holds_for_the_whole_search(asking: Scene, tmp_path: Path) -> None:
    """In every generation the errors of a layer stand in the row that the first prompt gave it."""
    context = asking(placebo="layers", evaluations=44)
    run(context, tmp_path)
    tables: dict[int, set[tuple[str, ...]]] = {}
    for line in context.ledger.lines():
        rows = re.findall(r"(?m)^(\d),\d+,\d+,(\d+,\d+)$", line.messages[1]["content"])
        if len(rows) == 6:
            tables.setdefault(line.generation, set()).add(tuple(errors for _, errors in rows))
    assert set(tables) == {0, 1, 2, 3}
    assert len(set.union(*tables.values())) == 1


def test_candidates_are_seen_as_they_are_without_a_disguise(scene: Scene, tmp_path: Path) -> None:
    context = scene(evaluations=20)
    run(context, tmp_path)
    known: list[Candidate] = context.ledger.candidates()
    view = View(context, 2, "moves", context.first_plan, shown=tuple(known))
    assert [view.seen(x) for x in known] == [view.bearer(x) for x in known] == known
    assert view.ranked(known) == context.ledger.best(len(known))
