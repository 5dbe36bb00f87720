"""`native`: a folder that is a model by itself, in a process that has never seen the dense one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import layerwise
from layerwise.errors import CorruptArtifact

IDS = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(9))

ELSEWHERE = """
import sys, torch, layerwise
from safetensors.torch import save_file
ids = torch.tensor(eval(sys.argv[2]))
model = layerwise.load(sys.argv[1])
assert not model.training
with torch.no_grad():
    logits = model(input_ids=ids, use_cache=False).logits
text = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False)
save_file({"logits": logits, "text": text}, sys.argv[3])
"""


@pytest.mark.parametrize(("family", "dropped"), [("qwen3", False), ("llama", True)])
def test_a_native_folder_generates_the_same_text_in_a_fresh_process_without_the_dense_model(
    in_turn: Callable[..., Any],
    rebuilt: Callable[..., Any],
    load_model: Callable[[str], Any],
    model_folder: Callable[[str], Path],
    tmp_path: Path,
    family: str,
    dropped: bool,
) -> None:
    from layerwise.stages.levels.database import Database
    from layerwise.stages.models.checkpoint import Checkpoint

    dense = tmp_path / "dense"
    shutil.copytree(model_folder(family), dense)
    made = in_turn(family, folder=dense, dropped=dropped)
    applied = made.bench.run("apply", {"pick": made.allocation.candidate}, **made.inputs)
    exported = made.bench.run("export", {"format": "native"}, model=applied.out).out
    moved = tmp_path / "moved"
    shutil.copytree(exported, moved)
    levels = made.allocation.levels
    database = Database(made.levels.out, made.bench.model)
    gone = [unit for unit, level in levels.items() if level == "drop"]
    changed = {
        unit: database.level(unit, level).decode()
        for unit, level in levels.items()
        if level not in ("dense", "keep", "drop")
    }
    expected = rebuilt(load_model(family).model, changed, gone)
    shutil.rmtree(dense)
    away = tmp_path / "away"
    away.mkdir()
    command = [sys.executable, "-c", ELSEWHERE, str(moved), str(IDS.tolist()), str(away / "found.safetensors")]
    root = Path(layerwise.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, cwd=away, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = load_file(away / "found.safetensors")
    with torch.no_grad():
        logits = expected(input_ids=IDS, use_cache=False).logits
    assert torch.allclose(found["logits"], logits, rtol=0, atol=1e-5 * float(logits.abs().max()))
    text = expected.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(found["text"], text)
    assert Checkpoint(exported).size_bytes == made.allocation.sizes["bytes"]


def test_a_folder_of_another_kind_is_refused_in_one_line(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(CorruptArtifact, match="was not exported with `format: native`"):
        layerwise.load(model_folder("llama"))
    with pytest.raises(CorruptArtifact, match="cannot be read"):
        layerwise.load(tmp_path)
