"""The loop and what it trains, against plain PyTorch and against what was promised of levels."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from layerwise.errors import DataError, NotFinite, UsageError
from layerwise.stages.contract import ModelSource
from layerwise.stages.data.text import cut, encode
from layerwise.stages.export.native import FILE, load
from layerwise.stages.levels.adapted import below
from layerwise.stages.models.causal_lm import CausalLM
from layerwise.stages.models.compressed import CompressedModel, source_of
from layerwise.stages.recover import find_repair
from layerwise.stages.recover.by_block import BlockTrainer
from layerwise.stages.recover.losses import Answer, divergence, loss_of, next_token, squarehead
from layerwise.stages.recover.params import TRAINING, RecoverParams
from layerwise.stages.recover.training import Trainer, schedule
from layerwise.stages.recover.training_params import TrainingParams

SHORT = {"steps": 6, "check_every": 2, "batch_size": 3, "heldout": 0.25}
FIXED = ("mask", "g_idx", "input_scale", "scale_codes")
MOVED = {
    "step_size": {"scale", "zero"}, "qat": {"scale", "zero", "codes"}, "block_qat": {"scale", "zero", "codes"},
    "finetune": {"values"}, "sparse_training": {"values", "mask"}, "lora": {"values"},
}  # fmt: skip


@pytest.fixture(scope="module")
def applied(in_turn: Callable[..., Any]) -> Callable[[str], tuple[Any, Path]]:
    """A family's model at dense, 3 bits and half pruned in turn, with a part dropped: the bench, and the artifact."""
    found: dict[str, Any] = {}

    def get(family: str) -> Any:
        if family not in found:
            made = in_turn(family, dropped=True)
            found[family] = made, made.bench.run("apply", {"pick": made.allocation.candidate}, **made.inputs).out
        return found[family]

    return get


@pytest.mark.parametrize("family", ["llama", "gpt2", "granitemoe"])
@pytest.mark.parametrize("method", TRAINING)
def test_training_lowers_the_loss_and_keeps_the_structure_bit_for_bit(
    applied: Callable[[str], Any], method: str, family: str
) -> None:
    made, folder = applied(family)
    repaired = made.bench.run("recover", {"repairs": [{"method": method, **SHORT}]}, model=folder)
    heldout = [row["value"] for row in repaired.rows["recovery"] if row["metric"] == "heldout_loss"]
    assert method == "block_qat" or len(heldout) == 4  # that has one for each block with a grid
    # Here blocks are nearer to the dense ones, see below, and the whole is not: the start is kept.
    kept = (method, family) == ("block_qat", "granitemoe")
    assert min(heldout) < heldout[0] or kept
    before, after = CompressedModel(folder), CompressedModel(repaired.out)
    assert before.levels.keys() == after.levels.keys()
    changed = set()
    for unit in before.levels:
        old, new = before.level(unit), below(after.level(unit))
        assert (old.recipe["encoding"], old.shape) == (new.recipe["encoding"], new.shape)
        assert old.tensors.keys() == new.tensors.keys()
        for name, tensor in old.tensors.items():
            if not torch.equal(tensor, new.tensors[name]):
                changed.add(name)
        if method != "sparse_training":  # another mask may take some bits more or less
            assert sum(one.nbytes for one in new.tensors.values()) == old.size_bytes
    assert changed <= MOVED.get(method, set()), "nothing else moves"
    assert (method == "perp" or kept) == (not changed)
    assert (repaired.out / "base").is_dir() == (method == "perp")


@pytest.mark.parametrize("family", ["llama", "gpt2", "granitemoe"])
def test_a_block_that_is_trained_by_itself_is_nearer_to_the_dense_one_or_stays_as_it_was(
    applied: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Its answers, worked out again from what is installed, on the sequences that were held out."""
    made, folder = applied(family)
    errors: list[tuple[float, float]] = []

    def end(self: BlockTrainer) -> None:
        before, began = self._error, self._at
        plain(self)
        self._begin_block(began)  # anew, with what was kept
        errors.append((before, self._error))
        self._at = -1

    plain = BlockTrainer.end_stretch
    monkeypatch.setattr(BlockTrainer, "end_stretch", end)
    repaired = made.bench.run("recover", {"repairs": [{"method": "block_qat", **SHORT}]}, model=folder)
    assert len(errors) >= 2
    assert all(after <= before for before, after in errors)
    assert any(after < before for before, after in errors)
    left = {row["unit"]: row["error"] for row in repaired.rows["recovery"] if row["status"] == "left"}
    grids = {unit for unit, recipe in recipes(folder).items() if recipe["encoding"] == "grid"}
    assert {error for unit, error in left.items() if unit in grids} <= {"it stands in no block"}


@pytest.mark.parametrize("method", TRAINING)
def test_what_is_written_is_what_was_trained(
    applied: Callable[[str], Any], load_model: Callable[[str], Any], texts: Any, method: str
) -> None:
    """The loss on the sequences that were held out, worked out from the written model alone, is what the loop told."""
    made, folder = applied("llama")
    repaired = made.bench.run("recover", {"repairs": [{"method": method, **SHORT}]}, model=folder)
    told = min(row["value"] for row in repaired.rows["recovery"] if row["metric"] == "heldout_loss")
    text = texts["calibration"]
    held = torch.from_numpy(cut(encode(text, made.bench.model.path), text)[-3:]).long()  # a quarter of twelve sequences
    dense, student = load_model("llama"), CausalLM.load(source_of(repaired.out, made.bench.model))
    p, q = dense.logits(held).log_softmax(-1), student.logits(held).log_softmax(-1)
    assert float((p.exp() * (p - q)).sum(-1).mean()) == pytest.approx(told, rel=1e-4)
    out = made.bench.run("export", {"format": "native"}, model=repaired.out).out
    assert torch.equal(load(out).logits(held), student.logits(held))
    before = made.bench.run("export", {"format": "native"}, model=folder).out
    sizes = [sum(tensor.nbytes for tensor in load_file(one / FILE).values()) for one in (before, out)]
    model = CompressedModel(repaired.out)
    adapters = [model.level(unit) for unit in model.levels if model.recipe(unit)["encoding"] == "adapted"]
    assert (method == "lora") == bool(adapters)
    if method == "sparse_training":
        found = [sum(one.level(unit).size_bytes for unit in one.levels) for one in (model, CompressedModel(folder))]
        assert sizes[1] - sizes[0] == found[0] - found[1]
        return
    assert sizes[1] - sizes[0] == sum(2 * level.recipe["rank"] * sum(level.shape) for level in adapters)


class _Two(torch.nn.Module):
    """One part: a whole weight of a network, as it is."""

    def __init__(self, network: CausalLM, name: str) -> None:
        super().__init__()
        self.name, self.values = name, network.parameter(name).detach().clone()

    @property
    def free(self) -> Mapping[str, Tensor]:
        return {self.name: self.values}

    @property
    def rates(self) -> Mapping[str, float]:
        return {}

    def tensors(self) -> Mapping[str, Tensor]:
        return {self.name: self.values}


def params(**given: Any) -> TrainingParams:
    return TrainingParams.model_validate({"method": "made up", "batch_size": 2, "steps": 5, "check_every": 2, **given})


def test_the_loop_is_that_of_plain_pytorch(load_model: Callable[[str], Any], tmp_path: Path) -> None:
    network, name = load_model("llama"), "model.layers.1.mlp.down_proj.weight"
    ids = torch.randint(0, 256, (6, 12), generator=torch.Generator().manual_seed(1))
    asked = params(loss={"cross_entropy": 1.0}, accumulate=2, warmup=2, learning_rate=0.01, clip=0.5, weight_decay=0.1)
    part = _Two(network, name)
    trainer = Trainer(network, None, [part], ids[:5], ids[5:], asked, tmp_path)  # type: ignore[list-item]
    told = [trainer(point) for point in (0, 2, 4, 5)]

    plain = CausalLM.load(ModelSource(Path(network.model.config.name_or_path)))
    weight = plain.parameter(name).requires_grad_(True)
    optimizer = torch.optim.AdamW([weight], lr=1.0, weight_decay=0.1)
    places = iter([int(one) for number in range(5) for one in trainer._order(number)])
    losses = []
    for step in range(5):
        batches = [ids[[next(places), next(places)]] for _ in range(2)]
        total = sum(
            torch.nn.functional.cross_entropy(
                plain.model(input_ids=batch).logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()
            )
            / 2
            for batch in batches
        )
        assert isinstance(total, Tensor)
        total.backward()
        torch.nn.utils.clip_grad_norm_([weight], 0.5)
        optimizer.param_groups[0]["lr"] = 0.01 * [0.5, 1, 1, 0.75, 0.25][step]  # cosine over the three after two
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item())
    assert [loss for one in told for loss in one["losses"]] == pytest.approx(losses, rel=1e-5)
    assert torch.allclose(part.values, weight, atol=1e-5)
    assert not torch.allclose(part.values, network.parameter(name), atol=1e-3)


def test_schedules_end_where_they_say() -> None:
    cosine = params(steps=10, warmup=4)
    assert [schedule(step, cosine) for step in range(4)] == [0.25, 0.5, 0.75, 1]
    assert schedule(10, cosine) == pytest.approx(0)
    assert schedule(9, params(steps=10, schedule="constant")) == 1


# --- losses -----------------------------------------------------------------------------------------------------------


def test_losses_are_those_of_their_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (torch.randn((2, 3, 7), generator=generator) for _ in range(2))
    p, q = teacher.double().softmax(-1), logits.double().softmax(-1)
    whole = (p * (p / q).log()).sum(-1).mean()
    assert float(divergence(logits, teacher)) == pytest.approx(float(whole), rel=1e-5)
    cut_off = [float(divergence(logits, teacher, k)) for k in (1, 2, 4, 6, 7)]
    assert all(fewer <= more + 1e-6 for fewer, more in pairwise(cut_off))
    assert cut_off[-1] == pytest.approx(float(whole), rel=1e-5)
    best = p.argmax(-1, keepdim=True)
    p1, q1 = p.gather(-1, best), q.gather(-1, best)
    two_ways = p1 * (p1 / q1).log() + (1 - p1) * ((1 - p1) / (1 - q1)).log()
    assert cut_off[0] == pytest.approx(float(two_ways.mean()), rel=1e-4)
    ids = torch.randint(0, 7, (2, 3), generator=generator)
    picked = q[:, :-1].gather(-1, ids[:, 1:, None]).log().mean()
    assert float(next_token(logits, ids)) == pytest.approx(-float(picked), rel=1e-5)
    one, two = [teacher, teacher + 1], [teacher * 2, teacher + 1]
    assert float(squarehead(two, one)) == pytest.approx(0.5)  # of two blocks one is off by all of itself
    mixed = loss_of({"kl": 2.0, "squarehead": 3.0}, Answer(logits, two), Answer(teacher, one), ids, 0)
    assert float(mixed) == pytest.approx(2 * float(whole) + 1.5, rel=1e-5)


MIXTURES = [{"kl": 0.5, "squarehead": 1.0}, {"cross_entropy": 1.0}, {"kl": 1.0, "cross_entropy": 0.1}]


@pytest.mark.parametrize("loss", MIXTURES)
def test_every_mixture_of_losses_trains(applied: Callable[[str], Any], loss: dict[str, float]) -> None:
    made, folder = applied("llama")
    repair = {
        "method": "perp",
        "loss": loss,
        "teacher_top_k": 8,
        "precision": "bfloat16",
        "checkpointing": True,
        **SHORT,
    }
    heldout = [
        row["value"]
        for row in made.bench.run("recover", {"repairs": [repair]}, model=folder).rows["recovery"]
        if row["metric"] == "heldout_loss"
    ]
    assert min(heldout) < heldout[0]


# --- ends that are not the end ----------------------------------------------------------------------------------------


def test_a_training_that_is_killed_again_and_again_goes_on_to_the_same_bytes(
    applied: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a child process each time, which the signal takes in the middle of a step that no checkpoint has."""
    made, folder = applied("llama")
    repairs = {"repairs": [{"method": "qat", "steps": 7, "check_every": 2, "batch_size": 2, "patience": 9}]}
    whole = made.bench.run("recover", repairs, model=folder)
    _killed(made.bench, repairs, folder, monkeypatch, at=[3])
    again = made.bench.run("recover", repairs, again=True, model=folder)
    assert _bytes(again.out) == _bytes(whole.out)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["qat", "block_qat", "lora", "perp"])
def test_ten_kills_change_nothing(applied: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    made, folder = applied("gpt2")
    repairs = {"repairs": [{"method": method, "steps": 13, "check_every": 2, "batch_size": 2}]}
    whole = made.bench.run("recover", repairs, model=folder)
    _killed(made.bench, repairs, folder, monkeypatch, at=[1, 1, 2, 3, 5, 6, 8, 9, 11, 12])
    again = made.bench.run("recover", repairs, again=True, model=folder)
    assert _bytes(again.out) == _bytes(whole.out)


def _killed(bench: Any, repairs: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, at: list[int]) -> None:
    """Begin a new run and kill it in the middle of each of some steps, going on in between."""
    step = Trainer._step
    for number, victim in enumerate(at):
        bench.runs += number == 0
        pid = os.fork()
        if pid == 0:  # pragma: no cover (it never comes back)

            def dies(self: Trainer, now: int, victim: int = victim) -> float:
                loss = step(self, now)
                if now == victim:
                    os.kill(os.getpid(), signal.SIGKILL)
                return loss

            monkeypatch.setattr(Trainer, "_step", dies)
            try:
                bench.runs -= number == 0
                bench.run("recover", repairs, again=number > 0, model=folder)
            finally:
                os._exit(1)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL, f"step {victim} was never made"


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_a_loss_that_is_no_longer_finite_ends_the_training_with_the_best_state_before(
    applied: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, folder = applied("llama")
    good = {"method": "perp", "steps": 4, "schedule": "constant", "check_every": 2, "batch_size": 2}
    expected = made.bench.run("recover", {"repairs": [good]}, model=folder)
    step = Trainer._step
    monkeypatch.setattr(Trainer, "_step", lambda self, now: float("nan") if now == 4 else step(self, now))
    broken = made.bench.run("recover", {"repairs": [{**good, "steps": 9}]}, model=folder)
    (row,) = [row for row in broken.rows["recovery"] if row["status"] == "nan"]
    best = min((row["value"], row["step"]) for row in broken.rows["recovery"] if row["metric"] == "heldout_loss")[1]
    assert row["step"] == 5
    assert row["error"] == f"the loss of step 5 is not finite; the state after step {best} is kept"
    found, meant = (load_file(one.out / "base" / "model.safetensors") for one in (broken, expected))
    assert all(torch.equal(found[name], meant[name]) for name in meant)
    (history,) = json.loads((broken.out / "recovery.json").read_text())
    assert (history["stop"], len(history["losses"])) == ("nan", 4)


def test_a_large_learning_rate_keeps_the_start_and_patience_ends_it(applied: Callable[[str], Any]) -> None:
    made, folder = applied("llama")
    wild = {"method": "perp", "learning_rate": 50.0, "patience": 2, "clip": 1e9, **SHORT, "steps": 20}
    repaired = made.bench.run("recover", {"repairs": [wild]}, model=folder)
    (history,) = json.loads((repaired.out / "recovery.json").read_text())
    assert (history["best_step"], history["stop"]) == (0, "patience")
    assert len(history["losses"]) == 4
    before, after = (CausalLM.load(source_of(one, made.bench.model)) for one in (folder, repaired.out))
    ids = torch.arange(16)[None]
    assert torch.equal(before.logits(ids), after.logits(ids))


def test_mistakes_are_told_before_any_step(
    applied: Callable[[str], Any],
    model_folder: Callable[[str], Path],
    load_model: Callable[[str], Any],
    tmp_path: Path,
) -> None:
    made, folder = applied("llama")
    run = made.bench.run
    with pytest.raises(
        DataError, match=r"12 sequences of 16 tokens, 3 of them held out, are too few: a step trains on 12"
    ):
        run("recover", {"repairs": [{"method": "perp", "accumulate": 4, **SHORT}]}, model=folder)
    pruned = [unit for unit, recipe in recipes(folder).items() if recipe["encoding"] == "mask"]
    with pytest.raises(UsageError, match=r"step_size fits none of the \d+ levels: \S+: mask has no scales of rows"):
        run("recover", {"repairs": [{"method": "step_size"}], "targets": pruned}, model=folder)
    text = torch.zeros((2, 4), dtype=torch.long)
    llama = load_model("llama")
    wide = replace_blocks(load_model("gpt2"))
    with pytest.raises(UsageError, match="squarehead compares 3 blocks 32 wide with 2 that are 32"):
        Trainer(llama, wide, [], text, text, params(loss={"squarehead": 1.0}), tmp_path)

    few = SimpleNamespace(vocab_size=17, hidden_size=32)
    other: Any = SimpleNamespace(n_blocks=3, model=SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: few)))
    with pytest.raises(UsageError, match="the model knows 256 tokens, the workflow's dense one, its teacher, 17"):
        Trainer(llama, other, [], text, text, params(), tmp_path)

    spoiled = CausalLM.load(ModelSource(model_folder("llama")))
    spoiled.parameter("model.layers.0.input_layernorm.weight").data[0] = float("nan")
    part = _Two(llama, "model.norm.weight")
    with pytest.raises(NotFinite, match="before it is trained"):
        Trainer(spoiled, llama, [part], text, text, params(), tmp_path)(0)  # type: ignore[list-item]


def recipes(folder: Path) -> dict[str, Any]:
    model = CompressedModel(folder)
    return {unit: model.recipe(unit) for unit in model.levels}


def replace_blocks(network: CausalLM) -> Any:
    """A network that says of itself that it has two blocks."""

    class Shorter:
        n_blocks, model = 2, network.model

    return Shorter()


def test_a_text_is_named_only_where_something_is_trained() -> None:
    assert RecoverParams.model_validate({"repairs": [{"method": "svd"}]}).data is None
    trained = RecoverParams.model_validate({"repairs": [{"method": "svd"}, {"method": "perp"}]})
    assert trained.data == "calibration"
    assert RecoverParams.model_validate(trained.model_dump(mode="json")) == trained
    assert all(issubclass(find_repair(name).params, TrainingParams) for name in TRAINING)
