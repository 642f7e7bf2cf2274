"""The benchmarks run and report; how fast anything is, no test asserts."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from tests.support import runs, tiny
from tests.support.benchmarks import FOLDER, script

import l2rec.modules.experts
from l2rec.data.dataset import Dataset
from l2rec.data.splits import leave_one_out
from l2rec.modules.experts import top_n

measure, step, growth = script("measure"), script("step"), script("growth")
breakdown, performance, systems = script("breakdown"), script("performance"), script("systems")
sasrec, rectools_child = script("sasrec"), script("rectools_child")
layers, earlier = script("layers"), script("earlier")
encoding, serving = script("encoding"), script("serving")


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
    command = [sys.executable, "-c", PEAK_SCRIPT, str(FOLDER)]
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


# -- growth --------------------------------------------------------------------------------------


def test_a_slope_is_the_exponent_of_the_last_points() -> None:
    assert growth.slope([1, 2, 4, 8], [7.0, 4.0, 16.0, 64.0]) == pytest.approx(2.0)
    curve = growth.Curve("c", "x", "s", [1, 2, 4, 8], [9.0, 2.0, 4.0, 8.0])
    assert curve.slope == pytest.approx(1.0)


def test_what_grows_can_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny.small(max_items=4)
    monkeypatch.setattr(growth, "L2RecConfig", lambda **_: config)
    monkeypatch.setattr(growth, "loader", lambda *_: tiny.random_backbone)
    monkeypatch.setattr(growth, "peak_of", lambda rows, args: float(rows))
    found = growth.curves(growth.parser().parse_args(["--quick"]))
    names = ["routed experts", "rank", "batch", "history", "exact ranking", "memory"]
    assert [curve.name for curve in found] == names
    assert all(math.isfinite(curve.slope) for curve in found)
    assert found[-1].slope == pytest.approx(1.0)


def test_ranking_ranks_everybody() -> None:
    assert len(growth.ranking(items=30, users=7)()) == 7


# -- where a step goes ---------------------------------------------------------------------------


@pytest.mark.parametrize("items", ["paper", "catalog"])
def test_a_step_is_taken_apart(items: str, backbone_folder: Path, chains: Dataset) -> None:
    step = breakdown.Step(runs.config(backbone_folder, items), chains)
    seconds = breakdown.measured(step, rounds=2)
    forward = {part for part, where in seconds if where == breakdown.FORWARD}
    backward = {part for part, where in seconds if where == breakdown.BACKWARD}
    model = {
        *(breakdown.FROZEN, breakdown.ATTENTION, breakdown.ACTIVATION, breakdown.NORMS),
        *(breakdown.EXPERTS, breakdown.SCALING, breakdown.ROUTERS, breakdown.FUSION),
        breakdown.LOSSES,
    }
    assert model <= forward and model <= backward
    assert {breakdown.BATCH, breakdown.INPUTS} <= forward
    assert {breakdown.OPTIMIZER, breakdown.SUMS} <= backward
    assert all(spent > 0 for (part, _), spent in seconds.items() if part != breakdown.BETWEEN)
    table = breakdown.rows(seconds)
    assert sum(row["share"] for row in table) == pytest.approx(1.0)
    assert table[0]["share"] == max(row["share"] for row in table)
    # Nothing stays behind: the model's own code is back, and there is no hook.
    assert l2rec.modules.experts.top_n is top_n
    hooks = [len(m._forward_hooks) for m in step.model.backbone.model.modules()]
    assert not any(hooks)


def test_what_lies_between_operations_is_the_rest_of_a_stretch() -> None:
    """Medians of both kinds of round; the rest is never less than nothing."""
    forward, backward = breakdown.FORWARD, breakdown.BACKWARD
    batch, between, experts = breakdown.BATCH, breakdown.BETWEEN, breakdown.EXPERTS

    class Scripted:
        rounds = iter([9.0, 3.0, 5.0, 4.0])  # the first, which warms up, is not counted

        def plain(self) -> dict[tuple[str, str], float]:
            return {
                (batch, forward): 1.0,
                (between, forward): next(self.rounds),
                (between, backward): 2.0,
            }

        def watched(self) -> dict[tuple[str, str], float]:
            return {(experts, forward): 1.5, (experts, backward): 6.0}

    seconds = breakdown.measured(Scripted(), rounds=3)
    assert seconds == {
        (batch, forward): 1.0,
        (between, forward): 4.0 - 1.5,
        (between, backward): 0.0,
        (experts, forward): 1.5,
        (experts, backward): 6.0,
    }
    assert [(row["part"], row["forward"], row["backward"]) for row in breakdown.rows(seconds)] == [
        (experts, 1500.0, 6000.0),
        (between, 2500.0, 0.0),
        (batch, 1000.0, 0.0),
    ]


# -- the page ------------------------------------------------------------------------------------


def document(part: str, **more: Any) -> dict[str, Any]:
    return {
        "part": part,
        "machine": {"date": "today", "cores": 2},
        "command": f"python benchmarks/{part}.py --threads 1",
        "goal": f"{part} is fast",
        "columns": [["who", "who"], ["seconds", "step, s"]],
        "rows": [{"who": "a|b", "seconds": 0.123456}, {"who": "c"}],
        "notes": [f"note on {part}"],
        "summary": [{"path": f"path of {part}", "goal": "1", "measured": "2", "reached": False}],
        **more,
    }


CURVE = {"name": "rank", "x_label": "rank", "y_label": "s", "slope": 1.0, "fitted": 2}


def test_the_page_is_made_of_what_was_measured(tmp_path: Path) -> None:
    curves = [{**CURVE, "x": [1, 2, 4], "y": [0.1, 0.2, 0.4]}] * 4
    found = {"zeta": document("zeta"), "growth": document("growth", curves=curves)}
    found["step"] = document("step")
    target = tmp_path / "performance.md"
    performance.write_page(found, target)
    text = target.read_text(encoding="utf-8")
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings == ["# Performance", "## Goals", "## Step", "## Growth", "## Zeta"]
    assert "| path of step | 1 | 2 | no |" in text
    assert "| who | step, s |\n|---|---:|\n| a\\|b | 0.123 |\n| c | – |" in text
    assert "`python benchmarks/zeta.py --threads 1`: date today, cores 2." in text
    assert "- padding: `python benchmarks/padding.py --data DIR`" in text
    assert "step-cuda" not in text and "- step:" not in text
    drawn = tmp_path / "performance" / "growth.svg"
    assert "](performance/growth.svg)" in text and "<svg" in drawn.read_text(encoding="utf-8")
    before = drawn.read_bytes()
    performance.write_page(found, target)
    assert drawn.read_bytes() == before and target.read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("part", "changes", "names"),
    [
        ("systems", {"rows": [{"system": "HDRec, text alone"}, {"system": "older"}]}, ["older"]),
        ("earlier", {"rows": [{"work": "paper"}, {"work": "whole"}]}, ["whole"]),
        ("padding", {"rows": [{"recipe": "l2rec-was"}]}, ["l2rec-was"]),
        ("layers", {"notes": ["Validation; recipe scientific/was, seed 0."]}, ["scientific/was"]),
        ("layers", {"notes": ["Read as recipe scientific/l2rec does."]}, []),
        (
            "update",
            {"command": "python benchmarks/update.py --recipe l2rec-was --x"},
            ["l2rec-was"],
        ),
        ("step", {}, []),
    ],
)
def test_the_page_says_what_a_command_no_longer_measures(
    part: str, changes: dict[str, Any], names: list[str]
) -> None:
    found = document(part, **changes)
    assert performance.gone(found) == names
    text = performance.page({part: found}, {})
    assert ("today's command gives other rows" in text.split("## Goals")[1]) == bool(names)
    assert all(f"`{name}`" in text for name in names)


def test_servers_of_two_precisions_reach_no_goal() -> None:
    """Results from before the dtype was kept; the peer was always of float32."""
    line = {"path": "a", "goal": "at least the requests/s of the peer", "reached": True}
    other = {"path": "b", "goal": "flat memory", "reached": True}
    old = {"part": "serving", "command": "python benchmarks/serving.py", "rows": [], "notes": []}
    old |= {"summary": [line, other]}
    assert [goal["reached"] for goal in performance.goals(old)] == [None, True]
    assert "float32" in performance.remarks(old)[0]
    new = old | {"dtype": "bfloat16"}
    assert [goal["reached"] for goal in performance.goals(new)] == [True, True]
    assert performance.remarks(new) == []


def test_the_kept_page_is_that_of_the_kept_results() -> None:
    """A script that loses rows, too, needs `python benchmarks/performance.py --only none`."""
    found = performance.documents()
    plots = {name: f"performance/{name}.svg" for name in found if found[name].get("curves")}
    assert performance.PAGE.read_text(encoding="utf-8") == performance.page(found, plots)


def test_parts_are_chosen() -> None:
    def names(only: str, gpu: bool, *given: str) -> list[str]:
        return [p.name for p in performance.chosen_parts(only, {"nothing", *given}, gpu)]

    assert names("", False) == ["step", "loss", "growth", "decoding", "preparation", "startup"]
    assert {"breakdown", "padding", "encoding", "ranking"} <= set(names("", False, "data", "first"))
    assert "precision" in names("", False, "runs")
    assert {"step-cuda", "growth-cuda"} <= set(names("", True))
    assert names("growth,step", False) == ["growth", "step"] and names("none", True) == []
    with pytest.raises(ValueError, match="'stp': choose from step, "):
        names("stp", False)


def test_what_a_part_is_given() -> None:
    parts = {part.name: part for part in performance.PARTS}
    options, data, runs = ["--threads", "1"], ["a", "b"], ["x", "y", "z"]

    def command(name: str) -> str:
        return " ".join(parts[name].command(options, data, runs))

    assert command("growth-cuda") == "benchmarks/growth.py --device cuda --threads 1"
    assert command("breakdown") == "benchmarks/breakdown.py --threads 1 --data a"
    assert command("padding") == "benchmarks/padding.py --threads 1 --data a b"
    assert command("precision") == "benchmarks/precision.py --threads 1 --run x --runs y z"
    assert command("serving") == "benchmarks/serving.py --threads 1 --run x"


def test_a_part_is_run_as_it_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only the named part is measured, and the page is written from what is there."""
    ran: list[list[str]] = []

    def fake(command: list[Any], **_: Any) -> subprocess.CompletedProcess[str]:
        ran.append([str(word) for word in command[1:]])
        measure.write_json(command[-1], document("padding"))
        return subprocess.CompletedProcess(command, 0)

    for name, path in (
        ("ROOT", tmp_path),
        ("RESULTS", tmp_path / "r"),
        ("PAGE", tmp_path / "p.md"),
    ):
        monkeypatch.setattr(performance, name, path)
    monkeypatch.setattr(performance.subprocess, "run", fake)
    performance.main(["--only", "padding", "--quick", "--data", "a", "b"])
    script, json_file = str(tmp_path / "benchmarks/padding.py"), str(tmp_path / "r/padding.json")
    assert ran == [[script, "--quick", "--threads", "1", "--data", "a", "b", "--json", json_file]]
    assert "note on padding" in (tmp_path / "p.md").read_text(encoding="utf-8")


def test_parts_that_need_data_ask_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        performance.main(["--only", "padding"])
    assert "--data DIR" in capsys.readouterr().err


@pytest.mark.parametrize("script", [step, growth, breakdown, performance, layers, earlier])
def test_help_teaches(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        script.main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "--quick" in text and "python benchmarks/" in text and "--threads" in text


@pytest.mark.parametrize(
    ("script", "missing", "install"),
    [
        (step, "peft", "l2rec[bench]"),
        (encoding, "sentence_transformers", "l2rec[bench]"),
        (serving, "faiss", "l2rec[bench,faiss]"),
    ],
)
def test_a_peer_that_is_not_installed_is_said(
    script: ModuleType,
    missing: str,
    install: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == missing else found(name)
    )
    with pytest.raises(SystemExit):
        script.main(["--quick"])
    assert f"needs {missing}: pip install '{install}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "file",
    [file for file in FOLDER.glob("*.py") if "arguments(__file__" in file.read_text("utf-8")],
    ids=lambda file: file.stem,
)
def test_threads_that_are_reported_are_those_that_were_asked_for(file: Path) -> None:
    assert "torch.set_num_threads(" in file.read_text("utf-8"), "--threads would change nothing"


# -- systems -------------------------------------------------------------------------------------


def test_systems_step_on_the_same_users(
    backbone_folder: Path, chains: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = [f"backbone.name={backbone_folder}", "model.sequence_prompt=''", "model.align_prompt=''"]
    patched = {
        name: (recipe, [*changes, *(own if "hdrec" in recipe else own[:1])])
        for name, (recipe, changes) in systems.SYSTEMS.items()
    }
    monkeypatch.setattr(systems, "SYSTEMS", patched)
    monkeypatch.setattr(
        systems, "SAME", {"max_items": 6, "item_tokens": 4, "max_tokens": 48, "rank": 2}
    )
    file = tmp_path / "systems.json"
    systems.main(
        ["--quick", "--data", str(chains.path), "--dtypes", "float32", "--json", str(file)]
    )
    rows = json.loads(file.read_text())["rows"]
    assert [row["system"] for row in rows] == list(patched)
    assert [row["updates"] for row in rows] == [1, 1, 2, 1, 1]
    assert all(row["seconds"] > 0 and row["gflop"] > 0 and row["tokens"] > 0 for row in rows)
    monkeypatch.setattr(systems, "from_child", lambda *command: [*command])
    command = systems.memory("HDRec, text alone", chains.path, 3, "float32")
    assert command[command.index("--child") + 1] == "HDRec, text alone"


# -- items that are read once --------------------------------------------------------------------

SMALL = [f"model.{option}={value}" for option, value in runs.SMALL.items()]


def test_every_k_trains_on_as_many_targets_and_as_long(
    backbone_folder: Path, chains: Dataset, tmp_path: Path
) -> None:
    options = [*SMALL, f"backbone.name={backbone_folder}"]
    rows = list(layers.measured(chains.path, tmp_path, "l2rec-plus", [0, 1], options, 1))
    assert [(row["k"], row["equal"]) for row in rows] == [
        (0, ""),
        (1, "as many targets"),
        (1, "as many minutes"),
    ]
    base, targets, minutes = rows
    assert targets["steps"] == base["steps"] > 0 and base["by_base"] == 0
    # The limit is met after a step, of at least one that was begun before it.
    assert minutes["minutes"] >= base["minutes"] - 0.001
    assert minutes["by_base"] == minutes["ndcg@10"] / base["ndcg@10"] - 1
    again = layers.measured(chains.path, tmp_path, "l2rec-plus", [0, 1], options, 1)
    assert [row["ndcg@10"] for row in again] == [row["ndcg@10"] for row in rows]
    for row, goal in zip(rows[1:], layers.goals(rows, "chains"), strict=True):
        least = -0.02 if row["equal"] == "as many targets" else 0
        assert goal["reached"] is (row["by_base"] >= least)


def test_an_earlier_build_takes_the_same_steps(
    backbone_folder: Path, chains: Dataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = [*SMALL, "model.negatives=2", f"backbone.name={backbone_folder}"]
    work = earlier.Work("scientific/l2rec", options, 8, (1,), 1000.0)
    monkeypatch.setattr(earlier, "WORK", {"tiny": work})
    file = tmp_path / "earlier.json"
    given = ["--earlier", str(FOLDER.parent), "--data", str(chains.path), "--only", "tiny"]
    earlier.main(["--quick", *given, "--json", str(file)])
    document = json.loads(file.read_text())
    before, now = document["rows"]
    assert (before["contender"], now["contender"]) == (earlier.BEFORE, "K = 1")
    assert before["targets"] == now["targets"] == 8 and before["faster"] == 1
    assert now["faster"] > 0 and now["items_faster"] > 0
    assert [goal["reached"] for goal in document["summary"]] == [False]
    with pytest.raises(SystemExit):
        earlier.main(["--earlier", str(FOLDER.parent), "--only", "other"])


# -- sasrec --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["SASRec", "UniSRec"])
def test_our_side_of_the_comparison(
    method: str, chains: Dataset, backbone_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, options = sasrec.RECIPES["UniSRec"]
    small = [f"backbone.name={backbone_folder}", "model.text_tokens=16"]
    monkeypatch.setitem(sasrec.RECIPES, "UniSRec", (recipe, [*options, *small]))
    found = sasrec.ours(chains.path, method, epochs=2, batch=32, seed=0)
    assert [len(found[name]) for name in ("epoch_seconds", "eval_seconds", "valid")] == [2, 2, 2]
    assert found["best_valid"] == max(found["valid"]) and found["peak_mb"] > 0
    assert found["prepare_seconds"] > 0
    row = sasrec.row("l2rec", method, found, found)
    assert row["slower_epoch"] == row["slower_evaluation"] == 1
    goals = sasrec.goals("chains", row, row)
    assert all(goal["reached"] is (at == 2) for at, goal in enumerate(goals))
    nothing = {**row, "recall@10": None, "ndcg@10": None}
    assert sasrec.goals("chains", row, nothing)[2]["measured"].endswith("against NaN")


def test_a_data_set_as_recbole_reads_it(chains: Dataset, tmp_path: Path) -> None:
    sasrec.write_atomic(chains, tmp_path / "events")
    head, *lines = (tmp_path / "events" / "events.inter").read_text().splitlines()
    assert head == "user_id:token\titem_id:token\ttimestamp:float"
    assert len(lines) == chains.n_events
    first = chains.sequences[0]
    assert [line.split("\t") for line in lines[: len(first)]] == [
        ["0", str(item), str(place)] for place, item in enumerate(first)
    ]


def test_a_sample_has_whole_histories_and_no_other_items(chains: Dataset, tmp_path: Path) -> None:
    small = sasrec.sample(chains, 5, 0, tmp_path / "small")

    def histories(dataset: Dataset) -> dict[str, list[str]]:
        names, texts = dataset.user_ids.to_pylist(), dataset.texts()
        rows = map(dataset.sequences.__getitem__, range(dataset.n_users))
        return {name: [texts[i] for i in row] for name, row in zip(names, rows, strict=True)}

    of_all, found = histories(chains), histories(small)
    assert len(found) == 5 and found == {name: of_all[name] for name in found}
    assert small.n_items == len(np.unique(small.items))
    assert list(histories(sasrec.sample(chains, 5, 1, tmp_path / "other"))) != list(found)


def test_left_padded_rows_as_rectools_reads_them() -> None:
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 40, size=n).tolist() for n in (1, 3, 50, 51, 120, 2)]
    rows[0] = [3]
    known = np.setdiff1d(np.arange(40), [0, 7, 8, 39])
    users = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    found = rectools_child.left_padded((users, np.concatenate(rows)), known)
    internal = {item: at + 1 for at, item in enumerate(known.tolist())}
    for row, got in zip(rows, found.tolist(), strict=True):
        newest = [internal[item] for item in row if item in internal][-rectools_child.MAX_ITEMS :]
        assert got == [0] * (rectools_child.MAX_ITEMS - len(newest)) + newest


def exported(split: Any, n_items: int, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    known = np.ones(n_items, dtype=bool)
    known[:3] = False
    users = {
        part: rng.normal(size=(len(getattr(split, part)), 4)).astype(np.float32)
        for part in ("valid", "test")
    }
    return {**users, "items": rng.normal(size=(n_items, 4)).astype(np.float32), "known": known}


def test_scores_of_exported_vectors_are_ranked_one_by_one(chains: Dataset) -> None:
    split = leave_one_out(chains.sequences)
    vectors = exported(split, chains.n_items, 0)
    hits, gains = [], []
    for user, target in zip(vectors["test"], split.test.targets.values, strict=True):
        scores = [
            float(user @ item) if known else -math.inf
            for item, known in zip(vectors["items"], vectors["known"], strict=True)
        ]
        others = [score for i, score in enumerate(scores) if i != target]
        rank = 1 + sum(score > scores[target] for score in others)
        rank += sum(score == scores[target] for score in others) / 2
        hits.append(rank <= 10)
        gains.append(1 / math.log2(1 + rank) if rank <= 10 else 0)
    found = sasrec.scores_of(vectors, "test", split.test)
    assert found["recall@10"] == pytest.approx(np.mean(hits))
    assert found["ndcg@10"] == pytest.approx(np.mean(gains), rel=1e-5)
    vectors["valid"][2] = math.nan
    nothing = sasrec.scores_of(vectors, "valid", split.valid)
    assert nothing == {"recall@10": None, "ndcg@10": None}


FAKE_CHILD = """#!{python}
import json, shutil, sys
import numpy as np
_, contender, events, epochs, threads, seed, batch, folder = sys.argv[1:]
data = np.load(events)
assert data["train_users"].shape == data["train_items"].shape
for epoch in range(int(epochs)):
    shutil.copy(f"{vectors}/{{epoch}}.npz", f"{{folder}}/epoch-{{epoch + 1}}.npz")
with open(f"{{folder}}/result.json", "w") as file:
    json.dump({{"contender": contender, "batch": batch}}, file)
"""


def test_rectools_is_scored_at_its_best_epoch(chains: Dataset, tmp_path: Path) -> None:
    """The interpreter is one that copies vectors: of three epochs, the second is not finite."""
    split = leave_one_out(chains.sequences)
    made = [exported(split, chains.n_items, seed) for seed in range(3)]
    made[1]["valid"][0] = math.inf
    for number, vectors in enumerate(made):
        np.savez(tmp_path / f"{number}.npz", **vectors)
    python = tmp_path / "python"
    python.write_text(FAKE_CHILD.format(python=sys.executable, vectors=tmp_path))
    python.chmod(0o755)
    texts = np.ones((chains.n_items, 2), dtype=np.float32)
    sasrec.write_events(split, chains.n_items, texts, tmp_path / "events.npz")
    events = np.load(tmp_path / "events.npz")
    assert events["n_items"] == chains.n_items and (events["vectors"] == texts).all()
    for part, rows in (("train", split.train), ("test", split.test.histories)):
        pairs = list(zip(events[f"{part}_users"], events[f"{part}_items"], strict=True))
        assert pairs == [(user, item) for user in range(len(rows)) for item in rows[user]]
    given = ["3", "1", "0", "128"]
    found = sasrec.rectools(str(python), "UniSRec", tmp_path / "events.npz", split, given)
    assert (found["contender"], found["batch"]) == ("UniSRec", "128")
    scores = [sasrec.scores_of(v, "valid", split.valid)["ndcg@10"] for v in made]
    assert found["valid"] == [scores[0], -1.0, scores[2]]
    best = max((0, 2), key=lambda epoch: scores[epoch])
    of_best = sasrec.scores_of(made[best], "test", split.test)
    assert found["test"] == {name: of_best[name] for name in ("recall@10", "ndcg@10")}


def test_nothing_to_compare_with_is_said(
    chains: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        sasrec.main(["--data", str(chains.path)])
    assert "give --peer PYTHON, --rectools PYTHON, or both" in capsys.readouterr().err
