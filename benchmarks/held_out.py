"""What corrections and rankings are judged on: the demo model and windows nobody has chosen on."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from torch import nn

from selfpruner.config import RunConfig
from selfpruner.judge import text_losses
from selfpruner.progress import Progress
from selfpruner.workbench import Workbench, prepare

LENGTH = 512
REPORT = 32_768
SHARE = 0.7


def texts_of(root: str | None) -> str:
    """Return the names of the texts, as cells have them."""
    return "passages" if root is None else "c4, wikitext2"


def bench_of(root: str | None, calibration_tokens: int) -> Workbench:
    """Return the demo model with C4 and WikiText-2 in the folder `root`, without one the passages.

    In bfloat16 at the widths of a CPU, as the cells on file.
    """
    source = "passages" if root is None else "c4"
    report = "passages" if root is None else "wikitext2"
    config = RunConfig.model_validate(
        {
            "model": "smollm2-135m-instruct",
            "budget": {"parameters": SHARE},
            "dtype": "bfloat16",
            "pruning": {"target": "cpu"},
            "data": {
                "root": root,
                "length": LENGTH,
                "calibrate": {"source": source, "tokens": calibration_tokens},
                "search": {"source": source, "tokens": LENGTH},
                "select": {"source": source, "tokens": LENGTH},
                "report": [{"source": report, "tokens": REPORT, "length": LENGTH}],
            },
        }
    )
    return prepare(config, Progress())


def report_losses(bench: Workbench, model: nn.Module) -> list[float]:
    """Return the mean negative log-likelihood of every report window."""
    (windows,) = bench.texts.report.values()
    losses: list[float] = text_losses(model, bench.family, windows, batch_size=4).tolist()
    return losses


def paired(losses: Sequence[float], others: Sequence[float]) -> str:
    """Return the mean difference over windows with its standard error."""
    gaps = [a - b for a, b in zip(losses, others, strict=True)]
    error = statistics.stdev(gaps) / math.sqrt(len(gaps))
    return f"{statistics.fmean(gaps):+.4f} ± {error:.4f}"
