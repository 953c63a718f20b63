"""The tokenizer of a model folder, as the keys of a GGUF file say it.

llama.cpp has tokenizers of its own, chosen by name: this file finds the name that splits text
as the folder's tokenizer does, or refuses. Two kinds are known: byte-level BPE (`gpt2`) and
SentencePiece-like BPE with bytes as a fallback (`llama`).

What differs all the same: llama.cpp does not normalise text to NFC, as Qwen2's tokenizer does. It
puts the leading space of a SentencePiece vocabulary at the start and after every special token,
as the normalizer of Llama 2 does; Metaspace with `prepend_scheme: first` puts one at the start
alone, and none before a space.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gguf import GGUFWriter, TokenType
    from transformers import PreTrainedTokenizerBase

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# (steps of the pre-tokenizer, whether a whole word in the vocabulary beats the merges) -> name.
_PRE_TOKENIZERS = {
    (("ByteLevel words",), False): "gpt-2",
    (("Digits", "ByteLevel words"), False): "smollm",
    ((_QWEN2, "ByteLevel"), False): "qwen2",
    ((_LLAMA3, "ByteLevel"), True): "llama-bpe",
    ((_TEKKEN, "ByteLevel"), True): "tekken",
}


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id with their kinds, what joins them, and what goes around a text.

    `special_ids` maps `bos`, `eos`, `unk`, `pad` to ids; `space_prefix` is about SentencePiece.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[TokenType, ...]
    merges: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    special_ids: Mapping[str, int] = field(default_factory=dict)
    add_bos: bool = False
    add_eos: bool = False
    space_prefix: bool | None = None
    chat_template: str | Sequence[Mapping[str, str]] | None = None

    @classmethod
    def of(cls, folder: Path, size: int) -> Vocabulary:
        """Return the vocabulary in `folder`, filled up to the `size` of the model's embedding.

        Raises:
            ValueError: there is none, or llama.cpp has no tokenizer that splits text like it.
        """
        tokenizer = _tokenizer(folder)
        parts: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
        model = parts["model"]
        if model["type"] != "BPE":
            raise ValueError(f"tokenizer: model {model['type']} is not supported; BPE is")
        tokens, types = _tokens(parts, size)
        shared: dict[str, Any] = {
            "tokens": tokens,
            "types": types,
            "special_ids": _special_ids(tokenizer),
            "chat_template": _chat_template(tokenizer),
        } | _around(tokenizer)
        if model["byte_fallback"]:
            return cls(
                model="llama",
                pre="default",
                scores=_scores(model, tokens),
                space_prefix=_space_prefix(parts),
                **shared,
            )
        merges = tuple(" ".join(pair) for pair in _pairs(model))
        return cls(model="gpt2", pre=_pre_tokenizer(parts), merges=merges, **shared)

    def add_to(self, writer: GGUFWriter) -> None:
        """Add the keys to a file."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.merges:
            writer.add_token_merges(self.merges)
        if self.scores:
            writer.add_token_scores(self.scores)
        for name, number in self.special_ids.items():
            getattr(writer, f"add_{name}_token_id")(number)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.space_prefix is not None:
            writer.add_add_space_prefix(self.space_prefix)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    from pruning.registration import register_with_transformers

    register_with_transformers()
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"tokenizer: {str(error).strip().splitlines()[0]}") from None
    if not tokenizer.is_fast:
        raise ValueError("tokenizer: no tokenizer.json, which a GGUF file is made from")
    return tokenizer


def _tokens(parts: Mapping[str, Any], size: int) -> tuple[tuple[str, ...], tuple[TokenType, ...]]:
    """Return texts and kinds by id; ids without a token are filled up as unused.

    Raises:
        ValueError: there are more tokens than the model has embeddings.
    """
    from gguf import TokenType

    model = parts["model"]
    texts = {number: text for text, number in model["vocab"].items()}
    kinds = dict.fromkeys(texts, TokenType.NORMAL)
    if model["byte_fallback"]:
        kinds |= {i: TokenType.BYTE for i, text in texts.items() if _is_byte(text)}
        kinds |= {i: TokenType.UNKNOWN for i, text in texts.items() if text == model["unk_token"]}
    for added in parts["added_tokens"]:
        texts[added["id"]] = added["content"]
        if kinds.get(added["id"]) != TokenType.UNKNOWN:
            special = added["special"]
            kinds[added["id"]] = TokenType.CONTROL if special else TokenType.USER_DEFINED
    if max(texts) >= size:
        raise ValueError(f"tokenizer: token {max(texts)}, but the model has {size} embeddings")
    return (
        tuple(texts.get(i, f"[PAD{i}]") for i in range(size)),
        tuple(kinds.get(i, TokenType.UNUSED) for i in range(size)),
    )


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the merges as pairs, in order of rank."""
    pairs = (x.split(" ") if isinstance(x, str) else x for x in model["merges"])
    return [(left, right) for left, right in pairs]


def _scores(model: Mapping[str, Any], tokens: Sequence[str]) -> tuple[float, ...]:
    """Return minus the rank of the first merge that makes each token, as SentencePiece has it.

    Tokens that no merge makes are never chosen by score.
    """
    ranks: dict[str, int] = {}
    for left, right in _pairs(model):
        ranks.setdefault(left + right, len(ranks))
    return tuple(-float(ranks.get(text, len(ranks))) for text in tokens)


def _space_prefix(parts: Mapping[str, Any]) -> bool:
    """Return whether a space goes before a text; spaces become U+2581.

    Raises:
        ValueError: the steps are not those of a SentencePiece vocabulary.
    """
    prefix = False
    steps = _flat(parts["normalizer"], "normalizers") + _flat(
        parts["pre_tokenizer"], "pretokenizers"
    )
    for step in steps:
        if step["type"] == "Prepend" and step["prepend"] == "▁":
            prefix = True
        elif step["type"] == "Metaspace" and step["replacement"] == "▁" and not step["split"]:
            prefix = prefix or step["prepend_scheme"] != "never"
        elif step["type"] != "Replace" or step["pattern"] != {"String": " "}:
            raise ValueError(f"tokenizer: step {step['type']}; llama.cpp's SentencePiece has none")
    return prefix


def _pre_tokenizer(parts: Mapping[str, Any]) -> str:
    """Return llama.cpp's name of the way words are split off before merges.

    Raises:
        ValueError: it has none.
    """
    foreign = [x for x in _flat(parts["normalizer"], "normalizers") if x["type"] != "NFC"]
    if foreign:
        raise ValueError(f"tokenizer: normalizer {foreign[0]['type']}; llama.cpp has none")
    steps = tuple(_words(x) for x in _flat(parts["pre_tokenizer"], "pretokenizers"))
    name = _PRE_TOKENIZERS.get((steps, bool(parts["model"].get("ignore_merges"))))
    if name is None:
        known = ", ".join(_PRE_TOKENIZERS.values())
        shown = " then ".join(steps) or "none"
        raise ValueError(f"tokenizer: words are split by {shown}; known are those of {known}")
    return name


def _words(step: Mapping[str, Any]) -> str:
    """Return one step of a pre-tokenizer in a word, a regular expression as it is."""
    kind = str(step["type"])
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return str(step["pattern"].get("Regex", step["pattern"]))
    if kind == "Digits" and step["individual_digits"]:
        return kind
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return "ByteLevel words" if step["use_regex"] else kind
    return json.dumps(step, sort_keys=True)


def _flat(step: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer as one list."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [x for part in step[inner] for x in _flat(part, inner)]
    return [step]


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    found = {x: getattr(tokenizer, f"{x}_token_id") for x in ("bos", "eos", "unk", "pad")}
    return {name: number for name, number in found.items() if number is not None}


def _around(tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
    """Return whether the tokenizer puts its first and last token around a text, by trying."""
    bare = tokenizer("a", add_special_tokens=False).input_ids
    full = tokenizer("a").input_ids
    return {
        "add_bos": full[:1] == [tokenizer.bos_token_id] != bare[:1],
        "add_eos": full[-1:] == [tokenizer.eos_token_id] != bare[-1:],
    }


def _chat_template(
    tokenizer: PreTrainedTokenizerBase,
) -> str | Sequence[Mapping[str, str]] | None:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        return [{"name": name, "template": text} for name, text in template.items()]
    return template or None
