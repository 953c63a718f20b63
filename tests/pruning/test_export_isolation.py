"""Exported folders load where this project does not exist: another process, every room blocked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pruning.export import export
from pruning.plan import Plan
from pruning.slicing import sliced

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
PLANS = {
    "uneven": Plan.from_json([[2, 2, 32], [4, 2, 48], [1, 2, 8]]),
    "uniform": Plan.from_json([[2, 2, 32]] * 3),
}
LOADER = """
import json, sys
from pathlib import Path

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("agent", "evaluators", "prompts", "pruning", "selfpruner"):
            raise ImportError(f"{name} is blocked")
        return None

sys.meta_path.insert(0, Blocker())
try:
    import pruning
except ImportError:
    pass
else:
    raise SystemExit("pruning was importable: the test proves nothing")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
seen = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    trust = (folder / "modeling_pruned.py").is_file()
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust).eval()
    ids = torch.tensor([json.loads(sys.argv[2])])
    made = model.generate(ids, min_new_tokens=3, max_new_tokens=3, do_sample=False)
    row = {"class": type(model).__name__, "logits": model(ids).logits[0, -1].float().tolist()}
    seen[folder.name] = row | {"generated": made[0].tolist()}
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
print(json.dumps({"models": seen, "words": tokenizer("w3 w9").input_ids}))
"""


def _environment(home: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "HF_HOME")}
    offline = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return kept | offline


def _loaded_elsewhere(folders: Path, ids: list[int], away: Path) -> dict[str, Any]:
    away.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", LOADER, str(folders), json.dumps(ids)],
        cwd=away,
        env=_environment(away / "home"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.mark.usefixtures("own_module_cache")
def test_every_family_loads_without_the_project(
    make_model: Any, rank: Any, tokenizer: Any, tmp_path: Path
) -> None:
    ids, folders, expected = [5, 40, 17, 99, 23], tmp_path / "models", {}
    for family in FAMILIES:
        for reconstruction in ("none", "least_squares"):
            elastic = rank(make_model(family, dtype=torch.float32), reconstruction)
            for shape, plan in PLANS.items():
                small = sliced(elastic, plan)
                name = f"{family}_{shape}_{reconstruction}"
                export(small, tokenizer, folders / name, torch.float32)
                with torch.no_grad():
                    logits = small(torch.tensor([ids])).logits[0, -1]
                expected[name] = (type(small).__name__, logits.tolist())
    answer = _loaded_elsewhere(folders, ids, tmp_path / "away")
    assert {
        name: (row["class"], row["logits"]) for name, row in answer["models"].items()
    } == expected
    assert all(len(row["generated"]) == len(ids) + 3 for row in answer["models"].values())
    assert answer["words"] == [3, 9]


@pytest.mark.usefixtures("own_module_cache")
def test_only_pruned_classes_carry_code(
    make_model: Any, rank: Any, tokenizer: Any, tmp_path: Path
) -> None:
    elastic = rank(make_model("llama", dtype=torch.float32))
    for shape, plan in PLANS.items():
        folder = tmp_path / shape
        export(sliced(elastic, plan), tokenizer, folder, torch.float32)
        config = json.loads((folder / "config.json").read_text())
        is_pruned = shape == "uneven"
        assert (folder / "modeling_pruned.py").is_file() == is_pruned
        assert ("auto_map" in config) == is_pruned
        assert config["model_type"] == ("pruned_llama" if is_pruned else "llama")
        assert (folder / "model.safetensors").is_file()


@pytest.mark.usefixtures("own_module_cache")
def test_tied_weights_are_written_once(
    make_model: Any, rank: Any, tokenizer: Any, tmp_path: Path
) -> None:
    from safetensors import safe_open

    for tied in (True, False):
        elastic = rank(make_model("llama", dtype=torch.float32, tied=tied))
        folder = tmp_path / str(tied)
        export(sliced(elastic, PLANS["uneven"]), tokenizer, folder, torch.float32)
        with safe_open(folder / "model.safetensors", "pt") as file:
            names = set(file.keys())
        assert len(names & {"lm_head.weight", "model.embed_tokens.weight"}) == (1 if tied else 2)
