"""A Hugging Face causal language model, taken apart into embedding, blocks and head.

Works for every family whose blocks are one ModuleList, without a line per family (`in_blocks.py` says how). Masks that
differ from block to block (Gemma 2) come out right by themselves. When a model is loaded its parts are tried on a few
tokens, in a batch of two, and it is refused if they do not give the model's own logits, or if its logits depend on
tokens that come later.

Of a model that takes more than text (images, sound) it is the text model, with all else left as it is. Left out:
encoder-decoder models, encoders, and blocks that exchange more than the hidden state; these are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.errors import UnsupportedModel
from layerwise.kernels.device import require_gpu
from layerwise.stages.contract import ModelSource
from layerwise.stages.models import streamed as streaming
from layerwise.stages.models.in_blocks import InBlocks
from layerwise.stages.models.network import Unit
from layerwise.stages.models.streamed import Streamed
from layerwise.stages.models.trust import loading
from layerwise.stages.models.units import units_outside

TRIAL = (2, 6)
"""Batch and length of the tokens that a model is tried on when it is loaded."""


class CausalLM(InBlocks):
    """A dense model in evaluation mode, frozen. Implements `layerwise.stages.models.network.Network`.

    Args:
        model: the Hugging Face model.
    Raises:
        UnsupportedModel: its parts are not the model.
    """

    only_hidden = "layerwise takes decoder-only models whose blocks pass on nothing but the hidden state"

    def __init__(self, model: nn.Module, streamed: Streamed | None = None) -> None:
        super().__init__(model, streamed)
        with suppress(AttributeError, ValueError):  # a family without experts has nothing to set
            self.model.set_experts_implementation("eager")  # type: ignore[operator]  # one by one, so that each is seen
        trial = _trial_ids(model).to(self.device)
        whole = self._run_whole(trial)
        self.block_path, blocks = _find_blocks(model, trial)
        self._take_apart({f"{self.block_path}.{index}": block for index, block in enumerate(blocks)}, trial, whole)

    @classmethod
    def load(cls, source: ModelSource, *, block_by_block: bool = False) -> CausalLM:
        """Load a local folder, and lay the levels of a compressed model over it, if the source names one.

        Args:
            source: the model.
            block_by_block: the blocks are run one after another, and may be read only then (`streamed.py`); a small
                model, a compressed one and one with code of its own are loaded whole all the same.
        Raises:
            UnsupportedModel: not a causal language model, weights missing, it cannot be taken apart, or it takes code
                of its own that is not trusted.
            UsageError: it is to be computed on a GPU, and there is none.
        """
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        if source.device == "cuda":
            require_gpu()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        network = cls._streamed(source) if block_by_block else None
        if network is not None:
            return network
        try:
            with loading(source.path, source.trust) as options:
                model, info = AutoModelForCausalLM.from_pretrained(
                    source.path,
                    dtype=getattr(torch, source.dtype),
                    use_safetensors=True,
                    output_loading_info=True,
                    **options,
                )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise UnsupportedModel(f"cannot load {source.path}: {error}") from error
        if info["missing_keys"] or info.get("mismatched_keys"):
            missing = sorted(map(str, [*info["missing_keys"], *info.get("mismatched_keys", ())]))
            raise UnsupportedModel(
                f"{source.path}: {len(missing)} weights are missing or of another shape, the first is {missing[0]}",
                hint="the folder holds another model than its config.json says",
            )
        network = cls(model.to(source.device))
        if source.compressed is not None:
            from layerwise.stages.models.compressed import CompressedModel

            CompressedModel(source.compressed).install(network)
        return network

    @classmethod
    def _streamed(cls, source: ModelSource) -> CausalLM | None:
        """A model whose blocks are read when they run; None where it is to be loaded whole."""
        from transformers import AutoConfig, AutoModelForCausalLM

        from layerwise.stages.models.checkpoint import Checkpoint

        checkpoint = Checkpoint(source.path)
        if source.compressed is not None or source.trust or checkpoint.size_bytes < streaming.STREAM_BYTES:
            return None
        try:
            with loading(source.path, trust=False) as options:
                config = AutoConfig.from_pretrained(source.path, **options)
                dtype = getattr(torch, source.dtype)
                model = streaming.without_weights(lambda: AutoModelForCausalLM.from_config(config, dtype=dtype))
        except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError):
            return None  # loaded whole, it says what is wrong
        streamed = streaming.streamed(model, checkpoint, source.device)
        return None if streamed is None else cls(model, streamed)

    # --- finding out what it is made of ---

    @torch.no_grad()
    def _run_whole(self, trial: Tensor) -> Tensor:
        """The logits of the trial tokens, of a model that runs on tokens and predicts each from those before it."""
        name = type(self.model).__name__
        try:
            whole = self.logits(trial)
            changed = trial.clone()
            half = changed.shape[1] // 2
            changed[:, half:] = trial[:, half:].flip(-1).roll(1, 0)
            moved = (self.logits(changed) - whole).abs().nan_to_num()
        except Exception as error:  # whatever a family's code raises
            raise UnsupportedModel(
                f"{name} does not run on token ids alone: {type(error).__name__}: {error}",
                hint="layerwise takes decoder-only models, which need nothing beside text",
            ) from error
        # What the dtype rounds off is far below, what a token tells far above the square root of its precision.
        if moved[:, :half].max() > torch.finfo(whole.dtype).eps ** 0.5 * moved.max():
            raise UnsupportedModel(
                f"{name} is not causal: what it says of a token depends on later ones, so it predicts nothing",
                hint="an encoder (BERT) is no language model; if this one was trained as a decoder, its config.json "
                "must say so (is_decoder: true)",
            )
        return whole

    def _outside(self) -> Sequence[Unit]:
        return units_outside(self.model, self.n_blocks)

    # --- running it ---

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (batch, length, vocabulary) of token ids (batch, length)."""
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits

    def predictions(self, ids: Tensor) -> int:
        """One for each token of a sequence."""
        return ids.shape[1]

    def targets(self, ids: Tensor, labels: Tensor | None) -> Tensor | None:
        """The next tokens: (batch, length - 1)."""
        return ids[:, 1:]

    # --- changing it for good ---

    def untie(self) -> None:
        """Give the head a weight of its own for good, a copy of the embedding's; they are two units from here on."""
        head: Any = self.model.get_output_embeddings()  # type: ignore[operator]
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        config: Any = self.model.config
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
        del self.parameters  # they are one more now
        self.units = self._with_outside([unit for unit in self.units if unit.block is not None])


def _trial_ids(model: nn.Module) -> Tensor:
    """Token ids (batch, length) to try a model on; the sequences differ."""
    vocabulary = int(getattr(model.config.get_text_config(), "vocab_size", 2))  # type: ignore[union-attr,operator]
    batch, length = TRIAL
    return (torch.arange(batch * length).reshape(batch, length) * 7 + 3) % max(1, vocabulary)


def _find_blocks(model: nn.Module, ids: Tensor) -> tuple[str, nn.ModuleList]:
    """The ModuleList that is the depth of the model: as long as the config says, and each of its modules runs."""
    config: Any = model.config
    depth = getattr(config.get_text_config(), "num_hidden_layers", None)
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    }
    ran: set[nn.Module] = set()
    with ExitStack() as stack, torch.no_grad():
        for block in {block for blocks in lists.values() for block in blocks}:
            handle = block.register_forward_pre_hook(lambda module, args: ran.add(module))
            stack.callback(handle.remove)
        model(input_ids=ids, use_cache=False)
    for name, blocks in lists.items():
        if ran.issuperset(blocks):
            return name, blocks
    raise UnsupportedModel(
        f"{type(model).__name__}: no ModuleList of {depth} blocks that all run",
        hint="layerwise takes decoder-only models whose blocks stand in one ModuleList",
    )
