"""The benchmarks run and report; how fast anything is, no test asserts."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tests import tiny

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def load(name: str) -> ModuleType:
    """A script as it runs: its folder is where it finds what the scripts share."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.insert(0, str(BENCHMARKS))
    return importlib.import_module(name)


measure, step = load("measure"), load("step")


# -- what all benchmarks share -------------------------------------------------------------------


def test_rivals_take_turns() -> None:
    calls: list[str] = []
    wall, cpu = measure.interleave([lambda: calls.append("a"), lambda: calls.append("b")], 2, 1)
    assert calls == ["a", "b"] * 3
    assert [len(rounds) for rounds in (*wall, *cpu)] == [2] * 4


def test_a_ratio_is_of_the_same_round() -> None:
    assert measure.ratio([2.0, 40.0, 3.0], [1.0, 10.0, 3.0]) == 2.0


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (True, "yes"),
        (12345, "12,345"),
        (1.0, "1.00"),
        (0.01234, "0.0123"),
        (99.96, "100"),
        (1234.5, "1,234"),
        ("q,v", "q,v"),
    ],
)
def test_cells_have_three_digits(value: object, text: str) -> None:
    assert measure.shown(value) == text


def test_a_report_is_printed_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "deep" / "part.json"
    monkeypatch.setattr(sys, "argv", ["benchmarks/part.py", "--json", str(file), "--quick"])
    measure.report(
        "part",
        file,
        goal="fast",
        columns=[("name", "who"), ("seconds", "s")],
        rows=[{"name": "we", "seconds": 0.5, "wall": [0.5]}],
        notes=["a note"],
        summary=[{"path": "p", "goal": "at most 1", "measured": "2", "reached": False}],
        curves=[],
    )
    printed = capsys.readouterr().out
    assert "we   0.500" in printed and "a note" in printed and "NOT REACHED" in printed
    written = json.loads(file.read_text(encoding="utf-8"))
    assert written["command"] == "python benchmarks/part.py --quick"
    assert written["columns"] == [["name", "who"], ["seconds", "s"]] and written["curves"] == []
    assert written["machine"]["torch"] == torch.__version__


PEAK_SCRIPT = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import measure
held = []
print(measure.peak_mb(lambda: held.append(torch.ones(4_000_000))))
"""


def test_a_peak_is_measured() -> None:
    """In a fresh process, as the benchmarks do: a used heap has room that no peak shows."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux tells")
    command = [sys.executable, "-c", PEAK_SCRIPT, str(BENCHMARKS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) > 0.9 * 4 * 4_000_000 / 2**20


def test_matmul_peak() -> None:
    assert measure.matmul_peak(torch.float32, size=32, repeats=1) > 0


# -- one training step ---------------------------------------------------------------------------

NAMES = ["bare", "peft, eager", "peft, sdpa", "l2rec", "l2rec, 2 views", "loop of 4", "X-LoRA of 4"]


def small_case(**changes: Any) -> Any:
    work = step.Workload(rows=2, tokens=5, rank=2, experts=3)
    return step.Case("tiny", "float32", work, **changes)


def test_every_contender_is_measured_and_reported() -> None:
    case = small_case()
    results = step.measure(
        case, tiny.random_backbone, steps=1, memory=lambda rival: float(len(rival.name))
    )
    assert [r.name for r in results] == NAMES
    assert [r.failed for r in results] == [""] * len(NAMES)
    lines = list(step.rows(case, results, peak=100.0))
    for line in lines:
        numbers = [v for v in line.values() if isinstance(v, float)]
        assert numbers and all(math.isfinite(v) and v > 0 for v in numbers)
    (peer,) = [line for line in lines if line["contender"].endswith("*")]
    assert peer["ratio"] == 1.0 and peer["contender"].startswith("peft")
    # Of PEFT, only the fastest is weighed.
    assert sum(line["memory_mb"] is None for line in lines) == 1
    json.dumps(lines)
    goals = list(step.summary(case, results))
    assert len(goals) == 5 and all("tiny, q,v" in goal["path"] for goal in goals)


@pytest.mark.parametrize("family", ["bert", "qwen3"])
def test_contenders_compute_the_same_and_train_all_they_have(family: str) -> None:
    """Untrained adapters change nothing, so all see the bare backbone."""
    losses = {}
    for name, build in step.contenders(small_case().work, torch.float32).items():
        contender = build(lambda: tiny.random_backbone(family))
        losses[name] = float(contender.forward().detach())
        contender.step()
        assert all(p.grad is not None for p in contender.trained), name
    one_view = losses.pop("l2rec") - step.BALANCE  # an even load has a balance of 1
    del losses["l2rec, 2 views"]  # half of its rows come from the behavioural view's input
    assert one_view == pytest.approx(losses["bare"], rel=1e-3)
    assert list(losses.values()) == pytest.approx([losses["bare"]] * len(losses), rel=1e-4)


def test_a_mixture_of_others_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("no such thing\nin this version")

    monkeypatch.setattr(step, "xlora", broken)
    case = small_case()
    results = step.measure(case, tiny.random_backbone, steps=1, only="X-LoRA")
    lines = list(step.rows(case, results, peak=100.0))
    assert lines[-1]["contender"] == "X-LoRA of 4: no such thing"
    assert not list(step.summary(case, results))


def test_dtypes_share_a_line_of_the_summary() -> None:
    def goal(measured: str, reached: bool) -> dict[str, Any]:
        return {"path": "p", "goal": "g", "measured": measured, "reached": reached}

    joined = step.join_dtypes([goal("float32 1.00", True), goal("bfloat16 2.00", False)])
    assert joined == [goal("float32 1.00, bfloat16 2.00", False)]


def test_cuda_where_there_is_none_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        step.main(["--device", "cuda"])
    assert "sees no CUDA device" in capsys.readouterr().err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        step.main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "--quick" in text and "ratio" in text and "--json FILE" in text
