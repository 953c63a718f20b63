"""The command `speed`: what it runs, what it holds the figures against, what readers see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from evaluators.engines import Bytes, Case, EngineReport, Row, Settings, Source
from selfpruner import speed
from selfpruner.cli import main
from selfpruner.progress import Progress
from selfpruner.speed import Asked, SpeedReport, measure_speed
from selfpruner.speed_page import print_speed, write_speed_page


def _row(phase: str, dense_ms: float, pruned_ms: float, batch: int = 1) -> Row:
    ms = {"baseline": dense_ms, "model": pruned_ms}
    rates = {name: 1000 * batch / x for name, x in ms.items()}
    spread = {name: (x, x) for name, x in ms.items()}
    ratio = dense_ms / pruned_ms
    return Row(phase, batch, 64, 5, ms, spread, rates, ratio, (ratio - 0.1, ratio + 0.1))


def _bytes(dense: int, pruned: int) -> Bytes:
    return Bytes(1, 64, {"baseline": dense, "model": pruned}, dense / pruned)


FACTS = {"version": "1", "dtype": "bfloat16", "threads": 2, "peak_bytes": 3_000_000}
REPORT = SpeedReport(
    {"baseline": "a <dense> model", "model": "a pruned one"},
    "some device",
    {
        "platform": "Linux", "cpu": "c", "cores": 2, "memory_bytes": 8, "python": "3",
        "versions": {"torch": "2"},
    },
    Settings("bfloat16", "cpu", 2),
    (
        EngineReport(
            "transformers",
            {"baseline": FACTS, "model": FACTS},
            (_row("prefill", 30.0, 20.0), _row("decode", 6.0, 5.0), _row("products", 32.0, 20.0),
             _row("prefill", 60.0, 40.0, batch=8)),
            (_bytes(150, 100),),
            ("batch 64, 64 tokens: out of memory",),
        ),
        EngineReport(
            "vllm",
            {"baseline": FACTS, "model": FACTS},
            (_row("prefill", 28.0, 20.0), _row("decode", 6.0, 4.0)),
        ),
        EngineReport(
            "llama.cpp",
            {"baseline": FACTS, "model": FACTS},
            (_row("prefill", 28.0, 20.0), _row("decode", 6.0, 5.0)),
            (_bytes(120, 100),),
        ),
    ),
)  # fmt: skip


def test_figures_are_held_against_what_they_could_reach() -> None:
    found = {(x.engine, x.row.phase, x.row.batch): (x.ideal, x.reached) for x in REPORT.lines()}
    assert found == {
        ("transformers", "prefill", 1): (1.6, pytest.approx(1.5 / 1.6)),
        ("transformers", "decode", 1): (1.5, pytest.approx(1.2 / 1.5)),
        ("transformers", "prefill", 8): (None, None),
        # The same weights: transformers' products and bytes hold for vLLM.
        ("vllm", "prefill", 1): (1.6, pytest.approx(1.4 / 1.6)),
        ("vllm", "decode", 1): (1.5, pytest.approx(1.0)),
        # Packed weights: the file's own bytes, and no products.
        ("llama.cpp", "prefill", 1): (None, None),
        ("llama.cpp", "decode", 1): (1.2, pytest.approx(1.0)),
    }


def test_readers_see_figures_facts_and_what_is_missing(tmp_path: Path) -> None:
    console = Console(width=80, record=True, quiet=False, file=(tmp_path / "out").open("w"))
    print_speed(REPORT, console)
    text = console.export_text()
    assert "…" not in text
    for words in ("some device", "a <dense> model", "prefill 1x64", "1.50×", "94 %",  # noqa: RUF001
                  "skipped: batch 64, 64 tokens: out of memory",
                  "1 of 2 prefill rows reach 90 % of their ideal."):  # fmt: skip
        assert words in text
    page = write_speed_page(REPORT, tmp_path / "speed.html").read_text()
    for words in ("a &lt;dense&gt; model", "1.50× (1.40 to 1.60)", "out of memory",  # noqa: RUF001
                  "llama.cpp", "3.0 MB"):  # fmt: skip
        assert words in page
    assert "http" not in page.replace("http-equiv", "")


def test_a_tiny_model_beside_a_smaller_one(tiny_run: Path, tmp_path: Path) -> None:
    """The whole command on real models, from arguments to JSON."""
    dense = yaml.safe_load(tiny_run.read_text())["model"]
    model = LlamaForCausalLM.from_pretrained(dense)
    model.config.num_hidden_layers = 1
    LlamaForCausalLM(model.config).save_pretrained(tmp_path / "small")
    out = tmp_path / "speed.json"
    arguments = ["speed", str(tmp_path / "small"), "--baseline", dense, "--engines", "transformers",
                 "--batches", "1,2", "--lengths", "8,64,80", "--new-tokens", "2", "--repeats", "3",
                 "--out", str(out)]  # fmt: skip
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    data: dict[str, Any] = json.loads(out.read_text())
    assert data["models"] == {"baseline": dense, "model": str(tmp_path / "small")}
    [engine] = data["engines"]
    assert len(engine["skipped"]) == 4
    assert "batch 1, 64 tokens: timed with 62, the model has 64 positions" in engine["skipped"][0]
    assert "82 positions, the model has 64" in engine["skipped"][1]
    assert [(x["phase"], x["batch"], x["tokens"]) for x in data["comparison"]] == [
        (phase, batch, tokens)
        for batch in (1, 2) for tokens in (8, 62) for phase in ("prefill", "decode")
    ]  # fmt: skip
    for line in data["comparison"]:
        assert line["reached"] == pytest.approx(line["speedup"] / line["ideal"])
    assert data["settings"]["threads"] >= 1
    assert {"torch", "transformers"} <= set(data["environment"]["versions"])


@pytest.fixture(name="asked_of")
def _asked_of(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Source], list[Case]]]:
    """Engines that only write down what they are to run."""
    seen: list[tuple[str, dict[str, Source], list[Case]]] = []

    def compare(
        name: str, models: dict[str, Source], cases: list[Case], settings: Settings, **_: Any
    ) -> EngineReport:
        del settings
        seen.append((name, models, cases))
        return EngineReport(name, {})

    monkeypatch.setattr(speed, "compare_engine", compare)
    return seen


def test_gguf_files_go_to_llama_cpp_alone(
    asked_of: list[tuple[str, dict[str, Source], list[Case]]], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "m.gguf"
    file.touch()
    with Progress() as progress:
        measure_speed(Asked(str(tmp_path), gguf=file, batches=(2,), lengths=(3,)), progress)
    assert [(name, models) for name, models, _ in asked_of] == [
        ("transformers", {"model": Source(str(tmp_path))}),
        ("llama.cpp", {"model": Source(str(file))}),
    ]
    assert asked_of[0][2] == [Case(2, 3, speed.SMALL.new_tokens)]


def test_a_baselines_file_without_a_baseline_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "m.gguf"
    with Progress() as progress, pytest.raises(ValueError, match="without --baseline"):
        measure_speed(Asked(str(tmp_path), gguf=file, baseline_gguf=file), progress)


def test_a_given_gguf_is_not_set_beside_one_that_nobody_named(
    asked_of: list[tuple[str, dict[str, Source], list[Case]]], tmp_path: Path
) -> None:
    """The packaged baseline is a Q4_1 file: beside F16 it would say nothing of pruning."""
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "m.gguf"
    file.touch()
    asked = Asked(str(tmp_path), baseline="smollm2-135m-instruct", gguf=file)
    with Progress() as progress:
        report = measure_speed(asked, progress)
    assert [name for name, _, _ in asked_of] == ["transformers"]
    assert [x.absent for x in report.engines[1:]] == [
        "needs --vllm-python, an interpreter that has vLLM",
        "needs a GGUF file: --baseline-gguf",
    ]


def test_a_missing_gguf_is_said(
    asked_of: list[tuple[str, dict[str, Source], list[Case]]], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    engines = ("llama.cpp", "transformers")
    with Progress() as progress:
        report = measure_speed(
            Asked("smollm2-135m-instruct", baseline=str(tmp_path), engines=engines), progress
        )
    assert [name for name, _, _ in asked_of] == ["transformers"]
    assert report.engines[1].absent == "needs a GGUF file: --baseline-gguf"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--out", "a.txt"], "--out: got a.txt; allowed: a name that ends in .json or .html"),
        (["--out", "gone/a.json"], "--out: no such folder: gone"),
        (["--batches", "1,x"], "--batches: got '1,x'; allowed: whole numbers such as 1,8,64"),
        (["--batches", "0"], "speed: got batches [0], lengths [128, 512], new tokens 16, "
         "repeats 5; allowed: 1 and more"),
        (["--engines", "tgi"], "--engines: got tgi; allowed: transformers, vllm, llama.cpp"),
        (["--gguf", "gone.gguf"], "--gguf: no such file: gone.gguf"),
        (["--baseline", "smollm2-135m-instruct", "--baseline-gguf", "gone.gguf"],
         "--baseline-gguf: no such file: gone.gguf"),
        (["--engines", "llama.cpp"], "speed: llama.cpp: needs a GGUF file: --gguf"),
        (["--engines", "vllm", "--vllm-python", "gone"],
         "speed: vllm: gone: No such file or directory"),
    ],
)  # fmt: skip
def test_what_a_user_can_mend_is_one_line(tmp_path: Path, arguments: list[str], line: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    result = CliRunner().invoke(main, ["speed", str(tmp_path), *arguments])
    assert result.exit_code == 2
    assert [x for x in result.stderr.splitlines() if x.startswith("selfpruner: ")] == [
        f"selfpruner: {line}"
    ]
