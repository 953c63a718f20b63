"""Vocabularies: llama.cpp reads a text as the tokenizer in the folder does, or it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader, TokenType
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pruning import vocabulary
from pruning.export import export
from pruning.gguf import write_gguf
from pruning.vocabulary import Vocabulary

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "In 1984 there were 12345 foxes, 3.14159 of them naïve; they'LL see, don't they?",
    "  two spaces,\n\n\ta tab,   and trailing   ",
    "日本語 и русский, 🙂🙃 and é ü — “quotes” … ½ ²",
    "HTTPServer camelCase iPhone ÉCOLE x=y+z //path/to\r\nfile",
    "a</s>b<s> c <unused> d",
    "",
]
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
BYTE_LEVEL_WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)


def _split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


KINDS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "gpt-2": ((BYTE_LEVEL_WORDS,), {}),
    "smollm": ((pre_tokenizers.Digits(individual_digits=True), BYTE_LEVEL_WORDS), {}),
    "qwen2": ((_split(vocabulary._QWEN2), BYTE_LEVEL), {}),
    "llama-bpe": ((_split(vocabulary._LLAMA3), BYTE_LEVEL), {"ignore_merges": True}),
    "tekken": ((_split(vocabulary._TEKKEN), BYTE_LEVEL), {"ignore_merges": True}),
}


@pytest.fixture
def saved(make_model: Any, tmp_path: Path) -> Any:
    """Save a model with a tokenizer and return the folder."""

    def made(tokenizer: Any, extra: int = 0) -> Path:
        model = make_model("llama", dtype=torch.float32, vocab_size=len(tokenizer) + extra)
        export(model, tokenizer, tmp_path / "model", torch.float32)
        return tmp_path / "model"

    return made


def _file(folder: Path) -> Path:
    path = folder.with_suffix(".gguf")
    write_gguf(folder, path)
    return path


@pytest.mark.parametrize("name", KINDS)
def test_llama_cpp_reads_byte_level_bpe_alike(
    name: str, train_bpe: Any, saved: Any, llama_cpp: Any
) -> None:
    steps, options = KINDS[name]
    tokenizer = train_bpe(*steps, **options)
    tokenizer.add_tokens(["<unused>"])
    folder = saved(tokenizer)
    path = _file(folder)
    assert GGUFReader(path).fields["tokenizer.ggml.pre"].contents() == name
    engine, loaded = llama_cpp(path), AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert engine.tokens(text) == loaded(text).input_ids


def test_the_texts_tell_the_kinds_apart(train_bpe: Any) -> None:
    made = {name: train_bpe(*steps, **options) for name, (steps, options) in KINDS.items()}
    words = {
        name: json.dumps(
            [tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(x) for x in TEXTS]
        )
        for name, tokenizer in made.items()
    }
    assert len(set(words.values())) == len(KINDS)


def _sentencepiece(trained: Tokenizer, normalizer: Any, pre_tokenizer: Any) -> Any:
    """The merges of `trained` in a vocabulary as Llama 2 has it: bytes, pieces, characters."""
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(x) for x in model["merges"]]
    pieces = list(dict.fromkeys(left + right for left, right in merges))
    characters = [x for x in model["vocab"] if len(x) == 1]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces, *characters]
    made = Tokenizer(
        BPE(
            {x: i for i, x in enumerate(names)},
            merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    made.normalizer = normalizer
    if pre_tokenizer is not None:
        made.pre_tokenizer = pre_tokenizer
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="module")
def pieces() -> Tokenizer:
    made = Tokenizer(BPE())
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.train_from_iterator(TEXTS[:5] * 2, BpeTrainer(vocab_size=150, show_progress=False))
    return made


LEGACY = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
SENTENCEPIECE = {
    "normalizer": (LEGACY, None),
    "metaspace": (None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
    "no prefix": (None, pre_tokenizers.Metaspace(prepend_scheme="never", split=False)),
}


@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_llama_cpp_reads_sentencepiece_alike(
    kind: str, pieces: Tokenizer, saved: Any, llama_cpp: Any
) -> None:
    folder = saved(_sentencepiece(pieces, *SENTENCEPIECE[kind]))
    engine, loaded = llama_cpp(_file(folder)), AutoTokenizer.from_pretrained(folder)
    texts = [x for x in TEXTS if x]
    if kind == "metaspace":  # the documented differences
        texts = [x for x in texts if "</s>" not in x and not x.startswith(" ")]
    for text in texts:
        assert engine.tokens(text) == loaded(text).input_ids


def test_kinds_of_tokens_and_padding(pieces: Tokenizer, saved: Any) -> None:
    tokenizer = _sentencepiece(pieces, *SENTENCEPIECE["normalizer"])
    tokenizer.add_tokens(["<mine>"])
    found = Vocabulary.of(saved(tokenizer, extra=2), len(tokenizer) + 2)
    assert found.tokens[:4] == ("<unk>", "<s>", "</s>", "<0x00>")
    assert found.tokens[-3:] == ("<mine>", f"[PAD{len(tokenizer)}]", f"[PAD{len(tokenizer) + 1}]")
    assert found.types[:4] == (
        TokenType.UNKNOWN,
        TokenType.CONTROL,
        TokenType.CONTROL,
        TokenType.BYTE,
    )
    assert found.types[-3:] == (TokenType.USER_DEFINED, TokenType.UNUSED, TokenType.UNUSED)
    assert found.types[300] == TokenType.NORMAL
    assert (found.add_bos, found.add_eos, found.space_prefix) == (True, False, True)
    assert found.special_ids["bos"] == 1
    assert found.special_ids["eos"] == 2


def test_the_chat_template_comes_along(bpe: Any, saved: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(bpe, "chat_template", "{{ messages[0]['content'] }}", raising=False)
    fields = GGUFReader(_file(saved(bpe))).fields
    assert fields["tokenizer.chat_template"].contents() == "{{ messages[0]['content'] }}"
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 2
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False


def test_more_tokens_than_embeddings(bpe: Any, saved: Any) -> None:
    folder = saved(bpe)
    with pytest.raises(ValueError, match="tokenizer: token 319, but the model has 319 embeddings"):
        Vocabulary.of(folder, 319)


def _unigram() -> Any:
    made = Tokenizer(Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="<unk>")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: _unigram(), "tokenizer: model Unigram is not supported; BPE is"),
        (
            lambda train: train(_split(r"\d+"), BYTE_LEVEL),
            r"tokenizer: words are split by \d+ then ByteLevel; known are those of gpt-2",
        ),
        (
            lambda train: train(_split(vocabulary._LLAMA3), BYTE_LEVEL),  # but heeds merges
            "tokenizer: words are split by ",
        ),
        (
            lambda train: train(pre_tokenizers.ByteLevel(add_prefix_space=True)),
            'tokenizer: words are split by {"add_prefix_space": true',
        ),
    ],
    ids=["unigram", "unknown words", "merges", "prefix"],
)
def test_what_llama_cpp_would_read_otherwise_is_refused(
    make: Any, message: str, train_bpe: Any, saved: Any
) -> None:
    tokenizer = make(train_bpe)
    folder = saved(tokenizer)
    with pytest.raises(ValueError, match=r"^tokenizer: ") as caught:
        Vocabulary.of(folder, len(tokenizer))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_normalizer_is_refused(train_bpe: Any, saved: Any) -> None:
    tokenizer = train_bpe(BYTE_LEVEL_WORDS)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ValueError, match=r"normalizer Lowercase; llama\.cpp has none"):
        Vocabulary.of(saved(tokenizer), len(tokenizer))


def test_a_folder_without_a_tokenizer(bpe: Any, saved: Any) -> None:
    folder = saved(bpe)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"^tokenizer: "):
        Vocabulary.of(folder, 400)
