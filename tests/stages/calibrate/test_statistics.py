"""Hessians against X Xᵀ of inputs that were captured in another way, and what is held in memory for them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from layerwise.stages.calibrate.statistics import add_up, collect

SEQUENCES = torch.randint(0, 256, (5, 12), generator=torch.Generator().manual_seed(0))


def naive_hessians(lm: Any, sequences: Tensor) -> dict[str, Tensor]:
    """X Xᵀ in float64, from one plain forward of the whole model per sequence."""
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def add(module: Any, args: tuple[Tensor, ...]) -> None:
            X = args[0].double().flatten(0, -2)
            found[name] = found.get(name, 0) + torch.einsum("ti,tj->ij", X, X)

        return add

    handles = [lm.module(unit.name).register_forward_pre_hook(hook(unit.name)) for unit in lm.units]
    for sequence in sequences:
        lm.logits(sequence[None])
    for handle in handles:
        handle.remove()
    return found


def read(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.iterdir()) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("batch_size", [2, 8])
def test_a_hessian_is_the_sum_of_outer_products_of_the_inputs(
    load_model: Callable[[str], Any], family: str, batch_size: int, tmp_path: Path
) -> None:
    lm = load_model(family)
    aliases = collect(lm, lm.units, SEQUENCES, tmp_path, batch_size=batch_size)
    hessians, expected = read(tmp_path), naive_hessians(lm, SEQUENCES)
    assert set(aliases) == {unit.name for unit in lm.units}
    for unit in lm.units:
        H = hessians[aliases[unit.name]]
        assert H.dtype == torch.float32
        assert H.shape == (unit.shape[1], unit.shape[1])
        tolerance = 1e-5 * expected[unit.name].abs().max().item()  # float32 sums of 60 products, through three blocks
        torch.testing.assert_close(H.double(), expected[unit.name], rtol=0, atol=tolerance)


def test_units_that_read_the_same_input_share_one_hessian(
    load_model: Callable[[str], Any], family: str, tmp_path: Path
) -> None:
    lm = load_model(family)
    aliases = collect(lm, lm.units, SEQUENCES, tmp_path, batch_size=2)
    stored = read(tmp_path)
    assert set(stored) == set(aliases.values())
    fused = {unit.group for unit in lm.units if unit.group}
    for group in fused:
        assert len({aliases[unit.name] for unit in lm.units if unit.group == group}) == 1
    members = sum(unit.group is not None for unit in lm.units)
    assert len(stored) == len(lm.units) - members + len(fused)


def test_only_the_chosen_units_are_observed(load_model: Callable[[str], Any], tmp_path: Path) -> None:
    lm = load_model("llama")
    chosen = [unit for unit in lm.units if unit.kind == "self_attn.v_proj" and unit.block == 1]
    assert collect(lm, chosen, SEQUENCES, tmp_path, batch_size=8) == {chosen[0].name: chosen[0].name}
    assert set(read(tmp_path)) == {chosen[0].name}
    assert not any(module._forward_pre_hooks for module in lm.model.modules()), "hooks are gone"


def test_the_same_text_gives_the_same_bytes(load_model: Callable[[str], Any], tmp_path: Path) -> None:
    lm = load_model("gemma2")
    for name in "ab":
        (tmp_path / name).mkdir()
        collect(lm, lm.units, SEQUENCES, tmp_path / name, batch_size=2)
    files = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert len(files) == len(lm.blocks)
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)


def test_shards_add_up_to_the_whole(load_model: Callable[[str], Any], tmp_path: Path) -> None:
    lm = load_model("llama")
    folders = [tmp_path / name for name in ("whole", "left", "right")]
    for folder, part in zip(folders, (SEQUENCES, SEQUENCES[:3], SEQUENCES[3:]), strict=True):
        folder.mkdir()
        collect(lm, lm.units, part, folder, batch_size=2)
    for block in range(len(lm.blocks)):
        name = f"block-{block}.safetensors"
        add_up([folder / name for folder in folders[1:]], tmp_path / name)
        summed, whole = load_file(tmp_path / name), load_file(folders[0] / name)
        assert set(summed) == set(whole)
        for unit, H in whole.items():
            torch.testing.assert_close(summed[unit], H, rtol=1e-5, atol=1e-5 * H.abs().max().item())


def test_hidden_states_are_held_before_one_block_only(
    load_model: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = load_model("llama")
    run_block, alive, most = lm.run_block, weakref.WeakSet[Any](), []

    class Held(torch.Tensor):
        """A tensor that can be counted."""

    def counted(index: int, hidden: Tensor, stream: Any) -> Tensor:
        output = run_block(index, hidden.as_subclass(torch.Tensor), stream).as_subclass(Held)
        alive.add(output)
        most.append(len(alive))
        return output

    monkeypatch.setattr(lm, "run_block", counted)
    collect(lm, lm.units, SEQUENCES, tmp_path, batch_size=1)
    assert len(most) == len(lm.blocks) * len(SEQUENCES)
    assert max(most) <= len(SEQUENCES) + 1, "one state per batch, and the one that just replaces another"
