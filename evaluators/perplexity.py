"""Perplexity over non-overlapping windows, the protocol of the pruning literature.

Shapes: N windows, L tokens a window, B windows a batch, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from evaluators.metric import Metric

# Entries of fp32 logits held at once: 16 Mi entries are 64 MiB.
_LOGIT_ENTRIES = 16 * 2**20


def perplexity_of(losses_N: Tensor, name: str = "perplexity") -> Metric:
    """Perplexity from the mean cross-entropy in nats of every window, shape (N,).

    `value = exp(m)`, `m` the mean over windows; `stderr = value * sd / sqrt(N)` (delta method,
    windows taken as independent), None for one window.
    """
    count = len(losses_N)
    try:
        value = math.exp(float(losses_N.mean()))
    except OverflowError:
        value = math.inf
    stderr = value * float(losses_N.std()) / math.sqrt(count) if count > 1 else None
    return Metric(name, value, stderr, count, "", higher_is_better=False)


@torch.inference_mode()
def window_losses(model: nn.Module, windows_NL: Tensor, batch_size: int = 1) -> Tensor:
    """Mean cross-entropy in nats of the L - 1 predicted tokens of every window, shape (N,).

    Args:
        model: Takes token ids (B, L) and returns an object with `logits` (B, L, V).
        windows_NL: Token ids, shape (N, L).
        batch_size: Windows a forward pass; keep it equal across compared models, because low
            precision results depend on it.

    Returns:
        In float64 on the CPU.
    """
    if windows_NL.ndim != 2 or windows_NL.shape[1] < 2 or batch_size < 1:
        raise ValueError(
            f"perplexity: got windows of shape {tuple(windows_NL.shape)} and batch size "
            f"{batch_size}, allowed (n, length >= 2) and batch size >= 1"
        )
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    batches = [x.to(device) for x in windows_NL.split(batch_size)]
    losses_N = losses_of((model(input_ids=x, use_cache=False).logits for x in batches), batches)
    model.train(was_training)
    return losses_N


@torch.inference_mode()
def losses_of(logits: Iterable[Tensor], batches: Sequence[Tensor]) -> Tensor:
    """Mean cross-entropy in nats of every window, shape (N,), float64 on the CPU.

    Args:
        logits: Of each batch (B, L, V), taken one at a time.
        batches: Token ids (B, L).
    """
    pairs = zip(logits, batches, strict=True)
    return torch.cat([_batch_losses(logits_BLV, ids_BL).cpu() for logits_BLV, ids_BL in pairs])


def _batch_losses(logits_BLV: Tensor, ids_BL: Tensor) -> Tensor:
    """Mean loss of each window, taking only so many positions to fp32 at a time as fit."""
    batch, length, vocabulary = logits_BLV.shape
    step = max(1, _LOGIT_ENTRIES // (batch * vocabulary))
    total_B = torch.zeros(batch, dtype=torch.float64, device=logits_BLV.device)
    for start in range(0, length - 1, step):
        stop = min(start + step, length - 1)
        chunk = logits_BLV[:, start:stop]
        # Models in float64 stay there; anything narrower is widened.
        chunk = chunk if chunk.dtype == torch.float64 else chunk.float()
        target = ids_BL[:, start + 1 : stop + 1]
        loss = cross_entropy(chunk.flatten(0, 1), target.flatten(), reduction="none")
        total_B += loss.view(batch, -1).double().sum(dim=1)
    return total_B / (length - 1)
