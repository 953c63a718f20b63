"""All allocators at equal evaluations: does any beat the default, and when does it pass evolution?

    python -m benchmarks.search [--workers 2] [--threads 1]

Runs the cells of configs/experiments/search.yaml that are missing, prints its table and, budget by
budget, every allocator beside the default one on fresh tokens.
"""

from __future__ import annotations

import argparse
import math
import statistics
from dataclasses import replace
from pathlib import Path

from selfpruner.config import CONFIGS
from selfpruner.experiment import run_experiment
from selfpruner.experiment_study import Study
from selfpruner.experiment_table import table
from selfpruner.progress import Progress
from selfpruner.workforce import Workforce
from selfpruner.yaml_text import read_mapping

FILE = CONFIGS / "experiments" / "search.yaml"
RESULTS = Path(__file__).parent / "results" / "search.jsonl"
FOLDER = Path("runs") / "experiments" / FILE.stem
RIVAL = "evolution"
SOONER = 1.5


def main() -> None:
    """Run the cells that are missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    workforce = Workforce(options.workers, asked_threads=options.threads)
    study = run_experiment(FILE, FOLDER, RESULTS, Progress(), workforce=workforce)
    default = _default()
    print(table(study))
    for budget in dict.fromkeys(x["cell"]["budget"] for x in study.rows):
        rows = [x for x in study.rows if x["cell"]["budget"] == budget]
        print(f"\n{budget}\n\n{_against(replace(study, rows=rows), default)}")
    print(f"\nall budgets\n\n{_overall(study, default)}")


def _default() -> str:
    """Return the allocator of the default recipe."""
    allocator: str = read_mapping(CONFIGS / "recipes" / "best.yaml")["search"]["allocator"]
    return allocator


def _against(study: Study, default: str) -> str:
    """Return every arm beside the default: paired difference, its error, and the targets."""
    lines = [
        f"| arm | pairs | fresh KL | minus {default}, paired | sooner than {RIVAL} |",
        "|---|---:|---:|---:|---:|",
    ]
    better = []
    ours = study.values(default)
    if not ours:
        return f"no cell of {default} is finished"
    for arm in study.arms:
        values = study.values(arm)
        common = [unit for unit in values if unit in ours]
        gaps = [values[unit] - ours[unit] for unit in common]
        if not gaps:
            continue
        mean, error = statistics.fmean(gaps), _standard_error(gaps)
        if mean < -error:
            better.append(arm)
        sooner = study.sooner(arm, RIVAL)
        lines.append(
            f"| {arm} | {len(common)} | {statistics.fmean(values[x] for x in common):.4f} | "
            f"{mean:+.4f} ± {error:.4f} | "
            f"{'' if sooner is None else f'{sooner:.2f}x'} |"
        )
    found = study.sooner(default, RIVAL)
    lines += [
        "",
        f"better than {default} by more than the error: {', '.join(better) or 'none'}",
        f"{default} sooner than {RIVAL}: {'never' if found is None else f'{found:.2f}x'}, "
        f"target {SOONER}x",
    ]
    return "\n".join(lines)


def _overall(study: Study, default: str) -> str:
    """Return every arm beside the default over all pairs; intervals are over seeds."""
    lines = [
        f"| arm | pairs | minus {default}, paired | 95 % interval | adjusted p |",
        "|---|---:|---:|---:|---:|",
    ]
    for found in study.comparisons(default):
        low, high = found.interval or (math.nan, math.nan)
        lines.append(
            f"| {found.arm} | {found.units} | {found.mean:+.4f} | {low:+.4f} to {high:+.4f} | "
            f"{found.p_holm:.3f} |"
        )
    return "\n".join(lines)


def _standard_error(values: list[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf


if __name__ == "__main__":
    main()
