"""A dozen families of all kinds, from the loader to the losses of a quantized model, against transformers itself.

The whole table is `benchmarks/families.py`, whose trial this is.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

WHOLE = {
    "gptj": "answers with tuples",
    "openai-gpt": "answers with lists",
    "bloom": "its half-blocks add the residual themselves",
    "opt": "positions are looked up",
    "gemma3": "a vision tower of as many blocks stands before the text model",
    "olmo_hybrid": "blocks of two kinds, attention and a recurrence",
    "mamba": "a linear layer that is never called, and convolutions",
    "gpt_oss": "experts as (in, out), attention with sinks",
    "deepseek_v3": "attention through low ranks, dense blocks before those of experts",
    "bart": "a decoder that is called by keywords",
}
REFUSED = {"bert": "is not causal", "hy_v4": "its blocks do not run one by one"}


@pytest.fixture(scope="module")
def families() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[3] / "benchmarks"))
        return importlib.import_module("families")


@pytest.mark.parametrize("family", WHOLE)
def test_every_loss_of_a_family_is_that_of_transformers(families: Any, family: str, tmp_path: Path) -> None:
    outcome = families.try_family(family, tmp_path)
    assert (outcome.result, outcome.told) == ("whole", "")
    assert outcome.units > 4


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_taken_apart_is_refused_with_the_reason(families: Any, family: str, tmp_path: Path) -> None:
    outcome = families.try_family(family, tmp_path)
    assert outcome.result == "refused"
    assert REFUSED[family] in outcome.told
