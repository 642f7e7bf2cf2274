"""The loop with a toy method: early stopping, budgets, stages, NaN, and resume to the bit."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import BaseModel
from tests.support.errors import one_line
from tests.support.rows import rows_of
from tests.support.runs import (
    Quiet,
    assert_no_step_twice,
    assert_same_training,
    assert_same_weights,
    log,
    losses,
)
from torch import Tensor, nn

from l2rec.config import TrainingConfig
from l2rec.data.batches import Batch, TrainingBatches
from l2rec.data.ragged import Ragged
from l2rec.data.splits import Split, leave_one_out
from l2rec.errors import CheckpointError, TrainingError
from l2rec.protocols import Losses, ParameterGroup, Scorer, Stage
from l2rec.runs import loop as training
from l2rec.runs.checkpoint import load_tensors, trained_tensors

N_ITEMS, N_USERS = 12, 30


@pytest.fixture(autouse=True, scope="module")
def no_fsync() -> Iterator[None]:
    """Skip waiting for the disk: states are written at every step here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def split(users: int = N_USERS, seed: int = 0) -> Split:
    """Build walks of 4 to 9 steps along one cycle, noisy enough to take some epochs to learn."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(users):
        walk = (rng.integers(N_ITEMS) + np.arange(rng.integers(4, 10))) % N_ITEMS
        noisy = rng.random(len(walk)) < 0.2
        rows.append(np.where(noisy, rng.integers(N_ITEMS, size=len(walk)), walk))
    return leave_one_out(Ragged.from_rows(rows))


class Toy(nn.Module):
    """A method that scores the next item by the last one, from two tables and with dropout."""

    def __init__(self, stages: int = 1, on_loss: Callable[[int], None] | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Parameter(0.01 * torch.randn(N_ITEMS, N_ITEMS))
        self.second = nn.Parameter(torch.zeros(N_ITEMS, N_ITEMS))
        self.n_stages, self.on_loss, self.calls = stages, on_loss, 0

    @property
    def n_items(self) -> int:
        return N_ITEMS

    def stages(self, lr: float, weight_decay: float) -> list[Stage]:
        def group(*parameters: nn.Parameter) -> list[ParameterGroup]:
            return [ParameterGroup("all", list(parameters), lr, weight_decay)]

        if self.n_stages == 2:
            return [
                Stage("one", group(self.first), self.batches, self.loss),
                Stage("two", group(self.second), self.batches, self.loss),
            ]
        both = group(self.first, self.second)
        return [Stage("train", both, self.batches, self.loss)][: self.n_stages]

    def batches(
        self, sequences: Ragged, *, seed: int, epoch: int, batch_users: int, batch_tokens: int
    ) -> TrainingBatches:
        return TrainingBatches(
            sequences,
            supervision="last",
            max_items=10,
            negatives=0,
            item_costs=np.ones(N_ITEMS, dtype=np.int64),
            batch_users=batch_users,
            batch_tokens=batch_tokens,
            seed=seed,
            epoch=epoch,
        )

    def loss(self, batch: Batch) -> Losses:
        self.calls += 1
        if self.on_loss is not None:
            self.on_loss(self.calls)
        last = torch.from_numpy(batch.histories.values[batch.histories.offsets[1:] - 1]).long()
        scores = nn.functional.dropout((self.first + self.second)[last], 0.3, self.training)
        loss = nn.functional.cross_entropy(scores, torch.from_numpy(batch.targets).long())
        return Losses(loss, {"rec": loss.detach()}, len(last), len(last))

    def scorer(self) -> Scorer:
        table = (self.first + self.second).detach()
        return lambda h: table[torch.from_numpy(h.values[h.offsets[1:] - 1]).long()]


class Scripted(Toy):
    """A method whose n-th validation ranks each target ``places[n]``-th; the last place repeats."""

    def __init__(self, places: list[int], data: Split, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.places, self.validations = places, 0
        self.right = {
            tuple(history): int(target)
            for history, target in zip(
                rows_of(data.valid.histories), data.valid.targets.values, strict=True
            )
        }

    def scorer(self) -> Scorer:
        place = self.places[min(self.validations, len(self.places) - 1)]
        self.validations += 1

        def score(histories: Ragged) -> Tensor:
            scores = torch.zeros(len(histories), N_ITEMS)
            for row, history in enumerate(rows_of(histories)):
                right = self.right[tuple(history)]
                others = [i for i in range(N_ITEMS) if i != right]
                scores[row, right] = 1.0
                scores[row, others[: place - 1]] = 2.0
            return scores

        return score


def unique_histories() -> Split:
    """Build users whose histories all differ, so that `Scripted` knows each target."""
    return leave_one_out(
        Ragged.from_rows([[i, (i + 1) % N_ITEMS, (i + 2) % N_ITEMS, i] for i in range(N_ITEMS)])
    )


def options(**changes: Any) -> TrainingConfig:
    values: dict[str, Any] = {
        "epochs": 4,
        "lr": 0.3,
        "batch_users": 8,
        "log_every": 3,
        "checkpoint_minutes": 0,
        "patience": 50,
    }
    return TrainingConfig(**values | changes)


def fit(
    run: Path,
    model: Toy | None = None,
    data: Split | None = None,
    *,
    resume: bool = False,
    progress: Quiet | None = None,
    **changes: Any,
) -> tuple[training.TrainingResult, Toy]:
    model = model or Toy()
    result = training.train(
        model,
        data or split(),
        options(**changes),
        seed=5,
        run=run,
        progress=progress or Quiet(),
        resume=resume,
    )
    return result, model


class Crash(Exception):
    pass


def crash_at(call: int) -> Callable[[int], None]:
    def check(calls: int) -> None:
        if calls == call:
            raise Crash

    return check


def assert_same_run(a: Path, b: Path) -> None:
    assert_same_training(a, b)
    timeless = [{k: v for k, v in r.items() if "second" not in k} for r in log(a, "valid")]
    assert timeless == [{k: v for k, v in r.items() if "second" not in k} for r in log(b, "valid")]


# -- what a run does -----------------------------------------------------------------------------


def test_trains_logs_step_0_and_keeps_the_best(tmp_run: Path) -> None:
    result, model = fit(tmp_run, epochs=15, lr=0.1)
    valid = {r["step"]: r["ndcg@10_masked"] for r in log(tmp_run, "valid")}
    assert next(iter(valid)) == 0 and result.untrained["ndcg@10_masked"] == valid[0]
    assert result.valid["ndcg@10_masked"] == max(valid.values()) > valid[0]
    best = min(step for step, score in valid.items() if score == max(valid.values()))
    assert result.best_step == best > 0
    tensors, metadata = load_tensors(tmp_run / "model.safetensors")
    assert metadata == {"step": str(best)}
    for name, tensor in trained_tensors(model).items():
        assert torch.equal(tensor, tensors[name])
    first, *_, last = losses(tmp_run)
    assert last[1] < first[1]
    assert result.stopped == "epochs" and result.tokens > 0


def test_train_lines_are_means_of_their_steps(tmp_path: Path) -> None:
    fit(tmp_path / "each", log_every=1, epochs=1)
    fit(tmp_path / "three", log_every=3, epochs=1)
    each = [loss for _, loss in losses(tmp_path / "each")]
    three = losses(tmp_path / "three")
    assert (len(each), [step for step, _ in three]) == (4, [3, 4])
    for number, (step, loss) in enumerate(three):
        assert loss == pytest.approx(np.mean(each[3 * number : step]))


def test_patience_stops_and_the_best_is_restored(tmp_run: Path) -> None:
    data = unique_histories()
    model = Scripted([6, 4, 2, 3, 5, 4, 1], data)
    result, model = fit(tmp_run, model, data, epochs=20, patience=3, batch_users=6)
    assert result.stopped == "patience"
    steps = [r["step"] for r in log(tmp_run, "valid")]
    assert len(steps) == 6 and result.best_step == steps[2] and result.steps == steps[5]
    assert load_tensors(tmp_run / "model.safetensors")[1] == {"step": str(steps[2])}
    assert result.valid["mrr"] == pytest.approx(1 / 2)


def test_repeats_hide_nothing_from_the_choice(tmp_run: Path) -> None:
    """The best step is that of the best masked score, though all that it ranks first is repeats."""
    data = unique_histories()

    class Repeats(Scripted):
        def scorer(self) -> Scorer:
            last, score = self.validations == 2, super().scorer()

            def marked(histories: Ragged) -> Tensor:
                scores = score(histories)
                for row, history in enumerate(rows_of(histories) if last else []):
                    scores[row, list(history)] = 3.0
                return scores

            return marked

    result, _ = fit(tmp_run, Repeats([4, 2, 1], data), data, epochs=2)
    plain, masked = ([r[k] for r in log(tmp_run, "valid")] for k in ("ndcg@10", "ndcg@10_masked"))
    assert np.argmax(plain) == 1 and np.argmax(masked) == 2
    assert result.best_step == result.steps and result.valid["ndcg@10"] == plain[2]
    assert result.selected_by == "ndcg@10_masked"


def test_equal_scores_keep_the_earlier_model(tmp_run: Path) -> None:
    data = unique_histories()
    result, _ = fit(tmp_run, Scripted([2], data), data, epochs=20, patience=2)
    assert (result.best_step, result.stopped) == (0, "patience")
    assert load_tensors(tmp_run / "model.safetensors")[1] == {"step": "0"}


def test_never_below_the_untrained_model(tmp_run: Path) -> None:
    data = unique_histories()
    result, model = fit(tmp_run, Scripted([1, 5], data), data, epochs=2)
    assert result.valid == result.untrained
    fresh = trained_tensors(Scripted([1], data))
    assert all(torch.equal(t, fresh[n]) for n, t in trained_tensors(model).items())


def test_max_steps_validates_and_saves(tmp_run: Path) -> None:
    result, _ = fit(tmp_run, max_steps=6, epochs=100)
    assert (result.steps, result.stopped) == (6, "max_steps")
    assert log(tmp_run, "valid")[-1]["step"] == 6
    assert (tmp_run / "state" / "step-00000006").is_dir()


def test_max_minutes_validates_and_saves(tmp_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr(training.time, "monotonic", lambda: 10.0 * next(clock))
    progress = Quiet()
    result, _ = fit(tmp_run, max_minutes=2, epochs=100, log_every=1, progress=progress)
    assert result.stopped == "max_minutes" and 120 <= result.seconds < 150
    assert log(tmp_run, "valid")[-1]["step"] == result.steps < 20
    # The time left is counted to the end of the budget, not to the last epoch.
    assert all(abs(total - result.steps) <= 1 for _, total in progress.steps)


def test_eval_every_and_the_last_steps_are_validated(tmp_run: Path) -> None:
    result, _ = fit(tmp_run, epochs=2, eval_every=0.7)
    epochs = [r["epoch"] for r in log(tmp_run, "valid")]
    assert epochs[0] == 0 and 0.7 <= epochs[1] < 1.1 and epochs[-1] == 2
    assert log(tmp_run, "valid")[-1]["step"] == result.steps


def test_validation_ranks_every_user_and_never_the_test_split(
    tmp_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Trap:
        def __getattribute__(self, name: str) -> Any:
            raise AssertionError(f"the test split was touched: {name}")

        def __len__(self) -> int:
            raise AssertionError("the test split was touched")

    data = split()
    seen: list[int] = []
    real = training.evaluate

    def spy(model: Any, histories: Ragged, targets: Any, **kwargs: Any) -> Any:
        assert histories is data.valid.histories and targets is data.valid.targets
        seen.append(len(histories))
        return real(model, histories, targets, **kwargs)

    monkeypatch.setattr(training, "evaluate", spy)
    trap: Any = Trap()
    fit(tmp_run, data=dataclasses.replace(data, test=trap))
    assert seen == [N_USERS] * 5


def test_batches_are_of_training_prefixes(tmp_run: Path) -> None:
    data = split()
    asked = []

    class Spy(Toy):
        def batches(self, sequences: Ragged, **kwargs: Any) -> TrainingBatches:
            asked.append(sequences)
            return super().batches(sequences, **kwargs)

    fit(tmp_run, Spy(), data)
    assert asked and all(sequences is data.train for sequences in asked)


def test_schedule() -> None:
    config = options(warmup=0.1)
    shares = [training._schedule(step, 100, config) for step in range(101)]
    assert shares[:10] == pytest.approx([(n + 1) / 10 for n in range(10)])
    assert shares[10] == 1.0 and shares[55] == pytest.approx(0.5) and shares[100] < 1e-9
    assert all(a > b for a, b in itertools.pairwise(shares[10:]))
    assert training._schedule(140, 100, config) == 0  # never up again past the plan
    constant = options(warmup=0.1, schedule="constant")
    assert [training._schedule(s, 100, constant) for s in (0, 9, 50, 100)] == [0.1, 1, 1, 1]
    assert training._schedule(0, 1, options(warmup=0)) == 1.0


def test_the_schedule_reaches_the_optimizer(tmp_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    real = torch.optim.AdamW.step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    config = options(max_steps=8, warmup=0.25)
    fit(tmp_run, max_steps=8, warmup=0.25)
    assert rates == pytest.approx([0.3 * training._schedule(n, 8, config) for n in range(8)])


def test_untrained_method(tmp_run: Path) -> None:
    result, _ = fit(tmp_run, Toy(stages=0))
    assert (result.steps, result.stopped, result.valid) == (0, "untrained", result.untrained)
    assert (tmp_run / "model.safetensors").is_file()
    again, _ = fit(tmp_run, Toy(stages=0), resume=True)
    assert again.valid == result.valid


def test_nothing_to_train_or_validate_on(tmp_run: Path) -> None:
    with pytest.raises(TrainingError, match="nothing to validate on"):
        fit(tmp_run, data=leave_one_out(Ragged.from_rows([[1, 2], [3]])))
    with pytest.raises(TrainingError, match="no user has two training events"):
        fit(tmp_run, data=leave_one_out(Ragged.from_rows([[1, 2, 3], [3, 4, 5]])))


# -- what goes wrong -----------------------------------------------------------------------------


class Poisoned(Toy):
    """A method whose loss, or only its gradient, is NaN or infinite at one call."""

    def __init__(self, call: int, where: str) -> None:
        super().__init__()
        self.call, self.where = call, where

    def loss(self, batch: Batch) -> Losses:
        losses = super().loss(batch)
        if self.calls != self.call:
            return losses
        if self.where == "gradient":
            zero = self.first.sum() * 0
            return Losses(losses.total + zero.sqrt(), losses.parts, 1, 1)
        bad = losses.total * math.nan
        return Losses(bad, {"rec": losses.parts["rec"], "bpc": bad.detach()}, 1, 1)


@pytest.mark.parametrize(
    ("where", "cause"), [("loss", "the loss part bpc"), ("gradient", "the gradient")]
)
def test_nan_stops_with_step_and_cause(tmp_run: Path, where: str, cause: str) -> None:
    model = Poisoned(7, where)
    with pytest.raises(TrainingError, match=f"^step 7: {cause} is not finite") as caught:
        fit(tmp_run, model)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert one_line(caught).endswith("lower training.lr")
    tensors, _ = load_tensors(tmp_run / "model.safetensors")
    assert all(torch.isfinite(t).all() for t in tensors.values())
    assert all(math.isfinite(loss) for _, loss in losses(tmp_run))
    # The step never reached the weights: going on without the poison is as if it never was.
    fit(tmp_run, resume=True)
    fit(tmp_run.parent / "clean")
    assert_same_run(tmp_run.parent / "clean", tmp_run)


def test_a_backbone_that_rounds_is_named_where_one_is_read(tmp_run: Path) -> None:
    class Reading(Poisoned):
        Config, uses_backbone, item_tensors = BaseModel, True, frozenset[str]()

    with pytest.raises(TrainingError, match=r"lower training\.lr, or use backbone\.dtype=float32$"):
        fit(tmp_run, Reading(7, "loss"))


def test_nan_scores_name_the_evaluation(tmp_run: Path) -> None:
    class Broken(Toy):
        def scorer(self) -> Scorer:
            return lambda h: torch.full((len(h), N_ITEMS), math.nan)

    with pytest.raises(TrainingError, match="NaN"):
        fit(tmp_run, Broken())


def test_a_full_disk_for_the_log_is_one_error(
    tmp_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.open

    def full(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if self.name == "metrics.jsonl" and "a" in mode:
            raise OSError(28, "No space left on device")
        return real(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl cannot be written.*No space left"):
        fit(tmp_run)


# -- resume --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train without a kill: 4 epochs of about 5 steps, not all of the same length."""
    run = tmp_path_factory.mktemp("whole") / "run"
    fit(run, batch_tokens=18)
    counts = {len(Toy().batches(split().train, **budget(epoch))) for epoch in range(4)}
    assert len(counts) > 1
    return run


def budget(epoch: int) -> dict[str, int]:
    return {"seed": 5, "epoch": epoch, "batch_users": 8, "batch_tokens": 18}


@pytest.mark.parametrize("call", [1, 2, 4, 6, 9, 13, 17])
def test_crash_and_resume_is_exact(whole: Path, tmp_run: Path, call: int) -> None:
    with pytest.raises(Crash):
        fit(tmp_run, Toy(on_loss=crash_at(call)), batch_tokens=18)
    progress = Quiet()
    result, model = fit(tmp_run, resume=True, batch_tokens=18, progress=progress)
    assert any(f"resuming at step {call - 1}" in line for line in progress.lines) == (call > 1)
    assert_same_run(whole, tmp_run)
    best = load_tensors(whole / "model.safetensors")[0]
    assert all(torch.equal(t, best[n]) for n, t in trained_tensors(model).items())
    assert result.steps == log(whole, "valid")[-1]["step"]


def test_crash_again_and_again(whole: Path, tmp_run: Path) -> None:
    for _ in range(30):
        try:
            fit(tmp_run, Toy(on_loss=crash_at(3)), resume=True, batch_tokens=18)
            break
        except Crash:
            continue
    else:
        raise AssertionError("no progress from crash to crash")
    assert_same_run(whole, tmp_run)


def test_rare_states_resume_exactly_too(tmp_path: Path) -> None:
    """Save states at validations only: a resumed run repeats the steps since the last one."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    fit(tmp_path / "a", checkpoint_minutes=60)
    with pytest.raises(Crash):
        fit(tmp_path / "b", Toy(on_loss=crash_at(7)), checkpoint_minutes=60)
    assert max(r["step"] for r in log(tmp_path / "b")) == 6
    progress = Quiet()
    fit(tmp_path / "b", resume=True, checkpoint_minutes=60, progress=progress)
    assert "resuming at step 4" in progress.lines[0]
    assert_same_run(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("moment", ["before the state", "before the best model"])
def test_crash_while_saving_a_validation(
    whole: Path, tmp_run: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "_save_state" if moment == "before the state" else "_save_best"
    real = getattr(training, name)

    best = int(load_tensors(whole / "model.safetensors")[1]["step"])

    def crash(run: Any, *args: Any) -> None:
        if run.counters.step == run.counters.best_step == best:
            raise Crash
        real(run, *args)

    with monkeypatch.context() as patch:
        patch.setattr(training, name, crash)
        with pytest.raises(Crash):
            fit(tmp_run, batch_tokens=18)
    fit(tmp_run, resume=True, batch_tokens=18)
    assert_same_run(whole, tmp_run)


def test_resume_skips_a_torn_state_and_torn_lines(whole: Path, tmp_run: Path) -> None:
    with pytest.raises(Crash):
        fit(tmp_run, Toy(on_loss=crash_at(9)), batch_tokens=18)
    newest = sorted((tmp_run / "state").glob("step-*"))[-1]
    (newest / "optimizer.safetensors").write_bytes(b"\x00" * 5)
    (tmp_run / "state" / ".step-00000099.part").mkdir()
    (tmp_run / "state" / ".step-00000099.part" / "counters.json").write_text("{")
    with (tmp_run / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "st')
    progress = Quiet()
    fit(tmp_run, resume=True, batch_tokens=18, progress=progress)
    assert "resuming at step 7" in progress.lines[0]
    assert_same_run(whole, tmp_run)


def test_all_states_torn_is_an_error_not_a_new_start(tmp_run: Path) -> None:
    fit(tmp_run, max_steps=4)
    before = (tmp_run / "metrics.jsonl").read_bytes()
    for state in (tmp_run / "state").glob("step-*"):
        (state / "counters.json").write_text('{"step": ')
    with pytest.raises(CheckpointError, match=r"counters\.json"):
        fit(tmp_run, resume=True, max_steps=4)
    assert (tmp_run / "metrics.jsonl").read_bytes() == before


def test_counters_of_another_version(tmp_run: Path) -> None:
    fit(tmp_run, max_steps=4)
    for state in (tmp_run / "state").glob("step-*"):
        counters = json.loads((state / "counters.json").read_text())
        (state / "counters.json").write_text(json.dumps(counters | {"horoscope": 1}))
    with pytest.raises(CheckpointError, match="another version"):
        fit(tmp_run, resume=True, max_steps=4)


def test_a_torn_best_model_is_reported_at_once(tmp_run: Path) -> None:
    with pytest.raises(Crash):
        fit(tmp_run, Toy(on_loss=crash_at(7)))
    (tmp_run / "model.safetensors").write_bytes(b"torn")
    calls = Toy()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        fit(tmp_run, calls, resume=True)
    assert calls.calls == 0


def test_resume_of_a_finished_training_changes_nothing(tmp_run: Path) -> None:
    result, _ = fit(tmp_run)
    files = {p: p.read_bytes() for p in tmp_run.rglob("*") if p.is_file()}
    files = {p: content for p, content in files.items() if "tensorboard" not in p.parts}
    again, _ = fit(tmp_run, Toy(on_loss=crash_at(1)), resume=True)
    assert dataclasses.replace(again, seconds=0) == dataclasses.replace(result, seconds=0)
    assert {p: p.read_bytes() for p in files} == files


def test_resume_with_a_larger_budget_goes_on(tmp_path: Path) -> None:
    fit(tmp_path / "long", max_steps=9, schedule="constant", warmup=0)
    fit(tmp_path / "short", max_steps=4, schedule="constant", warmup=0)
    result, _ = fit(tmp_path / "short", resume=True, max_steps=9, schedule="constant", warmup=0)
    assert (result.steps, result.stopped) == (9, "max_steps")
    assert_same_weights(tmp_path / "long", tmp_path / "short")


def test_a_new_training_forgets_the_old_log(tmp_run: Path) -> None:
    fit(tmp_run, max_steps=4)
    fit(tmp_run, max_steps=4)
    assert_no_step_twice(tmp_run)


def test_tensorboard_holds_no_step_twice(tmp_run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(Crash):
        fit(tmp_run, Toy(on_loss=crash_at(8)), checkpoint_minutes=60)
    time.sleep(1.1)  # TensorBoard orders files by the second in which they were begun
    fit(tmp_run, resume=True, checkpoint_minutes=60)
    events = EventAccumulator(str(tmp_run / "tensorboard")).Reload()
    steps = [e.step for e in events.Scalars("train/loss")]
    assert steps == [step for step, _ in losses(tmp_run)]
    assert [e.step for e in events.Scalars("valid/mrr")] == [
        r["step"] for r in log(tmp_run, "valid")
    ]


# -- stages --------------------------------------------------------------------------------------


def test_two_stages(tmp_run: Path) -> None:
    result, model = fit(tmp_run, Toy(stages=2), epochs=2, eval_every=0.5)
    per_epoch = len(model.batches(split().train, **budget(0) | {"batch_tokens": 8192}))
    assert result.steps == 4 * per_epoch
    epochs = [r["epoch"] for r in log(tmp_run, "valid")]
    second = epochs[epochs.index(2.0) + 1 :]
    assert second[0] < 1 and second[-1] == 2.0  # both stages ran their own two epochs
    assert not torch.equal(model.first, Toy().first), "restored: what is best of both stages"
    newest = sorted((tmp_run / "state").glob("step-*"))[-1]
    last = load_tensors(newest / "model.safetensors")[0]
    assert last["second"].abs().max() > 0 and torch.equal(last["first"], model.first)


def test_a_stage_starts_from_the_best_of_the_one_before(tmp_run: Path) -> None:
    data = unique_histories()
    # Stage 1 is best at its first validation, then loses patience; stage 2 betters it at its end.
    model = Scripted([9, 3, 5, 6, 4, 2], data, stages=2)
    result, _ = fit(tmp_run, model, data, epochs=9, max_steps=6, patience=2, batch_users=6)
    steps = [r["step"] for r in log(tmp_run, "valid")]
    first_best, stage_2 = steps[1], steps[3]
    assert (result.best_step, result.valid["mrr"]) == (steps[5], pytest.approx(1 / 2))
    assert result.steps == stage_2 + 6 and result.stopped == "max_steps"
    other = tmp_run.parent / "other"
    other.mkdir()
    fit(other, Scripted([9, 3], data), data, epochs=9, max_steps=first_best, batch_users=6)
    # `first` is not trained in stage 2: it still is what it was at the best step of stage 1.
    best = load_tensors(tmp_run / "model.safetensors")[0]
    one = Scripted([9, 3, 5, 6], data, stages=2)
    with pytest.raises(Crash):
        one.on_loss = crash_at(first_best + 1)
        fit(other, one, data, epochs=9, max_steps=6, patience=2, batch_users=6)
    assert torch.equal(best["first"], load_tensors(other / "model.safetensors")[0]["first"])


@pytest.mark.parametrize("call", [4, 9, 10, 14])
def test_resume_in_either_stage(tmp_path: Path, call: int) -> None:
    """Kill a run of 8 steps a stage; call 9 is the first of stage 2, which has no state yet."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    fit(tmp_path / "a", Toy(stages=2), epochs=2)
    assert log(tmp_path / "a", "valid")[-1]["step"] == 16
    with pytest.raises(Crash):
        fit(tmp_path / "b", Toy(stages=2, on_loss=crash_at(call)), epochs=2)
    fit(tmp_path / "b", Toy(stages=2), epochs=2, resume=True)
    assert_same_run(tmp_path / "a", tmp_path / "b")


class Ticking:
    """A clock that moves ten seconds each time it is read, twice for a step of training."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 10.0
        return self.now


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.time, "monotonic", Ticking())


@pytest.mark.usefixtures("ticking")
def test_stages_share_the_minutes(tmp_run: Path) -> None:
    progress = Quiet()
    result, model = fit(
        tmp_run, Toy(stages=2), max_minutes=2, epochs=100, log_every=1, progress=progress
    )
    assert result.stopped == "max_minutes" and result.seconds == 120
    (line,) = (line for line in progress.lines if "share of max_minutes" in line)
    assert line.startswith("stage 1: one ends") and "1.0 min, in epoch 2 of 100" in line
    assert result.steps == 12 and model.second.abs().max() > 0, "six steps of each stage"


@pytest.mark.usefixtures("ticking")
def test_what_a_short_stage_leaves_over_is_for_the_next(tmp_run: Path) -> None:
    result, model = fit(tmp_run, Pretrained(), max_minutes=10, epochs=100)
    first = 3 * 4
    assert isinstance(model, Pretrained) and model.started == [0, 1, 2]
    # What is done before each of its three epochs takes ten seconds too.
    assert (result.stopped, result.steps) == ("max_minutes", 57) and result.steps - first > 30
    assert result.seconds == 600


@pytest.mark.usefixtures("ticking")
@pytest.mark.parametrize(("minutes", "stopped"), [(4, "max_minutes"), (60, "patience")])
def test_a_stage_that_does_not_select_leaves_time_for_the_one_that_does(
    tmp_run: Path, minutes: float, stopped: str
) -> None:
    """The first stage would take all the time; the clock that cut it shaped the result."""
    data = unique_histories()

    class Long(Scripted):
        def stages(self, lr: float, weight_decay: float) -> list[Stage]:
            one, two = super().stages(lr, weight_decay)
            return [dataclasses.replace(one, select=False, epochs=50), two]

    model = Long([3, 5, 2, 4], data, stages=2)
    result, _ = fit(tmp_run, model, data, max_minutes=minutes, patience=1, epochs=100)
    assert result.stopped == stopped
    assert log(tmp_run, "valid")[-1]["step"] > 12 and result.valid["mrr"] == pytest.approx(1 / 2)


@pytest.mark.usefixtures("ticking")
@pytest.mark.parametrize("call", [3, 7, 9])
def test_shares_survive_a_kill(tmp_path: Path, call: int) -> None:
    whole, _ = fit(tmp_path / "a", Toy(stages=2), max_minutes=2, epochs=100)
    with pytest.raises(Crash):
        broken = Toy(stages=2, on_loss=crash_at(call))
        fit(tmp_path / "b", broken, max_minutes=2, epochs=100)
    again, _ = fit(tmp_path / "b", Toy(stages=2), max_minutes=2, epochs=100, resume=True)
    assert (again.steps, again.stopped) == (whole.steps, "max_minutes")
    assert_same_run(tmp_path / "a", tmp_path / "b")


# -- options of a stage --------------------------------------------------------------------------


class Pretrained(Toy):
    """A method whose first stage does not select, and sets ``epochs`` and ``begin_epoch``."""

    def __init__(self) -> None:
        super().__init__(stages=2)
        self.register_buffer("seen", torch.zeros(()))
        self.started: list[int] = []
        self.frozen: set[bool] = set()

    def stages(self, lr: float, weight_decay: float) -> list[Stage]:
        one, two = super().stages(lr, weight_decay)

        def begin(epoch: int) -> None:
            self.started.append(epoch)
            self.seen += 1

        one = dataclasses.replace(one, select=False, epochs=3, begin_epoch=begin, loss=self.watched)
        return [one, two]

    def watched(self, batch: Batch) -> Losses:
        self.frozen.add(self.second.requires_grad)
        return self.loss(batch)


def test_each_stage_has_its_own_schedule_under_max_minutes(
    tmp_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that the second stage starts at its peak rate and ends near zero with the minutes."""
    clock, rates = iter(range(10**6)), list[float]()
    monkeypatch.setattr(training.time, "monotonic", lambda: next(clock))
    rate = training._rate

    def watched(run: Any, planned: int) -> float:
        rates.append(rate(run, planned))
        return rates[-1]

    monkeypatch.setattr(training, "_rate", watched)
    result, _ = fit(tmp_run, Pretrained(), max_minutes=1, epochs=100, warmup=0.0)
    assert result.stopped == "max_minutes"
    second = rates[3 * len(Toy().batches(split().train, **budget(0) | {"batch_tokens": 8192})) :]
    assert len(second) > 4 and second[:2] == [1.0, pytest.approx(1.0, abs=0.2)]
    assert second == sorted(second, reverse=True) and second[-1] < 0.1


def test_a_stage_without_selection_keeps_its_last_weights(tmp_path: Path) -> None:
    model = Pretrained()
    result = training.train(
        model, split(), options(epochs=2, patience=99), seed=0, run=tmp_path, progress=Quiet()
    )
    assert model.started == [0, 1, 2] and model.frozen == {False}
    assert model.second.requires_grad, "given back after the stage"
    steps = [r["step"] for r in log(tmp_path, "valid")]
    per_epoch = result.steps // 5
    assert steps[:2] == [0, 3 * per_epoch], "validated once, at the end of the stage"
    tensors, _ = load_tensors(tmp_path / "model.safetensors")
    assert result.best_step >= 3 * per_epoch and float(tensors["seen"]) == 3


def test_resume_inside_an_epoch_does_not_begin_it_again(tmp_path: Path) -> None:
    whole = Pretrained()
    config = options(epochs=2, patience=99)
    training.train(whole, split(), config, seed=0, run=tmp_path / "a", progress=Quiet())

    class Killed(Exception):
        pass

    broken = Pretrained()

    def kill(calls: int) -> None:
        if calls == 4:
            raise Killed

    broken.on_loss = kill
    with pytest.raises(Killed):
        training.train(broken, split(), config, seed=0, run=tmp_path / "b", progress=Quiet())
    again = Pretrained()
    training.train(
        again, split(), config, seed=0, run=tmp_path / "b", progress=Quiet(), resume=True
    )
    a, b = (load_tensors(tmp_path / x / "model.safetensors")[0] for x in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


class Counting(Toy):
    """A method whose loss needs what calibration counted, which is in no state."""

    events = 1

    def calibrate(self, sequences: Ragged, histories: Ragged, targets: Any) -> None:
        self.events = len(sequences.values)

    def loss(self, batch: Batch) -> Losses:
        losses = super().loss(batch)
        return dataclasses.replace(losses, total=losses.total + self.first.sum() / self.events)


def test_resumed_inside_an_epoch_a_model_is_calibrated(tmp_path: Path) -> None:
    fit(tmp_path / "a", Counting())
    crash = Counting(on_loss=crash_at(3))
    with pytest.raises(Crash):
        fit(tmp_path / "b", crash, checkpoint_minutes=0)
    fit(tmp_path / "b", Counting(), resume=True)
    assert_same_run(tmp_path / "a", tmp_path / "b")


class Alternating(Toy):
    """A method with two updates a batch: the first table, then the second given the new first."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def stages(self, lr: float, weight_decay: float) -> list[Stage]:
        (stage,) = super().stages(lr, weight_decay)
        return [dataclasses.replace(stage, loss=self.both)]

    def both(self, batch: Batch) -> Iterator[Losses]:
        for parameter in (self.first, self.second):
            self.seen.append((self.first.detach().clone(), self.second.detach().clone()))
            parameter_only = {id(self.first): self.second, id(self.second): self.first}
            other = parameter_only[id(parameter)].detach()
            last = torch.from_numpy(batch.histories.values[batch.histories.offsets[1:] - 1]).long()
            scores = (parameter + other)[last]
            loss = nn.functional.cross_entropy(scores, torch.from_numpy(batch.targets).long())
            yield Losses(loss, {"rec": loss.detach()}, len(last), len(last))


def test_a_batch_may_ask_for_several_updates(tmp_path: Path) -> None:
    model = Alternating()
    result = training.train(
        model, split(), options(epochs=1), seed=0, run=tmp_path, progress=Quiet()
    )
    assert len(model.seen) == 2 * result.steps
    for number, ((a, b), (c, d)) in enumerate(itertools.pairwise(model.seen)):
        moved, same = ((a, c), (b, d)) if number % 2 == 0 else ((b, d), (a, c))
        assert not torch.equal(*moved) and torch.equal(*same), number


@pytest.mark.parametrize(("whole", "part"), [(5, 1), (1, 5)])
def test_a_stage_may_validate_another_recommender(tmp_path: Path, whole: int, part: int) -> None:
    """Check that scores of two recommenders are not compared, whichever are higher."""
    data = unique_histories()
    other = Scripted([part], data)

    class First(Scripted):
        def stages(self, lr: float, weight_decay: float) -> list[Stage]:
            one, two = super().stages(lr, weight_decay)
            return [dataclasses.replace(one, validates=other), two]

    model, seen = First([whole, 4], data, stages=2), Quiet()
    result = training.train(model, data, options(epochs=1), seed=0, run=tmp_path, progress=seen)
    scores = [r["ndcg@10"] for r in log(tmp_path, "valid")]
    assert (scores[1] > scores[0]) == (part < whole)
    half = result.steps // 2
    assert any(f"stage 2: two, from the best weights so far (step {half})" in x for x in seen.lines)
    assert result.valid["ndcg@10"] == scores[2] and result.best_step == result.steps


def test_only_scores_of_the_method_itself_are_hopeless(tmp_path: Path) -> None:
    """A search would else stop a method by the scores of another, and take them for its own."""
    data, asked = unique_histories(), []
    other = Scripted([1], data)

    class First(Scripted):
        def stages(self, lr: float, weight_decay: float) -> list[Stage]:
            one, two = super().stages(lr, weight_decay)
            return [dataclasses.replace(one, validates=other), two]

    def hopeless(score: float, number: int, done: float) -> bool:
        asked.append((number, done))
        return number == 1

    model = First([5, 9, 8, 7, 6], data, stages=2)
    result = training.train(
        model,
        data,
        options(epochs=4),
        seed=0,
        run=tmp_path,
        progress=Quiet(),
        hopeless=hopeless,
    )
    scores = [r["ndcg@10_masked"] for r in log(tmp_path, "valid")]
    assert len(scores) == 7 and result.stopped == "pruned"
    assert asked == [(0, pytest.approx(1 / 4)), (1, pytest.approx(1 / 2))]
    assert result.valid["ndcg@10_masked"] == max(scores[5:]) != max(scores)


def test_a_stage_may_have_a_patience_of_its_own(tmp_run: Path) -> None:
    """Check that stage 1 waits as long, and looks as often, as it asks for itself; not stage 2."""
    data = unique_histories()

    class Waits(Scripted):
        def stages(self, lr: float, weight_decay: float) -> list[Stage]:
            one, two = super().stages(lr, weight_decay)
            return [dataclasses.replace(one, patience=3, eval_every=0.5), two]

    model = Waits([9, 2, 3, 4, 5, 6, 7, 8, 9], data, stages=2)
    fit(tmp_run, model, data, epochs=9, patience=1)
    epochs = [r["epoch"] for r in log(tmp_run, "valid")]
    assert epochs == pytest.approx([0, 0.5, 1.0, 1.5, 2.0, 1.0])


def test_a_method_is_calibrated_before_each_validation(tmp_path: Path) -> None:
    """Check that the ranked recommender, the model or its replacement, is calibrated first."""
    data = unique_histories()
    calibrations: list[tuple[str, int]] = []

    class Tuned(Scripted):
        name = "model"

        def calibrate(self, sequences: Ragged, histories: Ragged, targets: Any) -> None:
            assert sequences is data.train and histories is data.valid.histories
            assert targets is data.valid.targets.values
            calibrations.append((self.name, self.calls))

        def stages(self, lr: float, weight_decay: float) -> list[Stage]:
            one, two = super().stages(lr, weight_decay)
            return [dataclasses.replace(one, validates=other), two]

    other = Tuned([1], data, stages=2)
    other.name = "other"
    model = Tuned([5, 4], data, stages=2)
    result = training.train(model, data, options(epochs=1), seed=0, run=tmp_path, progress=Quiet())
    half = result.steps // 2
    assert calibrations == [("model", 0), ("other", 0), ("model", 2 * half)]
    assert model.calls == 2 * half
