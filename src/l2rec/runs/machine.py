"""Facts about the machine of a run: device, hardware, versions, memory."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path

import torch

from l2rec._version import __version__

THREADS = " threads"


def peak_memory_mb() -> float:
    """Return the peak memory in MB of the GPU, else of the process; 0 if unknown."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    if sys.platform == "win32":
        return 0.0  # needs another dependency
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def device() -> str:
    """Return "cuda" if there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def hardware() -> str:
    """Return the name of the GPU, or of the processor and the number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {torch.get_num_threads()}{THREADS}"


def without_threads(found: str) -> str:
    """Return what `hardware` found without the number of threads, which is no machine's own."""
    name, _, threads = found.rpartition(", ")
    return name if threads.endswith(THREADS) else found


def versions() -> dict[str, str]:
    """Return the versions that results depend on, and the commit if there is one."""
    numbers = {"l2rec": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "numpy", "polars"):
        numbers[package] = importlib.metadata.version(package)
    commit = _commit()
    return {**numbers, "commit": commit} if commit else numbers


def _commit() -> str:
    """Return the commit of this checkout, "-dirty" if files changed; empty outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    tracked = Path(__file__).parents[3] / "pyproject.toml"
    return done.stdout.strip() if done.returncode == 0 and tracked.is_file() else ""
