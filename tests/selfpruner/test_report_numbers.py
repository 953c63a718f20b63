"""The numbers of the report: each one of results.json is readable in the page."""

from __future__ import annotations

import html
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from selfpruner.notation import counted, duration, short
from selfpruner.report import write_report

SAMPLE = Path(__file__).parent / "results_sample.json"


def _read(folder: Path) -> str:
    """Return the words of the sample's report without styles, charts and tags."""
    folder.mkdir()
    (folder / "results.json").write_bytes(SAMPLE.read_bytes())
    page = write_report(folder).read_text(encoding="utf-8")
    page = re.sub(r"<(style|svg)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())


def _sample() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(SAMPLE.read_text(encoding="utf-8"))
    return data


def _quality_texts(quality: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for side in ("dense", "pruned"):
        for value in quality[side]["perplexity"].values():
            yield f"{side} perplexity", f"{value:.2f}"
        for name, task in quality[side]["tasks"].items():
            for key in ("acc", "acc_norm", "stderr"):
                if task[key] is not None:
                    yield f"{side} {name} {key}", f"{100 * task[key]:.2f}"
            yield f"{side} {name} n", str(task["n"])
        yield f"{side} mean", f"{100 * quality[side]['mean']:.2f} %"
    for value in (quality["difference"]["points"], *quality["difference"]["ci95"]):
        yield "difference", f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")
    for name, value in quality["difference"]["mcnemar"].items():
        yield f"p of {name}", f"{value:.3f}"


def _search_texts(data: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for key in ("evaluations", "llm_calls", "llm_tokens", "fallbacks"):
        yield key, f"{data['search'][key]:,}"
    yield "equivalents", f"{data['search']['equivalents']:.1f}"
    yield "slopes", f"{data['search']['slopes']:.1f} of them for slopes"
    for key in ("best_fitness", "selected_fitness", "selection_fitness"):
        yield key, f"{data['search'][key]:.4f}"
    for row in data["generations"]:
        yield (
            "generation",
            (
                f"{row['generation']} {row['best_fitness']:.4f} {100 * row['accuracy']:.1f} % "
                f"{row['speedup']:.2f}"
            ),
        )
    for row in data["history"]:
        shown = "\N{EN DASH}" if row["fitness"] is None else f"{row['fitness']:.4f}"
        yield (
            "history",
            (
                f"{row['evaluation']} {row['generation']} {row['operator']} {row['origin']} "
                f"{shown} {row['best']:.4f}"
            ),
        )
    for key in ("before", "after"):
        yield f"refit {key}", f"{data['refit'][key]:.4f}"


def _size_texts(data: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for key in ("parameters_dense", "parameters_pruned"):
        yield key, f"{data['model'][key]:,}"
    for key in ("target", "achieved"):
        yield key, f"{100 * data['budget'][key]:.2f} %"
    for value in (*data["memory"].values(), *data["macs"].values()):
        yield "memory or macs", f"{value:,}"
    for value in data["units_dense"].values():
        yield "units_dense", f"{value:,}"
    for row in data["units"]:
        layer = f"{row['layer']} {row['kv_groups']} {row['q_per_group']} {row['mlp_channels']:,}"
        yield "units", layer


def _other_texts(data: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for row in data["speed"]["rows"]:
        yield (
            "speed",
            (
                f"{row['phase']} {row['batch']} {row['tokens']:,} {row['dense_ms']:.2f} "
                f"{row['pruned_ms']:.2f} {row['speedup']:.3f}\N{MULTIPLICATION SIGN} "
                f"{row['spread']:.3f}"
            ),
        )
    for name, control in data["controls"].items():
        values = " ".join(f"{x:.2f}" for x in control["perplexity"].values())
        yield "control", f"{name} {control['parameters']:,} {values}"
    for stage, seconds in (*data["cost"]["stage_seconds"].items(),
                           ("Search time", data["search"]["wall_seconds"])):  # fmt: skip
        long = f"{round(seconds) // 60} min {round(seconds) % 60:02d} s"
        yield "time", f"{stage} {long if seconds >= 100 else f'{seconds:.2f} s'}"
    yield "peak memory", f"{data['cost']['peak_memory_bytes'] / 1e9:.1f} GB"
    yield "items", f"{data['evaluation']['samples']} items a task"
    yield "evaluation batch", f"batch {data['evaluation']['batch_size']}"
    for value in data["evaluation"]["perplexity_length"].values():
        yield "length", f"length {value:,}"
    yield "environment", f"hardware.memory_bytes {data['environment']['hardware']['memory_bytes']}"


def _texts(data: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (place, text that must be readable) for every number of a results.json."""
    yield from _size_texts(data)
    yield from _search_texts(data)
    yield from _quality_texts(data["quality"])
    yield from _other_texts(data)


def test_every_number_of_the_run_is_readable(tmp_path: Path) -> None:
    data = _sample()
    text = _read(tmp_path / "run")
    missing = [
        (place, wanted)
        for place, wanted in _texts(data)
        if not re.search(rf"(?<![\d.,]){re.escape(wanted)}(?![\d])", text)
    ]
    assert missing == []


def test_origins_are_counted_from_the_history(tmp_path: Path) -> None:
    data = _sample()
    text = _read(tmp_path / "run")
    lowest = {"llm": 99.0}
    records: Counter[str] = Counter()
    for row in data["history"]:
        if row["fitness"] is not None and row["fitness"] < min(lowest.values()):
            records[row["origin"]] += 1
        if row["fitness"] is not None:
            lowest[row["origin"]] = min(lowest.get(row["origin"], 99.0), row["fitness"])
    counts = Counter(row["origin"] for row in data["history"])
    for origin, name in (("llm", "LLM"), ("llm_repaired", "LLM, repaired"),
                         ("fallback", "fallback"), ("classical", "classical")):  # fmt: skip
        assert f"{name} {counts[origin]} {records[origin]} {lowest[origin]:.4f}" in text


def test_counts_are_singular_where_there_is_one() -> None:
    assert counted(1, "plan") == "1 plan"
    assert counted(1200, "plan") == "1,200 plans"


@pytest.mark.parametrize(
    ("value", "written"),
    [(999.9e6, "999.9 M"), (999.96e6, "1.0 B"), (999.94, "1000"), (134_515_008, "134.5 M")],
)
def test_rounding_does_not_leave_the_unit(value: float, written: str) -> None:
    assert short(value) == written


def test_a_minute_and_more_is_written_as_such() -> None:
    assert duration(99.99) == "99.99 s"
    assert duration(99.996) == "1 min 40 s"
