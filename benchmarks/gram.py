"""Sums of x x' in panels, as calibration and refit make them, beside whole products.

    python -m benchmarks.gram [--tokens 1024] [--widths 4864 8960] [--repeats 5]

Both ways take turns on the same float32 inputs of one width, on the CPU, in seconds of processor
time: what is mirrored once at the end is timed apart.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from pruning.gram import PANEL, add_products, filled, products_per_token

WIDTHS = (4_864, 8_960)  # MLPs of Qwen2.5 0.5B and 1.5B


def main() -> None:
    """Time both ways by turns and print a row a width."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, {options.tokens} tokens, panels of {PANEL} rows\n")
    print("| channels | whole, s | panels, s | whole / panels | by operations | mirroring, s |")
    print("|---:|---:|---:|---:|---:|---:|")
    for width in options.widths:
        print(_row(width, options.tokens, options.repeats))


def _row(width: int, tokens: int, repeats: int) -> str:
    """Return the medians of one width and the quartiles of the ratio."""
    x, sums = torch.randn(tokens, width), torch.zeros(width, width)
    both = [
        (_seconds(lambda: sums.addmm_(x.T, x)), _seconds(lambda: add_products(sums, x)))
        for _ in range(repeats)
    ]
    whole, panels = (statistics.median(column) for column in zip(*both, strict=True))
    low, middle, high = statistics.quantiles([a / b for a, b in both], n=4)
    ideal = width**2 / products_per_token(width)
    mirroring = _seconds(lambda: filled(sums))
    return (
        f"| {width} | {whole:.2f} | {panels:.2f} | {middle:.2f} ({low:.2f} to {high:.2f}) | "
        f"{ideal:.2f} | {mirroring:.2f} |"
    )


def _seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


if __name__ == "__main__":
    main()
