"""What the latency table costs: whole models of many shapes, timed by turns."""

from __future__ import annotations

from dataclasses import replace

from pruning.plan import Grid
from selfpruner.config import RunConfig
from selfpruner.costs.hardware import Hardware
from selfpruner.costs.work import Running, Work, times
from selfpruner.latency_table import Detail

_KEPT = 0.75  # of the blocks, by the models of a table, roughly: half of them keep one kind whole
_GPU_CALLS = 4  # of one model a round: warm-up and capture of its graph
_REPLAYS = 13  # of the graph, which starts no layers one by one
_CPU_SECONDS, _CPU_CALLS = 0.2, 10  # a round calls a model for so long, at most so often


def latency_table(
    config: RunConfig, dense: Running, grid: Grid, hardware: Hardware
) -> tuple[Work, ...]:
    """Return the calls of all models of a table; on a CPU each beside one of the dense model."""
    detail = Detail.fine(on_gpu=hardware.gpu)
    attention, mlp = detail.levels(grid)
    visits = detail.rounds * (len(attention) + len(mlp) + detail.calibration)
    one, reference = (_call(config, x) for x in (replace(dense, kept=_KEPT), dense))
    if hardware.gpu:
        replay = replace(one, layers=0)
        return times(one, visits * _GPU_CALLS), times(replay, visits * _REPLAYS)
    calls = max(1, min(_CPU_CALLS, int(_CPU_SECONDS / (2 * one.seconds(hardware)))))
    return times(one, visits * (1 + calls)), times(reference, visits * calls)


def _call(config: RunConfig, model: Running) -> Work:
    """Return one call of a model under the workload of the run."""
    load = config.workload
    if load.phase == "decode":
        return model.steps(1, load.batch)
    return model.passes(load.batch * load.tokens, load.tokens, load.batch, head=load.batch)
