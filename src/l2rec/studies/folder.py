"""The folder that a study writes: its ``report.json`` says which study it is of."""

from __future__ import annotations

__all__ = ["claim_folder"]

from pathlib import Path

from l2rec.disk import read_json
from l2rec.errors import CheckpointError


def claim_folder(out: Path, kind: str) -> None:
    """Refuse a folder that holds something else than what `l2rec KIND` wrote.

    Raises:
        CheckpointError: it does, or it is a file.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise CheckpointError(f"{out} is a file; choose a folder for --out")
    report = out / "report.json"
    if any(out.iterdir()) and not (report.is_file() and read_json(report).get("kind") == kind):
        raise CheckpointError(
            f"{out} is not empty and holds no `l2rec {kind}`; choose another --out"
        )
