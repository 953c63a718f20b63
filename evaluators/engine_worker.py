"""One engine with one model, in a process of its own: one JSON line in, one JSON line out.

Started by `evaluators.engines` as a script, under whatever interpreter has the engine, so that
nothing of this project has to be installed there. The first line asks to load; each later one asks
for a measurement; the end of the input ends the process. An answer is `{"ok": ...}`, or
`{"missing": ...}` for an engine that is not installed, or `{"skip": ...}` for a combination that
does not fit. Any other failure is a traceback on stderr and the end of this process. Whatever the
engines print goes to stderr.

All engines time the same thing, on random prompts of equal length that are given as ids: the
prefill, from the start until the last sequence of the batch has its first token, and one decode
step, averaged over the `new_tokens` steps after it.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Engine -> the package that it needs, and the class.
ENGINES = {
    "transformers": ("transformers", "evaluators.engine_transformers:TransformersEngine"),
    "vllm": ("vllm", "evaluators.engine_vllm:VllmEngine"),
    "llama.cpp": ("xllamacpp", "evaluators.engine_llama_cpp:LlamaCppEngine"),
}


def main() -> None:
    """Answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # engines print where they like
    # This file's folder is first on the path of a script; the rooms lie beside it.
    sys.path[:] = [*sys.path[1:], str(Path(__file__).resolve().parents[1])]
    for answer in _answers():
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _answers() -> Iterator[dict[str, Any]]:
    from evaluators.engine import SkipError

    load = json.loads(sys.stdin.readline())
    package, path = ENGINES[load["engine"]]
    if importlib.util.find_spec(package) is None:
        yield {"missing": f"{package} is not installed"}
        return
    if load["prepare"] is not None:
        _named(load["prepare"])()
    kind = _named(path)
    started = time.perf_counter()
    try:
        engine: Any = kind(load)
    except SkipError as reason:
        yield {"skip": str(reason)}
        return
    seconds = time.perf_counter() - started
    yield {"ok": {**engine.facts(), "load_seconds": seconds}}
    for line in sys.stdin:
        yield _answer(engine, json.loads(line))


def _named(path: str) -> Any:
    """Return what `module:name` names."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _answer(engine: Any, request: dict[str, Any]) -> dict[str, Any]:
    from evaluators.engine import SkipError

    what = request.pop("do")
    try:
        return {"ok": getattr(engine, what)(**request)}
    except SkipError as reason:
        return {"skip": str(reason)}
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        return {"skip": "out of memory"}


def _is_out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(
        words in text for words in ("out of memory", "can't allocate memory")
    )


if __name__ == "__main__":
    main()
