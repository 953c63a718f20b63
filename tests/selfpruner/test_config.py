"""The configuration: refusals of one line, layers in order, and a resolved copy that reloads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from pruning.architecture import Architecture
from selfpruner.config import CONFIGS, RunConfig, load_config, parse_config

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def _write(text: str) -> Path:
        path = tmp_path / "x.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return _write


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("search: {popsize: 3}", "unknown key search.popsize; did you mean search.population?"),
        ("metric: wifv", "unknown key metric; did you mean pruning.metric?"),
        (
            "evaluation: {speed: {btch: 1}}",
            "unknown key evaluation.speed.btch; did you mean evaluation.speed.batch?",
        ),
        ("data: {report: [{lenght: 3}]}", "did you mean data.report.length?"),
        ("zzz: 1", "unknown key zzz; allowed: model, recipe, seed"),
        (
            "pruning: {metric: wandas}",
            "pruning.metric: got 'wandas'; "
            "allowed: 'magnitude', 'obs', 'random', 'wanda_sp', 'wifv' or 'wifv_squared'",
        ),
        (
            "budget: {}",
            "budget: got none; allowed: exactly one of parameters, macs, bytes, memory, speedup",
        ),
        ("budget: {macs: 0.5, speedup: 2}", "budget: got macs and speedup; allowed: exactly one"),
        ("budget: {speedup: 0.9}", "budget.speedup: got 0.9; allowed: greater than or equal to 1"),
        ("budget: {speedup: 2, phase: train}", "budget.phase: got 'train'; allowed: 'decode' or"),
        ("budget: {speedup: 2, batch: 0}", "budget.batch: got 0; allowed: greater than or equal"),
        (
            "budget: {macs: 0.5, phase: decode}",
            "budget.phase: got 'decode'; allowed only beside budget.speedup",
        ),
        (
            "budget: {parameters: 0.5, tokens: 9}",
            "budget.tokens: got 9; allowed only beside budget.memory or budget.speedup",
        ),
        ("budget: {memory: 1GB, batch: 2}", "budget.tokens: not given; budget.batch 2 needs"),
        ("budget: {memory: 40 Gibi}", "budget.memory: got '40 Gibi'; allowed: bytes, or a number"),
        ("budget: {memory: 1.2.3GB}", "budget.memory: got '1.2.3GB'; allowed: bytes, or a number"),
        ("budget: {memory: 0GB}", "budget.memory: got 0.0; allowed: greater than 0"),
        ("pruning: {target: gpu}", "pruning.target: got 'gpu'; allowed: cpu, tensor-cores, gguf"),
        (
            "front: {pick: best}",
            "front.pick: got 'best'; allowed: 'budget', 'knee', 'fastest' or 'most-accurate'",
        ),
        ("front: {pick: knee}", "front.pick: got 'knee'; allowed without front.targets: budget"),
        (
            "front: {targets: [0.8, 1.5]}",
            "front.targets: got 1.5; allowed beside budget.parameters 0.7: shares up to 1",
        ),
        (
            "front: {targets: [0.8]}\nbudget: {speedup: 1.4}",
            "front.targets: got 0.8; allowed beside budget.speedup 1.4: speedups of at least 1",
        ),
        (
            "front: {targets: [0.8]}\nbudget: {memory: 1GB}",
            "front.targets: got 0.8; allowed beside budget.memory 1e+09: none, because it is",
        ),
        ("search: {llm_share: 2}", "search.llm_share: got 2; allowed: learned, or 0 to 1"),
        ("search: {llm_share: half}", "search.llm_share: got 'half'; allowed: learned, or 0 to 1"),
        ("search: {llm_share: true}", "search.llm_share: got True; allowed: learned, or 0 to 1"),
        (
            "memory: streamed\ndata: {choices: 0}\nsearch: {allocator: llm}\n"
            "driver: {kind: api, base_url: http://h/v1, fallbacks: [{kind: embedded}]}",
            "driver.fallbacks.0.kind: got embedded; allowed: another",
        ),
        ("pruning: {ridge: '0.1'}", "pruning.ridge: got '0.1'; allowed: auto or a number above 0"),
        ("pruning: {ridge: 0}", "pruning.ridge: got 0; allowed: auto or a number above 0"),
        ("pruning: {ridge: true}", "pruning.ridge: got True; allowed: auto or a number above 0"),
        ("pruning: {ridge: .inf}", "pruning.ridge: got inf; allowed: auto or a number above 0"),
        ("pruning: {ridge: Auto}", "pruning.ridge: got 'Auto'; allowed: auto or a number above 0"),
        (
            "pruning: {refit_target: layer}",
            "pruning.refit_target: got 'layer'; allowed: 'stream' or 'block'",
        ),
        ("pruning: {refit: 1}", "pruning.refit: got 1; allowed: a valid boolean"),
        ("search: {population: 3.5}", "search.population: got 3.5"),
        ("evaluation: {samples: true}", "evaluation.samples: got True"),
        ("evaluation: {tasks: [boolq, piqq]}", "evaluation.tasks.1: got 'piqq'"),
        (
            "fitness: {kll: 1}",
            "fitness: got {'kll': 1.0}; allowed: weights of at least 0, one",
        ),
        ("fitness: {kl: .nan}", "fitness.kl: got nan"),
        ("fitness: {kl: 0}", "allowed: weights of at least 0"),
        ("fitness: {accuracy: 1}\ndata: {choices: 0}", "data.choices: got 0"),
        ("budget: {parameters: 0.7, macs: 0.5}", "budget: got parameters and macs"),
        ("budget: {}", "budget: got none; allowed: exactly one of parameters, macs, bytes"),
        ("budget: {macs: 2}", "budget.macs: got 2"),
        ("data: {search: {tokens: 3}}", "data.search.tokens: got 3; allowed: at least"),
        ("data: {report: [{tokens: 3}]}", "data.report.0.tokens: got 3; allowed: null or"),
        ("data: {calibrate: {source: wikitext2}}", "it is reported only"),
        ("data: {search: {source: passagse}}", "did you mean passages?"),
        (
            "driver: {kind: none}\nsearch: {allocator: hybrid}",
            "driver.kind: got 'none'; search.allocator hybrid needs a driver",
        ),
        (
            "driver: {kind: embedded}\nsearch: {allocator: hybrid, cost: 2}",
            "search.cost: got 2.0, and no driver has a price; allowed with a driver.price",
        ),
        ("search: {min_rate: 0.95}", "search.min_rate: got 0.95"),
        ("recipe: bset", "recipe: got 'bset'; allowed: best, flap, self_pruner, wanda_sp"),
        ("model: n", "line 2: key model given twice"),
        ("search: [", "line 2"),
        ("seed: 2024-13-45", "not valid YAML: month must be in 1..12"),
        ("search: 3", "search: got 3"),
        ("1: 2", "got the key 1"),
    ],
)
def test_refusals_are_one_line_that_says_where(write: Write, text: str, words: str) -> None:
    path = write(f"model: m\n{text}")
    with pytest.raises(ValueError, match=r".") as refusal:
        load_config(path)
    message = str(refusal.value)
    assert words in message
    assert "\n" not in message
    assert message.startswith(str(path))
    assert not isinstance(refusal.value, ValidationError)


def test_each_problem_has_its_own_line(write: Write) -> None:
    with pytest.raises(ValueError, match="seed") as refusal:
        load_config(write("seed: -1\nexport: {dtype: int8}"))
    lines = str(refusal.value).splitlines()
    assert [line.split(": ")[1] for line in lines] == ["model", "seed", "export.dtype"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"settings": ["search.popsize=1"]}, "--set search.popsize: unknown key search.popsize;"),
        ({"settings": ["seed"]}, "--set: got 'seed', want name=value"),
        ({"settings": ["model.x=1"]}, "--set model.x: model holds a value"),
        ({"settings": ["search.=1"]}, "--set search.: got 'search.'"),
        ({"settings": ["seed=[1"]}, "--set seed=[1"),
        ({"budget": "0.7"}, "--budget: got '0.7', want name=value, such as parameters=0.7"),
        ({"budget": "parameters=0"}, "--budget: budget.parameters: got 0"),
        ({"budget": "params=0.7"}, "--budget: unknown key budget.params; did you mean"),
        ({"settings": ["recipe=bset"]}, "--set recipe: recipe: got 'bset'"),
        ({"settings": ["search.min_rate=0.95"]}, "--set search.min_rate: search.min_rate: got"),
        ({"settings": ["front.pick=knee"]}, "--set front.pick: front.pick: got 'knee'"),
        ({"pick": "knee"}, "--pick: front.pick: got 'knee'; allowed without front.targets"),
        ({"pick": "best"}, "--pick: front.pick: got 'best'; allowed: 'budget', 'knee'"),
    ],
)
def test_refusals_of_the_command_line_name_the_option(
    write: Write, arguments: dict[str, str], words: str
) -> None:
    with pytest.raises(ValueError, match=r".") as refusal:
        load_config(write("model: m"), **arguments)  # type: ignore[arg-type]
    assert str(refusal.value).startswith(words)
    assert "\n" not in str(refusal.value)


def test_missing_file_and_wrong_shape(tmp_path: Path, write: Write) -> None:
    with pytest.raises(ValueError, match=r"none\.yaml: no such configuration file"):
        load_config(tmp_path / "none.yaml")
    experiment = CONFIGS / "experiments" / "search.yaml"
    with pytest.raises(
        ValueError, match=r"^\S+search\.yaml: an experiment; `selfpruner experiment"
    ):
        load_config(experiment)
    with pytest.raises(ValueError, match="want a mapping"):
        load_config(write("- a"))


@pytest.mark.parametrize("setting", ["allocator: flap_global", "starts: [uniform, owl]"])
def test_facts_of_a_frozen_ranking_are_needed(write: Write, setting: str) -> None:
    path = write(f"model: m\nrecipe: wanda_sp\nsearch: {{{setting}}}")
    with pytest.raises(ValueError, match=r"pruning\.statistics: got 'sequential'; allowed with "):
        load_config(path)


def test_later_layers_win_key_by_key(write: Write) -> None:
    path = write("model: m\nrecipe: self_pruner\nsearch: {population: 20}\nseed: 3")
    config = load_config(path, model="n", settings=["seed=4", "search.crossover=5"])
    assert (config.model, config.seed) == ("n", 4)
    assert config.search.population == 20  # file over recipe
    assert config.search.crossover == 5  # command line over recipe
    assert config.search.evaluations == 430  # recipe over default
    assert config.pruning.step is None  # default


def test_a_recipe_from_the_command_line_goes_over_the_file(write: Write) -> None:
    path = write("model: m\nrecipe: best\nsearch: {allocator: hybrid, population: 8, tokens: 4}")
    config = load_config(path, settings=["search.crossover=5", "recipe=self_pruner"])
    assert config.recipe == "self_pruner"
    assert config.search.allocator == "llm"
    assert config.search.population == 30  # recipe over file
    assert config.search.tokens == 4  # the recipe says nothing of it
    assert config.search.window is None  # nothing of the file's recipe is left
    assert config.search.crossover == 5  # command line over recipe
    assert config.pruning.attention_metric is None  # nothing of the file's recipe is left
    assert config.pruning.metric == "wanda_sp"


def test_a_recipe_may_be_a_path_but_may_not_choose_the_model(tmp_path: Path, write: Write) -> None:
    recipe = tmp_path / "own.yaml"
    recipe.write_text("pruning: {ridge: 0.5}", encoding="utf-8")
    assert load_config(write(f"model: m\nrecipe: {recipe}")).pruning.ridge == 0.5
    recipe.write_text("pruning: {ridge: auto}", encoding="utf-8")
    assert load_config(write(f"model: m\nrecipe: {recipe}")).pruning.ridge == "auto"
    recipe.write_text("model: other", encoding="utf-8")
    with pytest.raises(ValueError, match="model is not allowed in a recipe"):
        load_config(write(f"model: m\nrecipe: {recipe}"))


def test_budget_and_fitness_are_replaced_whole(write: Write) -> None:
    path = write("model: m\nrecipe: self_pruner\nfitness: {kl: 2.0}\nbudget: {macs: 0.5}")
    config = load_config(path, budget="bytes=0.6")
    assert config.fitness == {"kl": 2.0}
    assert (config.budget.kind, config.budget.target) == ("bytes", 0.6)


def test_values_of_set_are_yaml(write: Write) -> None:
    config = load_config(
        write("model: m"),
        settings=["pruning.ridge=1e-3", "evaluation.samples=null", "evaluation.tasks=[piqa]"],
    )
    assert config.pruning.ridge == 1e-3
    assert config.evaluation.samples is None
    assert config.evaluation.tasks == ("piqa",)


@pytest.mark.parametrize("recipe", ["best", "flap", "self_pruner", "wanda_sp"])
def test_the_resolved_copy_reloads_to_an_equal_tree(tmp_path: Path, recipe: str) -> None:
    config = load_config(
        CONFIGS / "demo.yaml",
        budget="parameters=49e9",
        settings=[f"recipe={recipe}", "pruning.ridge=1e-7", "fitness.latency=0.1", "seed=7"],
    )
    copy = tmp_path / "config.yaml"
    copy.write_text(config.to_yaml(), encoding="utf-8")
    assert parse_config(config.to_yaml(), "copy") == config
    assert load_config(copy) == config
    assert config != load_config(CONFIGS / "demo.yaml")


def test_the_tree_is_frozen() -> None:
    config = RunConfig(model="m")
    with pytest.raises(ValidationError, match="frozen"):
        config.pruning.metric = "random"  # type: ignore[misc]


def test_self_pruner_is_the_paper() -> None:
    recipe = yaml.safe_load((CONFIGS / "recipes" / "self_pruner.yaml").read_text("utf-8"))
    search = recipe["search"]
    offspring = search["crossover"] + search["mutate"]
    assert search["population"] + 20 * offspring == search["evaluations"] == 430
    assert (search["min_rate"], search["max_rate"]) == (0.1, 0.9)
    assert recipe["pruning"]["reconstruction"] == "none"


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-2-7b", 6_738_415_616),
        ("llama-2-70b", 68_976_648_192),
        ("llama-3-8b", 8_030_261_248),
        ("smollm2-135m", 134_515_008),
    ],
)
def test_published_parameter_counts(name: str, parameters: int) -> None:
    config = yaml.safe_load((CONFIGS / "models" / f"{name}.yaml").read_text("utf-8"))
    assert Architecture.from_config(config).total_parameters() == parameters


def test_sizes_are_read_in_either_unit(write: Write) -> None:
    path = write("model: m\nbudget: {memory: 40GiB, tokens: 100}")
    config = load_config(path)
    assert config.budget.memory == 40 * 1024**3
    assert config.budget.cached_tokens == 100
    assert parse_config(config.to_yaml(), "copy") == config
    for text, size in (("500MB", 5e8), ("1.5 kB", 1500), ("2MiB", 2**21), ("1000000", 1e6)):
        assert load_config(path, budget=f"memory={text}").budget.target == size


def test_a_speedup_is_asked_on_the_command_line(write: Write) -> None:
    path = write("model: m\nbudget: {parameters: 0.7}")
    config = load_config(path, budget="speedup=1.4")
    assert str(config.workload) == "decode, batch 1, 512 tokens"
    settings = ["budget.phase=prefill", "budget.batch=4", "budget.tokens=128"]
    config = load_config(path, budget="speedup=1.4", settings=settings)
    assert config.budget.name == "speedup=1.4,phase=prefill,batch=4,tokens=128"
    assert str(config.workload) == "prefill, batch 4, 128 tokens"
    assert config.weighs_latency
    assert parse_config(config.to_yaml(), "copy") == config
    plain = load_config(path)
    assert str(plain.workload) == "prefill, batch 1, 256 tokens"
    assert not plain.weighs_latency
    assert load_config(path, settings=["fitness={kl: 1, latency: 0.1}"]).weighs_latency
    with pytest.raises(ValueError, match=r"budget\.phase: got 'decode'; allowed only beside"):
        load_config(path, settings=["budget.phase=decode"])
