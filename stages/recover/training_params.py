"""What every repair that trains can be told; free of torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, field_validator

from layerwise.stages.quantities import Count
from layerwise.stages.recover import RepairEntry

if TYPE_CHECKING:
    from layerwise.stages.models.network import Unit

Loss = Literal["kl", "cross_entropy", "squarehead"]


class TrainingParams(RepairEntry):
    """Loss, steps, step sizes, and when to stop."""

    loss: dict[Loss, float] = Field(
        {"kl": 1.0},
        min_length=1,
        description="losses with their weights: kl, KL(dense || model) per token; cross_entropy of the next token; "
        "squarehead, the distance of the hidden states behind every block to the dense model's, relative to their size",
    )
    steps: Count = Field(200, description="of the optimizer")
    batch_size: int = Field(8, ge=1, description="sequences that run at a time")
    accumulate: int = Field(1, ge=1, description="batches whose gradients are added up for one step")
    learning_rate: float = Field(1e-3, gt=0, description="of AdamW, at its greatest")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="of the learning rate, down to zero or not")
    warmup: int = Field(0, ge=0, description="first steps, in which the learning rate rises from zero")
    weight_decay: float = Field(0.0, ge=0, description="of AdamW")
    clip: float = Field(1.0, gt=0, description="greatest norm of all gradients together; larger ones are shortened")
    check_every: Count = Field(
        25,
        description="steps after which held-out loss is taken, and a checkpoint that an interrupted run goes on from",
    )
    patience: int = Field(
        0, ge=0, description="checks without a better held-out loss that end the training; 0 for none"
    )
    heldout: float = Field(
        0.1, gt=0, lt=1, description="share of the sequences that is not trained on, and decides which state is kept"
    )
    teacher_top_k: int = Field(
        0, ge=0, description="kl: compare only the dense model's likeliest tokens, and all others as one; 0 for all"
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="in which products are computed; what is trained is float32 in any case"
    )
    checkpointing: bool = Field(
        False,
        description="gradient checkpointing: keep of every block only its inputs, and run it again for its gradients: "
        "the memory of one block's activations for a third more time",
    )
    seed: int = Field(0, ge=0, description="of the order of the sequences and of what starts at random")

    scope: ClassVar[Literal["unit", "parameters", "model"]] = "model"

    by_block: ClassVar[bool] = False
    """Whether each block is trained by itself, in a stretch of its own (`by_block.py`)."""

    def for_units(self, units: Sequence[Unit]) -> Self:
        """The parameters of a training of some units, where their number tells how many steps there are."""
        return self

    @field_validator("loss")
    @classmethod
    def _some_weight(cls, loss: dict[Loss, float]) -> dict[Loss, float]:
        if min(loss.values()) < 0 or not any(loss.values()):
            raise ValueError("weights are at least 0, and one of them is above")
        return loss
