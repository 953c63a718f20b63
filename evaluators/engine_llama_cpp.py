"""llama.cpp as an engine."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

from evaluators.engine import (
    Load,
    Seconds,
    check_room,
    free_bytes,
    installed_version,
    random_prompts,
)


class LlamaCppEngine:
    """llama.cpp (the package xllamacpp): a server in this process, made anew for every case."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._server: Any = None
        self._case: tuple[int, int] | None = None
        self._serve(1, 64)

    @cached_property
    def _file(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return _gguf(self._load["model"])

    def facts(self) -> dict[str, Any]:
        """Return version, file type, threads, context, and what it was built with."""
        import xllamacpp

        instructions = [
            x.split("=")[0].strip()
            for x in xllamacpp.get_system_info().replace("CPU :", "").split("|")
            if x.strip().endswith("= 1")
        ]
        return {
            "version": f"xllamacpp {installed_version('xllamacpp')}",
            "dtype": _file_type(self._file[0]),
            "threads": self._load["threads"],
            "mode": f"built with {', '.join(instructions)}",
            "context": int(self._file[1]["context_length"]),
        }

    def measure(self, batch: int, tokens: int, new_tokens: int, seed: int) -> Seconds:
        """Return `{prefill, decode}` in seconds; the server's start is not in them.

        Raises:
            SkipError: the KV cache does not fit into the memory that is free.
        """
        self._serve(batch, tokens + new_tokens + 1)
        vocabulary = int(self._file[0]["token_embd.weight"].shape[1])
        prompts = random_prompts(batch, tokens, vocabulary, seed)
        started = time.perf_counter()
        with ThreadPoolExecutor(batch) as pool:
            ends = list(pool.map(lambda ids: self._complete(ids, new_tokens), prompts))
        filled = max(first for first, _ in ends)
        last = max(end for _, end in ends)
        return {"prefill": filled - started, "decode": (last - filled) / new_tokens}

    def step_bytes(self, batch: int, context: int) -> dict[str, int]:
        """Return the bytes that one decode step has to read: packed weights and f16 KV cache."""
        unread = "token_embd.weight" if "output.weight" in self._file[0] else None
        weights = sum(int(x.n_bytes) for name, x in self._file[0].items() if name != unread)
        return {"bytes": weights + batch * context * self._cached_bytes()}

    def device_bytes(self) -> int | None:
        """Return None: the CPU build is what is timed."""
        return None

    def _complete(self, ids: list[int], new_tokens: int) -> tuple[float, float]:
        """Return when the first and the last token of one sequence came."""
        reply = self._server.handle_completions(
            {
                "prompt": ids,
                "n_predict": new_tokens + 1,
                "ignore_eos": True,
                "cache_prompt": False,
                "temperature": 0.0,
            }
        )
        end = time.perf_counter()
        timings = reply.get("timings")
        if timings is None:
            raise RuntimeError(f"llama.cpp: {json.dumps(reply)[:200]}")
        counts = timings["prompt_n"], timings["predicted_n"]
        if counts != (len(ids), new_tokens + 1):
            raise RuntimeError(f"llama.cpp: {counts} tokens, asked {len(ids)}, {new_tokens + 1}")
        return end - timings["predicted_ms"] / 1000, end

    def _serve(self, batch: int, tokens: int) -> None:
        """Have a server with room for `batch` sequences of `tokens`: the last one, or another.

        Raises:
            SkipError: its KV cache does not fit into the memory that is free.
        """
        import xllamacpp

        if self._case == (batch, tokens):
            return
        self._server = self._case = None  # the memory of the last case comes free first
        check_room(batch * tokens * self._cached_bytes(), free_bytes("cpu"))
        wanted = xllamacpp.CommonParams()
        wanted.model.path = self._load["model"]
        wanted.n_parallel, wanted.n_ctx = batch, batch * tokens
        wanted.cache_ram_mib = 0
        wanted.n_gpu_layers = 0
        wanted.fit_params = False
        wanted.verbosity = 0
        for threads in (wanted.cpuparams, wanted.cpuparams_batch):
            threads.n_threads = self._load["threads"]
            threads.poll = 0  # the other model's process must not find this one spinning
        self._server = xllamacpp.Server(wanted)
        self._case = batch, tokens

    def _cached_bytes(self) -> int:
        """Return the bytes of one token of one sequence in the KV cache (f16)."""
        heads = self._file[1]["attention.head_count"]
        groups = self._file[1].get("attention.head_count_kv", heads)
        layers = int(self._file[1]["block_count"])
        total = sum(groups) if isinstance(groups, list) else layers * int(groups)
        first = heads[0] if isinstance(heads, list) else heads
        head_dim = self._file[1].get(
            "attention.key_length", int(self._file[1]["embedding_length"]) // int(first)
        )
        return 2 * 2 * total * int(head_dim)


def _gguf(file: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the tensors of a GGUF file by name, and its architecture's fields without prefix."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    architecture = str(reader.fields["general.architecture"].contents())
    prefix = f"{architecture}."
    fields = {
        name.removeprefix(prefix): field.contents()
        for name, field in reader.fields.items()
        if name.startswith(prefix)
    }
    return {tensor.name: tensor for tensor in reader.tensors}, fields


def _file_type(tensors: dict[str, Any]) -> str:
    """Return the type that most of the weights have."""
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        name = tensor.tensor_type.name
        sizes[name] = sizes.get(name, 0) + int(tensor.n_elements)
    return max(sizes, key=lambda name: sizes[name])
