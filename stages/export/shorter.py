"""A model without some of its blocks as a smaller model: blocks numbered anew, and a configuration that says so.

Whatever the configuration lists block by block (`layer_types`) is cut alike, also what transformers fills in by the
number of blocks; lists of block numbers (`mlp_only_layers`) are numbered anew. The smaller configuration is tried on a
model without weights: what it asks for has to be what is there. Left out: half-blocks, for which configurations have no
word.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerwise.errors import UnsupportedModel
from layerwise.stages.contract import ModelSource
from layerwise.stages.models.network import Unit

NATIVE = "export it with `format: native`"
HINT = f"{NATIVE}, or an allocation without dropped parts"

NUMBERS = ("mlp_only_layers", "full_attention_idxs", "global_attn_layers", "cross_attention_layers")
"""Settings that list numbers of blocks."""

NO_BLOCKS = ("architectures", "bos_token_id", "eos_token_id", "pad_token_id", "mrope_section")
"""Settings whose lists have nothing to do with blocks, however long they are."""

PERIODS = (
    "decoder_sparse_step", "interleave_moe_layer_step", "attn_layer_period", "expert_layer_period", "moe_layer_freq",
    "first_k_dense_replace", "num_kv_shared_layers",
)  # fmt: skip
"""Settings that make blocks different by their number: above 1, what a block is would change with its number."""


@dataclass(frozen=True)
class Shorter:
    """Which blocks are left.

    Args:
        path: of the list of blocks, as the network calls it (`model.layers`).
        gone: numbers of blocks that are dropped.
    """

    path: str = ""
    gone: frozenset[int] = frozenset()

    def name(self, tensor: str) -> str | None:
        """What a stored tensor is called then; None if it is in a block that is dropped."""
        if not self.gone:
            return tensor
        short = self.path.partition(".")[2] or self.path
        found = re.match(rf"((?:.*\.)?{re.escape(short)}\.)(\d+)(\..*)", tensor)
        if found is None:
            return tensor
        number = int(found[2])
        return None if number in self.gone else f"{found[1]}{self.number(number)}{found[3]}"

    def number(self, block: int) -> int:
        """The new number of a block that is left."""
        return block - sum(other < block for other in self.gone)


def shorter(dropped: Sequence[Unit]) -> Shorter:
    """What dropping some parts leaves.

    Raises:
        UnsupportedModel: one of them is a half-block.
    """
    halves = [unit.name for unit in dropped if unit.role != "block"]
    if halves:
        raise UnsupportedModel(
            f"a configuration has every block whole, but of this model {len(halves)} half-blocks are dropped, the "
            f"first is {halves[0]}",
            hint=HINT,
        )
    if not dropped:
        return Shorter()
    return Shorter(dropped[0].name.rpartition(".")[0], frozenset(int(unit.name.rpartition(".")[2]) for unit in dropped))


def read_config(source: ModelSource) -> Any:
    """The configuration of the text model, as transformers reads it."""
    return _configs(source)[1]


def _configs(source: ModelSource) -> tuple[Any, Any]:
    """The whole configuration, and that of the text model in it."""
    from transformers import AutoConfig

    from layerwise.stages.models.trust import loading

    with loading(source.path, source.trust) as options:
        config = AutoConfig.from_pretrained(source.path, **options)
    return config, config.get_text_config()


def write_config(
    source: ModelSource,
    out: Path,
    left: Shorter,
    tensors: Mapping[str, Sequence[int]],
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write `config.json` of the smaller model.

    Args:
        source: the model.
        out: a folder.
        left: which blocks are left.
        tensors: shapes of all that will be stored, by name.
        settings: of the text model, what else is to change.
    Raises:
        UnsupportedModel: the configuration cannot say it.
    """
    document = json.loads((source.path / "config.json").read_text(encoding="utf-8"))
    config, text = _configs(source)
    own = document if text is config else document[next(k for k, v in vars(config).items() if v is text)]
    if left.gone:
        key = text.attribute_map.get("num_hidden_layers", "num_hidden_layers")
        total = getattr(text, key)
        periods = [name for name in PERIODS if isinstance(getattr(text, name, None), int) and getattr(text, name) > 1]
        if periods:
            raise UnsupportedModel(f"{periods[0]} in its config.json makes blocks what their numbers are", hint=HINT)
        if len(left.gone) >= total:
            raise UnsupportedModel(f"all {total} blocks are dropped, so no model is left", hint=HINT)
        own[key] = total - len(left.gone)
        own |= cut(text.to_dict(), total, left)
    own |= settings or {}
    target = out / "config.json"
    target.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    _check(source, target, tensors)


def cut(settings: Mapping[str, Any], total: int, left: Shorter) -> dict[str, Any]:
    """Those of some settings that are lists of blocks, without the blocks that are gone.

    Args:
        settings: of a configuration.
        total: how many blocks it had.
        left: which blocks are left.
    """
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if name in NO_BLOCKS or not isinstance(value, list):
            continue
        if name in NUMBERS:
            found[name] = [left.number(block) for block in value if block not in left.gone]
        elif len(value) == total:
            found[name] = [entry for block, entry in enumerate(value) if block not in left.gone]
    return found


def told(error: BaseException) -> str:
    """What a configuration has against its settings: the check that failed, not that one did."""
    return str(error.__cause__ or error)


def _check(source: ModelSource, file: Path, tensors: Mapping[str, Sequence[int]]) -> None:
    """Compare what a configuration asks for with what is there, as far as names agree."""
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    from layerwise.stages.models.trust import loading

    try:
        with loading(source.path, source.trust) as options, torch.device("meta"):
            config = AutoConfig.from_pretrained(file, **options)
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=source.trust)
    except (ValueError, TypeError, RuntimeError, AssertionError, StrictDataclassError) as error:
        raise UnsupportedModel(f"its config.json cannot say what is left: {told(error)}", hint=NATIVE) from error
    prefix = f"{model.base_model_prefix}."
    asked = {name.removeprefix(prefix): tuple(value.shape) for name, value in model.state_dict().items()}
    stored = {name.removeprefix(prefix): tuple(shape) for name, shape in tensors.items()}
    wrong = [name for name in asked.keys() & stored.keys() if asked[name] != stored[name]]
    if wrong:
        name = min(wrong)
        raise UnsupportedModel(
            f"its config.json cannot say what is left: it asks for {name} of {list(asked[name])}, and there is one of "
            f"{list(stored[name])}",
            hint=NATIVE,
        )
