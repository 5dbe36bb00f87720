"""How far a model is from its teacher, or from the text: what repairs are trained on. All are means over tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Answer:
    """What a model says of some sequences.

    Args:
        logits: (sequences, length, vocabulary); empty if nobody asked.
        hidden: (sequences, length, width) behind every block; none if nobody asked.
    """

    logits: Tensor
    hidden: Sequence[Tensor] = ()

    def of(self, sequences: Tensor) -> Answer:
        """Of some of the sequences."""
        return Answer(self.logits[sequences], [state[sequences] for state in self.hidden])


def loss_of(weights: Mapping[Any, float], student: Answer, teacher: Answer | None, ids: Tensor, top_k: int) -> Tensor:
    """The weighted sum of some losses.

    Args:
        weights: by the name of a loss; see `TrainingParams.loss`.
        teacher: None where only cross-entropy is asked for.
        ids: (sequences, length), the text itself.
        top_k: see `divergence`.
    """
    total = student.logits.new_zeros((), dtype=torch.float32)
    for name, weight in weights.items():
        if not weight:
            continue
        if name == "cross_entropy":
            total = total + weight * next_token(student.logits, ids)
        elif teacher is not None:
            value = (
                divergence(student.logits, teacher.logits, top_k)
                if name == "kl"
                else squarehead(student.hidden, teacher.hidden)
            )
            total = total + weight * value
    return total


def next_token(logits: Tensor, ids: Tensor) -> Tensor:
    """Cross-entropy of every token but the first of a sequence."""
    return functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


def divergence(logits: Tensor, teacher: Tensor, top_k: int = 0) -> Tensor:
    """KL(teacher || model), in nats.

    Args:
        logits, teacher: (sequences, length, vocabulary).
        top_k: above 0, only the teacher's likeliest tokens are told apart; all others are one. That is never more than
            the whole divergence (data processing inequality).
    """
    q, p = logits.float().log_softmax(-1), teacher.float().log_softmax(-1)
    if top_k and top_k < p.shape[-1]:
        p, likeliest = p.topk(top_k, -1)
        q = q.gather(-1, likeliest)
        p, q = torch.cat([p, _rest(p)], -1), torch.cat([q, _rest(q)], -1)
    return (p.exp() * (p - q)).sum(-1).mean()


def _rest(logs: Tensor) -> Tensor:
    """The logarithm of what some probabilities leave to one."""
    least = torch.finfo(logs.dtype).eps
    return (1 - logs.exp().sum(-1, keepdim=True)).clamp(min=least).log()


def squarehead(hidden: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """The mean over blocks of ‖h - t‖² / ‖t‖².

    Source: SquareHead, arXiv:2310.06927, section 3.
    """
    parts = [
        (mine.float() - theirs.float()).square().mean() / theirs.float().square().mean().clamp(min=1e-12)
        for mine, theirs in zip(hidden, teacher, strict=True)
    ]
    return torch.stack(parts).mean()
