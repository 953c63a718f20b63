"""Engines with real tiny models, and workers that misbehave."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from evaluators import engine_process, engines
from evaluators.engines import Case, EngineReport, Row, Settings, Source, compare_engine
from pruning.loading import locate

SETTINGS = Settings(dtype="float32", device="cpu", threads=1, repeats=3, warmup=1)
VLLM_PYTHON = Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python"
CASES = [Case(1, 16, 4), Case(3, 8, 2), Case(1, 65, 4)]
HIDDEN, HEAD_DIM, LAYERS, VOCABULARY, CONTEXT = 64, 32, 2, 256, 64

# A stand-in that speaks the protocol: it writes down what it is asked and answers as it is told.
STAND_IN = """\
#!{python} -IS
import json, os, pathlib, sys
load = json.loads(sys.stdin.readline())
print(json.dumps(dict(ok=dict(context=1000, load_seconds=0.5))), flush=True)
log = open({log!r}, "a")
for turn, line in enumerate(sys.stdin):
    request = json.loads(line)
    log.write(json.dumps([load["model"], request]) + "\\n")
    log.flush()
    if request["do"] == "measure":
        {measure}
    elif request["do"] == "products":
        print(json.dumps(dict(ok=dict(products=1.0))), flush=True)
    elif request["do"] == "step_bytes":
        found = dict(a=600, b=400).get(load["model"])
        print(json.dumps(dict(ok=dict(bytes=found)) if found else dict(skip="full")), flush=True)
    else:
        print(json.dumps(dict(ok=None)), flush=True)
"""
ANSWER = """\
prefill = [9.0, 4.0, 4.0, 8.0, 8.0][request["seed"] + turn] if load["model"] == "a" else 2.0
        print(json.dumps(dict(ok=dict(prefill=prefill, decode=0.5))), flush=True)"""


def _config(mlp: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=mlp,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
        max_position_embeddings=CONTEXT,
    )


@pytest.fixture(name="folders", scope="module")
def _folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    folder = tmp_path_factory.mktemp("models")
    for name, mlp in (("dense", 128), ("pruned", 64)):
        LlamaForCausalLM(_config(mlp)).save_pretrained(folder / name)
    return {name: Source(str(folder / name)) for name in ("dense", "pruned")}


@pytest.fixture(name="stand_in")
def _stand_in(tmp_path: Path) -> Callable[..., str]:
    def made(measure: str = ANSWER) -> str:
        path = tmp_path / "python"
        log = str(tmp_path / "log")
        path.write_text(STAND_IN.format(python=sys.executable, log=log, measure=measure))
        path.chmod(0o755)
        return str(path)

    return made


def _row(report: EngineReport, phase: str, batch: int = 1) -> Row:
    [row] = [x for x in report.rows if (x.phase, x.batch) == (phase, batch)]
    return row


@pytest.fixture(name="measured", scope="module")
def _measured(folders: dict[str, Source]) -> tuple[EngineReport, list[Case]]:
    """Both models in transformers, and the cases as they were told."""
    seen: list[Case] = []
    report = compare_engine("transformers", folders, CASES, SETTINGS, tell=seen.append)
    return report, seen


def test_transformers_times_both_models(measured: tuple[EngineReport, list[Case]]) -> None:
    report, seen = measured
    assert report.absent is None
    assert seen == CASES
    assert [(x.phase, x.batch) for x in report.rows] == [
        (phase, batch) for batch in (1, 3) for phase in ("prefill", "decode", "products")
    ]
    for row in report.rows:
        assert row.repeats == 3
        assert set(row.ms) == {"dense", "pruned"}
        assert all(low <= row.ms[x] <= high for x, (low, high) in row.spread_ms.items())
        assert row.speedup == pytest.approx(row.ms["dense"] / row.ms["pruned"])
        tokens = row.batch * (1 if row.phase == "decode" else row.tokens)
        for name, rate in row.tokens_per_second.items():
            assert rate == pytest.approx(1000 * tokens / row.ms[name])
    assert report.skipped == ("batch 1, 65 tokens: 69 positions, the model has 64",)


def test_transformers_says_what_it_ran_on(measured: tuple[EngineReport, list[Case]]) -> None:
    report, _ = measured
    for name, mlp in (("dense", 128), ("pruned", 64)):
        facts = report.facts[name]
        model = LlamaForCausalLM(_config(mlp))
        count = sum(x.numel() for x in model.parameters())
        assert facts["parameters"] == count
        assert facts["weight_bytes"] == 4 * count
        assert 4 * count < facts["file_bytes"] < 4 * count + 10_000
        assert (facts["dtype"], facts["threads"], facts["context"]) == ("float32", 1, CONTEXT)
        assert torch.__version__ in facts["version"]
        assert facts["load_seconds"] > 0
        assert facts["peak_bytes"] > 50e6
        # Read at every step: all but the embedding, and keys and values half way through.
        cache = 2 * LAYERS * 2 * HEAD_DIM * 4 * 3 * (8 + 1)
        expected = 4 * (count - VOCABULARY * HIDDEN) + cache
        assert report.bytes[1].by_model[name] == expected
    sizes = report.bytes[1].by_model
    assert report.bytes[1].speedup == sizes["dense"] / sizes["pruned"]


def test_one_model_has_no_ratio(stand_in: Callable[..., str]) -> None:
    only = {"only": Source("b")}
    report = compare_engine("llama.cpp", only, [Case(1, 4, 2)], SETTINGS, python=stand_in())
    assert [(x.phase, x.speedup, x.quartiles) for x in report.rows] == [
        ("prefill", None, None),
        ("decode", None, None),
    ]
    json.dumps(report.to_json())


def test_models_take_turns_and_known_times_give_known_figures(
    stand_in: Callable[..., str], tmp_path: Path
) -> None:
    models = {"dense": Source("a"), "pruned": Source("b")}
    settings = Settings("float32", "cpu", 1, repeats=4, warmup=1)
    python = stand_in()
    report = compare_engine("llama.cpp", models, [Case(2, 10, 4)], settings, python=python)
    row = _row(report, "prefill", 2)
    assert (row.ms, row.speedup) == ({"dense": 6000.0, "pruned": 2000.0}, 3.0)
    assert row.quartiles == (2.0, 4.0)
    assert row.tokens_per_second == {"dense": 20 / 6, "pruned": 10.0}
    assert _row(report, "decode", 2).tokens_per_second == {"dense": 4.0, "pruned": 4.0}
    assert report.bytes[0].speedup == 1.5
    asked = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    turns = [model for model, request in asked if request["do"] == "measure"]
    assert turns == ["a", "b", "b", "a"] * 2 + ["a", "b"]


def test_little_time_still_gives_three_repeats(stand_in: Callable[..., str]) -> None:
    settings = Settings("float32", "cpu", 1, repeats=9, warmup=0, seconds=0.0)
    models = {"only": Source("b")}
    report = compare_engine("llama.cpp", models, [Case(1, 2, 1)], settings, python=stand_in())
    assert {x.repeats for x in report.rows} == {engines.LEAST_REPEATS}


def test_what_does_not_fit_is_named_and_the_rest_measured(stand_in: Callable[..., str]) -> None:
    picky = """\
fits = request["batch"] < 8
        answer = dict(ok=dict(prefill=1.0, decode=1.0)) if fits else dict(skip="out of memory")
        print(json.dumps(answer), flush=True)"""
    cases = [Case(8, 2, 1), Case(1, 2, 1)]
    models = {"only": Source("b")}
    report = compare_engine("llama.cpp", models, cases, SETTINGS, python=stand_in(picky))
    assert report.skipped == ("batch 8, 2 tokens: only: out of memory",)
    assert {x.batch for x in report.rows} == {1}


def test_bytes_that_no_room_is_left_to_count_are_named(stand_in: Callable[..., str]) -> None:
    models = {"only": Source("large")}
    report = compare_engine("llama.cpp", models, [Case(1, 2, 1)], SETTINGS, python=stand_in())
    assert [x.phase for x in report.rows] == ["prefill", "decode"]
    assert report.bytes == ()
    assert report.skipped == ("batch 1, 2 tokens: only: bytes of a step: full",)


def test_an_answer_torn_off_is_one_line(stand_in: Callable[..., str]) -> None:
    torn = """print('{"ok": {"pre', flush=True)"""
    models = {"only": Source("b")}
    report = compare_engine("llama.cpp", models, [Case(1, 2, 1)], SETTINGS, python=stand_in(torn))
    assert report.absent == """the worker answered '{"ok": {"pre'"""


def test_a_process_that_is_gone_takes_no_memory() -> None:
    process = subprocess.Popen(["true"])
    seen = psutil.Process(process.pid)
    process.wait()
    assert engine_process._peak(seen) == 0


def test_a_death_half_way_keeps_what_was_measured(stand_in: Callable[..., str]) -> None:
    mortal = """\
if request["batch"] == 2:
            print("Traceback\\nRuntimeError: no kernel\\n  (hint)", file=sys.stderr, flush=True)
            os._exit(7)
        print(json.dumps(dict(ok=dict(prefill=1.0, decode=1.0))), flush=True)"""
    cases = [Case(1, 2, 1), Case(2, 2, 1), Case(4, 2, 1)]
    models = {"only": Source("b")}
    report = compare_engine("llama.cpp", models, cases, SETTINGS, python=stand_in(mortal))
    assert {x.batch for x in report.rows} == {1}
    assert report.skipped == ("the worker ended (status 7): RuntimeError: no kernel",)
    assert report.absent is None


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (
            "echo 'ValueError: bad weights' >&2; exit 3",
            "the worker ended (status 3): ValueError: bad weights",
        ),
        ("exit 1", "the worker ended (status 1): no output"),
        (
            "kill -9 $$",
            "the worker was killed (signal 9; out of memory?): no output",
        ),
    ],
)
def test_a_worker_that_dies_gives_one_line(tmp_path: Path, script: str, reason: str) -> None:
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    models = {"only": Source("x")}
    report = compare_engine("vllm", models, [Case(1, 2, 1)], SETTINGS, python=str(path))
    assert report == EngineReport("vllm", {}, absent=reason)


def test_a_real_worker_that_cannot_load_says_why(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    models = {"only": Source(str(tmp_path))}
    report = compare_engine("transformers", models, [Case(1, 2, 1)], SETTINGS)
    assert report.absent is not None
    assert report.absent.startswith("the worker ended (status 1): ValueError: ")
    assert "\n" not in report.absent


def test_no_such_interpreter() -> None:
    models = {"only": Source("x")}
    report = compare_engine("vllm", models, [Case(1, 2, 1)], SETTINGS, python="gone/python")
    assert report.absent == "gone/python: No such file or directory"


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_an_engine_that_is_not_installed_is_no_error(folders: dict[str, Source]) -> None:
    report = compare_engine("vllm", folders, [Case(1, 2, 1)], SETTINGS)
    assert report == EngineReport("vllm", {}, absent="vllm is not installed")


@pytest.mark.parametrize("models", [{}, dict.fromkeys("abc", Source("x"))])
def test_one_or_two_models(models: dict[str, Source]) -> None:
    with pytest.raises(ValueError, match="1 or 2 models"):
        compare_engine("transformers", models, [Case(1, 2, 1)], SETTINGS)


def test_llama_cpp_on_a_real_file() -> None:
    pytest.importorskip("xllamacpp")
    folder, name = locate("smollm2-135m-instruct")
    assert name is not None
    file = Path(folder) / name
    models = {"one": Source(str(file))}
    cases = [Case(1, 6, 3), Case(2, 4, 2)]
    report = compare_engine("llama.cpp", models, cases, SETTINGS)
    assert report.absent is None
    assert [(x.phase, x.batch) for x in report.rows] == [
        (phase, batch) for batch in (1, 2) for phase in ("prefill", "decode")
    ]
    assert all(ms > 0 for row in report.rows for ms in row.ms.values())
    facts = report.facts["one"]
    assert (facts["dtype"], facts["context"], facts["threads"]) == ("Q4_1", 8192, 1)
    assert facts["file_bytes"] == file.stat().st_size
    # Tied: all weights are read; keys and values in f16 of 30 layers with 3 groups of 64.
    cache = 2 * 30 * 2 * 3 * 64 * (4 + 1) * 2
    weights = report.bytes[1].by_model["one"] - cache
    assert 0.97 < weights / facts["file_bytes"] < 1


@pytest.mark.skipif(not VLLM_PYTHON.is_file(), reason="no .venv-vllm here: make venv-vllm")
def test_vllm_times_both_models(folders: dict[str, Source]) -> None:
    cases = [Case(1, 16, 4), Case(2, 8, 2), Case(1, 80, 4)]
    python = str(VLLM_PYTHON)
    report = compare_engine("vllm", folders, cases, SETTINGS, python=python)
    assert report.absent is None, report.absent
    assert [(x.phase, x.batch) for x in report.rows] == [
        (phase, batch) for batch in (1, 2) for phase in ("prefill", "decode")
    ]
    assert report.skipped == ("batch 1, 80 tokens: 84 positions, the model has 64",)
    facts: dict[str, Any] = report.facts["pruned"]
    assert facts["mode"].startswith("Transformers backend, eager")
    assert facts["dtype"] == "float32"


def test_a_worker_that_hangs_is_told_of(
    stand_in: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_process, "SILENCE_SECONDS", 3.0)
    monkeypatch.setattr(engine_process, "_GRACE_SECONDS", 0.1)
    python = stand_in("__import__('time').sleep(60)")
    found = compare_engine("vllm", {"a": Source("a")}, CASES[:1], SETTINGS, python=python)
    assert found.absent == "the worker said nothing for 0.05 minutes"


def test_a_worker_that_hung_is_not_asked_again(
    stand_in: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its late answer would be taken for that to another question."""
    monkeypatch.setattr(engine_process, "SILENCE_SECONDS", 3.0)
    python = stand_in("__import__('time').sleep(4 if turn else 0)\n        " + ANSWER)
    found = compare_engine("vllm", {"b": Source("b")}, CASES[:1], SETTINGS, python=python)
    assert found.absent == "the worker said nothing for 0.05 minutes"
    assert "device_bytes" not in found.facts["b"]
