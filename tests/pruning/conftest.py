"""Tiny random models of every family, their activations by hooks, and a word tokenizer."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.trainers import BpeTrainer
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    dynamic_module_utils,
)

from pruning.elastic import ElasticModel, Recipe
from pruning.families import family_of
from pruning.plan import Plan

VOCABULARY = 120


def _model(
    family: str,
    *,
    kv_heads: int = 4,
    tied: bool = False,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    **fields: Any,
) -> PreTrainedModel:
    """A random model, biases and norms too: 3 layers, hidden 64, 8 query heads of 8."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": kv_heads,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = AutoConfig.for_model(family, **(sizes | fields))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(values + ("norm" in name))
    return model.to(dtype).eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads only slow models of this size down."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., PreTrainedModel]:
    return _model


@pytest.fixture(scope="session")
def make_tokens() -> Callable[..., torch.Tensor]:
    def tokens(num: int, length: int, seed: int = 7) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, VOCABULARY, (num, length), generator=generator)

    return tokens


@pytest.fixture(scope="session")
def rank(make_tokens: Callable[..., torch.Tensor]) -> Callable[..., ElasticModel]:
    """Rank a model on 12 sequences of 16 tokens: more tokens than any projection has inputs."""

    def ranked(
        model: PreTrainedModel,
        reconstruction: str = "none",
        unit: Any = "kv_group",
        metric: str = "wanda_sp",
        ridge: float = 0.01,
    ) -> ElasticModel:
        family, architecture = family_of(model)
        recipe = Recipe(metric, reconstruction, ridge, unit)
        return ElasticModel.rank(model, family, architecture, make_tokens(12, 16), recipe)

    return ranked


@pytest.fixture(scope="session")
def plans() -> list[Plan]:
    """Plans 0 and 3 are the same, 0 and 1 share two layers, 2 shares one with both; 4 is dense."""
    rows = (
        [[2, 2, 32], [4, 2, 48], [1, 2, 8]],
        [[2, 2, 32], [4, 2, 48], [3, 2, 24]],
        [[2, 2, 32], [1, 2, 16], [3, 2, 24]],
        [[2, 2, 32], [4, 2, 48], [1, 2, 8]],
        [[4, 2, 48], [4, 2, 48], [4, 2, 48]],
    )
    return [Plan.from_json(x) for x in rows]


@dataclass
class Activations:
    """What one layer saw in a full forward pass, one row a token."""

    attention: list[torch.Tensor] = field(default_factory=list)
    mlp: list[torch.Tensor] = field(default_factory=list)
    after_attention: list[torch.Tensor] = field(default_factory=list)
    after_mlp: list[torch.Tensor] = field(default_factory=list)

    def rows(self, name: str) -> torch.Tensor:
        return torch.cat([x.flatten(0, 1) for x in getattr(self, name)])


def _watch(layer: nn.Module, seen: Activations) -> list[Any]:
    def before(module: str, into: list[torch.Tensor]) -> Any:
        return layer.get_submodule(module).register_forward_pre_hook(
            lambda _, args: into.append(args[0].detach().clone())
        )

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        tensor = output if isinstance(output, torch.Tensor) else output[0]
        seen.after_mlp.append(tensor.detach().clone())

    return [
        before("self_attn.o_proj", seen.attention),
        before("mlp.down_proj", seen.mlp),
        before("post_attention_layernorm", seen.after_attention),
        layer.register_forward_hook(after),
    ]


@pytest.fixture(scope="session")
def capture() -> Callable[[PreTrainedModel, torch.Tensor], list[Activations]]:
    """Run the stock forward pass with hooks; what each layer saw."""

    def captured(model: PreTrainedModel, tokens_BT: torch.Tensor) -> list[Activations]:
        layers = list(model.get_submodule("model.layers").children())
        result = [Activations() for _ in layers]
        pairs = zip(layers, result, strict=True)
        handles = [handle for layer, seen in pairs for handle in _watch(layer, seen)]
        with torch.no_grad():
            model(tokens_BT)
        for handle in handles:
            handle.remove()
        return result

    return captured


@pytest.fixture(scope="session")
def logits_of() -> Callable[..., torch.Tensor]:
    """The logits (B, T, V) of a plan on anything that runs plans."""

    def logits(prunable: Any, plan: Any, tokens_BT: torch.Tensor) -> torch.Tensor:
        ((_, hidden),) = prunable.hidden_states([plan], tokens_BT)
        return hidden @ prunable.family.head(prunable.model).T

    return logits


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    made = Tokenizer(WordLevel(words, unk_token="</s>"))
    made.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="</s>",
    )


TRAINING_TEXT = [
    "The quick brown fox jumps over the lazy dog, and the dog isn't amused; they'LL see.",
    "In 1984 there were 12345 foxes\n\n\tand x = 3.14159 of them were naïve (or so they said).",
    "the theory of the thing is that there are three thousand other things in there   ",
]


@pytest.fixture(scope="session")
def train_bpe() -> Callable[..., PreTrainedTokenizerFast]:
    """Byte-level BPE of 320 tokens whose words are split by the given steps before."""

    def trained(*steps: Any, **options: Any) -> PreTrainedTokenizerFast:
        made = Tokenizer(BPE(**options))
        made.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
        trainer = BpeTrainer(
            vocab_size=320,
            show_progress=False,
            special_tokens=["<pad>", "<s>", "</s>", "<|endoftext|>"],  # Qwen2 adds the last
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        made.train_from_iterator(TRAINING_TEXT * 2, trainer)
        return PreTrainedTokenizerFast(
            tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
        )

    return trained


@pytest.fixture(scope="session")
def bpe(train_bpe: Callable[..., PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    return train_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False))


class LlamaCpp:
    """Stock llama.cpp with one GGUF file loaded, on one thread.

    By default it caches keys and values in float16, and its fused attention rounds to that too:
    both are off, so that what is left is the file.
    """

    def __init__(self, path: Path) -> None:
        import xllamacpp

        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(path)
        parameters.n_ctx = 512
        parameters.n_parallel = 1
        parameters.verbosity = 0
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
        parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._server = xllamacpp.Server(parameters)

    def tokens(self, text: str) -> list[int]:
        """The ids of a text, special tokens read and added."""
        asked = {"content": text, "add_special": True, "parse_special": True}
        ids: list[int] = self._post("tokenize", asked)["tokens"]
        return ids

    def continued(self, ids: list[int], num: int) -> list[int]:
        """`num` greedy tokens, none of which ends the text."""
        asked = {"prompt": ids, "n_predict": num, "temperature": 0, "ignore_eos": True}
        answer = self._post("completion", asked | {"return_tokens": True, "cache_prompt": False})
        tokens: list[int] = answer["tokens"]
        return tokens

    def logprobs(self, ids: list[int], num: int, forced: int) -> dict[int, float]:
        """The `num` likeliest next tokens and their log-probabilities.

        They are told of whole characters only: `forced`, the token that is taken, must be one.
        """
        asked = {"prompt": ids, "n_predict": 1, "n_probs": num, "logit_bias": [[forced, 1000]]}
        (answer,) = self._post("completion", asked)["completion_probabilities"]
        return {x["id"]: x["logprob"] for x in answer["top_logprobs"]}

    def _post(self, path: str, asked: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"{self._server.listening_address}/{path}",
            json.dumps(asked).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)


@pytest.fixture(scope="session")
def llama_cpp() -> type[LlamaCpp]:
    return LlamaCpp


@pytest.fixture
def own_module_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Code of exported models is copied to a cache: this one, not the user's."""
    folder = tmp_path / "modules"
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder))
    return folder
