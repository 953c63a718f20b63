"""Divergence of a pruned model's next-token distribution from the dense model's.

Both models share the head E (V, D), which pruning leaves alone. With the dense distribution p and
the pruned hidden state h, the cross term of the divergence is linear in the logits:
sum_v p_v (E h)_v = h . (E' p). E' p is the same for every candidate, so that a candidate costs one
matrix product with the head and one log-sum-exp, nothing else over the vocabulary.

Shapes: N token positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 256
VOCABULARY = 4096


class DenseReference:
    """What the dense model predicts at N positions, prepared once and met by many candidates."""

    def __init__(self, hidden_ND: Tensor, head_VD: Tensor) -> None:
        self._head = head_VD
        expected, neg_entropy = [], []
        for hidden in hidden_ND.split(CHUNK):
            log_p = _log_softmax(hidden, head_VD)
            p = log_p.exp()
            neg_entropy.append((p * log_p).sum(-1))
            expected.append(_accurate(p.to(head_VD.dtype) @ head_VD))
        self._expected_ND = torch.cat(expected)
        self._neg_entropy_N = torch.cat(neg_entropy)

    def kl(self, hidden_ND: Tensor) -> Tensor:
        """Return KL(dense || pruned) in nats at each position (N,), >= 0 up to rounding.

        In bfloat16 the logits are rounded: a position may come out at -0.1, means are unbiased.
        """
        log_z = log_partition(hidden_ND, self._head)
        cross = (_accurate(hidden_ND) * self._expected_ND).sum(-1)
        return self._neg_entropy_N - cross + log_z


class TopReference:
    """The k most likely tokens of the dense model and one bucket for the rest: `kl_top512`.

    Merging outcomes never raises a divergence (data-processing inequality), so this is a lower
    bound of `kl`; it holds k numbers a position instead of a distribution.
    """

    def __init__(self, hidden_ND: Tensor, head_VD: Tensor, k: int = 512) -> None:
        self._head = head_VD
        k = min(k, head_VD.shape[0] - 1)
        indices, buckets = [], []
        for hidden in hidden_ND.split(CHUNK):
            log_p = _log_softmax(hidden, head_VD)
            indices.append(log_p.topk(k, dim=-1).indices)
            buckets.append(_buckets(log_p, indices[-1]))
        self._indices_NK = torch.cat(indices)
        self._log_p_NK1 = torch.cat(buckets)

    def kl(self, hidden_ND: Tensor) -> Tensor:
        """Return the divergence over k + 1 outcomes in nats at each position (N,)."""
        rows = []
        chunks = zip(
            hidden_ND.split(CHUNK),
            self._log_p_NK1.split(CHUNK),
            self._indices_NK.split(CHUNK),
            strict=True,
        )
        for hidden, log_p, indices in chunks:
            log_q = _buckets(_log_softmax(hidden, self._head), indices)
            rows.append((log_p.exp() * (log_p - log_q)).sum(-1))
        return torch.cat(rows)


def negative_log_likelihood(hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor) -> Tensor:
    """Return -log q(target) in nats at each position (N,)."""
    logit = (_accurate(hidden_ND) * _accurate(head_VD[targets_N])).sum(-1)
    return log_partition(hidden_ND, head_VD) - logit


def log_partition(hidden_ND: Tensor, head_VD: Tensor) -> Tensor:
    """Return log sum_v exp(E h)_v at each position (N,): of logits in the model's dtype."""
    return torch.cat([_chunk_partition(x, head_VD) for x in hidden_ND.split(CHUNK)])


def _chunk_partition(hidden_ND: Tensor, head_VD: Tensor) -> Tensor:
    """Return log sum_v exp(E h)_v of few positions (N,), part of the vocabulary by part.

    A part's logits stay in a processor's cache: 1.5 times as fast as all of them at once.
    """
    parts = [_accurate(hidden_ND @ x.T).logsumexp(-1) for x in head_VD.split(VOCABULARY)]
    return torch.stack(parts).logsumexp(0)


def _log_softmax(hidden_ND: Tensor, head_VD: Tensor) -> Tensor:
    return _accurate(hidden_ND @ head_VD.T).log_softmax(-1)


def _buckets(log_p_NV: Tensor, indices_NK: Tensor) -> Tensor:
    """Return the log-probabilities of the listed tokens and of all others together (N, K + 1)."""
    listed = log_p_NV.gather(-1, indices_NK)
    others = log_p_NV.scatter(-1, indices_NK, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.cat([listed, others], dim=-1)


def _accurate(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
