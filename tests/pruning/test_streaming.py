"""Streaming: a model read from disk layer by layer gives, bit by bit, what one in memory gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from pruning import spool as spooling
from pruning.architecture import FAMILIES
from pruning.curvature import stream_curvature
from pruning.elastic import ElasticModel
from pruning.elastic_layer import Recipe
from pruning.elastic_layerwise import LayerwiseElastic
from pruning.export import export, is_stock
from pruning.families import family_of
from pruning.loading import load, load_streamed
from pruning.plan import Grid, Plan
from pruning.shaping import shaped
from pruning.slicing import sliced, sliced_on_disk
from pruning.spool import Spool
from pruning.streaming import final_states, is_streamed


@pytest.fixture
def saved(make_model: Any, tokenizer: Any, tmp_path: Path) -> Any:
    """Save a random model in several shards; return its folder."""

    def save(family: str, dtype: torch.dtype = torch.float32, **fields: Any) -> str:
        model = make_model(family, dtype=dtype, **fields)
        model.save_pretrained(tmp_path / "model", max_shard_size="60KB")
        tokenizer.save_pretrained(tmp_path / "model")
        assert len(list((tmp_path / "model").glob("*.safetensors"))) > 3
        return str(tmp_path / "model")

    return save


def _both(folder: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    return load(folder, dtype)[0], load_streamed(folder, dtype)[0]


def _weights_in_memory(model: nn.Module) -> list[str]:
    return [name for name, x in model.named_parameters() if x.device.type != "meta"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_stock_forward_pass_is_the_same(
    saved: Any, make_tokens: Any, family: str, tied: bool
) -> None:
    """In bfloat16 from a float32 folder: cast on the way; the rotary frequencies are not."""
    held, streamed = _both(saved(family, tied=tied), torch.bfloat16)
    tokens = make_tokens(3, 20)
    assert is_streamed(streamed)
    assert not is_streamed(held)
    with torch.no_grad():
        assert torch.equal(held(tokens).logits, streamed(tokens).logits)
    assert (held.dtype, held.device) == (streamed.dtype, streamed.device)
    assert held.generation_config.to_dict() == streamed.generation_config.to_dict()
    assert not [x for x in _weights_in_memory(streamed) if "layers" in x]


@pytest.mark.parametrize("family", FAMILIES)
def test_final_states_are_those_of_the_trunk(saved: Any, make_tokens: Any, family: str) -> None:
    held, streamed = _both(saved(family))
    batches = make_tokens(7, 20).split(3)
    with torch.no_grad():
        expected = [held.model(x, use_cache=False).last_hidden_state for x in batches]
    for model in (held, streamed):
        found = final_states(model, family_of(model)[0], batches)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_one_layer_has_its_weights_at_a_time(saved: Any) -> None:
    _, model = _both(saved("llama"))
    family, _ = family_of(model)
    outer = _weights_in_memory(model)
    for index, layer in enumerate(family.layers(model)):
        mine = [f"model.layers.{index}.{name}" for name, _ in layer.named_parameters()]
        assert sorted(_weights_in_memory(model)) == sorted(outer + mine)
    assert _weights_in_memory(model) == outer


def test_two_walks_side_by_side_do_not_take_layers_from_each_other(saved: Any) -> None:
    held, model = _both(saved("llama"))
    family, _ = family_of(model)
    walks = zip(family.layers(held), family.layers(model), family.layers(model), strict=True)
    for expected, one, other in walks:
        assert one is other
        for name, parameter in one.named_parameters():
            assert torch.equal(parameter, expected.get_parameter(name))


@pytest.mark.parametrize("reconstruction", ["none", "bias", "least_squares"])
@pytest.mark.parametrize("unit", ["kv_group", "query_head"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_ranking_and_scores_are_those_of_the_model_in_memory(
    saved: Any,
    make_tokens: Any,
    tmp_path: Path,
    family: str,
    unit: Any,
    reconstruction: str,
    plans: Any,
) -> None:
    models = _both(saved(family, **({"attention_bias": True} if family == "llama" else {})))
    tokens, others = make_tokens(12, 16), make_tokens(7, 14, seed=3)
    recipe = Recipe("wifv", reconstruction, "auto", unit, attention_metric="obs")
    spools = (None, Spool(tmp_path / "spool"))
    curvature = [
        stream_curvature(model, family_of(model)[0], tokens, batch_size=5, spool=spool)
        for model, spool in zip(models, spools, strict=True)
    ]
    one, ranked = (
        ElasticModel.rank(
            model,
            *family_of(model),
            tokens,
            recipe,
            batch_size=3,
            curvature=measures,
            spool=spool,
        )
        for model, spool, measures in zip(models, spools, curvature, strict=True)
    )
    streamed = LayerwiseElastic(ranked, batch_size=3)
    grid = Grid.of(family_of(models[0])[1], 8, unit)
    for a, b, here, there in zip(one.layers, streamed.layers, *curvature, strict=True):
        assert a.cut_errors(grid) == b.cut_errors(grid)
        assert a.cut_errors(grid, here) == b.cut_errors(grid, there)
        assert (a.ridges, a.facts) == (b.ridges, b.facts)
        for name in ("groups", "heads", "channels"):
            assert torch.equal(getattr(a.order, name), getattr(b.order, name))
    if unit == "query_head":
        plans = [Plan.from_json([[4, x % 2 + 1, c] for x, _, c in p.to_json()]) for p in plans]
    found = dict(streamed.hidden_states(plans, others))
    assert sorted(found) == list(range(len(plans)))
    for start in range(0, len(others), 3):
        for index, hidden in one.hidden_states(plans, others[start : start + 3]):
            assert torch.equal(found[index][start : start + 3], hidden)
    assert not torch.equal(found[0], found[1])
    for a, b in zip(one.parameters(plans[1]), streamed.parameters(plans[1]), strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_generation_reads_each_layer_once(
    saved: Any, make_tokens: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plans: Any
) -> None:
    _, model = _both(saved("llama"))
    spool = Spool(tmp_path / "spool")
    recipe = Recipe("wifv", "least_squares", 0.1)
    ranked = ElasticModel.rank(model, *family_of(model), make_tokens(6, 16), recipe, spool=spool)
    read: list[tuple[str, str]] = []

    def note(path: Path, name: str, device: torch.device) -> torch.Tensor:
        read.append((path.name, name))
        return original(path, name, device)

    original = spooling._read
    monkeypatch.setattr(spooling, "_read", note)
    list(LayerwiseElastic(ranked, 2).hidden_states(plans, make_tokens(6, 14)))
    assert len(read) == len(set(read)) > 30
    assert [int(path[:5]) for path, _ in read] == sorted(int(path[:5]) for path, _ in read)


def test_the_spool_gives_back_what_it_took_as_it_lay(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    square = torch.randn(5, 5, dtype=torch.float64)
    tensors = {
        "rows": square,
        "columns": torch.randn(4, 5).T,
        "vector": torch.arange(3),
        "part": torch.randn(5, 4)[:, :2],
    }
    kept = [spool.of_layer(index)(tensors) for index in range(2)]
    for mapping in (*kept, kept[0]):
        assert list(mapping) == list(tensors)
        for name, x in tensors.items():
            assert torch.equal(mapping[name], x)
            assert mapping[name].dtype == x.dtype
        assert mapping["rows"].is_contiguous()
        assert not mapping["columns"].is_contiguous()
        assert mapping["columns"].T.is_contiguous()
    assert "others" not in kept[0]
    with pytest.raises(KeyError):
        kept[0]["others"]


def _refusal(call: Any) -> str:
    with pytest.raises(ValueError, match="model: ") as refusal:
        call()
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_what_cannot_be_streamed_is_refused(saved: Any, tmp_path: Path) -> None:
    packed = tmp_path / "some.gguf"
    packed.touch()
    assert "GGUF" in _refusal(lambda: load_streamed(str(packed), torch.float32))
    folder = Path(saved("llama"))
    shard = max(folder.glob("*.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:20])
    assert shard.name in _refusal(lambda: load_streamed(str(folder), torch.float32))
    shard.unlink()
    assert shard.name in _refusal(lambda: load_streamed(str(folder), torch.float32))
    (folder / "model.safetensors.index.json").unlink()
    assert "allowed: safetensors" in _refusal(lambda: load_streamed(str(folder), torch.float32))


def test_missing_weights_are_named(saved: Any) -> None:
    folder = Path(saved("llama"))
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    del data["weight_map"]["model.layers.1.mlp.up_proj.weight"]
    index.write_text(json.dumps(data))
    text = _refusal(lambda: load_streamed(str(folder), torch.float32))
    assert "1 weights are missing, the first model.layers.1.mlp.up_proj.weight" in text


@pytest.mark.usefixtures("own_module_cache")
@pytest.mark.parametrize("reconstruction", ["none", "least_squares"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_slices_and_exports_are_those_of_the_model_in_memory(
    saved: Any,
    make_tokens: Any,
    tokenizer: Any,
    tmp_path: Path,
    family: str,
    tied: bool,
    reconstruction: str,
    plans: Any,
) -> None:
    models = _both(saved(family, tied=tied))
    recipe = Recipe("wanda_sp", reconstruction, 0.1)
    spools = (None, Spool(tmp_path / "spool"))
    held, streamed = (
        ElasticModel.rank(model, *family_of(model), make_tokens(6, 16), recipe, spool=spool)
        for model, spool in zip(models, spools, strict=True)
    )
    tokens = make_tokens(2, 12)
    for number, plan in enumerate((plans[0], Plan.from_json([[2, 2, 24]] * 3))):
        one = sliced(held, plan)
        other = sliced_on_disk(streamed, plan, tmp_path / f"sliced-{number}")
        with torch.no_grad():
            assert torch.equal(one(tokens).logits, other(tokens).logits)
        folders = [tmp_path / f"{name}-{number}" for name in ("held", "streamed")]
        for model, folder in zip((one, other), folders, strict=True):
            export(model, tokenizer, folder, torch.bfloat16)
        assert _tensors(folders[0]) == _tensors(folders[1])
        for name in ("config.json", "generation_config.json", "tokenizer.json"):
            assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
        assert is_stock(one) == is_stock(other)
        first, second = (
            AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
            for folder in folders
        )
        with torch.no_grad():
            expected = first(tokens).logits
            assert torch.equal(expected, second(tokens).logits)
            assert torch.equal(expected, other(tokens).logits), "converted in place, too"


def test_a_stand_in_for_the_stopwatch_has_one_layer_for_all(
    saved: Any, make_tokens: Any, plans: Any
) -> None:
    held, streamed = _both(saved("qwen3"))
    tokens = make_tokens(2, 9)
    one, other = (shaped(model, plans[1]) for model in (held, streamed))
    assert [x.shape for x in one.parameters()] == [x.shape for x in other.parameters()]
    with torch.no_grad():
        assert other(tokens).logits.shape == one(tokens).logits.shape
    weights = [layer.mlp.up_proj.weight for layer in other.model.layers]
    assert len({x.data_ptr() for x in weights}) == 1
    assert not [x for x in _weights_in_memory(streamed) if "layers" in x]


def _tensors(folder: Path) -> dict[str, Any]:
    """The tensors of a folder by name, as something that compares bit by bit."""
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    assert {x.dtype for x in found.values()} == {torch.bfloat16}
    return {name: (x.shape, x.view(torch.int16).tolist()) for name, x in found.items()}
