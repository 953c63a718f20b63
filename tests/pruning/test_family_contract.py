"""What every family must satisfy, whatever the unit, the heads, the tying and the correction.

Each family is a subclass of `FamilyContract` of a few lines.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from pruning.elastic import ElasticModel
from pruning.export import export, is_stock
from pruning.families import family_of
from pruning.plan import Plan
from pruning.slicing import layer_plan, sliced

CORRECTIONS = ("none", "bias", "least_squares")


@dataclass(frozen=True)
class Case:
    """A kind of attention, an attention unit, and a plan that differs in every layer."""

    unit: str
    kv_heads: int
    tied: bool
    rows: tuple[tuple[int, int, int], ...]

    @property
    def plan(self) -> Plan:
        return Plan.from_json(self.rows)

    @property
    def uniform(self) -> Plan:
        """Four query heads and 32 channels in every layer: expressible in stock configurations."""
        groups, per_group = self.kv_heads, 8 // self.kv_heads
        kept = (4 // per_group, per_group) if self.unit == "kv_group" else (groups, 4 // groups)
        return Plan.from_json([[kept[0], max(kept[1], 1), 32]] * 3)


CASES = [
    pytest.param(Case("kv_group", 4, False, ((2, 2, 32), (4, 2, 48), (1, 2, 8))), id="group-gqa"),
    pytest.param(Case("kv_group", 8, True, ((5, 1, 32), (8, 1, 48), (1, 1, 8))), id="group-mha"),
    pytest.param(Case("query_head", 2, True, ((2, 3, 32), (2, 4, 48), (2, 1, 8))), id="head-gqa"),
    pytest.param(Case("query_head", 8, False, ((8, 1, 32), (8, 1, 48), (8, 1, 8))), id="head-mha"),
]


def _columns(heads: Tensor, head_dim: int) -> list[int]:
    return [head * head_dim + i for head in heads.flatten().tolist() for i in range(head_dim)]


def _mask(dense: nn.Linear, columns: list[int], cut: nn.Linear, is_corrected: bool) -> None:
    """Zero every column of `dense` but the kept ones; corrected weights and bias from `cut`."""
    weight = torch.zeros_like(dense.weight)
    weight[:, columns] = cut.weight if is_corrected else dense.weight[:, columns]
    dense.weight = nn.Parameter(weight)
    if is_corrected:
        dense.bias = nn.Parameter(cut.bias.clone())


def _masked(elastic: ElasticModel, small: PreTrainedModel, plan: Plan, is_corrected: bool) -> Any:
    """The dense model with removed heads and channels silenced: nothing gets smaller."""
    model = copy.deepcopy(elastic.model)
    head_dim = model.config.head_dim
    layers = zip(
        model.model.layers, small.model.layers, elastic.orders(plan), plan.layers, strict=True
    )
    for layer, cut, order, kept in layers:
        heads = order.heads[: kept.kv_groups, : kept.q_per_group]
        attention, mlp = layer.self_attn, layer.mlp
        columns = _columns(heads, head_dim)
        _mask(attention.o_proj, columns, cut.self_attn.o_proj, is_corrected)
        channels = order.channels[: kept.mlp_channels].tolist()
        _mask(mlp.down_proj, channels, cut.mlp.down_proj, is_corrected)
    return model


def _by_step(model: PreTrainedModel, tokens_BT: Tensor) -> Tensor:
    """Logits of one token after the other through the KV cache."""
    cache, rows = None, []
    for token in tokens_BT.split(1, dim=1):
        output = model(token, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        rows.append(output.logits)
    return torch.cat(rows, dim=1)


def _continued(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Five greedy tokens (B, 5) and the logits they came from (B, 5, V)."""
    output = model.generate(
        ids,
        attention_mask=mask,
        min_new_tokens=5,
        max_new_tokens=5,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return output.sequences[:, ids.shape[1] :], torch.stack(output.logits, dim=1)


def _is_close(a: Tensor, b: Tensor, share: float) -> bool:
    return bool((a - b).abs().max() <= share * b.abs().max())


class FamilyContract:
    """The contract; `fields` go into the configuration of the tiny model."""

    family: str
    fields: dict[str, Any] = {}  # noqa: RUF012
    holds_biases = False
    any_heads = True

    @pytest.fixture(params=CASES)
    def case(self, request: pytest.FixtureRequest) -> Case:
        return request.param

    @pytest.fixture
    def dense(self, make_model: Any, case: Case) -> Callable[..., PreTrainedModel]:
        def made(dtype: torch.dtype = torch.float64) -> PreTrainedModel:
            options = {"kv_heads": case.kv_heads, "tied": case.tied, "dtype": dtype}
            return make_model(self.family, **(options | self.fields))

        return made

    @pytest.mark.parametrize("reconstruction", CORRECTIONS)
    def test_dense_plan_is_the_dense_model(
        self,
        dense: Any,
        case: Case,
        reconstruction: str,
        rank: Any,
        logits_of: Any,
        make_tokens: Any,
    ) -> None:
        model, tokens = dense(), make_tokens(3, 20)
        elastic = rank(model, reconstruction, case.unit)
        plan = Plan.dense(family_of(model)[1])
        assert torch.allclose(
            logits_of(elastic, plan, tokens), model(tokens).logits, rtol=0, atol=1e-9
        )

    @pytest.mark.parametrize("reconstruction", CORRECTIONS)
    def test_masked_is_sliced(
        self, dense: Any, case: Case, reconstruction: str, rank: Any, make_tokens: Any
    ) -> None:
        tokens = make_tokens(3, 20)
        elastic = rank(dense(), reconstruction, case.unit)
        small = sliced(elastic, case.plan)
        masked = _masked(elastic, small, case.plan, reconstruction != "none")
        assert layer_plan(small) == case.plan
        logits = small(tokens).logits
        assert torch.allclose(logits, masked(tokens).logits, rtol=0, atol=1e-9)
        assert not _is_close(logits, elastic.model(tokens).logits, 1e-3)

    @pytest.mark.parametrize("reconstruction", CORRECTIONS)
    def test_elastic_is_sliced(
        self,
        dense: Any,
        case: Case,
        reconstruction: str,
        rank: Any,
        logits_of: Any,
        make_tokens: Any,
    ) -> None:
        tokens = make_tokens(3, 20)
        elastic = rank(dense(torch.float32), reconstruction, case.unit)
        for plan in (case.plan, case.uniform):
            small = sliced(elastic, plan)
            assert small.dtype == torch.float32
            logits = logits_of(elastic, plan, tokens)
            assert _is_close(logits, small(tokens).logits, 1e-5)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    @pytest.mark.parametrize("reconstruction", ["none", "least_squares"])
    @pytest.mark.usefixtures("own_module_cache")
    def test_sliced_is_exported(
        self,
        dense: Any,
        case: Case,
        reconstruction: str,
        dtype: torch.dtype,
        rank: Any,
        make_tokens: Any,
        tokenizer: Any,
        tmp_path: Path,
    ) -> None:
        tokens, folder = make_tokens(3, 20), tmp_path / "out"
        elastic = rank(dense(torch.float32), reconstruction, case.unit)
        for plan in (case.plan, case.uniform):
            exported = export(sliced(elastic, plan), tokenizer, folder, dtype)
            trust = not is_stock(exported)
            loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust).eval()
            assert loaded.dtype == exported.dtype == dtype
            is_same = torch.equal(loaded(tokens).logits, exported(tokens).logits)
            assert is_same
            assert layer_plan(loaded) == plan

    def test_cache_gives_the_full_forward(
        self, dense: Any, case: Case, rank: Any, make_tokens: Any
    ) -> None:
        small = sliced(rank(dense(), "least_squares", case.unit), case.plan)
        tokens = make_tokens(3, 12)
        with torch.no_grad():
            assert _is_close(_by_step(small, tokens), small(tokens).logits, 1e-6)

    def test_left_padding_does_not_matter(
        self, dense: Any, case: Case, rank: Any, make_tokens: Any
    ) -> None:
        small = sliced(rank(dense(), "least_squares", case.unit), case.plan)
        lengths, tokens = (9, 4, 1), make_tokens(3, 9)
        mask = torch.tensor([[0] * (9 - n) + [1] * n for n in lengths])
        ids, logits = _continued(small, tokens * mask, mask)
        for row, length in enumerate(lengths):
            alone = tokens[row : row + 1, 9 - length :]
            expected, alone_logits = _continued(small, alone, torch.ones_like(alone))
            assert torch.equal(ids[row], expected[0])
            assert _is_close(logits[row], alone_logits[0], 1e-5)

    @pytest.mark.parametrize("reconstruction", CORRECTIONS)
    def test_uniform_plans_are_stock_where_they_can(
        self, dense: Any, case: Case, reconstruction: str, rank: Any
    ) -> None:
        elastic = rank(dense(), reconstruction, case.unit)
        first = case.uniform.layers[0]
        fits = self.any_heads or first.kv_groups * first.q_per_group == 8
        can = fits and (reconstruction == "none" or self.holds_biases)
        dense_name = type(elastic.model).__name__
        assert type(sliced(elastic, case.uniform)).__name__ == (
            dense_name if can else f"Pruned{dense_name}"
        )
        assert type(sliced(elastic, case.plan)).__name__ == f"Pruned{dense_name}"

    @pytest.mark.parametrize("reconstruction", CORRECTIONS)
    def test_parameters_are_counted(
        self, dense: Any, case: Case, reconstruction: str, rank: Any
    ) -> None:
        model = dense()
        small = sliced(rank(model, reconstruction, case.unit), case.plan)
        count = sum(parameter.numel() for parameter in small.parameters())
        architecture = family_of(model)[1]
        assert count == architecture.total_parameters(case.plan, reconstruction != "none")
        assert (small.lm_head.weight is small.model.embed_tokens.weight) == case.tied

    def test_inputs_of_kept_units_survive(self, dense: Any, case: Case, rank: Any) -> None:
        """Rows of q, k, v, gate, up, their biases, and every norm: unchanged, in rank order."""
        elastic = rank(dense(), "least_squares", case.unit)
        small = dict(sliced(elastic, case.plan).named_parameters())
        head_dim = elastic.model.config.head_dim
        for name, full in elastic.model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                continue
            rows = slice(None)
            if name.startswith("model.layers.") and "proj" in name:
                index = int(name.split(".")[2])
                order, kept = elastic.orders(case.plan)[index], case.plan.layers[index]
                heads = order.heads[: kept.kv_groups, : kept.q_per_group]
                rows = order.channels[: kept.mlp_channels].tolist()
                if "self_attn" in name:
                    chosen = heads if "q_proj" in name else order.groups[: kept.kv_groups]
                    rows = _columns(chosen, head_dim)
            assert torch.equal(small[name], full[rows]), name


class TestLlama(FamilyContract):
    family = "llama"
    holds_biases = True


class TestLlamaWithBiases(FamilyContract):
    family = "llama"
    fields = {"attention_bias": True, "mlp_bias": True}  # noqa: RUF012
    holds_biases = True


class TestMistral(FamilyContract):
    family = "mistral"


class TestQwen2(FamilyContract):
    family = "qwen2"
    any_heads = False  # stock engines derive their width from the hidden size, 64 here

    def test_a_uniform_cut_of_mlps_alone_is_stock(self, dense: Any, case: Case, rank: Any) -> None:
        elastic = rank(dense(), "none", case.unit)
        small = sliced(elastic, Plan.from_json([[case.kv_heads, 8 // case.kv_heads, 32]] * 3))
        assert type(small).__name__ == "Qwen2ForCausalLM"


class TestQwen3(FamilyContract):
    """Heads wider than hidden / heads, and norms on queries and keys."""

    family = "qwen3"
    fields = {"head_dim": 16}  # noqa: RUF012
