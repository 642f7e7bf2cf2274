"""The one training loop: stages, validation on all users, early stopping, exact resume.

    train          all stages in turn, each from the best weights so far
    _train_stage   the loop itself: step, log, validate, save
    try_steps      some steps and nothing else, to see what they take

Methods are known through `l2rec.protocols` alone. All randomness is a function of
(seed, epoch, batch) or of the random state saved in each checkpoint, so a run that is killed and
resumed ends with the same weights as one that is not.

Several processes run it in step (`l2rec.runs.launch`): each has its rows of a batch, all have the
mean loss and the same weights, the first writes, and its clock counts.

One rule chooses the best step of every method: NDCG@10 on validation, the history masked
(`SELECT`). What a method that compares vectors says of items the user already has hides what it
knows of the next one; repeats are the business of a blend (`l2rec.modules.cooccurrence.Blend`).
Validations print NDCG@10 of both kinds.

``max_minutes`` is shared among stages: one may use the time that is left, divided by the number of
stages left, itself included. None uses up the clock of those after it, and what a stage that ends
early leaves over is shared among them.
"""

from __future__ import annotations

__all__ = [
    "SELECT",
    "Hopeless",
    "TrainingResult",
    "gradients_only_for",
    "never_hopeless",
    "train",
    "try_steps",
    "validation_of",
]

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from l2rec.config import TrainingConfig
from l2rec.data.batches import Batch
from l2rec.data.splits import Split
from l2rec.disk import write_text
from l2rec.errors import CheckpointError, TrainingError
from l2rec.evaluation.ranking import Evaluation, evaluate
from l2rec.modules import processes
from l2rec.protocols import (
    Calibrated,
    EpochBatches,
    Leaky,
    Losses,
    Method,
    Progress,
    Recommender,
    Stage,
    Trainable,
    updates,
)
from l2rec.runs import launch
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
from l2rec.runs.numbers import UNTRAINED
from l2rec.runs.trackers import Points, tracking

SELECT = "ndcg@10_masked"
"""Validation metric that chooses the best step."""
SELECT_EARLIER = "ndcg@10"
"""The metric of runs that earlier versions began: they go on with it."""

Averaged = Callable[[Tensor], Tensor]
"""A loss -> the same, but its gradients will be the means over all processes."""
Hopeless = Callable[[float, int, float], bool]
"""Score of a validation, its number, share of its stage that is done -> whether to end the run."""


def never_hopeless(score: float, number: int, done: float) -> bool:
    """Go on, whatever the score."""
    return False


@dataclass
class _Counters:
    """The loop's state besides tensors; saved as JSON, so that names are part of the format."""

    stage: int = 0
    stage_start: int = 0
    """Steps of the stages before this one."""
    stage_seconds: float = 0.0
    """``seconds`` of the stages before this one."""
    step: int = 0
    """Steps of all stages."""
    epoch: int = 0
    """Epoch of this stage, from 0."""
    batch: int = 0
    """Batches done in this epoch."""
    next_eval: float = 0.0
    """Epochs of this stage at which the next validation is due."""
    select: str = SELECT
    """Metric that chooses the best step of this run."""
    best: float = -math.inf
    """Highest score in ``select`` so far."""
    best_step: int = 0
    bad: int = 0
    """Validations of this stage since the best one."""
    selections: int = 0
    """Validations so far of the method itself that choose the best step, that of the untrained
    model not counted."""
    cut: bool = False
    """Whether ``max_minutes`` ended a stage before this one."""
    seconds: float = 0.0
    """Training time of the run, earlier processes included, validations excluded."""
    eval_seconds: float = 0.0
    tokens: int = 0
    """Tokens passed through the backbone, without padding."""
    computed: int = 0
    """Tokens computed, with padding."""


@dataclass(frozen=True)
class TrainingResult:
    """Outcome of a training, for the report."""

    steps: int
    best_step: int
    valid: dict[str, float]
    """Validation metrics of the best step."""
    untrained: dict[str, float]
    """Validation metrics before the first step."""
    seconds: float
    """Training time, validations excluded."""
    eval_seconds: float
    """Validation time."""
    tokens: int
    """Tokens passed through the backbone, without padding."""
    stopped: str
    """Reason of the end: epochs, patience, max_steps, max_minutes (also where it ended a stage
    before the last one), pruned or untrained."""
    selected_by: str = SELECT
    """Validation metric that chose the best step."""


@dataclass
class _Window:
    """Sums over the steps since the last log line; saved with the counters."""

    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0
    computed: int = 0
    loss: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)

    def add(self, done: _Done) -> None:
        """Add one step."""
        self.steps += 1
        self.seconds += done.seconds
        self.tokens += done.tokens
        self.computed += done.computed
        self.loss += done.loss
        for name, part in done.parts.items():
            self.parts[name] = self.parts.get(name, 0.0) + part


@dataclass
class _Done:
    """What one step did: all updates of one batch, in all processes."""

    seconds: float = 0.0
    tokens: int = 0
    computed: int = 0
    loss: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)

    def add(self, losses: Losses, weight: float) -> None:
        """Add an update, whose loss has this weight among the processes'."""
        self.tokens += losses.tokens
        self.computed += losses.computed_tokens
        self.loss += weight * float(losses.total.detach())
        for name, part in losses.parts.items():
            self.parts[name] = self.parts.get(name, 0.0) + weight * float(part)

    def of_all(self) -> _Done:
        """Put together what the processes did: mean losses, sums of tokens, the first's clock."""
        world = processes.current()
        if world.size == 1:
            return self
        own = [self.seconds * world.main, self.tokens, self.computed, self.loss / world.size]
        own += [self.parts[name] / world.size for name in sorted(self.parts)]
        seconds, tokens, computed, loss, *parts = world.total(np.array(own)).tolist()
        return _Done(
            seconds,
            round(tokens),
            round(computed),
            loss,
            dict(zip(sorted(self.parts), parts, strict=True)),
        )


@dataclass
class _Run:
    """A training run: its inputs, and its state so far."""

    model: Any
    split: Split
    config: TrainingConfig
    seed: int
    folder: Path
    progress: Progress
    points: Points
    hopeless: Hopeless
    start: str = UNTRAINED
    """What the model is called before the first step."""
    pruned: bool = False
    stages: int = 1
    """Number of stages of the method."""
    counters: _Counters = field(default_factory=_Counters)
    window: _Window = field(default_factory=_Window)
    untrained: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    saved_at: float = 0.0
    """Clock time of the last saved state."""


def train(
    model: Trainable,
    split: Split,
    config: TrainingConfig,
    *,
    seed: int,
    run: Path,
    progress: Progress,
    resume: bool = False,
    hopeless: Hopeless = never_hopeless,
    start: str = UNTRAINED,
) -> TrainingResult:
    """Train to early stopping; the model and RUN/model.safetensors then hold the best step.

    ``hopeless`` receives the score that selects (`SELECT`) of each validation of the method itself
    by a stage that does, never that of another recommender (`Stage.validates`): its number, from
    0, earlier processes included, and how much of the stage is done, from 0 to 1. If it returns
    True, the run ends ("pruned"). ``start``: what the model is called before the first step.

    Raises:
        TrainingError: the loss became NaN or infinite (step and cause are named; the last good
            state stays), or there is nothing to train or validate on.
        CheckpointError: the disk is full, or ``resume`` finds another model's state.
    """
    run.mkdir(parents=True, exist_ok=True)
    state = latest_state(run) if resume else None
    first = 0 if state is None else int(state.counters["step"]) + 1
    world = processes.current()
    if world.from_main(lambda: first) != first:
        raise CheckpointError(f"{run} is not one folder: all processes need it on a shared disk")
    options = config.model_dump(mode="json") | {"seed": seed, "method": type(model).__name__}
    with tracking(config.tracker, run, first, options) as points:
        return _train_stages(
            _Run(model, split, config, seed, run, progress, points, hopeless, start), state
        )


# -- stages --------------------------------------------------------------------------------------


def _train_stages(run: _Run, state: State | None) -> TrainingResult:
    """Start or resume the run, train the stages that are left, restore the best weights."""
    torch.manual_seed(run.seed)
    stages = run.model.stages(run.config.lr, run.config.weight_decay)
    run.stages = len(stages)
    _leak(run)
    if state is None:
        _start(run)
        if stages:
            run.counters.next_eval = _eval_every(run, stages[0])
            if stages[0].validates is not None:  # scores of another recommender than this one
                run.counters.best = -math.inf
    else:
        _resume(run, state)
    stopped = "untrained"
    first = run.counters.stage
    for number in range(first, len(stages)):
        stage = stages[number]
        if number > first:
            _begin_stage(run, number, stage, stages[number - 1])
        with gradients_only_for(run.model, stage):
            state_of_stage = state if number == first else None
            if state_of_stage is not None:  # before the processes compare their weights
                load_trained(run.model, state_of_stage.model, f"{run.folder}/state")
                _calibrate(run.model, run.split)  # what the state does not hold
            with launch.averaging(run.model) as averaged:
                stopped = _train_stage(run, stage, state_of_stage, averaged)
        if stopped == "pruned":
            break
        if stopped == "max_minutes" and number + 1 < len(stages):
            _cut(run, stage)
    if stages:
        _load_best(run)
    c = run.counters
    return TrainingResult(
        steps=c.step,
        best_step=c.best_step,
        valid=run.best,
        untrained=run.untrained,
        seconds=c.seconds,
        eval_seconds=c.eval_seconds,
        tokens=c.tokens,
        stopped="max_minutes" if c.cut and stopped != "pruned" else stopped,
        selected_by=c.select,
    )


def _start(run: _Run) -> None:
    """Validate the model of step 0: the score to beat."""
    if processes.current().main:
        (run.folder / "metrics.jsonl").unlink(missing_ok=True)
    run.untrained = run.best = _validate(run, 0.0)
    run.counters.best = run.untrained[run.counters.select]
    _save_best(run)


def _resume(run: _Run, state: State) -> None:
    """Take over the counters of a state, and bring log and best model back to its step."""
    saved = dict(state.counters)
    try:
        run.untrained, run.best = saved.pop("untrained"), saved.pop("best_metrics")
        run.window = _Window(**saved.pop("window"))
        run.counters = c = _Counters(**{"select": SELECT_EARLIER} | saved)
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{run.folder}/state was written by another version of l2rec ({error}); resume it "
            "with that version, or train into another folder"
        ) from error
    world = processes.current()
    if world.main:
        _trim_log(run.folder / "metrics.jsonl", c.step)
    run.progress.line(f"resuming at step {c.step}, epoch {c.epoch}")
    best = run.folder / "model.safetensors"
    if c.best_step == c.step:  # the kill may have come before this state became the best model
        if world.main:
            save_tensors(best, state.model, step=str(c.step))
    else:
        load_tensors(best)  # a torn file is reported now, not after hours of training


def _begin_stage(run: _Run, number: int, stage: Stage, before: Stage) -> None:
    """Restore the best weights so far and reset the counters of a stage."""
    _load_best(run)
    c = run.counters
    if stage.validates is not before.validates:
        c.best = -math.inf  # scores of another recommender do not compare with this one's
    c.stage, c.stage_start, c.stage_seconds = number, c.step, c.seconds
    c.epoch = c.batch = c.bad = 0
    c.next_eval = _eval_every(run, stage)
    run.progress.line(
        f"stage {number + 1}: {stage.name}, from the best weights so far (step {c.best_step})"
    )


def _cut(run: _Run, stage: Stage) -> None:
    """Note that a stage before the last one ended with its share of the time."""
    c = run.counters
    c.cut = True
    run.progress.line(
        f"stage {c.stage + 1}: {stage.name} ends with its share of max_minutes, "
        f"{(c.seconds - c.stage_seconds) / 60:.1f} min, in epoch {c.epoch + 1} of "
        f"{_epochs(run, stage)}; the rest is for the stages after it"
    )


@contextmanager
def gradients_only_for(model: nn.Module, stage: Stage) -> Iterator[None]:
    """Freeze all parameters that the stage does not train; restore their flags at the end."""
    trained = {p for group in stage.groups for p in group.parameters}
    before = {p: p.requires_grad for p in model.parameters()}
    for parameter in before:
        parameter.requires_grad_(parameter in trained)
    try:
        yield
    finally:
        for parameter, needed in before.items():
            parameter.requires_grad_(needed)


# -- one stage -----------------------------------------------------------------------------------


def _train_stage(run: _Run, stage: Stage, state: State | None, averaged: Averaged) -> str:
    """Train one stage to its end and return why it ended."""
    optimizer = _optimizer(stage)
    if state is not None:
        restore_optimizer(optimizer, state.optimizer)
        if reached := _limit_reached(run, stage):
            return reached
    planned = _planned_steps(run, stage)
    run.saved_at = time.monotonic()
    run.model.train()
    for batch, position, last in _batches_left(run, stage):
        _step(run, stage, batch, optimizer, planned, averaged)
        ended = _limit_reached(run, stage) or ("epochs" if last else "")
        validating = bool(ended) or _validation_due(run, stage, position)
        if validating or run.counters.step % run.config.log_every == 0:
            _log_steps(run, position, planned)
        if validating:
            better = _validate_stage(run, stage, position, planned)
            ended = ended or _limit_reached(run, stage)
            _save_state(run, optimizer)  # first: the best model can be restored from it
            if better:
                _save_best(run)
        elif processes.current().main and _state_due(run):
            _save_state(run, optimizer)
        if ended:
            return ended
    return "epochs"


def _optimizer(stage: Stage) -> torch.optim.AdamW:
    """Build AdamW over the stage's groups; ``peak`` is the learning rate before the schedule."""
    return torch.optim.AdamW(
        [
            {"params": g.parameters, "lr": g.lr, "weight_decay": g.weight_decay, "peak": g.lr}
            for g in stage.groups
        ],
        fused=True,  # one pass over the memory of large item tables instead of ten
    )


def _planned_steps(run: _Run, stage: Stage) -> int:
    """Return the length of the schedule in steps.

    Epochs may differ by a few batches; epoch 0 counts for all, so that a resumed run has the
    same schedule.
    """
    planned = _epochs(run, stage) * len(_batches(run, stage, 0))
    if planned == 0:
        raise TrainingError("no user has two training events: there is nothing to train on")
    return planned if run.config.max_steps is None else min(planned, run.config.max_steps)


def _epochs(run: _Run, stage: Stage) -> int:
    return stage.epochs or run.config.epochs


def _patience(run: _Run, stage: Stage) -> int:
    return stage.patience or run.config.patience


def _eval_every(run: _Run, stage: Stage) -> float:
    return stage.eval_every or run.config.eval_every


def _batches(run: _Run, stage: Stage, epoch: int) -> EpochBatches:
    return stage.batches(
        run.split.train,
        seed=run.seed,
        epoch=epoch,
        batch_users=run.config.batch_users,
        batch_tokens=run.config.batch_tokens,
    )


def _batches_left(run: _Run, stage: Stage) -> Iterator[tuple[Batch, float, bool]]:
    """Yield the batches from where the counters stand (`_step` moves them) to the stage's end.

    Each comes with the epochs done after it, a fraction, and whether it is the last.
    """
    c, epochs = run.counters, _epochs(run, stage)
    for epoch in range(c.epoch, epochs):
        if stage.begin_epoch is not None and c.batch == 0:
            _begin_epoch(run, stage.begin_epoch, epoch)
        batches = _batches(run, stage, epoch)
        for done, batch in enumerate(batches.iterate(c.batch), start=c.batch + 1):
            last = epoch + 1 == epochs and done == len(batches)
            yield batch, epoch + done / len(batches), last
        c.epoch, c.batch = epoch + 1, 0


def _begin_epoch(run: _Run, begin: Callable[[int], None], epoch: int) -> None:
    """Do what a stage does before an epoch, such as encoding all items; it is training time."""
    started = time.monotonic()
    begin(epoch)
    run.counters.seconds += _Done(time.monotonic() - started).of_all().seconds


def _limit_reached(run: _Run, stage: Stage) -> str:
    """Return the limit that ends this stage before its epochs do, or an empty string."""
    config, c = run.config, run.counters
    if run.pruned:
        return "pruned"
    if config.max_steps is not None and c.step - c.stage_start >= config.max_steps:
        return "max_steps"
    if _time_used(run) >= 1:
        return "max_minutes"
    return "patience" if c.bad >= _patience(run, stage) else ""


# -- step ----------------------------------------------------------------------------------------


def _step(
    run: _Run,
    stage: Stage,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    planned: int,
    averaged: Averaged,
) -> None:
    """Make the updates that the loss of one batch asks for, and count them as one step."""
    started = time.monotonic()
    share = _rate(run, planned)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share
    c, done = run.counters, _Done()
    draw = (run.seed, c.step)
    with launch.dealt(batch, gather=run.config.gather_negatives, draw=draw) as (rows, weight):
        for losses in updates(stage.loss(rows)):
            _update(run, losses, averaged(weight * losses.total), optimizer)
            done.add(losses, weight)
    done.seconds = time.monotonic() - started
    done = done.of_all()
    c.step, c.batch, c.seconds = c.step + 1, c.batch + 1, c.seconds + done.seconds
    c.tokens += done.tokens
    c.computed += done.computed
    run.window.add(done)


def try_steps(
    model: Trainable,
    split: Split,
    config: TrainingConfig,
    stage: Stage,
    batches: Iterable[Batch],
    *,
    progress: Progress,
) -> Iterator[float]:
    """Take one step of a stage with each batch, and yield its seconds; nothing is written."""
    run = _Run(model, split, config, 0, Path(), progress, lambda *_: None, never_hopeless)
    optimizer = _optimizer(stage)
    planned = _planned_steps(run, stage)
    with gradients_only_for(run.model, stage):
        run.model.train()
        for batch in batches:
            before = run.counters.seconds
            _step(run, stage, batch, optimizer, planned, lambda total: total)
            yield run.counters.seconds - before


def _update(run: _Run, losses: Losses, total: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Make one update of the weights, gradients clipped to ``training.clip``.

    total: what is differentiated, the losses' own as a part of all processes'.
    """
    optimizer.zero_grad(set_to_none=True)
    total.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, run.config.clip)
    _check_finite(run, losses, norm)
    optimizer.step()


def _check_finite(run: _Run, losses: Losses, norm: torch.Tensor) -> None:
    """Raise TrainingError before a loss or gradient that is not finite reaches the weights."""
    if torch.isfinite(losses.total) and torch.isfinite(norm):
        return
    bad = [name for name, part in losses.parts.items() if not torch.isfinite(part)]
    cause = f"the loss part {', '.join(bad)}" if bad else "the gradient"
    rounds = isinstance(run.model, Method) and run.model.uses_backbone
    raise TrainingError(
        f"step {run.counters.step + 1}: {cause} is not finite (gradient norm {float(norm):.3g}); "
        f"the best model so far (step {run.counters.best_step}) and the last state are kept; "
        f"lower training.lr{', or use backbone.dtype=float32' if rounds else ''}"
    )


def _rate(run: _Run, planned: int) -> float:
    """Return the share of the peak learning rate at this step of the stage.

    Under ``max_minutes``, the schedule follows whichever is nearer to its end: the planned steps,
    or this stage's share of the time.
    """
    config, c = run.config, run.counters
    step = max(c.step - c.stage_start, int(planned * _time_used(run)))
    return _schedule(step, planned, config)


def _time_used(run: _Run) -> float:
    """Return how much of its share of ``max_minutes`` this stage has used, 1 for all; else 0."""
    c, minutes = run.counters, run.config.max_minutes
    if minutes is None:
        return 0.0
    given = (60 * minutes - c.stage_seconds) / (run.stages - c.stage)
    return (c.seconds - c.stage_seconds) / max(given, 1e-9)


def _schedule(step: int, total: int, config: TrainingConfig) -> float:
    """Return a share of the peak rate: linear warm-up, then cosine to zero or constant."""
    warm = max(1, round(config.warmup * total))
    if step < warm:
        return (step + 1) / warm
    if config.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, total - warm))))


# -- validate ------------------------------------------------------------------------------------


def _validation_due(run: _Run, stage: Stage, position: float) -> bool:
    return stage.select and position >= run.counters.next_eval - 1e-9


def _validate_stage(run: _Run, stage: Stage, position: float, planned: int) -> bool:
    """Validate; return whether to keep these weights: the best so far, or of no selection."""
    _print_cost(run, position)
    metrics = _validate(run, position, stage.validates)
    run.model.train()
    c = run.counters
    score = metrics[c.select]
    c.next_eval = position + _eval_every(run, stage)
    if stage.select and stage.validates is None:
        done = max((c.step - c.stage_start) / planned, _time_used(run))
        run.pruned = run.hopeless(score, c.selections, min(done, 1.0))
        c.selections += 1
    if score > c.best or not stage.select:
        c.best, c.best_step, c.bad, run.best = score, c.step, 0, metrics
        return True
    c.bad += 1
    return False


def _validate(run: _Run, position: float, validated: Recommender | None = None) -> dict[str, float]:
    """Rank the validation item of every user, by the model unless ``validated`` replaces it."""
    split, c = run.split, run.counters
    started = time.monotonic()
    if not len(split.valid):
        raise TrainingError("there is nothing to validate on: no user has enough events")
    ranked = run.model if validated is None else validated
    result = validation_of(
        ranked, split, lambda done: run.progress.validating(done, len(split.valid))
    )
    c.eval_seconds += time.monotonic() - started
    metrics = result.metrics()
    _log_validation(run, position, metrics)
    return metrics


def validation_of(
    ranked: Recommender, split: Split, progress: Callable[[int], None] | None = None
) -> Evaluation:
    """Calibrate what is calibrated on validation, and rank every validation item."""
    _calibrate(ranked, split)
    return evaluate(
        ranked,
        split.valid.histories,
        split.valid.targets,
        users=split.valid.users,
        progress=progress,
    )


def _calibrate(model: Recommender, split: Split) -> None:
    if isinstance(model, Calibrated):
        model.calibrate(split.train, *split.valid.pairs())


def _leak(run: _Run) -> None:
    """Give held-out items to a method whose options ask for them, with a warning."""
    if isinstance(run.model, Leaky) and run.model.leaks:
        run.progress.line(
            f"warning: {run.model.leaks}: this training is given test items, as published; its "
            "scores are not to be compared with any other's"
        )
        run.model.leak(run.split.whole())


# -- save ----------------------------------------------------------------------------------------


def _save_best(run: _Run) -> None:
    """Write the present weights to RUN/model.safetensors."""
    if processes.current().main:
        path, step = run.folder / "model.safetensors", str(run.counters.step)
        save_tensors(path, trained_tensors(run.model), step=step)


def _load_best(run: _Run) -> None:
    """Load RUN/model.safetensors into the model."""
    processes.current().barrier()  # it is written
    tensors, _ = load_tensors(run.folder / "model.safetensors")
    load_trained(run.model, tensors, str(run.folder))


def _state_due(run: _Run) -> bool:
    return time.monotonic() - run.saved_at > 60 * run.config.checkpoint_minutes


def _save_state(run: _Run, optimizer: torch.optim.Optimizer) -> None:
    """Write a state to resume from."""
    if not processes.current().main:
        return
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
    run.saved_at = time.monotonic()


# -- log -----------------------------------------------------------------------------------------


def _log_steps(run: _Run, position: float, planned: int) -> None:
    """Report the means over the steps since the last log line, and begin a new window."""
    c, window, run.window = run.counters, run.window, _Window()
    if not window.steps:
        return
    loss, rate = window.loss / window.steps, window.tokens / max(window.seconds, 1e-9)
    parts = {name: value / window.steps for name, value in window.parts.items()}
    step_seconds = window.seconds / window.steps
    memory = peak_memory_mb()
    _append(
        run,
        {
            "event": "train",
            "step": c.step,
            "epoch": round(position, 4),
            "loss": loss,
            "parts": parts,
            "tokens_per_second": rate,
            "step_seconds": step_seconds,
            "real_tokens": window.tokens / max(window.computed, 1),
            "peak_memory_mb": memory,
            "seconds": c.seconds,
        },
    )
    run.points("train", c.step, {**parts, "loss": loss, "tokens_per_second": rate})
    run.progress.training(
        position,
        c.step,
        _last_step(run, planned),
        f"loss {loss:.3f}  {step_seconds:.2f} s/step  {rate:,.0f} tokens/s  "
        f"{_padding(window.tokens, window.computed):.0%} padding  {memory:,.0f} MB",
    )


def _last_step(run: _Run, planned: int) -> int:
    """Return the step at which this stage will end, at its speed so far under ``max_minutes``."""
    c, used = run.counters, _time_used(run)
    last = c.stage_start + planned
    if used > 0:
        last = min(last, c.stage_start + round((c.step - c.stage_start) / used))
    return max(last, c.step)


def _log_validation(run: _Run, position: float, metrics: dict[str, float]) -> None:
    step = run.counters.step
    _append(run, {"event": "valid", "step": step, "epoch": round(position, 4), **metrics})
    run.points("valid", step, metrics)
    run.progress.line(
        f"validation at step {step} (epoch {position:.2f}): "
        f"recall@10 {metrics['recall@10']:.4f}  ndcg@10 {metrics['ndcg@10']:.4f}  "
        f"ndcg@10 masked {metrics['ndcg@10_masked']:.4f}" + f"  ({run.start})" * (step == 0)
    )


def _print_cost(run: _Run, position: float) -> None:
    """Print the cost of training so far: step time, tokens, padding, memory."""
    c = run.counters
    run.progress.line(
        f"epoch {position:.2f}: {c.step} steps in {c.seconds / 60:.1f} min, "
        f"{c.seconds / max(c.step, 1):.2f} s/step, "
        f"{c.tokens / max(c.seconds, 1e-9):,.0f} tokens/s, "
        f"{_padding(c.tokens, c.computed):.1%} padding, peak memory {peak_memory_mb():,.0f} MB"
    )


def _padding(tokens: int, computed: int) -> float:
    """Return the share of computed tokens that are padding."""
    return 1 - tokens / computed if computed else 0.0


def _append(run: _Run, record: dict[str, Any]) -> None:
    """Append one line to RUN/metrics.jsonl."""
    if not processes.current().main:
        return
    try:
        with (run.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise CheckpointError(f"{run.folder}/metrics.jsonl cannot be written: {error}") from error


def _trim_log(path: Path, step: int) -> None:
    """Remove log lines later than ``step``: a resumed run writes them again."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        with suppress(ValueError):  # a line torn by a kill or a full disk
            if json.loads(line)["step"] <= step:
                lines.append(f"{line}\n")
    write_text(path, "".join(lines))
