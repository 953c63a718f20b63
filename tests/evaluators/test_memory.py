from __future__ import annotations

import torch
from torch import nn

from evaluators.memory import parameter_count, peak_resident_bytes, weight_bytes


def test_dense_layer_counts_by_hand() -> None:
    layer = nn.Linear(5, 7).to(torch.bfloat16)
    assert parameter_count(layer) == 5 * 7 + 7
    assert weight_bytes(layer) == 2 * (5 * 7 + 7)


def test_tied_weights_count_once() -> None:
    tied = nn.ModuleList([nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False)])
    assert weight_bytes(tied) == 2 * 4 * 6 * 4
    # A second Parameter object on the same storage, as after loading: identity is not enough.
    tied[1].weight = nn.Parameter(tied[0].weight.data)
    assert parameter_count(tied) == 4 * 6
    assert weight_bytes(tied) == 4 * 6 * 4


def test_peak_is_in_bytes_and_grows() -> None:
    before = peak_resident_bytes()
    assert before > 50 * 2**20
    block = torch.ones(before // 4 + 2**26)  # float32: more than the whole peak so far
    assert peak_resident_bytes() - before >= 2**26
    del block
