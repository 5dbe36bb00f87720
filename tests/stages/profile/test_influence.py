"""How much blocks and half-blocks turn the hidden state, against transformers' own hidden states."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from layerwise.stages.profile.influence import influence

IDS = torch.randint(0, 256, (5, 12), generator=torch.Generator().manual_seed(4))


def turned(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Mean of 1 - cosine over tokens, and the standard error of the sequences' means."""
    before, after = before.double(), after.double()
    cosine = (before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))
    means = (1 - cosine).mean(1)
    return float(means.mean()), float(means.std() / len(means) ** 0.5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_block_turns_what_transformers_hands_on(load_model: Callable[[str], Any], family: str) -> None:
    lm = load_model(family)
    found = influence(lm, IDS, batch_size=2)
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def seen(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        inputs.append(args[0] if args else kwargs["hidden_states"])
        outputs.append(output if isinstance(output, Tensor) else output[0])

    handles = [block.register_forward_hook(seen, with_kwargs=True) for block in lm.blocks]
    with torch.no_grad():
        lm.model(input_ids=IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    for number, block in enumerate(lm.block_names):
        mean, stderr = turned(inputs[number], outputs[number])
        assert found[block]["mean"] == pytest.approx(mean, rel=1e-4)
        assert found[block]["stderr"] == pytest.approx(stderr, rel=1e-3)
        assert found[block]["n_tokens"] == IDS.numel()


def test_a_half_block_turns_what_it_is_added_to(load_model: Callable[[str], Any]) -> None:
    lm = load_model("llama")
    found = influence(lm, IDS, batch_size=5)
    added: dict[str, Tensor] = {}

    def seen(name: str, output: Any) -> None:
        added[name] = output[0] if isinstance(output, tuple) else output

    handles = [
        lm.module(half.name).register_forward_hook(lambda module, args, output, name=half.name: seen(name, output))
        for half in lm.parents
        if half.role != "block"
    ]
    with torch.no_grad():
        hidden = lm.model.model.embed_tokens(IDS)
        lm.model(input_ids=IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    for half in (half for half in lm.parents if half.role != "block"):
        mean, _ = turned(hidden, hidden + added[half.name])
        assert found[half.name]["mean"] == pytest.approx(mean, rel=1e-4)
        hidden = hidden + added[half.name]


def test_the_profile_tells_it_of_what_may_be_dropped_and_a_solver_drops_what_turns_least(
    make_bench: Callable[[Path], Any], model_folder: Callable[[str], Path]
) -> None:
    from layerwise.stages.allocate.allocation import load_allocations

    bench = make_bench(model_folder("llama"))
    menu = [{"method": "drop", "units": ["attention", "mlp"]}, {"method": "dense"}]
    made = bench.run("compress", {"menu": menu})
    profile = bench.run("profile", {"metrics": ["kl", "influence"], "tokens": 64}, database=made.out)
    told = [row for row in profile.rows["profile"] if row["metric"] == "influence"]
    rows = {row["unit"]: row for row in told if row["level"] == "drop"}
    assert len(rows) == 6
    assert all(row["value"] > 0 and row["n_tokens"] == 64 for row in rows.values())
    assert {row["value"] for row in told if row["level"] != "drop"} == {0.0}
    settings = {"solver": "ilp", "loss": "influence", "budgets": {"depth": 2}}
    (allocation,) = load_allocations(bench.run("allocate", settings, database=made.out, profile=profile.out).out)
    dropped = {unit for unit, level in allocation.levels.items() if level == "drop"}
    assert dropped == set(sorted(rows, key=lambda unit: rows[unit]["value"])[:2])
