"""Plain lines where there is no terminal, tables, and texts that look like markup."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from l2rec import console
from l2rec.console import Console, print_new_items, print_recommendations, print_table


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    now = SimpleNamespace(time=1000.0)
    monkeypatch.setattr(console.time, "monotonic", lambda: now.time)
    return now


def test_plain_lines_now_and_then(
    capsys: pytest.CaptureFixture[str], clock: SimpleNamespace
) -> None:
    with Console() as out:
        for step in range(1, 101):  # a step every 6 seconds
            out.training(step / 100, step, 200, "loss 1.000")
            clock.time += 6
        out.validating(40, 40)
        out.line("done [b]")
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == "" and lines[-1] == "done [b]"
    assert lines[0] == "step 1/200  epoch 0.01  loss 1.000"
    assert 30 <= len(lines) <= 40  # every 15 seconds at most
    last = lines[-2].split()
    done = int(last[1].split("/")[0])
    assert last[-3:] == [f"~{(200 - done) / 10:.0f}", "min", "left"]


def test_the_time_left_is_of_this_run_of_several(
    capsys: pytest.CaptureFixture[str], clock: SimpleNamespace
) -> None:
    """A search trains one run after the other."""
    with Console() as out:
        for _ in range(2):
            for step in range(10, 31, 10):
                out.training(0.0, step, 40, "")
                clock.time += 60
    assert [line.partition("~")[2] for line in capsys.readouterr().err.splitlines()] == [
        "",
        "2 min left",
        "1 min left",
    ] * 2


def test_the_time_left_is_of_this_part_of_a_resumed_run(
    capsys: pytest.CaptureFixture[str], clock: SimpleNamespace
) -> None:
    with Console() as out:
        for step in (900, 910):
            out.training(9.0, step, 1000, "")
            clock.time += 60
    assert capsys.readouterr().err.splitlines()[-1].endswith("~9 min left")


def test_the_time_left_follows_a_stage_with_slower_steps(
    capsys: pytest.CaptureFixture[str], clock: SimpleNamespace
) -> None:
    with Console() as out:
        for step in range(1000):
            out.training(1.0, step, 2000, "")
            clock.time += 2 if step < 900 else 60
    assert capsys.readouterr().err.splitlines()[-1].endswith("~1001 min left")


def test_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with Console(quiet=True) as out:
        out.line("a")
        out.training(1.0, 1, 2, "b")
        out.validating(1, 2)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_bars(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "xterm")
    with Console() as out:
        out.training(0.5, 5, 10, "loss 1.0")
        for done in (10, 20, 10, 20):  # twice: the bar of a validation comes and goes
            out.validating(done, 20)
        out.line("a line [/]")
    err = capsys.readouterr().err
    assert "5/10" in err and "loss 1.0" in err and "a line [/]" in err


def test_lines_are_as_given(capsys: pytest.CaptureFixture[str]) -> None:
    text = r"C:\[x] [red]not red[/red] :smile: [/] " + "long " * 60
    with Console() as out:
        out.line(text)
    assert capsys.readouterr().err == text + "\n"


def test_scores(capsys: pytest.CaptureFixture[str]) -> None:
    keys = ["recall@10", "ndcg@10", "mrr", "recall@10_masked", "ndcg@10_masked"]
    rows = {name: dict.fromkeys(keys, 0.12345) for name in ("L2Rec", "popularity")}
    dataset = {"name": "toys", "fingerprint": "f00d"}
    report = {"method": "L2Rec", "dataset": dataset, "scores": rows}
    Console().scores(report | {"remarks": ["ranks [what] it reaches"]})
    captured = capsys.readouterr()
    assert captured.err == "" and captured.out.count("0.1235") + captured.out.count("0.1234") == 10
    assert captured.out.endswith("note: L2Rec: ranks [what] it reaches\n")
    assert "toys, fingerprint f00d" in captured.out and "popularity" in captured.out


def test_table_of_facts(capsys: pytest.CaptureFixture[str]) -> None:
    facts = {"users": 12345, "density": 0.00123456, "note": "[red]x[/red]", "none": None}
    print_table("a [b]", facts | {"nested": {"a": 1, "b": True, "c": None}, "list": [1, 2.5]})
    out = capsys.readouterr().out
    for shown in ("a [b]", "12,345", "0.001235", "[red]x[/red]", "a 1  b yes ", "1; 2.5"):
        assert shown in out, shown
    assert "none" not in out.lower() and "c " not in out


def test_recommendations(capsys: pytest.CaptureFixture[str]) -> None:
    items = [{"id": "[1]", "score": 12.3456, "text": "x" * 200}]
    print_recommendations([("a", "lamp :smile:")], SimpleNamespace(items=items, gate=0.256))
    out = capsys.readouterr().out
    assert "a  lamp :smile:" in out and "12.346  [1]  " + "x" * 89 + "…" in out
    assert "δ = 0.26" in out
    print_recommendations([], SimpleNamespace(items=[], gate=None))
    assert "δ" not in capsys.readouterr().out


def test_new_items_have_a_rank_or_were_not_found(capsys: pytest.CaptureFixture[str]) -> None:
    """A beam search ranks only what it reaches."""
    print_new_items(["a", "new1", "b"], ["new1", "new2"])
    assert capsys.readouterr().out.splitlines() == [
        "  new1 is rank 2 of 3 (new: known by its text alone)",
        "  new2 is not among the 3 items that were found (new: known by its text alone)",
    ]


def test_a_long_ranking_says_where_it_is(
    capsys: pytest.CaptureFixture[str], clock: SimpleNamespace
) -> None:
    with Console() as out:
        for total in (600, 60):  # a short one after the long one
            for done in range(0, total + 1, 10):
                out.validating(done, total)
                clock.time += 1 if total == 600 else 0.1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "ranking users 160/600  ~1 min left" and len(lines) == 3


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.1234, "0.12 s"), (9.94, "9.9 s"), (99.6, "100 s"), (115.0, "115 s"), (120.0, "2.0 min")],
)
def test_times(seconds: float, shown: str) -> None:
    assert console._time(seconds) == shown


def test_numbers_are_written_out() -> None:
    assert [console._shown(n) for n in (0.12345, 1234.5, 12345.6)] == ["0.1235", "1,234", "12,346"]


def test_a_dumb_terminal_gets_plain_lines(
    capsys: pytest.CaptureFixture[str], clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, for rich
    with Console() as out:
        out.training(0.1, 1, 10, "loss 1.000")
    assert "step 1/10  epoch 0.10  loss 1.000" in capsys.readouterr().err


def test_a_text_gives_a_terminal_no_commands(capsys: pytest.CaptureFixture[str]) -> None:
    name = "red\x1b]0;mine\x07 lamp\x9b2J"
    print_table("items", {name: name})
    with Console() as out:
        out.line(name)
    captured = capsys.readouterr()
    assert "lamp" in captured.out and "lamp" in captured.err
    assert not console.CONTROL.search(captured.out + captured.err)
