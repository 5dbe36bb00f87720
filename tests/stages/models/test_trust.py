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

from layerwise.errors import UnsupportedModel
from layerwise.stages.contract import ModelSource, TextSource
from layerwise.stages.data.text import encode
from layerwise.stages.export.native import load, native
from layerwise.stages.models.causal_lm import CausalLM
from layerwise.stages.models.checkpoint import Checkpoint

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
