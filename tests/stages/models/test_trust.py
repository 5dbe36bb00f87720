"""Model folders that bring code: nothing of it runs unless the workflow says so, whatever a terminal would answer."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from layerwise.errors import CorruptArtifact, UnsupportedModel
from layerwise.stages.contract import ModelSource, TextSource
from layerwise.stages.data.text import encode
from layerwise.stages.export.dense import dense
from layerwise.stages.export.native import load, native
from layerwise.stages.levels.files import open_unit, write_unit
from layerwise.stages.models.causal_lm import CausalLM
from layerwise.stages.models.checkpoint import Checkpoint
from layerwise.stages.models.trust import check_links

MODULE = """\
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
Path({marker!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
OWN_MODEL = {"AutoConfig": "code.OwnConfig", "AutoModelForCausalLM": "code.OwnModel"}
OWN_TOKENIZER = {"AutoTokenizer": [None, "code.OwnTokenizer"]}

Change = Callable[[Path], None]


class Bomb:
    """A pickle that touches a file when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.marker,)


def rewrite(file: Path, **changes: object) -> None:
    document = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(document | changes))


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the planted code leaves if it runs; standard input says yes to everything."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "it-ran"


@pytest.fixture
def planted(tmp_path: Path, marker: Path, model_folder: Callable[[str], Path]) -> Path:
    """A Llama with a tokenizer, and a module that nothing names yet."""
    folder = tmp_path / "planted"
    shutil.copytree(model_folder("llama"), folder)
    (folder / "code.py").write_text(MODULE.format(marker=str(marker)))
    return folder


@pytest.fixture
def text(tmp_path: Path) -> TextSource:
    (tmp_path / "text.txt").write_text("abc")
    return TextSource("text", (tmp_path / "text.txt",), 2)


def test_a_model_that_is_made_of_its_own_code_is_refused(planted: Path, marker: Path) -> None:
    rewrite(planted / "config.json", model_type="own", auto_map=OWN_MODEL)
    with pytest.raises(UnsupportedModel, match=r"without code of its own \(code.py\), which is not run") as caught:
        CausalLM.load(ModelSource(planted))
    assert "trust: true" in str(caught.value.hint)
    assert "trust_remote_code" not in str(caught.value)
    assert not marker.exists()


def test_a_tokenizer_that_is_its_own_code_is_refused(planted: Path, marker: Path, text: TextSource) -> None:
    rewrite(planted / "tokenizer_config.json", auto_map=OWN_TOKENIZER, tokenizer_class="OwnTokenizer")
    rewrite(planted / "config.json", model_type="unheard-of")
    with pytest.raises(UnsupportedModel, match="which is not run"):
        encode(text, planted)
    assert not marker.exists()


def test_where_transformers_knows_the_family_its_own_code_serves(
    planted: Path, marker: Path, text: TextSource, tmp_path: Path
) -> None:
    rewrite(planted / "config.json", auto_map=OWN_MODEL)
    rewrite(planted / "tokenizer_config.json", auto_map=OWN_TOKENIZER)
    assert type(CausalLM.load(ModelSource(planted)).model).__name__ == "LlamaForCausalLM"
    assert len(encode(text, planted)) == 3
    (tmp_path / "native").mkdir()
    native(ModelSource(planted), tmp_path / "native")
    assert type(load(tmp_path / "native").model).__name__ == "LlamaForCausalLM"
    assert not marker.exists()
    assert not list(tmp_path.glob("native/*.py"))


def test_trusted_code_runs_and_belongs_to_the_model(planted: Path, marker: Path, text: TextSource) -> None:
    rewrite(planted / "config.json", model_type="own", auto_map=OWN_MODEL)
    assert type(CausalLM.load(ModelSource(planted, trust=True)).model).__name__ == "OwnModel"
    assert len(encode(text, planted, trust=True)) == 3
    assert marker.exists()
    assert planted / "code.py" in Checkpoint(planted, trust=True).beside
    assert planted / "code.py" not in Checkpoint(planted).beside


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        {"auto_map": {"AutoConfig": "someone/else--code.OwnConfig"}},
        {"attn_implementation": "someone/kernel"},
        {"text_config": {"_attn_implementation": {"": "someone/kernel"}}},
    ],
    ids=["module", "kernel", "inner kernel"],
)
def test_code_that_stands_elsewhere_is_never_loaded(planted: Path, change: dict[str, object], trust: bool) -> None:
    rewrite(planted / "config.json", **change)
    with pytest.raises(UnsupportedModel, match="names code that stands elsewhere: someone/"):
        CausalLM.load(ModelSource(planted, trust=trust))


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("other", [None, "adapter.safetensors"])
def test_a_pickle_is_never_read(planted: Path, marker: Path, trust: bool, other: str | None) -> None:
    weights = planted / "model.safetensors"
    if other is None:
        weights.unlink()
    else:
        weights.rename(planted / other)
    (planted / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(marker)))
    for read in (lambda: CausalLM.load(ModelSource(planted, trust=trust)), lambda: Checkpoint(planted)):
        with pytest.raises(UnsupportedModel):
            read()
    assert not marker.exists()


# --- names and links that lead out of their folder ---


def test_tensors_with_names_of_paths_make_no_files(planted: Path, tmp_path: Path) -> None:
    weights = load_file(planted / "model.safetensors")
    odd = {name: torch.ones(4, 4) for name in ("../../evil", "/evil.weight", "model.layers.0/../../x.weight", "a\n.b")}
    save_file(weights | odd, planted / "model.safetensors", metadata={"format": "pt"})
    network = CausalLM.load(ModelSource(planted))
    assert not [unit.name for unit in (*network.units, *network.parents) if "/" in unit.name or "\n" in unit.name]
    (tmp_path / "deep" / "out").mkdir(parents=True)
    dense(ModelSource(planted), tmp_path / "deep" / "out")
    assert {path.name for path in tmp_path.rglob("*evil*")} == set()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


@pytest.mark.parametrize("unit", ["../x", "/x", "model/../../x", "x\0"])
def test_a_unit_that_an_artifact_names_leads_nowhere_else(tmp_path: Path, unit: str) -> None:
    with pytest.raises(CorruptArtifact, match="cannot name a unit"):
        write_unit(tmp_path / "levels", unit, [])
    with pytest.raises(CorruptArtifact, match="cannot name a unit"):
        open_unit(tmp_path / "levels", unit)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shard", ["../other.safetensors", "/other.safetensors", "a/../../other.safetensors"])
def test_an_index_names_no_weights_outside_of_its_folder(tmp_path: Path, shard: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(UnsupportedModel, match=f"names weights outside of its folder: {shard}"):
        Checkpoint(tmp_path)


def test_a_link_out_of_a_model_carries_nothing_along(tmp_path: Path) -> None:
    folder, secret = tmp_path / "model", tmp_path / "secret.json"
    folder.mkdir()
    secret.write_text("mine")
    (folder / "config.json").write_text("{}")
    (folder / "same.json").symlink_to("config.json")
    (folder / "model.safetensors").symlink_to(secret)
    check_links(folder, list(folder.iterdir()))
    (folder / "notes.json").symlink_to(secret)
    with pytest.raises(UnsupportedModel, match=f"notes.json is a link to {secret}, outside of the model's folder"):
        check_links(folder, list(folder.iterdir()))


def test_the_cache_of_the_hub_is_made_of_links(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "revision", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "abc").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    check_links(snapshot, list(snapshot.iterdir()))
