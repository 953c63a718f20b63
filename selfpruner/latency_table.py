"""The latency table: milliseconds by what an attention block and an MLP keep, summed for a plan.

ProxylessNAS (Cai et al., arXiv 1812.00332) and FBNet (Wu et al., arXiv 1812.03443) add up measured
times of parts; what parts do not show (overlap, caches, the clock) is put right by a straight line
fitted to a few whole models. Pure data: `profiling` measures it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pruning.budget import Times
from pruning.plan import AttentionUnit, Grid, LayerPlan, Plan

Phase = Literal["decode", "prefill"]
Curve = tuple[tuple[int, float], ...]
Floats = NDArray[np.float64]

_LEAST_SHARE = 0.01  # of the dense time: what a plan is predicted to take at least


@dataclass(frozen=True)
class Workload:
    """What is timed, for `batch` sequences: the prefill of `tokens`, or one token after them."""

    phase: Phase
    batch: int
    tokens: int

    def __str__(self) -> str:
        """Return it in words: `decode, batch 1, 512 tokens`."""
        return f"{self.phase}, batch {self.batch}, {self.tokens} tokens"


@dataclass(frozen=True)
class Timing:
    """What the command line asks to time; None is for the configuration to say."""

    phase: Phase | None = None
    batch: int | None = None
    tokens: int | None = None

    def of(self, workload: Workload) -> Workload:
        """Return `workload` with what was asked for in its place."""
        asked = {name: value for name, value in asdict(self).items() if value is not None}
        return replace(workload, **asked)


@dataclass(frozen=True)
class Detail:
    """How finely a table is measured.

    Attributes:
        attention: numbers of attention units at most; linear in between.
        mlp: MLP widths at most.
        rounds: how often models take turns.
        calibration: whole random models, beside the dense one and the smallest; 0 to go without.
        graphs: whether a GPU replays CUDA graphs.
    """

    attention: int
    mlp: int
    rounds: int
    calibration: int
    graphs: bool

    @classmethod
    def coarse(cls) -> Detail:
        """Return what does for prompts and the report: seconds on a CPU."""
        return cls(attention=2, mlp=3, rounds=2, calibration=0, graphs=False)

    @classmethod
    def fine(cls, *, on_gpu: bool) -> Detail:
        """Return what a search within a speedup needs.

        Times are linear between the widths measured, 33 at most on a GPU: a tile narrower than
        the gap between two of them does not show, which is why its widths go in whole tiles
        (`pruning.target`).
        """
        widths = 33 if on_gpu else 9
        return cls(widths, widths, rounds=5, calibration=4, graphs=True)

    def levels(self, grid: Grid) -> tuple[list[int], list[int]]:
        """Return the levels of attention and of MLPs that are measured."""
        return (
            _spread(len(grid.attention), self.attention),
            _spread(len(grid.mlp), self.mlp),
        )


@dataclass(frozen=True)
class LatencyTable:
    """`milliseconds = offset + slope * (base + attention blocks + MLPs)`.

    Attributes:
        workload: what takes that long.
        unit: what `attention` counts.
        dense: what a layer of the dense model keeps.
        layers: how many layers there are.
        base: milliseconds of the model beside its blocks.
        attention: (units kept, milliseconds of one block), ascending in both, the last one dense;
            linear in between.
        mlp: the same by channels.
        offset: of the calibration, milliseconds.
        slope: of the calibration, not negative.
        repeatability: relative difference of two measurements of one model, the median over models.
    """

    workload: Workload
    unit: AttentionUnit
    dense: LayerPlan
    layers: int
    base: float
    attention: Curve
    mlp: Curve
    offset: float = 0.0
    slope: float = 1.0
    repeatability: float = 0.0

    @classmethod
    def of_models(
        cls,
        workload: Workload,
        unit: AttentionUnit,
        dense: LayerPlan,
        layers: int,
        attention: Mapping[int, float],
        mlp: Mapping[int, float],
        noise: float = 0.0,
    ) -> LatencyTable:
        """Return the uncalibrated table from times of whole models.

        `attention[units]` is what a model takes all of whose layers keep that many units and all
        channels, `mlp[channels]` likewise with all units; both have the dense model. Steps in a
        curve that `noise` milliseconds explain are not believed, and times are made to rise with
        size. What a block would take with nothing left, by the straight line through its curve,
        counts with the base: only differences bear on a prediction.
        """
        whole = mlp[dense.mlp_channels]
        curves = []
        for measured in (attention, mlp):
            kept = sorted(measured)
            times = rising(believed(kept, [measured[x] for x in kept], noise))
            nothing = min(_line(kept, times)[1], times[0])
            curves.append(
                tuple((k, float(t - nothing) / layers) for k, t in zip(kept, times, strict=True))
            )
        base = whole - layers * (curves[0][-1][1] + curves[1][-1][1])
        return cls(workload, unit, dense, layers, base, curves[0], curves[1])

    def calibrated(self, plans: Sequence[Plan], milliseconds: Sequence[float]) -> LatencyTable:
        """Return the table with the line of least squares from its sums to measured times.

        A line that would fall is taken as flat: then nothing that a plan keeps makes a difference.
        """
        sums = np.array([self.sum(plan) for plan in plans])
        times = np.asarray(milliseconds, dtype=np.float64)
        spread = sums - sums.mean()
        slope = max(0.0, float(spread @ times / (spread @ spread))) if spread.any() else 0.0
        offset = float(times.mean() - slope * sums.mean())
        return replace(self, offset=offset, slope=slope)

    def with_repeatability(self, value: float) -> LatencyTable:
        """Return the table with another `repeatability`."""
        return replace(self, repeatability=value)

    def sum(self, plan: Plan) -> float:
        """Return base and blocks of `plan` added up, before calibration."""
        by_attention, by_mlp = (self._rows[name] for name in ("attention", "mlp"))
        groups = [x.kv_groups if self.unit == "kv_group" else x.q_per_group for x in plan.layers]
        channels = [x.mlp_channels for x in plan.layers]
        blocks = np.interp(groups, *by_attention).sum() + np.interp(channels, *by_mlp).sum()
        return float(self.base + blocks)

    def milliseconds(self, plan: Plan) -> float:
        """Return the predicted time of `plan`, never below a hundredth of the dense model's.

        What is measured on a busy machine may add up to less than nothing for small plans.
        """
        return max(self._predicted(plan), _LEAST_SHARE * self.dense_milliseconds)

    @cached_property
    def dense_milliseconds(self) -> float:
        """The predicted time of the dense model."""
        return self._predicted(Plan((self.dense,) * self.layers))

    def speedup(self, plan: Plan) -> float:
        """Return the predicted time of the dense model over that of `plan`."""
        return self.dense_milliseconds / self.milliseconds(plan)

    def per_unit(self, grid: Grid) -> tuple[float, float]:
        """Return the microseconds of one attention level and of one MLP step, on average."""
        means = []
        for row in self._levels(grid):
            means.append(1000 * float(row[-1] - row[0]) / max(1, len(row) - 1))
        return means[0], means[1]

    def worthwhile(self, grid: Grid) -> Grid:
        """Return `grid` without levels that are predicted to take as long as a wider one."""
        kept = [_worth(row) for row in self._whole_rows(grid)]
        return grid.keeping(kept[0], kept[1])

    def times(self, grid: Grid) -> Times:
        """Return calibrated nanoseconds of the levels of `grid`, for a budget."""
        attention, mlp = self._whole_rows(grid)
        blocks = self.layers * (attention[-1] + mlp[-1])
        base = round(1e6 * self.dense_milliseconds) - blocks
        return Times(base, tuple(attention), tuple(mlp))

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LatencyTable:
        """Return the table that `to_json` wrote."""
        curves = {
            name: tuple((int(k), float(t)) for k, t in data[name]) for name in ("attention", "mlp")
        }
        parts = {"workload": Workload(**data["workload"]), "dense": LayerPlan(**data["dense"])}
        return cls(**{**data, **curves, **parts})

    def _predicted(self, plan: Plan) -> float:
        return self.offset + self.slope * self.sum(plan)

    @cached_property
    def _rows(self) -> dict[str, tuple[Floats, Floats]]:
        """What blocks keep and the milliseconds of it, by block."""
        curves = {"attention": np.array(self.attention), "mlp": np.array(self.mlp)}
        return {name: (curve[:, 0], curve[:, 1]) for name, curve in curves.items()}

    def _levels(self, grid: Grid) -> tuple[Floats, Floats]:
        """Return the calibrated milliseconds of every attention and every MLP level."""
        attention = np.interp(grid.attention, *self._rows["attention"])
        mlp = np.interp(grid.mlp, *self._rows["mlp"])
        return self.slope * attention, self.slope * mlp

    def _whole_rows(self, grid: Grid) -> tuple[list[int], list[int]]:
        rows = self._levels(grid)
        attention, mlp = (np.rint(1e6 * row).astype(int).tolist() for row in rows)
        return attention, mlp


def rising(values: ArrayLike) -> Floats:
    """Return the values of least squared distance that never fall (pool adjacent violators)."""
    pools: list[list[float]] = []
    for value in np.asarray(values, dtype=np.float64).tolist():
        pools.append([value, 1.0])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (left, n), (right, m) = pools[-2:]
            pools[-2:] = [[(n * left + m * right) / (n + m), n + m]]
    return np.concatenate([np.full(int(count), mean) for mean, count in pools])


def believed(kept: Sequence[int], times: Sequence[float], noise: float) -> Floats:
    """Return the straight line through a curve and of each departure from it what passes `noise`.

    A noisy machine then shows no steps where there are none, and a quiet one all that there are.
    """
    measured = np.asarray(times, dtype=np.float64)
    slope, start = _line(kept, measured)
    line = start + slope * np.asarray(kept)
    departure = measured - line
    found: Floats = line + np.sign(departure) * np.maximum(0, np.abs(departure) - noise)
    return found


def _line(kept: Sequence[int], times: Floats) -> tuple[float, float]:
    """Return slope and start of the line of least squares; a flat one through a single point."""
    if len(kept) < 2:
        return 0.0, float(times[0])
    slope, start = np.polyfit(kept, times, 1)
    return float(slope), float(start)


def _worth(row: Sequence[int]) -> list[int]:
    """Return the levels that are faster than every wider one that is kept, ascending."""
    kept = [len(row) - 1]
    for level in range(len(row) - 2, -1, -1):
        if row[level] < row[kept[-1]]:
            kept.append(level)
    return kept[::-1]


def _spread(levels: int, most: int) -> list[int]:
    """Return at most so many levels, evenly from the smallest to the dense one."""
    return sorted({round(x) for x in np.linspace(0, levels - 1, min(levels, most))})
