"""Statistics against float64 loops over inputs that were captured in another way, and against autograd."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import silu

from layerwise.results.durable import settled_files
from layerwise.stages.calibrate import collect as collect_module
from layerwise.stages.calibrate import find_statistic
from layerwise.stages.calibrate.collect import collect, merge, statistic_file

SEQUENCES = torch.randint(0, 256, (5, 12), generator=torch.Generator().manual_seed(0))


def naive_inputs(lm: Any, sequences: Tensor) -> dict[str, Tensor]:
    """By unit, every row that its weight is multiplied by, in float64: from plain forwards of the whole model, one
    sequence at a time. Experts' rows follow from what their module is called with: the tokens, and who gets them."""
    rows: dict[str, list[Tensor]] = {unit.name: [] for unit in lm.units if unit.multiplied}
    handles = []
    experts: dict[str, dict[tuple[str, int], Any]] = {}
    for unit in lm.units:
        if unit.role == "expert":
            module, _, parameter = unit.view.tensor.rpartition(".")
            experts.setdefault(module, {})[parameter, unit.view.index[0]] = unit
        elif unit.multiplied:

            def see(module: Any, args: tuple[Tensor, ...], name: str = unit.name) -> None:
                rows[name].append(args[0].double().flatten(0, -2))

            handles.append(lm.module(unit.name).register_forward_pre_hook(see))
    for path, members in experts.items():

        def route(module: Any, args: tuple[Tensor, ...], members: Any = members) -> None:
            hidden, chosen = args[0].double(), args[1]
            for number in range(4):
                up, down = members["gate_up_proj", number], members["down_proj", number]
                X = hidden[(chosen == number).any(-1)]
                gate, value = (X @ lm.weight(up).double().T).chunk(2, -1)
                rows[up.name].append(X)
                rows[down.name].append(silu(gate) * value)

        handles.append(lm.module(path).register_forward_pre_hook(route))
    for sequence in sequences:
        lm.logits(sequence[None])
    for handle in handles:
        handle.remove()
    return {name: torch.cat(found) for name, found in rows.items()}


def read(folder: Path, statistic: str) -> dict[str, Tensor]:
    files = sorted((folder / statistic).iterdir())
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def gather(lm: Any, folder: Path, *, sequences: Tensor = SEQUENCES, batch_size: int = 2, **options: Any) -> Any:
    options = {"units": lm.units, "statistics": ["hessian", "channels"], "shard": 0} | options
    folder.mkdir(exist_ok=True)
    return collect(lm, options.pop("units"), sequences, folder, batch_size=batch_size, **options)


@pytest.mark.parametrize("batch_size", [2, 8])
def test_statistics_of_inputs_are_those_of_every_row_that_reaches_a_unit(
    load_model: Callable[[str], Any], any_family: str, batch_size: int, tmp_path: Path
) -> None:
    lm = load_model(any_family)
    gathered = gather(lm, tmp_path, batch_size=batch_size)
    hessians, channels, expected = read(tmp_path, "hessian"), read(tmp_path, "channels"), naive_inputs(lm, SEQUENCES)
    assert set(gathered.owners) == set(gathered.counts) == set(expected)
    for name, X in expected.items():
        assert gathered.counts[name] == len(X), name
        H, rows = hessians[gathered.owners[name]], channels[gathered.owners[name]]
        assert H.dtype == rows.dtype == torch.float32
        exact = sum(torch.outer(x, x) for x in X)
        # float32 sums of 60 products, of inputs that are rounded in three blocks.
        torch.testing.assert_close(H.double(), exact, rtol=0, atol=2e-5 * exact.abs().max().item())
        numbers = X.numpy()
        for row, known in zip(
            rows.double().numpy(),
            (np.square(numbers).sum(0), np.abs(numbers).sum(0), np.abs(numbers).max(0), numbers.sum(0)),
            strict=True,
        ):
            np.testing.assert_allclose(row, known, rtol=0, atol=2e-5 * np.abs(numbers).sum(0).max() + 1e-6)


def test_units_that_read_the_same_input_share_what_is_known_of_it(
    load_model: Callable[[str], Any], family: str, tmp_path: Path
) -> None:
    lm = load_model(family)
    gathered = gather(lm, tmp_path)
    stored = read(tmp_path, "hessian")
    assert set(stored) == set(read(tmp_path, "channels")) == set(gathered.owners.values())
    fused = {unit.group for unit in lm.units if unit.group}
    for group in fused:
        assert len({gathered.owners[unit.name] for unit in lm.units if unit.group == group}) == 1
    members = sum(unit.group is not None for unit in lm.units)
    assert len(stored) == sum(unit.multiplied for unit in lm.units) - members + len(fused)


def test_experts_that_saw_other_tokens_share_nothing(
    load_model: Callable[[str], Any], moe_family: str, tmp_path: Path
) -> None:
    lm = load_model(moe_family)
    owners = gather(lm, tmp_path, batch_size=1).owners
    experts = [unit.name for unit in lm.units if unit.role == "expert"]
    assert {owners[name] for name in experts} == set(experts)


def test_only_the_chosen_units_are_observed(load_model: Callable[[str], Any], tmp_path: Path) -> None:
    lm = load_model("llama")
    chosen = [unit for unit in lm.units if unit.kind == "self_attn.v_proj" and unit.block == 1]
    gathered = gather(lm, tmp_path, units=chosen)
    assert gathered.owners == {chosen[0].name: chosen[0].name}
    assert gathered.counts == {chosen[0].name: SEQUENCES.numel()}
    assert set(read(tmp_path, "hessian")) == {chosen[0].name}
    assert not any(module._forward_pre_hooks for module in lm.model.modules()), "hooks are gone"


@pytest.mark.parametrize("family", ["gemma2", "mixtral"])
def test_the_same_text_gives_the_same_bytes(load_model: Callable[[str], Any], tmp_path: Path, family: str) -> None:
    lm = load_model(family)
    for name in "ab":
        gather(lm, tmp_path / name, statistics=["hessian", "fisher", "block_inputs"])
    files = sorted(file.relative_to(tmp_path / "a") for file in (tmp_path / "a").rglob("*.safetensors"))
    assert len(files) == 4 + (5 if family == "mixtral" else 4) + 4, "an embedding of its own has gradients, too"
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("family", ["qwen3", "mixtral"])
def test_shards_merge_to_the_whole(load_model: Callable[[str], Any], tmp_path: Path, family: str) -> None:
    lm, names = load_model(family), ["hessian", "channels", "fisher"]
    parts = (SEQUENCES, SEQUENCES[:1], SEQUENCES[1:])
    gathered = [
        gather(lm, tmp_path / str(number), sequences=part, statistics=names) for number, part in enumerate(parts)
    ]
    assert gathered[0].counts == {
        name: sum(other.counts.get(name, 0) for other in gathered[1:]) for name in gathered[0].counts
    }
    for name in names:
        for position in range(4):
            files = [statistic_file(tmp_path / folder, name, position, 0) for folder in ("1", "2")]
            merge([file for file in files if file.is_file()], tmp_path / "m", find_statistic(name).merge)
            merged, whole = load_file(tmp_path / "m"), load_file(statistic_file(tmp_path / "0", name, position, 0))
            assert set(merged) == set(whole)
            for unit, tensor in whole.items():
                torch.testing.assert_close(merged[unit], tensor, rtol=1e-5, atol=1e-5 * tensor.abs().max().item())


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "mixtral"])
def test_fisher_is_the_sum_of_squared_gradients_of_each_sequence(
    load_model: Callable[[str], Any], tmp_path: Path, family: str
) -> None:
    lm = load_model(family)
    gather(lm, tmp_path, statistics=["fisher"])
    found = read(tmp_path, "fisher")
    model = copy.deepcopy(lm.model).double().requires_grad_(True)
    expected = {unit.name: torch.zeros(unit.shape, dtype=torch.float64) for unit in lm.units}
    for sequence in SEQUENCES:
        loss = model(input_ids=sequence[None], labels=sequence[None]).loss * (len(sequence) - 1)  # of the mean, the sum
        parameters = [model.get_parameter(unit.view.tensor) for unit in lm.units]
        gradients = torch.autograd.grad(loss, parameters)
        for unit, gradient in zip(lm.units, gradients, strict=True):
            expected[unit.name] += unit.view.read(gradient).square()
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name].double(), tensor, rtol=1e-3, atol=1e-4 * tensor.max().item())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in lm.model.parameters())


def test_block_inputs_are_the_hidden_states_of_transformers(
    load_model: Callable[[str], Any], any_family: str, tmp_path: Path
) -> None:
    lm = load_model(any_family)
    gather(lm, tmp_path, statistics=["block_inputs"], batch_size=3)
    last: list[Tensor] = []
    handle = lm.blocks[2].register_forward_hook(
        lambda module, args, output: last.append(output if isinstance(output, Tensor) else output[0])
    )
    with torch.no_grad():
        states = lm.model(input_ids=SEQUENCES, output_hidden_states=True, use_cache=False).hidden_states
    handle.remove()
    for position, expected in enumerate((*states[:3], last[0])):  # the last of theirs is after the norm
        tensors = load_file(statistic_file(tmp_path, "block_inputs", position, 0))
        assert torch.equal(tensors["ids"], SEQUENCES)
        torch.testing.assert_close(tensors["hidden"], expected, rtol=1e-5, atol=1e-5)


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
    gather(lm, tmp_path, units=[unit for unit in lm.units if unit.block is not None], batch_size=1)
    assert len(most) == len(lm.blocks) * len(SEQUENCES)
    assert max(most) <= len(SEQUENCES) + 1, "one state per batch, and the one that just replaces another"


class Killed(BaseException):
    """Ends a shard where nothing is caught."""


@pytest.mark.parametrize("statistics", [["hessian", "channels"], ["hessian", "block_inputs"]])
def test_a_shard_whose_hidden_states_are_on_disk_goes_on_at_the_block_to_the_same_bytes(
    load_model: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, statistics: list[str]
) -> None:
    lm = load_model("llama")
    options: dict[str, Any] = {"statistics": statistics, "shard": 0, "batch_size": 2}
    in_memory = collect(lm, lm.units, SEQUENCES, tmp_path / "memory", **options)
    monkeypatch.setattr(collect_module, "SPILL_BYTES", 0)
    ran: list[int] = []
    run_block = lm.run_block

    def run(index: int, *args: Any) -> Tensor:
        if ran.count(index) == 1 and index == 1 and len(ran) == 4:
            raise Killed  # in the middle of the second block
        ran.append(index)
        return run_block(index, *args)

    monkeypatch.setattr(lm, "run_block", run)
    with pytest.raises(Killed):
        collect(lm, lm.units, SEQUENCES, tmp_path / "disk", **options)
    assert ran == [0, 0, 0, 1]
    ran.clear()
    with settled_files() as settled:
        on_disk = collect(lm, lm.units, SEQUENCES, tmp_path / "disk", **options)
    assert ran == [1, 1, 1, 2, 2, 2]
    assert on_disk == in_memory
    written = {
        file.relative_to(tmp_path / "memory"): file.read_bytes()
        for file in (tmp_path / "memory").rglob("*.safetensors")
    }
    again = {
        file.relative_to(tmp_path / "disk"): file.read_bytes() for file in (tmp_path / "disk").rglob("*.safetensors")
    }
    assert again == written
    assert {tmp_path / "disk" / file for file in again} == set(settled), (
        "all are checked when the answer is found again"
    )
    assert [file.name for file in (tmp_path / "disk" / "hidden" / "0").glob("*.bin")] == ["hidden-3.bin"]
