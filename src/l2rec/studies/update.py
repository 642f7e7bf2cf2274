"""A finished run brought up to date: newer events, items and counts, without a full training.

    data set + newer log ──► the data set grown: known items keep their ints   l2rec.data.extend
    run ──► a run on it that starts from its weights, for a few epochs         l2rec.runs.train
    ──► blended again, if the run was                                          l2rec.studies.blend

The new run is tested as any other: by the newest events, which nothing was trained on.
"""

from __future__ import annotations

__all__ = ["EPOCHS", "PATIENCE", "update_run"]

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from l2rec.config import RunConfig, check_use, method_class, override_values, resolve
from l2rec.data.dataset import Dataset, open_dataset
from l2rec.data.extend import extend
from l2rec.data.formats.source import Source
from l2rec.disk import beside
from l2rec.errors import CheckpointError
from l2rec.modules import processes
from l2rec.protocols import Progress
from l2rec.runs.folder import (
    BLEND,
    find_backbone,
    finished_report,
    load_run_config,
    open_run_dataset,
    require_finished,
)
from l2rec.runs.start import refuse_of_one_catalog
from l2rec.runs.train import train_run
from l2rec.studies.blend import blend_run

EPOCHS, PATIENCE = 3, 1
"""``training.epochs`` and ``training.patience`` of an update, which starts where a run ended."""


def update_run(
    run: Path,
    newer: Source,
    out: Path,
    *,
    progress: Progress,
    data: Path | None = None,
    grown: Path | None = None,
    overrides: Sequence[str] = (),
    drop_unknown_items: bool = False,
    resume: bool = False,
    command: str = "",
) -> dict[str, Any]:
    """Train RUN on from its weights with newer events; write OUT as a run. Return its report.

    Args:
        newer: the log of newer events. Those of users and items that are known carry their ids.
        data: the data set of the run, if it was moved.
        grown: folder for the data set of OUT; ``OUT-data`` by default. With ``resume`` it is there.
        overrides: ``key=value`` of the recipe. By default that of the run with a few epochs.
        drop_unknown_items: drop events of items that neither catalog has.

    Raises:
        CheckpointError: the run is not finished, its data set is not there, or it cannot be
            trained on from there. DataError: the log cannot be added to its data set.
    """
    require_finished(run)
    config, identity = load_run_config(run)
    refuse_of_one_catalog(method_class(config.method), run)
    config = _few_epochs(find_backbone(run, config, identity), overrides)
    world = processes.current()
    folder = world.from_main(
        lambda: _grown(run, newer, out, data, grown, drop_unknown_items, resume).path
    )
    blended = (run / BLEND).is_file()
    if resume and blended:
        done = world.from_main(lambda: _blended_already(out, config))
        if done is not None:
            progress.line(f"{out} is finished: these are its scores")
            return done
    trained = beside(out, "trained") if blended else out
    report = train_run(
        config,
        folder,
        trained,
        progress=progress,
        resume=resume,
        init=run,
        update=True,
        init_data=data,
        recipe=f"update of {run.name}",
        command=command,
    )
    if not blended:
        return report
    return world.from_main(lambda: blend_run(trained, out, progress=progress, command=command))


def _few_epochs(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """Return the recipe of a run with the few epochs of an update, and with other changes."""
    values = config.model_dump(mode="json")
    values["training"] |= {"epochs": EPOCHS, "patience": PATIENCE}
    changes = override_values(overrides)
    check_use(changes, config.method, where="update")
    for key, value in changes.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return resolve(values, where="update")


def _blended_already(out: Path, config: RunConfig) -> dict[str, Any] | None:
    """Return the report of a finished blend of an update by this recipe, or None."""
    if not (out / BLEND).is_file() or load_run_config(out)[0] != config:
        return None
    return finished_report(out)


def _grown(
    run: Path,
    newer: Source,
    out: Path,
    data: Path | None,
    grown: Path | None,
    drop_unknown_items: bool,
    resume: bool,
) -> Dataset:
    """Write the data set of the new run, or open the one that a run to resume has."""
    folder = grown or beside(out, "data")
    if resume and folder.exists():
        there = open_dataset(folder)
        theirs = [(file["name"], file["bytes"]) for file in there.meta["source"]["files"][1:]]
        if theirs != [(file.name, file.stat().st_size) for file in newer.files]:
            names = ", ".join(name for name, _ in theirs)
            raise CheckpointError(
                f"{folder} was not made of these newer events but of another log ({names}); "
                "resume with that, or choose another --out"
            )
        return there
    if folder.exists():
        raise CheckpointError(f"{folder} exists; choose another --grown, or --resume")
    return extend(open_run_dataset(run, data), newer, folder, drop_unknown_items=drop_unknown_items)
