"""The pruned architectures made known to transformers and to vLLM, so that no remote code is run.

`register` is the entry point of the group `vllm.general_plugins`: where this project is installed
beside vLLM, `vllm serve FOLDER` needs no `--trust-remote-code`.
"""

from __future__ import annotations

from importlib.util import find_spec

# vLLM runs our layers through its Transformers backend; a name, so that nothing of it loads yet.
_VLLM_BACKEND = "vllm.model_executor.models.transformers:TransformersForCausalLM"


def register() -> None:
    """Register every pruned family with transformers' Auto classes and, where there is one, vLLM.

    vLLM calls this in each of its processes, more than once in some: every call does the same.
    """
    register_with_transformers()
    if find_spec("vllm") is not None:
        register_with_vllm()


def register_with_transformers() -> None:
    """Let `AutoConfig`, `AutoModel` and `AutoModelForCausalLM` load exported folders."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from pruning import modeling_pruned
    from pruning.families import FAMILIES

    for family in FAMILIES.values():
        config, trunk, causal = (
            getattr(modeling_pruned, f"Pruned{family.class_prefix}{suffix}")
            for suffix in ("Config", "Model", "ForCausalLM")
        )
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, trunk, exist_ok=True)
        AutoModelForCausalLM.register(config, causal, exist_ok=True)


def register_with_vllm() -> None:
    """Let vLLM serve exported folders through its Transformers backend."""
    from vllm import ModelRegistry

    from pruning.families import FAMILIES

    for family in FAMILIES.values():
        ModelRegistry.register_model(f"Pruned{family.class_prefix}ForCausalLM", _VLLM_BACKEND)
