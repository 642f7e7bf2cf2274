"""Functions that every benchmark shares: measuring time and memory, and reporting results.

A benchmark is a script beside this file. It prints a table, and with ``--json FILE`` writes

    part, machine, command, goal   what was measured, where, how, and the goal
    columns, rows                  the table: [key, header] and one mapping per row
    notes                          how to read it
    summary                        path, goal, measured, reached: one line each of the first table

from which `performance.py` makes docs/performance.md.
"""

from __future__ import annotations

__all__ = [
    "arguments",
    "from_child",
    "interleave",
    "machine",
    "matmul_peak",
    "median",
    "needs",
    "peak_mb",
    "ratio",
    "report",
    "reset_peak",
    "resident_mb",
    "shown",
    "synchronize",
    "write_json",
]

import argparse
import datetime
import importlib.util
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import l2rec

median = statistics.median

# -- time ----------------------------------------------------------------------------------------


def interleave(
    rivals: Sequence[Callable[[], object]], rounds: int, warmup: int
) -> tuple[list[list[float]], list[list[float]]]:
    """Measure wall and CPU seconds of each rival, both [rivals][rounds].

    Rivals run in turn (A B C A B C ...), so that a machine that gets slower or busier affects all
    of them. CPU is the processor time of all threads, which other processes disturb less.
    """
    wall: list[list[float]] = [[] for _ in rivals]
    cpu: list[list[float]] = [[] for _ in rivals]
    for number in range(warmup + rounds):
        for i, rival in enumerate(rivals):
            started, busy = time.perf_counter(), time.process_time()
            rival()
            if number >= warmup:
                wall[i].append(time.perf_counter() - started)
                cpu[i].append(time.process_time() - busy)
    return wall, cpu


def ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the median over rounds of a / b, each within one round."""
    return median(x / y for x, y in zip(a, b, strict=True))


def matmul_peak(
    dtype: torch.dtype, size: int = 2048, repeats: int = 10, device: str = "cpu"
) -> float:
    """Measure the GFLOP/s of the fastest of some large square matrix products."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out, best = a @ b, float("inf")
    for _ in range(repeats):
        synchronize(device)
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best / 1e9


def synchronize(device: str) -> None:
    """Wait for the device, so that the clock sees what it does."""
    if device == "cuda":
        torch.cuda.synchronize()


# -- memory --------------------------------------------------------------------------------------


def resident_mb(field: str) -> float:
    """Read VmRSS or RssAnon (now) or VmHWM (largest since the last reset) of this process, in MB
    of 2^20 bytes, as all that is measured here.

    On Linux.

    Raises:
        OSError: the system does not report it.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {field}")


def reset_peak() -> None:
    """Reset VmHWM, the largest resident set.

    Raises:
        OSError: the system cannot (Linux can).
    """
    Path("/proc/self/clear_refs").write_text("5")


def peak_mb(run: Callable[[], object], device: str = "cpu") -> float:
    """Measure the peak MB of ``run()`` above what was allocated before.

    On a CPU, call it in a fresh process: the free room of a used heap would hide part of the peak.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - held) / 2**20
    reset_peak()
    before = resident_mb("VmRSS")
    run()
    return resident_mb("VmHWM") - before


def from_child(script: str, *options: str) -> float | None:
    """Run a script in a fresh process and return the number it prints; None if it fails."""
    done = subprocess.run([sys.executable, script, *options], capture_output=True, text=True)
    return float(done.stdout) if done.returncode == 0 else None


# -- where, and how it is told -------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Describe machine, versions and time, for the head of the table and the JSON."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        fields = dict(
            line.split(":", 1) for line in info.read_text().splitlines() if line.count(":")
        )
        named = {key.strip(): value.strip() for key, value in fields.items()}
        cpu = named.get("model name", cpu)
    versions = {}
    for name in ("torch", "transformers", "peft", "sentence-transformers"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    device = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": cpu,
        **device,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "l2rec": l2rec.__version__,
        **versions,
    }


def arguments(script: str, doc: str | None) -> argparse.ArgumentParser:
    """Build a parser with the options that all benchmarks have."""
    p = argparse.ArgumentParser(
        prog=f"benchmarks/{Path(script).name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--quick", action="store_true", help="a first impression, no more")
    p.add_argument("--threads", type=int, default=0, help="threads of torch (default: its own)")
    p.add_argument("--json", type=Path, metavar="FILE", help="also write everything as JSON")
    return p


def needs(p: argparse.ArgumentParser, extra: str, *packages: str) -> None:
    """End in one line where a package that is compared with is not installed; it is in ``extra``
    of l2rec.
    """
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        p.error(f"needs {' and '.join(missing)}: pip install 'l2rec[{extra}]'")


def shown(value: object) -> str:
    """Write a cell: a number with three significant digits, a dash for what was not measured."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")
    return str(value)


def report(
    part: str,
    json_file: Path | None,
    *,
    goal: str,
    columns: Sequence[tuple[str, str]],
    rows: Sequence[Mapping[str, object]],
    notes: Sequence[str] = (),
    summary: Sequence[Mapping[str, object]] = (),
    **more: object,
) -> dict[str, Any]:
    """Print a benchmark's table and goals; write them, and whatever ``more`` holds, to the file.

    ``summary``: for each goal its ``path``, ``goal``, what was ``measured``, ``reached`` or not.
    """
    script, where = Path(sys.argv[0]).name, machine()
    document = {
        "part": part,
        "machine": where,
        "command": shlex.join(["python", f"benchmarks/{script}", *_without_json(sys.argv[1:])]),
        "goal": goal,
        "columns": [list(column) for column in columns],
        "rows": list(rows),
        "notes": list(notes),
        "summary": list(summary),
        **more,
    }
    print("  ".join(f"{key} {value}" for key, value in where.items()))
    print(f"{goal}\n")
    cells = [[header for _, header in columns]]
    cells += [[shown(row.get(key)) for key, _ in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        first, *rest = (
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        print("  ".join((first, *rest)).rstrip())
    for note in notes:
        print(f"\n{note}")
    for found in summary:
        verdict = "reached" if found["reached"] else "NOT REACHED"
        print(f"\n{found['path']}: {found['measured']} (goal: {found['goal']}): {verdict}")
    if json_file:
        write_json(json_file, document)
    return document


def _without_json(options: Sequence[str]) -> list[str]:
    """Remove --json from the command, because it changes nothing about the result."""
    at = options.index("--json") if "--json" in options else len(options)
    return [*options[:at], *options[at + 2 :]]


def write_json(path: Path, payload: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(payload, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)
