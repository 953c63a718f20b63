"""A model spread over memory and disk computes what it does in memory, bit for bit.

There is no GPU here: the first device is the CPU, and what it is given no room for stays on disk.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from evaluators.perplexity import window_losses
from evaluators.tasks import evaluate_tasks
from pruning.export import export
from pruning.families import FAMILIES
from pruning.loading import load, load_spread, whereabouts
from pruning.plan import Plan
from pruning.registration import register_with_transformers
from pruning.slicing import sliced
from selfpruner.judge import continuations

UNEVEN = Plan.from_json([[2, 2, 32], [4, 2, 48], [1, 2, 8]])
Written = Callable[..., Path]


@pytest.fixture
def written(make_model: Any, rank: Any, bpe: Any, tmp_path: Path) -> Written:
    """Return the folder of a stock model, or of one cut by a plan, with a tokenizer for texts."""

    def write(family: str, plan: Plan | None = None, *, tied: bool = False) -> Path:
        sizes = {"vocab_size": len(bpe), "max_position_embeddings": 2048}
        model = make_model(family, tied=tied, dtype=torch.float32, **sizes)
        model = model if plan is None else sliced(rank(model, "least_squares"), plan)
        export(model, bpe, tmp_path / "model", torch.float32)
        return tmp_path / "model"

    register_with_transformers()
    return write


def _pair(folder: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Return the model in memory, and with room there for some of its layers."""
    whole, _ = load(str(folder), dtype)
    size = sum(x.numel() * x.element_size() for x in whole.parameters())
    for percent in range(100, 0, -5):
        spread, _ = load_spread(str(folder), dtype, room={"cpu": percent * size // 100})
        if _on_disk(spread):
            break
    assert 0 < _on_disk(spread) < 3
    return whole, spread


def _on_disk(model: PreTrainedModel) -> int:
    return sum(
        all(x.is_meta for x in layer.parameters()) for layer in model.get_submodule("model.layers")
    )


@pytest.mark.parametrize(("tied", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
@pytest.mark.parametrize(
    ("family", "plan"), [("llama", None), *((family, UNEVEN) for family in FAMILIES)]
)
def test_logits_are_the_same(
    written: Written,
    make_tokens: Any,
    family: str,
    plan: Plan | None,
    tied: bool,
    dtype: torch.dtype,
) -> None:
    folder = written(family, plan, tied=tied)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    whole, spread = _pair(folder, dtype)
    assert _on_disk(whole) == 0
    assert type(spread) is type(whole)
    assert spread.dtype == dtype
    assert "logits_to_keep" in signature(spread.forward).parameters  # the harness asks
    tokens = make_tokens(2, 12)
    with torch.inference_mode():
        for _ in range(2):  # what was read from disk is let go of and read again
            is_same = torch.equal(spread(tokens).logits, whole(tokens).logits)
            assert is_same
            assert _on_disk(spread) > 0
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.mark.parametrize("plan", [None, UNEVEN], ids=["stock", "pruned"])
def test_tasks_perplexity_and_greedy_text_are_the_same(
    written: Written, make_tokens: Any, bpe: Any, plan: Plan | None
) -> None:
    whole, spread = _pair(written("llama", plan), torch.float32)
    scores = [
        evaluate_tasks(x, bpe, ("piqa", "boolq"), samples=12, batch_size=4) for x in (whole, spread)
    ]
    assert scores[0] == scores[1]
    assert 0 < sum(scores[0]["piqa"].correct) < 12
    tokens = make_tokens(4, 16)
    assert window_losses(whole, tokens, 2).equal(window_losses(spread, tokens, 2))
    texts = [continuations(x, bpe, ("The quick", "In 1984"), 6) for x in (whole, spread)]
    assert texts[0] == texts[1]
    assert all(texts[0])


def test_damaged_weights_on_disk_are_another_model(written: Written, make_tokens: Any) -> None:
    """The comparison above can fail: the layers on disk are what the folder holds now."""
    folder = written("llama")
    _, spread = _pair(folder, torch.float32)
    tokens = make_tokens(2, 12)
    with torch.inference_mode():
        sound = spread(tokens).logits
    name = "model.layers.2.mlp.up_proj.weight"
    path = folder / "model.safetensors"
    place = path.read_bytes().index(load_file(path)[name].numpy().tobytes())
    with path.open("r+b") as file:
        file.seek(place)
        file.write(bytes(16))
    with torch.inference_mode():
        is_same = torch.equal(spread(tokens).logits, sound)
    assert not is_same


def test_where_the_layers_are(written: Written) -> None:
    folder = written("llama")
    whole, spread = _pair(folder, torch.float32)
    assert whereabouts(whole) == "layers: 3 on cpu"
    kept = 3 - _on_disk(spread)
    assert whereabouts(spread) == f"layers: {kept} on cpu, {3 - kept} on disk"
    spread.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1, "model.layers.2": 1}
    assert whereabouts(spread) == "layers: 1 on GPU 0, 2 on GPU 1"


def test_by_default_what_fits_is_in_memory(written: Written) -> None:
    spread, _ = load_spread(str(written("llama")), torch.float32)
    assert Counter(x.device.type for x in spread.parameters()).keys() == {"cpu"}


def test_weights_that_are_no_safetensors_cannot_stay_on_disk(written: Written) -> None:
    folder = written("llama")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    load_spread(str(folder), torch.float32)
    with pytest.raises(ValueError, match=f"^model: {folder}: too large for GPUs and CPU memory;"):
        _pair(folder, torch.float32)


def test_a_first_device_without_room_for_the_embedding(written: Written) -> None:
    folder = written("llama")
    with pytest.raises(ValueError, match=f"^model: {folder}: no room for its embedding"):
        load_spread(str(folder), torch.float32, room={"cpu": 10_000})


def test_refusals_are_those_of_load(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^model: {tmp_path} is a folder without config.json$"):
        load_spread(str(tmp_path), torch.float32)
