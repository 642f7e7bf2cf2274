"""The machine a run is made on: device, hardware, versions, memory."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path

import torch

from l2rec._version import __version__


def peak_memory_mb() -> float:
    """Largest resident memory of this process so far (or of the GPU, where one is used)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    if sys.platform == "win32":
        return 0.0  # not known without another dependency
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def device() -> str:
    """The accelerator if there is one, else the processor."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def hardware() -> str:
    """Processor or accelerator, and how many cores were used."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """What the numbers depend on."""
    found = {"l2rec": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "numpy", "polars"):
        found[package] = importlib.metadata.version(package)
    commit = _commit()
    return {**found, "commit": commit} if commit else found


def _commit() -> str:
    """The commit of this source tree, "-dirty" where it was changed; empty if it is no checkout."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    tracked = Path(__file__).parents[3] / "pyproject.toml"
    return done.stdout.strip() if done.returncode == 0 and tracked.is_file() else ""
