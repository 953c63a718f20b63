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
IN_VLLM = """
import json
from pruning.registration import register
register()
register()
from vllm import ModelRegistry
from vllm.model_executor.models.transformers import TransformersForCausalLM
names = json.loads(__import__("sys").argv[1])
assert set(names) <= set(ModelRegistry.get_supported_archs())
models = [ModelRegistry.models[name].load_model_cls() for name in names]
print(json.dumps([model is TransformersForCausalLM for model in models]))
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
    return json.loads(done.stdout.splitlines()[-1])


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
def test_vllm_runs_every_family_through_its_transformers_backend() -> None:
    names = [f"Pruned{family.class_prefix}ForCausalLM" for family in FAMILIES.values()]
    assert _answer(VLLM, IN_VLLM, json.dumps(names)) == [True] * len(names)
