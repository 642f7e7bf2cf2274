"""The benchmarks run and report; how fast anything is, no test asserts."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tests import tiny

SOURCE = Path(__file__).parents[2] / "benchmarks" / "step.py"


@pytest.fixture(scope="module")
def step() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_step", SOURCE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


# transformers' own deprecation, which PEFT runs into while wrapping a model.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_every_contender_is_measured_and_reported(step: ModuleType) -> None:
    pytest.importorskip("peft")
    work = step.Workload(rows=2, tokens=5, rank=2, experts=3)
    results = step.measure(tiny.random_backbone, work, "float32", steps=1, warmup=0)
    assert [r.name for r in results] == [
        "bare",
        "peft, eager",
        "peft, sdpa",
        "l2rec",
        "l2rec, 2 views",
        "loop of 4",
    ]
    lines = step.rows(results, work, peak=100.0)
    for line in lines:
        numbers = [v for v in line.values() if isinstance(v, float)]
        assert numbers and all(math.isfinite(v) and v > 0 for v in numbers)
    assert [line["ratio"] for line in lines if line["peer"]] == [1.0]
    text = step.table(lines, "float32", 100.0)
    assert all(r.name in text for r in results) and "peft" in text and " *" in text
    json.dumps(lines)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_all_trained_parameters_get_gradients(step: ModuleType) -> None:
    pytest.importorskip("peft")
    work = step.Workload(rows=2, tokens=5, rank=2, experts=3)
    for build in step.contenders(work, torch.float32).values():
        contender = build(tiny.random_backbone)
        contender.step()
        assert all(p.grad is not None for p in contender.trained), contender.name


PEAK_SCRIPT = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("benchmarks_step", sys.argv[1])
step = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = step
spec.loader.exec_module(step)
held = []
contender = step.Contender("list", lambda: held.append(torch.ones(4_000_000)) or held[-1].sum(), [])
print(step.step_memory(contender, steps=1))
"""


def test_the_peak_of_a_step_is_measured(step: ModuleType) -> None:
    """In a fresh process, as the benchmark does: a used heap has room that no peak shows."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux tells")
    command = [sys.executable, "-c", PEAK_SCRIPT, str(step.__file__)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) > 0.9 * 4 * 4_000_000 / 2**20


def test_machine_and_matmul_peak(step: ModuleType) -> None:
    pytest.importorskip("peft")
    assert step.matmul_peak(torch.float32, size=32, repeats=1) > 0
    assert step.machine()["torch"] == torch.__version__


def test_help_teaches(step: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        step.main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "--quick" in text and "ratio" in text and "--json PATH" in text
