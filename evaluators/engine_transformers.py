"""Stock transformers as an engine."""

from __future__ import annotations

from typing import Any

from evaluators.engine import (
    Load,
    Seconds,
    check_room,
    free_bytes,
    installed_version,
    random_prompts,
)


class TransformersEngine:
    """Stock transformers: eager, scaled-dot-product attention, a dynamic cache."""

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
            "version": f"{installed_version('transformers')}, torch {torch.__version__}",
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
        prompt = torch.tensor(random_prompts(batch, tokens, vocabulary, seed))
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
        check_room(batch * tokens * self._cached_bytes, free_bytes(self._device.type))
