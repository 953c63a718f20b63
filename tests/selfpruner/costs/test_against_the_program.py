"""What the estimate says the program holds and does, against the program itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from transformers import AutoConfig, AutoModelForCausalLM

from evaluators.memory import weight_bytes
from pruning import elastic, loading, refit
from pruning.curvature import stream_curvature
from pruning.elastic import ElasticModel
from pruning.elastic_layer import ElasticLayer, Recipe
from pruning.families import family_of
from pruning.reconstruction import ridge
from pruning.spool import Spool
from pruning.statistics import stream_statistics
from selfpruner.config import CONFIGS, RunConfig, load_config
from selfpruner.costs import judging, memory, surgery
from selfpruner.costs.memory import MemoryModel
from selfpruner.costs.work import Running


def _model() -> nn.Module:
    config = AutoConfig.for_model(
        "llama",
        vocab_size=96,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
    )
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(
        config,
        dtype=torch.float32,
        attn_implementation="eager",  # whose attention is counted
    )
    return model.eval()


def _config(*settings: str) -> RunConfig:
    return load_config(CONFIGS / "demo.yaml", settings=("dtype=float32", *settings))


def _bytes(tensors: list[Tensor]) -> int:
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


def _corrections(layers: list[ElasticLayer]) -> list[Tensor]:
    parts = [x for layer in layers for x in (layer._attention, layer._mlp)]
    return [x for part in parts for x in part._kept.values()]


@pytest.mark.parametrize("reconstruction", ["none", "bias", "least_squares"])
def test_what_the_elastic_model_holds(reconstruction: str) -> None:
    model = _model()
    family, architecture = family_of(model)
    recipe = Recipe("wifv", reconstruction, 0.1)
    elastic = ElasticModel.rank(
        model, family, architecture, torch.randint(0, 96, (16, 32)), recipe, batch_size=8
    )
    dense = Running(architecture, "float32")
    config = _config(f"pruning.reconstruction={reconstruction}")
    said = MemoryModel(config, dense, replace(dense, kept=0.7), 1).score()
    assert said.weights == weight_bytes(model)
    copies = [x for layer in elastic.layers for k, x in layer._inputs.items() if "norm" not in k]
    assert said.copies == _bytes(copies)
    # The program also keeps a few vectors: means, errors of every cut.
    assert said.corrections == pytest.approx(_bytes(_corrections(elastic.layers)), rel=0.05)


@pytest.mark.parametrize("reconstruction", ["none", "bias", "least_squares"])
def test_what_a_streamed_run_keeps_on_disk(reconstruction: str, tmp_path: Path) -> None:
    model = _model()
    family, architecture = family_of(model)
    recipe, spool = Recipe("wifv", reconstruction, 0.1), Spool(tmp_path)
    tokens = torch.randint(0, 96, (16, 32))
    ElasticModel.rank(model, family, architecture, tokens, recipe, spool=spool)
    settings = ("memory=streamed", "data.choices=0", "evaluation.tasks=[]", "search.allocator=cma")
    config = _config(f"pruning.reconstruction={reconstruction}", *settings)
    dense = Running(architecture, "float32")
    said = MemoryModel(config, dense, replace(dense, kept=0.7), 3)
    written = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert said.cuts == pytest.approx(written, rel=0.05)
    assert said.finished == 6 * replace(dense, kept=0.7).weight_bytes


def test_a_forward_pass_has_the_operations_that_are_counted() -> None:
    model = _model()
    _, architecture = family_of(model)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(0, 96, (4, 32)), use_cache=False)
    said = Running(architecture, "float32").passes(128, 32, 4, head=128).flops
    assert said == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_gram_matrices_have_the_operations_that_are_counted() -> None:
    model = _model()
    family, architecture = family_of(model)
    tokens = torch.randint(0, 96, (4, 32))
    with FlopCounterMode(display=False) as counter:
        list(stream_statistics(model, family, tokens, 4))
    blocks = Running(architecture, "float32").passes(128, 32, 4).flops
    grams = surgery.gram(surgery.Shapes.of(architecture), 128).flops
    assert blocks + grams == pytest.approx(counter.get_total_flops(), rel=0.02)


class _Operations(TorchDispatchMode):
    """Counts operations as `FlopCounterMode` does, which cannot follow `autograd.grad`."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.total += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=found)
        return found


def test_curvature_has_the_operations_and_the_bytes_that_are_counted(tmp_path: Path) -> None:
    model = _model()
    family, architecture = family_of(model)
    tokens = torch.randint(0, 96, (4, 32))
    with _Operations() as counter:
        found = stream_curvature(model, family, tokens, batch_size=4, spool=Spool(tmp_path))
    dense, shapes = Running(architecture, "float32"), surgery.Shapes.of(architecture)
    passes = dense.passes(3 * 128, 32, 4, head=2 * 128).flops
    fisher, _ = surgery.curvature(shapes, 128)
    # Of attention's products of queries with keys and with values the way back makes twice as many.
    assert passes + fisher.flops == pytest.approx(counter.total, rel=0.05)
    settings = ("memory=streamed", "data.choices=0", "evaluation.tasks=[]", "search.allocator=cma")
    config = _config("pruning.fisher_tokens=128", "data.length=32", *settings)
    said = MemoryModel(config, dense, replace(dense, kept=0.7), 1)
    written = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert said.fisher == pytest.approx(written, rel=0.05)
    in_memory = _config("pruning.fisher_tokens=128", "data.length=32")
    roots = MemoryModel(in_memory, dense, replace(dense, kept=0.7), 1).curvature().statistics
    assert roots == _bytes([x for layer in found for x in (layer.attention, layer.mlp)])


def test_constants_are_the_program_s_own() -> None:
    assert elastic.CACHE_BYTES == memory.CACHE_BYTES
    assert loading.SPREAD_SHARE == judging.SPREAD_SHARE
    assert len(refit.RIDGES) == surgery.REFIT_RIDGES
    assert len(ridge.RIDGES) == surgery.RANK_RIDGES
