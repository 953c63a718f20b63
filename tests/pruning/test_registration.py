"""Registration: exported folders load without remote code, in transformers and in vLLM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch

from pruning.export import export
from pruning.families import FAMILIES
from pruning.plan import Plan
from pruning.slicing import sliced

ROOT = Path(__file__).resolve().parents[2]
VLLM = ROOT / ".venv-vllm" / "bin" / "python"
UNEVEN = Plan.from_json([[2, 2, 32], [4, 2, 48], [1, 2, 8]])
LOADER = """
import json, sys
from pathlib import Path
import pruning.registration as registration
light = [x for x in ("torch", "transformers", "vllm") if x in sys.modules]

import torch
from transformers import AutoModel, AutoModelForCausalLM
torch.set_num_threads(1)
ids = torch.tensor([json.loads(sys.argv[2])])
folders = sorted(Path(sys.argv[1]).iterdir())
refused = []
for folder in folders:
    try:
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        refused.append("trust_remote_code" in str(error))
registration.register()
registration.register()
logits = {}
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(model).__module__ == "pruning.modeling_pruned", type(model)
    assert type(AutoModel.from_pretrained(folder)) is type(model.model)
    logits[folder.name] = model(ids).logits[0, -1].tolist()
print(json.dumps({"light": light, "refused": refused, "logits": logits}))
"""
# vLLM calls the plug-in by itself; calling it once more must change nothing.
IN_VLLM = """
import json, sys
from vllm import LLM, ModelRegistry, SamplingParams
from vllm.model_executor.models.transformers import TransformersForCausalLM

folder, names, prompts = sys.argv[1], *map(json.loads, sys.argv[2:])
options = {} if names else {"trust_remote_code": True}
engine = LLM(folder, dtype="float32", max_model_len=64, enforce_eager=True, **options)
if names:
    from pruning.registration import register

    register()
classes = [ModelRegistry.models[name].load_model_cls() for name in names]
asked = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], asked)
print()  # vLLM's progress may have left a line open
print(json.dumps({
    "backend": [x is TransformersForCausalLM for x in classes],
    "tokens": [list(output.outputs[0].token_ids) for output in outputs],
}))
"""


def _answer(python: Path | str, code: str, *arguments: str, **variables: str) -> Any:
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [python, "-c", code, *arguments],
        env=os.environ | offline | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = (x for x in done.stdout.splitlines() if x.startswith("{"))  # vLLM logs there too
    return json.loads(line)


def test_folders_load_without_remote_code(
    make_model: Any, rank: Any, tokenizer: Any, tmp_path: Path
) -> None:
    ids, expected = [5, 40, 17, 99, 23], {}
    for family in FAMILIES:
        elastic = rank(make_model(family, dtype=torch.float32), "least_squares")
        small = sliced(elastic, UNEVEN)
        export(small, tokenizer, tmp_path / "models" / family, torch.float32)
        with torch.no_grad():
            expected[family] = small(torch.tensor([ids])).logits[0, -1].tolist()
    answer = _answer(
        sys.executable,
        LOADER,
        str(tmp_path / "models"),
        json.dumps(ids),
        HF_MODULES_CACHE=str(tmp_path / "modules"),
    )
    assert answer == {"light": [], "refused": [True] * len(FAMILIES), "logits": expected}
    assert not (tmp_path / "modules" / "transformers_modules").exists()


def test_vllm_finds_the_plug_in() -> None:
    (found,) = (x for x in entry_points(group="vllm.general_plugins") if x.name == "selfpruner")
    assert found.value == "pruning.registration:register"


@pytest.mark.real
@pytest.mark.skipif(not VLLM.exists(), reason="make venv-vllm makes the environment")
@pytest.mark.parametrize("plug_in", [True, False])
def test_vllm_serves_a_pruned_model(
    plug_in: bool, make_model: Any, rank: Any, bpe: Any, make_tokens: Any, tmp_path: Path
) -> None:
    """By the plug-in, which needs no remote code, and by remote code without the plug-in."""
    fields = {"head_dim": 32, "vocab_size": len(bpe)}  # vLLM has no kernel for heads of 8
    elastic = rank(make_model("llama", dtype=torch.float32, **fields), "least_squares")
    small = export(sliced(elastic, UNEVEN), bpe, tmp_path / "model", torch.float32).eval()
    prompts = make_tokens(3, 20)
    made = small.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=16,
        do_sample=False,
        eos_token_id=None,
    )
    classes = [f"Pruned{family.class_prefix}ForCausalLM" for family in FAMILIES.values()]
    names = classes if plug_in else []
    answer = _answer(
        VLLM,
        IN_VLLM,
        str(tmp_path / "model"),
        json.dumps(names),
        json.dumps(prompts.tolist()),
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_NO_USAGE_STATS="1",
        HF_MODULES_CACHE=str(tmp_path / "modules"),
        **({} if plug_in else {"VLLM_PLUGINS": "none"}),
    )
    assert answer == {"backend": [True] * len(names), "tokens": made[:, 20:].tolist()}
