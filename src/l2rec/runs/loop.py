"""The one training loop: stages, validation on all users, early stopping, exact resume.

It knows methods through `l2rec.protocols` alone. Everything random is a function of
(seed, epoch, batch) or of the random state kept in each checkpoint, so a run that was killed and
resumed ends with the weights of a run that was not.
"""

from __future__ import annotations

__all__ = ["TrainingResult", "train"]

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from l2rec.config import TrainingConfig
from l2rec.data.splits import Split
from l2rec.disk import write_text
from l2rec.errors import CheckpointError, TrainingError
from l2rec.evaluation.ranking import evaluate
from l2rec.protocols import (
    Calibrated,
    EpochBatches,
    Losses,
    Progress,
    Recommender,
    Stage,
    Trainable,
    updates,
)
from l2rec.runs.checkpoint import (
    State,
    latest_state,
    load_tensors,
    load_trained,
    optimizer_tensors,
    restore_optimizer,
    save_tensors,
    trained_tensors,
    write_state,
)
from l2rec.runs.machine import peak_memory_mb

SELECT = "ndcg@10"


@dataclass
class _Counters:
    """Everything of the loop's state that is not a tensor. Saved as JSON."""

    stage: int = 0
    stage_start: int = 0
    """Steps of the stages before this one."""
    stage_seconds: float = 0.0
    """``seconds`` of the stages before this one."""
    step: int = 0
    """Steps of all stages."""
    epoch: int = 0
    """Of this stage, as are ``batch``, ``next_eval`` and ``bad``."""
    batch: int = 0
    """Batches of this epoch that are done."""
    next_eval: float = 0.0
    """Epochs at which the next validation is due."""
    best: float = -math.inf
    best_step: int = 0
    bad: int = 0
    """Validations since the best."""
    seconds: float = 0.0
    """Training time of all parts of this run, validations excluded."""
    eval_seconds: float = 0.0
    tokens: int = 0
    computed: int = 0


@dataclass(frozen=True)
class TrainingResult:
    """What the loop hands to the report. ``valid``: metrics of the best step on validation."""

    steps: int
    best_step: int
    valid: dict[str, float]
    untrained: dict[str, float]
    seconds: float
    eval_seconds: float
    tokens: int
    stopped: str


@dataclass
class _Window:
    """Sums since the last log line."""

    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0
    computed: int = 0
    loss: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)

    def add(self, done: list[Losses], seconds: float) -> None:
        """All updates of one batch: together one step."""
        self.steps += 1
        self.seconds += seconds
        for losses in done:
            self.tokens += losses.tokens
            self.computed += losses.computed_tokens
            self.loss += float(losses.total.detach())
            for name, part in losses.parts.items():
                self.parts[name] = self.parts.get(name, 0.0) + float(part)


@dataclass
class _Run:
    """One training in flight."""

    model: Any
    split: Split
    config: TrainingConfig
    seed: int
    folder: Path
    progress: Progress
    watch: Callable[[str, int, dict[str, float]], None]
    hopeless: Callable[[float], bool]
    pruned: bool = False
    counters: _Counters = field(default_factory=_Counters)
    window: _Window = field(default_factory=_Window)
    untrained: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)


def train(
    model: Trainable,
    split: Split,
    config: TrainingConfig,
    *,
    seed: int,
    run: Path,
    progress: Progress,
    resume: bool = False,
    hopeless: Callable[[float], bool] = lambda score: False,
) -> TrainingResult:
    """Train to early stopping; RUN/model.safetensors holds the best step at the end.

    ``hopeless`` is told the validation NDCG@10 of each validation that selects, and may end the
    run by saying True ("pruned").

    Raises:
        TrainingError: the loss became NaN or infinite (step and cause are named; the last good
            state stays), or there is nothing to train on.
        CheckpointError: the disk is full, or ``resume`` finds another model's state.
    """
    run.mkdir(parents=True, exist_ok=True)
    state = latest_state(run) if resume else None
    with _tensorboard(run, 0 if state is None else int(state.counters["step"]) + 1) as watch:
        return _train(_Run(model, split, config, seed, run, progress, watch, hopeless), state)


@contextmanager
def _tensorboard(run: Path, first: int) -> Iterator[Callable[[str, int, dict[str, float]], None]]:
    """Writes points to RUN/tensorboard, steps from ``first`` on anew. A full disk is reported by
    the files that matter, so it is no error here.
    """
    from torch.utils.tensorboard import SummaryWriter

    board = SummaryWriter(str(run / "tensorboard"), purge_step=first)

    def watch(kind: str, step: int, values: dict[str, float]) -> None:
        with suppress(OSError):
            for name, value in values.items():
                board.add_scalar(f"{kind}/{name}", value, step)

    try:
        yield watch
    finally:
        with suppress(OSError):
            board.close()


def _train(run: _Run, state: State | None) -> TrainingResult:
    torch.manual_seed(run.seed)
    stages = run.model.stages(run.config.lr, run.config.weight_decay)
    if state is None:
        _begin(run)
    else:
        _go_on(run, state)
    stopped = "untrained"
    for number in range(run.counters.stage, len(stages)):
        stage = stages[number]
        if number > run.counters.stage:
            _next_stage(run, number, stage, stages[number - 1])
        with _only(run.model, [p for g in stage.groups for p in g.parameters]) as parameters:
            stopped = _run_stage(run, stage, parameters, state)
        state = None
        if stopped in ("max_minutes", "pruned"):
            break
    if stages:
        _load_best(run)
    c = run.counters
    return TrainingResult(
        c.step, c.best_step, run.best, run.untrained, c.seconds, c.eval_seconds, c.tokens, stopped
    )


@contextmanager
def _only(model: nn.Module, parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Meanwhile no other parameter of the model takes a gradient."""
    trained = set(parameters)
    before = {p: p.requires_grad for p in model.parameters()}
    for parameter in before:
        parameter.requires_grad_(parameter in trained)
    try:
        yield parameters
    finally:
        for parameter, needed in before.items():
            parameter.requires_grad_(needed)


def _begin(run: _Run) -> None:
    (run.folder / "metrics.jsonl").unlink(missing_ok=True)
    run.untrained = run.best = _validate(run, 0.0)
    run.counters.best = run.untrained[SELECT]
    run.counters.next_eval = run.config.eval_every
    _keep_best(run)


def _go_on(run: _Run, state: State) -> None:
    saved = dict(state.counters)
    try:
        run.untrained, run.best = saved.pop("untrained"), saved.pop("best_metrics")
        run.window = _Window(**saved.pop("window"))
        run.counters = c = _Counters(**saved)
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{run.folder}/state was written by another version of l2rec ({error}); resume it "
            "with that version, or train into another folder"
        ) from error
    _trim_log(run.folder / "metrics.jsonl", c.step)
    run.progress.line(f"resuming at step {c.step}, epoch {c.epoch}")
    best = run.folder / "model.safetensors"
    if c.best_step == c.step:  # the kill may have come before this state became the best model
        save_tensors(best, state.model, step=str(c.step))
    else:
        load_tensors(best)  # a torn one is better known now than after hours of training


def _next_stage(run: _Run, number: int, stage: Stage, before: Stage) -> None:
    """From the best weights so far, with counters of its own."""
    _load_best(run)
    c = run.counters
    if stage.validates is not before.validates:
        c.best = -math.inf  # other scores than these
    c.stage, c.stage_start, c.stage_seconds = number, c.step, c.seconds
    c.epoch = c.batch = c.bad = 0
    c.next_eval = run.config.eval_every
    run.progress.line(f"stage {number + 1}: {stage.name}, from step {c.best_step}")


def _load_best(run: _Run) -> None:
    tensors, _ = load_tensors(run.folder / "model.safetensors")
    load_trained(run.model, tensors, str(run.folder))


def _run_stage(run: _Run, stage: Stage, parameters: list[nn.Parameter], state: State | None) -> str:
    """One stage to its end; returns why it ended."""
    config, c, model = run.config, run.counters, run.model
    epochs = stage.epochs or config.epochs
    optimizer = torch.optim.AdamW(
        [
            {"params": g.parameters, "lr": g.lr, "weight_decay": g.weight_decay, "peak": g.lr}
            for g in stage.groups
        ]
    )
    if state is not None:
        load_trained(model, state.model, f"{run.folder}/state")
        restore_optimizer(optimizer, state.optimizer)
        if over := _over(run):
            return over
    # Of epoch 0, in a resumed run too: epochs differ by some batches, the schedule must not.
    planned = epochs * len(_batches(run, stage, 0))
    if planned == 0:
        raise TrainingError("no user has two training events: there is nothing to train on")
    if config.max_steps is not None:
        planned = min(planned, config.max_steps)
    saved_at = time.monotonic()
    model.train()
    for epoch in range(c.epoch, epochs):
        c.epoch = epoch
        if stage.begin_epoch is not None and c.batch == 0:
            stage.begin_epoch(epoch)
        batches = _batches(run, stage, epoch)
        for batch in batches.iterate(c.batch):
            started = time.monotonic()
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * _rate(run, planned)
            done: list[Losses] = []
            for losses in updates(stage.loss(batch)):
                optimizer.zero_grad(set_to_none=True)
                losses.total.backward()
                norm = nn.utils.clip_grad_norm_(parameters, config.clip)
                _check_finite(run, losses, norm)
                optimizer.step()
                done.append(losses)
            c.step, c.batch = c.step + 1, c.batch + 1
            c.tokens += sum(losses.tokens for losses in done)
            c.computed += sum(losses.computed_tokens for losses in done)
            c.seconds += time.monotonic() - started
            run.window.add(done, time.monotonic() - started)
            position = epoch + c.batch / len(batches)
            if c.step % config.log_every == 0:
                _log_window(run, position, planned)
            over = _over(run)
            if epoch + 1 == epochs and c.batch == len(batches):
                over = over or "epochs"
            if over or (stage.select and position >= c.next_eval - 1e-9):
                _log_window(run, position, planned)
                better = _validate_and_count(run, position, stage)
                c.next_eval = position + config.eval_every
                over = over or _over(run)
                # The state first: from it the best model can be had again, not the other way.
                _save(run, optimizer)
                if better:
                    _keep_best(run)
                saved_at = time.monotonic()
                model.train()
            elif time.monotonic() - saved_at > 60 * config.checkpoint_minutes:
                _save(run, optimizer)
                saved_at = time.monotonic()
            if over:
                return over
        c.batch = 0
        c.epoch = epoch + 1
    return "epochs"


def _batches(run: _Run, stage: Stage, epoch: int) -> EpochBatches:
    return stage.batches(
        run.split.train,
        seed=run.seed,
        epoch=epoch,
        batch_users=run.config.batch_users,
        batch_tokens=run.config.batch_tokens,
    )


def _rate(run: _Run, planned: int) -> float:
    """`_schedule` at this step; under ``max_minutes`` the clock may run ahead of the steps, and
    the rate follows whichever is nearer to its end. A stage has the time that is left to it.
    """
    config, c = run.config, run.counters
    step = max(c.step - c.stage_start, int(planned * _time_over(run)))
    return _schedule(step, planned, config)


def _time_over(run: _Run) -> float:
    """Share of the time that ``max_minutes`` left to this stage that is over; 0 without a limit."""
    c, minutes = run.counters, run.config.max_minutes
    if minutes is None:
        return 0.0
    return (c.seconds - c.stage_seconds) / max(60 * minutes - c.stage_seconds, 1e-9)


def _schedule(step: int, total: int, config: TrainingConfig) -> float:
    """Share of the peak learning rate: linear warm-up, then cosine to zero or constant."""
    warm = max(1, round(config.warmup * total))
    if step < warm:
        return (step + 1) / warm
    if config.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, total - warm))))


def _over(run: _Run) -> str:
    """Why this stage ends before its epochs do, or an empty string."""
    config, c = run.config, run.counters
    if run.pruned:
        return "pruned"
    if config.max_steps is not None and c.step - c.stage_start >= config.max_steps:
        return "max_steps"
    if config.max_minutes is not None and c.seconds >= 60 * config.max_minutes:
        return "max_minutes"
    return "patience" if c.bad >= config.patience else ""


def _check_finite(run: _Run, losses: Losses, norm: torch.Tensor) -> None:
    if torch.isfinite(losses.total) and torch.isfinite(norm):
        return
    bad = [name for name, part in losses.parts.items() if not torch.isfinite(part)]
    cause = f"the loss part {', '.join(bad)}" if bad else "the gradient"
    raise TrainingError(
        f"step {run.counters.step + 1}: {cause} is not finite (gradient norm {float(norm):.3g}); "
        f"the best model so far (step {run.counters.best_step}) and the last state are kept; "
        "lower training.lr, or use backbone.dtype=float32"
    )


# -- validation and checkpoints ------------------------------------------------------------------


def _validate(run: _Run, position: float, validated: Recommender | None = None) -> dict[str, float]:
    split, c = run.split, run.counters
    started = time.monotonic()
    if not len(split.users):
        raise TrainingError("no user has three events: there is nothing to validate on")
    ranked = run.model if validated is None else validated
    if isinstance(ranked, Calibrated):
        ranked.calibrate(split.train, split.valid_histories, split.valid_targets)
    result = evaluate(
        ranked,
        split.valid_histories,
        split.valid_targets,
        users=split.users,
        progress=lambda done: run.progress.validating(done, len(split.users)),
    )
    c.eval_seconds += time.monotonic() - started
    metrics = result.metrics()
    _log(run, {"event": "valid", "step": c.step, "epoch": round(position, 4), **metrics})
    run.watch("valid", c.step, metrics)
    run.progress.line(
        f"validation at step {c.step} (epoch {position:.2f}): "
        f"recall@10 {metrics['recall@10']:.4f}  ndcg@10 {metrics[SELECT]:.4f}  "
        f"masked {metrics[SELECT + '_masked']:.4f}" + ("  (untrained)" if c.step == 0 else "")
    )
    return metrics


def _validate_and_count(run: _Run, position: float, stage: Stage) -> bool:
    """Validate; True if the model is the best so far, or if its stage keeps the last."""
    _tell_cost(run, position)
    metrics = _validate(run, position, stage.validates)
    c = run.counters
    run.pruned = stage.select and run.hopeless(metrics[SELECT])
    if metrics[SELECT] > c.best or not stage.select:
        c.best, c.best_step, c.bad, run.best = metrics[SELECT], c.step, 0, metrics
        return True
    c.bad += 1
    return False


def _keep_best(run: _Run) -> None:
    save_tensors(
        run.folder / "model.safetensors", trained_tensors(run.model), step=str(run.counters.step)
    )


def _save(run: _Run, optimizer: torch.optim.Optimizer) -> None:
    counters = {
        **asdict(run.counters),
        "window": asdict(run.window),
        "untrained": run.untrained,
        "best_metrics": run.best,
    }
    write_state(
        run.folder,
        run.counters.step,
        State(trained_tensors(run.model), optimizer_tensors(optimizer), counters),
    )


# -- logs ----------------------------------------------------------------------------------------


def _tell_cost(run: _Run, position: float) -> None:
    """One line on what training has cost so far: step time, rate, padding, memory."""
    c = run.counters
    run.progress.line(
        f"epoch {position:.2f}: {c.step} steps in {c.seconds / 60:.1f} min, "
        f"{c.seconds / max(c.step, 1):.2f} s/step, "
        f"{c.tokens / max(c.seconds, 1e-9):,.0f} tokens/s, "
        f"{c.tokens / max(c.computed, 1):.1%} real tokens, peak memory {peak_memory_mb():,.0f} MB"
    )


def _log_window(run: _Run, position: float, planned: int) -> None:
    c, window, run.window = run.counters, run.window, _Window()
    if not window.steps:
        return
    loss, rate = window.loss / window.steps, window.tokens / max(window.seconds, 1e-9)
    parts = {name: value / window.steps for name, value in window.parts.items()}
    step_seconds = window.seconds / window.steps
    real, memory = window.tokens / max(window.computed, 1), peak_memory_mb()
    _log(
        run,
        {
            "event": "train",
            "step": c.step,
            "epoch": round(position, 4),
            "loss": loss,
            "parts": parts,
            "tokens_per_second": rate,
            "step_seconds": step_seconds,
            "real_tokens": real,
            "peak_memory_mb": memory,
            "seconds": c.seconds,
        },
    )
    run.watch("train", c.step, {**parts, "loss": loss, "tokens_per_second": rate})
    run.progress.training(
        position,
        c.step,
        _last_step(run, planned),
        f"loss {loss:.3f}  {rate:,.0f} tokens/s  {step_seconds:.2f} s/step  real {real:.0%}  "
        f"{memory:,.0f} MB",
    )


def _last_step(run: _Run, planned: int) -> int:
    """The step this stage will end at, as far as is known now: for the time that is left."""
    c, over = run.counters, _time_over(run)
    last = c.stage_start + planned
    if over > 0:
        last = min(last, c.stage_start + round((c.step - c.stage_start) / over))
    return max(last, c.step)


def _log(run: _Run, record: dict[str, Any]) -> None:
    try:
        with (run.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise CheckpointError(f"{run.folder}/metrics.jsonl cannot be written: {error}") from error


def _trim_log(path: Path, step: int) -> None:
    """Forget lines later than the state that a run goes on from: they will come again."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        with suppress(ValueError):  # the line that a kill or a full disk tore
            if json.loads(line)["step"] <= step:
                kept.append(f"{line}\n")
    write_text(path, "".join(kept))
