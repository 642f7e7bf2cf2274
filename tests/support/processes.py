"""Several processes that train together, on this machine: started by tests, or run as one of them.

``python -m tests.support.processes FOLDER METHOD ...`` compares the gradients of methods' losses:
of this process by itself, and of all together.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tests.support import methods
from torch import nn

from l2rec.data.batches import Batch
from l2rec.data.catalog import Catalog
from l2rec.data.ragged import Ragged
from l2rec.data.synthetic import simple_text
from l2rec.modules import processes
from l2rec.protocols import Stage, updates
from l2rec.runs import launch
from l2rec.runs.loop import gradients_only_for

ROOT = Path(__file__).parents[2]
PLAIN = {"item_drop": 0.0, "mlm": 0.0, "negatives": 3}
"""Options under which a loss draws nothing itself: what is drawn differs between processes."""
SHORT = ("LEARN", "RecFormer")
"""Methods whose rows are cut at random: those of two items can be cut in one place only."""


def start(count: int, *arguments: object) -> list[subprocess.Popen[str]]:
    """Start processes as a launcher would: ``python ARGUMENTS`` each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    shared |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": 1, "PYTHONPATH": f"{ROOT}/src:{ROOT}"}
    return [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            env=os.environ | {k: str(v) for k, v in shared.items()} | _rank(rank),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]


def _rank(rank: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank)}


def together(count: int, *arguments: object, seconds: float = 300) -> list[str]:
    """Start processes, wait for them, and return what each printed; all have to succeed."""
    started = start(count, *arguments)
    try:
        last = time.monotonic() + seconds
        while any(one.poll() is None for one in started) and time.monotonic() < last:
            if any(one.poll() for one in started):  # the others would wait for it
                break
            time.sleep(0.1)
    finally:
        for one in started:
            one.kill()
    printed = [one.communicate()[0] for one in started]
    assert [one.returncode for one in started] == [0] * count, "\n".join(printed)
    return printed


# ------------------------------------------------------------------------- gradients of all methods


def _model(name: str) -> Any:
    """Build a method, without dropout; ``L2Rec paper`` is L2Rec in that form."""
    catalog = Catalog.of_texts([simple_text(1007 * i) for i in range(methods.N)])
    name, _, form = name.partition(" ")
    known = methods.METHODS[name].Config.model_fields
    more = {k: v for k, v in PLAIN.items() if k in known}
    if name == "L2Rec":
        more = {"balance": 0.5, "bpc": 0.5, "form": form or "catalog"}
        more |= {"negatives": 3, "item_residual": False} if form == "paper" else {}
    return methods.build(name, catalog, **more).eval()


def _gradients(model: nn.Module, stage: Stage, batch: Batch, gather: bool) -> dict[str, Any]:
    """Return loss and gradients of the first update of one batch, averaged over the processes."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    with (
        gradients_only_for(model, stage),
        launch.averaging(model) as averaged,
        launch.dealt(batch, gather=gather, draw=(0, 0)) as (rows, weight),
    ):
        total = weight * next(iter(updates(stage.loss(rows)))).total
        averaged(total).backward()
    world = processes.current()
    loss = world.total(np.array([float(total.detach())])) / world.size
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": float(loss[0]), "grads": grads}


def _difference(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """Return how far two gradients are apart, relative to their length."""
    assert ours["grads"].keys() == theirs["grads"].keys()
    if not ours["grads"]:
        return 0.0
    a, b = (torch.cat([g.flatten() for g in x["grads"].values()]) for x in (ours, theirs))
    return float((a - b).norm() / a.norm())


def _differences(model: nn.Module, stage: Stage, batch: Batch) -> dict[str, float]:
    """Compare one process with all: loss, and gradients with and without the others' rows."""
    with processes.alone():
        alone = _gradients(model, stage, batch, True)
    both = _gradients(model, stage, batch, True)
    apart = _gradients(model, stage, batch, False)
    return {
        "loss": abs(both["loss"] / alone["loss"] - 1),
        "gathered": _difference(alone, both),
        "apart": _difference(alone, apart),
    }


def _compare(folder: Path, names: list[str]) -> None:
    rng = np.random.default_rng(0)
    results = {}
    with launch.joined() as world:
        for name in names:
            model = _model(name)
            sizes = [2] * 7 if name in SHORT else [3, 6, 4, 2, 5, 6, 3]
            rows = Ragged.from_rows([rng.integers(methods.N, size=n) for n in sizes])
            for stage in model.stages(1e-3, 0.0):
                if stage.begin_epoch is not None:
                    stage.begin_epoch(0)
                made = stage.batches(rows, seed=0, epoch=0, batch_users=99, batch_tokens=10**6)
                batch = next(made.iterate())
                results[f"{name}: {stage.name}"] = _differences(model, stage, batch)
                if name == names[0]:
                    one = _differences(model, stage, batch.take(np.array([1])))
                    results[f"one row, {name}: {stage.name}"] = one
        path = folder / f"{world.rank}.json"
        path.write_text(json.dumps(results))


if __name__ == "__main__":
    _compare(Path(sys.argv[1]), sys.argv[2:])
