"""The command line as people and scripts meet it: help, exit codes, one line for each error."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from tests.support import runs
from tests.support.command import Call, Outcome
from tests.support.runs import Finished

from l2rec import __main__, cli
from l2rec.cli import production
from l2rec.data.dataset import Dataset
from l2rec.data.ragged import Ragged
from l2rec.data.synthetic import chain_dataset
from l2rec.methods.hdrec import HDRec, Reading, Side


def refused(outcome: Outcome, message: str) -> None:
    """Exit code 2, one line on standard error, nothing on standard output."""
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    lines = outcome.err.splitlines()
    progress = [line for line in lines[:-1] if not line.startswith(("data ", "backbone "))]
    assert progress == [] and "Traceback" not in outcome.err
    assert lines[-1].startswith("l2rec: ")
    assert re.search(message, lines[-1]), lines[-1]


# -- help ----------------------------------------------------------------------------------------

VERBS = {
    "prepare": [
        "--out",
        "--items",
        "--format",
        "--formats",
        "--text",
        "--k-core",
        "--only",
        "--before",
        "--ties",
    ],
    "describe": ["--json"],
    "train": ["--data", "--out", "--split", "--valid-from", "--test-from", "--resume", "--init"],
    "update": ["--events", "--out", "--items", "--data", "--grown", "--resume"],
    "cold": ["--out", "--share", "--seed"],
    "alignment": ["--out", "--users", "--seed", "--data", "--json"],
    "floors": ["--split", "--valid-from", "--test-from", "--backbone", "--out", "--json"],
    "tune": ["--data", "--out", "--trials", "--search", "--seed", "--json"],
    "recipes": ["--json"],
    "evaluate": ["--split", "--data", "--json"],
    "compare": ["--data", "--against", "--group", "--no-group", "--out", "--json"],
    "experiment": [
        *("--data", "--out", "--plan", "--render", "--jobs", "--hours"),
        *("--source", "--take", "--list", "--json"),
    ],
    "fusion": ["--alpha", "--dominant", "--split", "--data", "--json"],
    "recommend": [
        *("--history", "--user", "--new-item", "--include-seen", "--json"),
        *("--all", "--users", "--histories", "--out"),
    ],
    "embed": [
        *("--out", "--users", "--data", "--precision"),
        *("--histories", "--texts", "--engine", "--shard-rows", "--cpus"),
    ],
    "onnx": ["--out", "--data"],
    "diagnose": ["--by", "--users", "--separator", "--k", "--data", "--out", "--json"],
    "publish": ["--out", "--to", "--license", "--public", "--dataset", "--backbone", "--limits"],
    "blend": ["--out", "--data"],
    "average": ["--out", "--data"],
    "index": ["--out", "--kind", "--queries", "--alias", "--partition-by", "--data", "--json"],
    "abtest": ["--experiment", "--treatment", "--simulate", "--json"],
    "serve": ["--host", "--port", "--log", "--index", "--experiment", "--control", "--rate"],
    "deploy": ["--to", "--shadow", "--stop-shadow"],
    "rollback": [],
    "downstream": ["--run", "--vectors", "--until", "--seeds", "--out", "--json"],
    "doctor": ["--data", "--backbone", "--gpu-memory", "--no-measure", "--json"],
    "demo": ["--out", "--data", "--minutes"],
}


def test_help_names_the_verbs(call: Call) -> None:
    outcome = call("--help")
    assert outcome.code == 0 and "l2rec demo" in outcome.out
    assert all(verb in outcome.out for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb(call: Call, verb: str) -> None:
    outcome = call(verb, "--help")
    assert outcome.code == 0 and outcome.err == ""
    assert all(option in outcome.out for option in VERBS[verb])


def test_every_verb_is_tested() -> None:
    names = {c.name or c.callback.__name__ for c in cli.app.registered_commands if c.callback}
    assert names - {"merge"} == set(VERBS)


def test_help_is_quick() -> None:
    heavy = ("torch", "transformers", "polars", "pyarrow", "pydantic", "numpy", "matplotlib")
    script = (
        "import sys; from l2rec.cli import main; sys.argv = ['l2rec', '--help']\n"
        "try: main()\n"
        f"except SystemExit: print('LOADED', [m for m in {heavy!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "LOADED []", done.stdout + done.stderr


def test_serve_takes_its_defaults_from_the_settings(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    from l2rec.service.settings import Experiment, Settings, default_of

    names = inspect.signature(production.serve).parameters
    started: list[Settings] = []

    def server(target: Path, settings: Settings, **_: Any) -> None:
        started.append(settings)

    monkeypatch.setattr("l2rec.service.server.serve", server)
    for name in ("L2REC_READ_KEYS", "L2REC_WRITE_KEYS"):
        monkeypatch.delenv(name, raising=False)
    assert call("serve", "run").code == 0
    assert call("serve", "run", "--experiment", "e").code == 0
    assert started == [Settings(), Settings(experiment=Experiment(name="e"))]

    elsewhere = {
        "target",
        "log",
        "experiment",
        "control",
        "images",
    }  # no default, or not of the settings
    expected = {name: default_of(name) for name in names if name not in {*elsewhere, "threads"}}
    assert expected.pop("salt") == "" and expected.pop("access_log") is True  # shown as a flag
    shown = re.findall(r"\[default: (.+?)\]", call("serve", "--help").out)
    assert shown == [*map(str, expected.values()), "0", "access-log"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["train"],
        ["train", "l2rec"],
        ["train", "l2rec", "--data", "x"],
        ["recommend", "run", "-k", "many"],
        ["describe", "x", "--nonsense"],
    ],
)
def test_usage_errors_are_2(call: Call, arguments: list[str]) -> None:
    outcome = call(*arguments)
    assert outcome.code == 2 and outcome.out == "" and "Usage" in outcome.err
    assert "Traceback" not in outcome.err


# -- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["l2rec", "training.epohcs=3"], r"unknown key 'training\.epohcs'; did you mean 'epochs'"),
        (["l2rec", "model.rnak=3"], r"unknown key '(model\.)?rnak'; did you mean 'rank'"),
        (["l2rec", "backbone.nmae=x"], r"'backbone\.nmae'; did you mean 'name'"),
        (["l2rec", "trainnig.epochs=3"], r"unknown key 'trainnig'; did you mean 'training'"),
        (["l2rec", "training.epochs.more=3"], r"training\.epochs=\{'more': 3\}: Input should be"),
        (["l2rec", "training.epochs=some"], r"training\.epochs='some'"),
        (["l2rec", "training.epochs=0"], r"training\.epochs=0"),
        (["l2rec", "training.epochs"], r"write key=value, such as training\.epochs=3"),
        (["l2rec", "model.top_n=9"], "top_n=9 exceeds view_experts=8"),
        (["l2rec", "method=l2rec.methods.l2rec:L3Rec"], "L3Rec.* cannot be imported"),
        (["l2rec", "method=json:JSONDecoder"], "is no method"),
        (["l2rec", "method=3"], "method=3"),
        (["scientific/l2rce"], "no recipe 'scientific/l2rce'; did you mean 'scientific/l2rec'"),
        (["sasrek"], "no recipe 'sasrek'.*'sasrec'.*shipped: .*l2rec-plus"),
        (["mine.yaml"], "recipe 'mine.yaml': no such file"),
        (["l2rec", "backbone.name=./nowhere"], r"backbone '\./nowhere' cannot be loaded"),
    ],
)
def test_what_train_refuses(
    call: Call, chains: Dataset, tmp_path: Path, arguments: list[str], message: str
) -> None:
    outcome = call("train", *arguments, "--data", chains.path, "--out", tmp_path / "run")
    refused(outcome, message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "not readable as YAML"),
        ("- 1", "a recipe is a mapping of keys, got list"),
        ("training: 3", "training=3"),
        ("model: [1]", "model=.*group of keys"),
        ("model: {rnak: 3}", "'rnak'; did you mean 'rank'"),
        ("\xff", "r.yaml"),
    ],
)
def test_bad_recipes(call: Call, chains: Dataset, tmp_path: Path, text: str, message: str) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_bytes(text.encode("latin-1"))
    refused(call("train", recipe, "--data", chains.path, "--out", tmp_path / "run"), message)


def test_data_that_cannot_be_trained_on(call: Call, backbone_folder: Path, tmp_path: Path) -> None:
    recipe = runs.write_recipe(tmp_path / "r.yaml", runs.recipe_values(backbone_folder))
    refused(
        call("train", recipe, "--data", tmp_path / "none", "--out", tmp_path / "run"),
        "none does not exist.*l2rec prepare",
    )
    short = chain_dataset(tmp_path / "short", 10, 5, 2, seed=0)
    refused(
        call("train", recipe, "--data", short.path, "--out", tmp_path / "run"),
        "no user has three events",
    )
    assert not (tmp_path / "run" / "config.yaml").exists()  # nothing was claimed for it


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recommend", "{data}", "--history", "i1"], "not a run folder: it has no config.yaml"),
        (["evaluate", "{data}"], "not a run folder"),
        (["embed", "{data}", "--out", "{tmp}"], "not a run folder"),
        (["evaluate", "{run}", "--split", "all"], "split='all': choose valid or test"),
        (["evaluate", "{run}", "--data", "{tmp}"], "has no dataset.json"),
        (["recommend", "{run}"], "give either --history ID,ID,... or --user ID"),
        (["recommend", "{run}", "--history", "i1", "--user", "u1"], "give either --history"),
        (["recommend", "{run}", "--history", " , "], "an empty history"),
        (["recommend", "{run}", "--history", "i1,i99,x"], "unknown item ids: 'i99', 'x'; did you"),
        (["recommend", "{run}", "--user", "u999"], "user 'u999' is not among the 40 users"),
        (["recommend", "{run}", "--history", "i1", "-k", "0"], r"k=0: .*choose 1\.\.30"),
        (["recommend", "{run}", "--history", "i1", "-k", "31"], r"k=31: .*choose 1\.\.30"),
        (["recommend", "{run}", "--history", "i1", "--new-item", "lamp"], 'write "ID=its text"'),
        (["recommend", "{run}", "--history", "i1", "--new-item", "=lamp"], 'write "ID=its text"'),
        (["recommend", "{run}", "--history", "i1", "--new-item", "n="], "a new item needs a text"),
        (["recommend", "{run}", "--history", "i1", "--new-item", "i2=lamp"], "'i2' is in the cat"),
        (
            ["recommend", "{run}", "--history", "i1", *("--new-item", "n=a", "--new-item", "n=b")],
            "--new-item names 'n' twice",
        ),
        (["describe", "{tmp}"], "has no dataset.json"),
        (["embed", "{run}", "--out", "{run}/config.yaml"], "config.yaml is a file; give a folder"),
        (["recommend", "{run}", "--item", "i1", "--user", "u1"], "give either --history"),
        (["recommend", "{run}", "--item", "i1,i2"], "unknown item ids: 'i1,i2'"),
        (["recommend", "{run}", "--item", "n1"], r"'n1'.* \(--new-item .ID=its text. adds an item"),
        (["recommend", "{run}", "--all"], r"with --out FILE; this has --all without --out$"),
        (["recommend", "{run}", "--user", "u1", "--out", "x.parquet"], "this has --user with --o"),
        (["recommend", "{run}", "--out", "x.parquet"], "this has none of them with --out"),
        (
            ["recommend", "{run}", "--all", "--users", "x.csv", "--out", "x.parquet"],
            "this has --all and --users with --out",
        ),
        (["recommend", "{run}", "--all", "--out", "{tmp}"], r"give a file that ends in \.parquet"),
        (["recommend", "{run}", "--all", "--out", "x.csv"], r"x\.csv: give a file that ends in"),
        (
            ["recommend", "{run}", "--all", "--out", "{tmp}/x.parquet", "-k", "31"],
            r"k=31: .*choose 1\.\.30",
        ),
        (
            ["recommend", "{run}", "--histories", "{tmp}", "--out", "{tmp}/x.parquet"],
            "no Parquet file there",
        ),
        (
            ["recommend", "{run}", "--users", "{tmp}/x.parquet", "--out", "{tmp}/x.parquet"],
            "is what is read; choose another",
        ),
    ],
)
def test_what_other_verbs_refuse(
    call: Call, catalog_run: Finished, tmp_path: Path, arguments: list[str], message: str
) -> None:
    places = {"data": catalog_run.data, "run": catalog_run.run, "tmp": tmp_path}
    refused(call(*(argument.format(**places) for argument in arguments)), message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["movielens-100"], "data set 'movielens-100' is not known; did you mean 'movielens-100k'"),
        (["{tmp}/none.csv"], "none.csv"),
        (["{log}", "--k-core", "-1"], "--k-core -1: "),
        (["{log}", "--format", "nonsense"], "nonsense"),
        (["{log}", "--duplicate-items", "last"], "--duplicate-items last: "),
        (["{log}", "--user", "customer"], "customer"),
    ],
)
def test_what_prepare_refuses(
    call: Call, tmp_path: Path, arguments: list[str], message: str
) -> None:
    log = tmp_path / "log.csv"
    log.write_text("user_id,item_id,timestamp\n" + "".join(f"u,{n},{n}\n" for n in range(5)))
    filled = [argument.format(tmp=tmp_path, log=log) for argument in arguments]
    refused(call("prepare", *filled, "--out", tmp_path / "data"), message)


def test_prepare_lists_its_formats(call: Call) -> None:
    from l2rec.data.formats.open import FORMATS

    outcome = call("prepare", "--formats")
    assert (outcome.code, outcome.err) == (0, "")
    assert [line.split(maxsplit=1) for line in outcome.out.splitlines()] == [
        [name, looks] for name, looks in FORMATS.items()
    ]


def test_tune(call: Call, catalog_run: Finished, tmp_path: Path) -> None:
    fixed = ["training.epochs=1", "model.max_items=6", "--data", catalog_run.data]
    made = ["tune", "sasrec", *fixed, "--out", tmp_path / "s", "--trials", "2"]
    shown = call(*made, "--search", "model.dim={choose: [8, 16]}")
    assert shown.code == 0 and "ended by" in shown.out and "model.dim" in shown.out
    assert f"next: l2rec train {tmp_path}/s/best.yaml --data {catalog_run.data}" in shown.out
    found = json.loads(call(*made, "--search", "model.dim={choose: [8, 16]}", "--json").out)
    assert len(found["trials"]) == 2 and found["recipe"] == f"{tmp_path}/s/best.yaml"
    trained = call("train", found["recipe"], "--data", catalog_run.data, "--out", tmp_path / "r")
    assert trained.code == 0
    refused(call(*made, "--search", "model.dim=8"), r"write key=\[low, high\]")


def test_fusion_weights_of_a_trained_hdrec(
    call: Call, catalog_run: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each weight scores as a run evaluated at it does, and no history is read twice."""
    values = {
        "method": "l2rec.methods.hdrec:HDRec",
        "backbone": {"name": str(catalog_run.backbone), "dtype": "float32"},
        "model": {"max_items": 4, "item_tokens": 6, "max_tokens": 128, "id_dim": 8}
        | {"sasrec_epochs": 1, "sequence_prompt": "", "align_prompt": "", "align_items": 4},
        "training": runs.TRAINING | {"epochs": 1},
    }
    recipe, run = runs.write_recipe(tmp_path / "r.yaml", values), tmp_path / "run"
    assert call("train", recipe, "--data", catalog_run.data, "--out", run).code == 0
    own = json.loads(call("evaluate", run, "--split", "valid", "--json").out)

    reads: list[str] = []
    read = HDRec.read

    def counted(self: HDRec, histories: Ragged, side: Side, *, every: bool) -> Reading:
        reads.append(side)
        return read(self, histories, side, every=every)

    monkeypatch.setattr(HDRec, "read", counted)
    found = only_json(call("fusion", run, "--alpha", "0,0.5,2", "--json"))
    assert reads == ["text", "id"]
    assert found.pop("fingerprint") == own["fingerprint"]
    assert (found.pop("split"), found.pop("protocol")) == ("valid", own["protocol"])
    found = found.pop("scores")
    assert list(found) == ["0.0", "0.5", "2.0"]
    assert found["0.5"]["ndcg@10"] == own["ndcg@10"] != found["0.0"]["ndcg@10"]
    swapped = json.loads(call("fusion", run, "--alpha", "0", "--dominant", "id", "--json").out)
    assert swapped["scores"]["0.0"]["ndcg@10"] != found["0.0"]["ndcg@10"]
    shown = call("fusion", run, "--alpha", "0,2", "--split", "test").out
    assert "alpha" in shown and "ndcg@10 masked" in shown and "2.0" in shown
    assert own["fingerprint"] in shown

    refused(call("fusion", run, "--alpha", "x"), "numbers between commas")
    refused(call("fusion", run, "--alpha", "-1"), "none below 0")
    refused(call("fusion", run, "--dominant", "gate"), "choose one of text, id, both")
    refused(call("fusion", run, "--split", "train"), "choose valid or test")
    refused(call("fusion", catalog_run.run), "is no HDRec but L2Rec")
    blended = tmp_path / "blended"
    assert call("blend", run, "--out", blended).code == 0
    refused(call("fusion", blended), "is blended; give the run it was made of")


def test_a_folder_with_a_run(call: Call, catalog_run: Finished, tmp_path: Path) -> None:
    values = runs.recipe_values(catalog_run.backbone)
    recipe = runs.write_recipe(tmp_path / "r.yaml", values)
    arguments = ["train", recipe, "--data", catalog_run.data, "--out", catalog_run.run]
    refused(call(*arguments), "holds a run already; add --resume")
    refused(call(*arguments, "model.rank=1", "--resume"), r"model\.rank was 2, is 1")
    outcome = call(*arguments, "--resume")
    assert outcome.code == 0 and "is finished: these are its scores" in outcome.err
    assert "untrained backbone" in outcome.out


def test_it_says_its_version(call: Call) -> None:
    outcome = call("--version")
    assert (outcome.code, outcome.out) == (0, f"l2rec {version('l2rec')}\n")


@pytest.mark.parametrize("where", ["before", "after"])
def test_debug_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: str
) -> None:
    arguments = ["describe", str(tmp_path)]
    arguments = ["--debug", *arguments] if where == "before" else [*arguments, "--debug"]
    monkeypatch.setattr(sys, "argv", ["l2rec", *arguments])
    with pytest.raises(cli.L2RecError, match=r"dataset\.json"):
        cli.main()


@pytest.mark.parametrize(
    ("arguments", "at", "after"),
    [
        (["describe", "train"], "l2rec.data.dataset.open_dataset", ""),
        (["prepare", "x.csv", "--out", "d"], "l2rec.data.prepare.prepare", "; what was at --out"),
        (["train", "l2rec", "--data", "d", "--out", "r"], "l2rec.runs.train.train_run", "--resume"),
        (
            ["update", "r", "--events", "nothing.csv", "--out", "o"],
            "l2rec.runs.folder.open_run_dataset",
            "--resume",
        ),
        (["demo"], "l2rec.demo.run_demo", "; go on with the same command"),
        (
            ["tune", "sasrec", "--data", "d", "--out", "train"],
            "l2rec.studies.tune.tune",
            "; go on with the same command",
        ),
    ],
)
def test_an_interrupt_says_how_to_go_on(
    call: Call, monkeypatch: pytest.MonkeyPatch, arguments: list[str], at: str, after: str
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(at, interrupt)
    outcome = call(*arguments)
    assert outcome.code == 130
    assert outcome.err.startswith(f"l2rec: interrupted{after and '; '}") and after in outcome.err
    assert outcome.err.count("\n") == 1
    monkeypatch.setattr(cli, "app", interrupt)  # before typer can catch it
    assert call(*arguments) == outcome


def test_ctrl_c_while_modules_load(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Pressed:
        """Finder of modules that is interrupted."""

        @staticmethod
        def find_spec(name: str, *_: Any) -> None:
            if name == "l2rec.cli":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "l2rec.cli")
    monkeypatch.setattr(sys, "meta_path", [Pressed, *sys.meta_path])
    on_interrupt = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stop:
        __main__.main()
    signal.signal(signal.SIGINT, on_interrupt)
    assert (stop.value.code, capsys.readouterr().err) == (130, "l2rec: interrupted\n")


@pytest.mark.parametrize("caught", [KeyboardInterrupt, SystemExit])
def test_a_second_ctrl_c_prints_nothing(caught: type[BaseException]) -> None:
    script = (
        "import atexit, os, signal, sys\n"
        "from l2rec import cli\n"
        f"def app(_): raise {caught.__name__}(130)\n"
        "cli.app, sys.argv = app, ['l2rec', 'train']\n"
        "atexit.register(os.kill, os.getpid(), signal.SIGINT)\n"
        "cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    expected = "l2rec: interrupted; go on with the same command and --resume\n"
    assert (done.returncode, done.stdout, done.stderr) == (130, "", expected)


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied", "x"), OSError("a\nb")])
def test_errors_of_the_system_are_one_line(
    call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: OSError
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr("l2rec.data.dataset.open_dataset", fail)
    refused(call("describe", tmp_path), r"Permission denied: 'x'|a b")


def test_nan_is_one_line(
    call: Call, catalog_run: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from l2rec.modules import item_side

    real, calls = item_side.fused_catalog_loss, []

    def poisoned(*args: Any, **options: Any) -> torch.Tensor:
        calls.append(1)
        return real(*args, **options) * (float("nan") if len(calls) > 12 else 1.0)

    monkeypatch.setattr(item_side, "fused_catalog_loss", poisoned)
    values = runs.recipe_values(catalog_run.backbone)
    recipe = runs.write_recipe(tmp_path / "r.yaml", values)
    outcome = call("train", recipe, "--data", catalog_run.data, "--out", tmp_path / "run")
    assert outcome.code == 2 and outcome.out == ""
    last = outcome.err.splitlines()[-1]
    assert re.match(r"l2rec: step 13: the loss part rec.* is not finite.*lower training\.lr", last)
    outcome = call("recommend", tmp_path / "run", "--history", "i1", "--json")
    assert outcome.code == 0 and len(json.loads(outcome.out)["items"]) == 10


# -- what works ----------------------------------------------------------------------------------


def test_the_whole_road(call: Call, backbone_folder: Path, tmp_path: Path) -> None:
    log, items = tmp_path / "log.csv", tmp_path / "items.csv"
    rows = [f"u{u},p{(u + n) % 12},{n}" for u in range(15) for n in range(6)]
    log.write_text("user_id,item_id,timestamp\n" + "\n".join(rows) + "\n")
    texts = [f"p{n},small {colour} lamp" for n, colour in enumerate(["red", "blue", "green"] * 4)]
    items.write_text("item_id,title\n" + "\n".join(texts) + "\n")
    data, run = tmp_path / "data", tmp_path / "run"
    outcome = call("prepare", log, "--items", items, "--text", "{title}", "--out", data)
    assert outcome.code == 0, outcome
    assert f"{data}: 15 users, 12 items, 90 events, fingerprint " in outcome.out
    assert "fingerprint" not in outcome.err  # once
    assert call("prepare", log, "--items", items, "--out", tmp_path / "more").code == 0
    both = call("merge", data, tmp_path / "more", "--out", tmp_path / "both")
    assert both.out.count("fingerprint") == 1 and "fingerprint" not in both.err
    outcome = call("describe", data, "--json")
    facts = json.loads(outcome.out)
    assert (facts["users"], facts["items"], facts["events"]) == (15, 12, 90)
    values = runs.recipe_values(backbone_folder)
    recipe = runs.write_recipe(tmp_path / "r.yaml", values)
    outcome = call("train", recipe, "--data", data, "--out", run, "training.epochs=1", "seed=3")
    assert outcome.code == 0, outcome
    assert "step 0" in outcome.err and "(untrained)" in outcome.err
    assert f"next: l2rec recommend {run}" in outcome.err
    for row in ("L2Rec", "popularity", "last item neighbour", "untrained backbone"):
        assert row in outcome.out
    config = yaml.safe_load((run / "config.yaml").read_text())["config"]
    assert (config["seed"], config["training"]["epochs"]) == (3, 1)
    report = json.loads((run / "report.json").read_text())
    assert report["recipe"] == str(recipe) and report["command"].startswith("l2rec train ")
    assert call("recommend", run, "--user", "u3", "-k", 3).code == 0


def test_ids_with_commas(call: Call, catalog_run: Finished) -> None:
    odd = ("--new-item", "a,b= a lamp", "--new-item", "c=a chair")
    run = ("recommend", catalog_run.run, "--json", *odd)
    first = only_json(call(*run, "--item", "a,b", "--item", "i3"))
    assert only_json(call(*run, "--history", "c", "--item", "a,b", "-k", 3))["items"]
    assert len(first["items"]) == 10
    message = r"is read as 2 ids between commas; give ids with a comma by --item.*: --item a,b$"
    refused(call(*run, "--history", "a,b"), message)


def test_ids_with_blanks_at_an_end(call: Call, catalog_run: Finished, tmp_path: Path) -> None:
    odd = ("--new-item", "n=a lamp")
    refused(call("recommend", catalog_run.run, "--history", " n2 ", *odd), "unknown item ids: 'n2'")
    log, items = tmp_path / "log.csv", tmp_path / "items.csv"
    names = ["a", "b", " c ", "d"]
    rows = [f"u{u},{names[(u + n) % 4]},{n}" for u in range(8) for n in range(4)]
    log.write_text("user_id,item_id,timestamp\n" + "\n".join(rows) + "\n")
    items.write_text("item_id,title\n" + "".join(f"{name},a lamp\n" for name in names))
    data, run = tmp_path / "data", tmp_path / "run"
    assert call("prepare", log, "--out", data).code == 0
    small = ["model.dim=8", "training.max_steps=1"]
    assert call("train", "sasrec", *small, "--data", data, "--out", run).code == 0
    outcome = call("recommend", run, "--history", "a, c ", "-k", 1)
    refused(outcome, r"without blanks at the ends of ids; .*by --item, .*: --item ' c '$")
    assert call("recommend", run, "--history", " a , b", "--item", " c ", "-k", 1).code == 0


def test_the_next_line_fits_the_data(call: Call, tmp_path: Path) -> None:
    log, items = tmp_path / "my log.csv", tmp_path / "items.csv"
    log.write_text("user_id,item_id,timestamp\nann,a,1\nann,b,2\nann,c,3\nbob,a,1\n")
    items.write_text("item_id,title\na,x\nb,\nc,\n")
    data = tmp_path / "my data"
    last = call("prepare", log, "--out", data).out.splitlines()[-1]
    assert last == f"next: l2rec train sasrec --data '{data}' --out 'runs/my data'"
    last = call("prepare", log, "--items", items, "--out", data).out.splitlines()[-1]
    assert last.startswith("next: l2rec train l2rec-plus --data '")
    log.write_text("user_id,item_id,timestamp\nann,a,1\nann,b,2\nbob,a,1\n")
    last = call("prepare", log, "--out", data).out.splitlines()[-1]
    assert "a training needs users with 3 or more" in last


@pytest.mark.parametrize(
    ("train", "valid", "test", "options"),
    [
        (["u,a,1", "u,b,2", "u,c,3"], [], ["v,a,9"], ["--split", "leave-one-out"]),
        (["u,a,1", "u,b,2", "u,c,3"], [], ["u,d,9"], []),
        (["u,a,1", "v,a,1"], [], ["u,d,9", "u,e,9"], ["--split", "leave-one-out"]),
        (["u,a,1", "u,b,2", "u,c,3"], ["v,a,1"], ["u,d,9"], ["--split", "leave-one-out"]),
        (["u,a,1", "v,a,1"], ["u,b,2"], ["v,b,2"], []),
    ],
)
def test_the_next_line_fits_the_splits(
    call: Call, tmp_path: Path, train: Rows, valid: Rows, test: Rows, options: Rows
) -> None:
    (tmp_path / "log").mkdir()
    for name, rows in (("train", train), ("valid", valid), ("test", test)):
        lines = ["user_id,item_id,timestamp", *rows, ""]
        (tmp_path / "log" / f"{name}.csv").write_text("\n".join(lines))
    data = tmp_path / "data"
    *_, last = call("prepare", tmp_path / "log", "--out", data).out.splitlines()
    assert last.split()[8:] == options
    assert call("floors", data, "--backbone", "none", *options).code == 0
    tested = only_json(call("describe", data, "--json"))["users_evaluated"]
    assert bool(tested) == (not options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--valid-from", "0.5"), r"^l2rec: valid_from and test_from need .* \(--split time\)$"),
        (("--split", "loo"), r"^l2rec: --split loo: Input should be 'auto', 'leave-one-out'"),
    ],
)
def test_split_options_that_are_refused(
    call: Call, catalog_run: Finished, options: tuple[str, ...], message: str
) -> None:
    refused(call("floors", catalog_run.data, "--backbone", "none", *options), message)


def test_a_moment_that_is_none_is_refused(call: Call, tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\nann,a,1\n")
    outcome = call("prepare", tmp_path / "log.csv", "--out", tmp_path / "d", "--before", "nan")
    refused(outcome, "^l2rec: --before nan: 'nan' is no time; write a date")


def test_train_by_bare_method_name(call: Call, catalog_run: Finished, tmp_path: Path) -> None:
    overrides = [f"model.{key}={json.dumps(value)}" for key, value in runs.SMALL.items()] + [
        "training.max_steps=1",
        "backbone.dtype=float32",
        f"backbone.name={catalog_run.backbone}",
    ]
    run = tmp_path / "run"
    outcome = call("train", "l2rec", *overrides, "--data", catalog_run.data, "--out", run)
    assert outcome.code == 0, outcome
    config = yaml.safe_load((run / "config.yaml").read_text())["config"]
    assert config["model"]["form"] == "paper" and config["model"]["negatives"] == 10


def test_recipes(call: Call) -> None:
    names = call("recipes").out.split()
    assert {"l2rec", "l2rec-plus", "scientific/l2rec", "movielens-100k/l2rec-plus"} <= set(names)


Rows = list[str]


def only_json(outcome: Outcome) -> dict[str, Any]:
    assert outcome.code == 0, outcome
    assert outcome.out.count("\n") == 1 and outcome.out.endswith("\n")
    value = json.loads(outcome.out)
    assert isinstance(value, dict)
    return value


def test_evaluate_json(call: Call, catalog_run: Finished, chains: Dataset) -> None:
    report = json.loads((catalog_run.run / "report.json").read_text())
    found = only_json(call("evaluate", catalog_run.run, "--json"))
    names = {"recall@10", "ndcg@10", "mrr", "recall@10_masked", "ndcg@10_masked", "mrr_masked"}
    assert names <= found.keys() and found["fingerprint"] == chains.fingerprint
    assert found["ndcg@10"] == pytest.approx(report["scores"]["L2Rec"]["ndcg@10"], abs=1e-9)
    valid = only_json(call("evaluate", catalog_run.run, "--split", "valid", "--json"))
    assert valid["split"] == "valid" and valid["users"] == 40
    assert "ndcg@10" in call("evaluate", catalog_run.run).out


def test_compare(
    call: Call, catalog_run: Finished, paper_run: Finished, chains: Dataset, tmp_path: Path
) -> None:
    both = (catalog_run.run, paper_run.run)
    shown = call("compare", *both, "--out", tmp_path / "table.md")
    assert shown.code == 0 and shown.err == ""
    assert all(name in shown.out for name in ("N@10 by segment", "bias@10", "costs", "popularity"))
    assert (
        f"### chains, fingerprint {chains.fingerprint}: costs"
        in (tmp_path / "table.md").read_text()
    )
    found = only_json(call("compare", *both, "--against", paper_run.run, "--json"))
    (ours, theirs) = found["entries"]
    assert ours["runs"] == [str(catalog_run.run)] and ours["label"] == f"tiny ({catalog_run.run})"
    assert {block["reference"] for block in found["blocks"]} == {theirs["label"]}
    report = json.loads((catalog_run.run / "report.json").read_text())
    overall = found["blocks"][0]["lines"][ours["label"]]["scores"]
    for metric in ("recall@5", "ndcg@10", "mrr", "coverage@10"):
        assert overall[metric]["mean"] == pytest.approx(report["scores"]["L2Rec"][metric], abs=1e-9)


@pytest.mark.parametrize(
    "command",
    [
        "floors {data} --backbone none",
        "train {copy}/config.yaml --data {data} --out {copy} --resume",
        "tune sasrec training.max_steps=1 --data {data} --out {tmp}/tuned --trials 1",
        "evaluate {run}",
        "compare {run} {other}",
        "diagnose {run}",
        "blend {run} --out {tmp}/blended",
        "average {run} {other} --out {tmp}/mean",
        "embed {run} --out {tmp}/vectors --precision int8",
    ],
)
def test_the_fingerprint_is_printed_beside_every_score(
    call: Call,
    catalog_run: Finished,
    paper_run: Finished,
    chains: Dataset,
    tmp_path: Path,
    command: str,
) -> None:
    places = {"run": catalog_run.run, "other": paper_run.run, "data": catalog_run.data}
    places |= {"tmp": tmp_path, "copy": tmp_path / "copy"}
    shutil.copytree(catalog_run.run, tmp_path / "copy")
    outcome = call(*(word.format(**places) for word in command.split()))
    assert outcome.code == 0, outcome
    assert re.search(r"n(dcg)?@10", outcome.out, re.IGNORECASE), outcome.out
    assert chains.fingerprint in outcome.out


def test_compare_refuses(call: Call, catalog_run: Finished, tmp_path: Path) -> None:
    refused(call("compare", catalog_run.run, tmp_path), "is not a run folder")
    refused(call("compare", catalog_run.run, catalog_run.run), "is given twice")
    refused(
        call("compare", catalog_run.run, "--out", tmp_path / "x.html"), r"ends in \.md or \.csv"
    )
    chain_dataset(tmp_path / "other", 12, 10, 6, seed=1)
    refused(
        call("compare", catalog_run.run, "--data", tmp_path / "other"), "made on data .* --data"
    )


def test_recommend_json(call: Call, catalog_run: Finished) -> None:
    found = only_json(call("recommend", catalog_run.run, "--history", " i3 ,i7", "-k", 4, "--json"))
    assert found.keys() == {"items", "gate", "version"}
    assert [item.keys() for item in found["items"]] == [{"id", "score", "text"}] * 4
    assert not {"i3", "i7"} & {item["id"] for item in found["items"]}
    seen = only_json(
        call(
            *("recommend", catalog_run.run, "--history", "i3,n1", "-k", 32, "--json"),
            *("--include-seen", "--new-item", "n1=small red lamp", "--new-item", "n2=a = b"),
        )
    )
    by_id = {item["id"]: item["text"] for item in seen["items"]}
    assert len(by_id) == 32 and by_id["n2"] == "a = b" and "i3" in by_id


@pytest.mark.parametrize("blended", [False, True])
def test_lists_of_many_users_are_those_of_each(
    call: Call, catalog_run: Finished, chains: Dataset, tmp_path: Path, blended: bool
) -> None:
    run = catalog_run.run
    if blended:
        run = tmp_path / "blended"
        assert call("blend", catalog_run.run, "--out", run).code == 0
    out = tmp_path / "lists" / "all.parquet"
    outcome = call("recommend", run, "--all", "--out", out, "-k", 4)
    assert (outcome.code, outcome.out) == (0, f"{out}: 160 rows of 40 users\n")
    every = pl.read_parquet(out)
    assert every.columns == ["user_id", "item_id", "score", "rank"]
    assert every["user_id"].unique(maintain_order=True).to_list() == chains.user_ids.to_pylist()
    for user in ("u3", "u17"):
        items = only_json(call("recommend", run, "--user", user, "-k", 4, "--json"))["items"]
        rows = every.filter(pl.col("user_id") == user)
        assert rows["item_id"].to_list() == [item["id"] for item in items]
        assert rows["score"].to_list() == pytest.approx([i["score"] for i in items], abs=1e-5)
        assert rows["rank"].to_list() == [1, 2, 3, 4]

    some = tmp_path / "some.csv"
    some.write_text("user_id,age\nu17,1\nu3,2\n")
    facts = only_json(call("recommend", run, "--users", some, "--out", out, "-k", 4, "--json"))
    assert (facts["out"], facts["users"], facts["rows"]) == (str(out), 2, 8)
    chosen = pl.read_parquet(out)  # in the place of the earlier file
    assert chosen["user_id"].unique(maintain_order=True).to_list() == ["u17", "u3"]
    of_one = every.filter(pl.col("user_id") == "u3")["item_id"]
    assert chosen.filter(pl.col("user_id") == "u3")["item_id"].equals(of_one)
    some.write_text("user_id\nu17\nu98\nnobody\n")
    message = r"--users .*some\.csv: users 'u98', 'nobody' are not among the 40 users"
    refused(call("recommend", run, "--users", some, "--out", out), message)
    assert pl.read_parquet(out).equals(chosen)  # as it was


def test_lists_of_a_data_set_look_no_id_up(
    call: Call, catalog_run: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Histories are the data set's item ints, which are the run's."""
    from l2rec.runs.predictor import Predictor

    monkeypatch.delattr(Predictor, "rows")
    out = tmp_path / "all.parquet"
    assert call("recommend", catalog_run.run, "--all", "--out", out, "-k", 4).code == 0
    assert len(pl.read_parquet(out)) == 160


def test_lists_of_histories(call: Call, catalog_run: Finished, tmp_path: Path) -> None:
    tonight, out = tmp_path / "tonight.parquet", tmp_path / "lists.parquet"
    lists = {"user_id": ["x", "nobody", "y"], "history": [["i3", "n1"], [], ["i7"]]}
    pl.DataFrame(lists).write_parquet(tonight)
    new = ("--new-item", "n1=small red lamp", "--include-seen")
    many = ("recommend", catalog_run.run, "--histories", tonight, "--out", out)
    assert call(*many, *new, "-k", 31).code == 0
    found = pl.read_parquet(out)
    assert found["user_id"].unique(maintain_order=True).to_list() == ["x", "y"]
    one = only_json(
        call("recommend", catalog_run.run, "--history", "i3,n1", *new, "-k", 31, "--json")
    )
    rows = found.filter(pl.col("user_id") == "x")
    assert rows["item_id"].to_list() == [item["id"] for item in one["items"]]
    refused(call(*many), r"tonight\.parquet, rows 0 to 2: unknown item ids: 'n1'")
    pl.DataFrame({"user_id": ["x", "x"], "history": [["i3"], ["i7"]]}).write_parquet(tonight)
    refused(call(*many), "user_id 'x' is in 2 rows")


def test_describe_json(call: Call, chains: Dataset) -> None:
    found = only_json(call("describe", chains.path, "--json"))
    assert found["fingerprint"] == chains.fingerprint
    assert chains.fingerprint in call("describe", chains.path).out


def test_ties_on_the_command_line(call: Call, tmp_path: Path) -> None:
    log, data = tmp_path / "log.csv", tmp_path / "data"
    rows = "".join(f"u{u},{n},{86_400 * 15_000}\n" for u in range(200) for n in (7, 9, 10))
    log.write_text("user_id,item_id,timestamp\n" + rows)
    outcome = call("prepare", log, "--out", data)
    assert outcome.code == 0, outcome
    warning = "warning: 100.0% of tied neighbours ascend by item id: the order inside ties looks"
    assert warning in outcome.err and "check with --ties hash" in outcome.err
    outcome = call("describe", data)
    assert outcome.code == 0 and warning in outcome.out
    assert "time: unit seconds, resolution days; 100.0% of neighbouring events" in outcome.out
    order = only_json(call("describe", data, "--json"))["order"]
    assert (order["tied"], order["ascending_share"], order["last_three_share"]) == (400, 1.0, 1.0)
    assert order["warning"].startswith("100.0% of tied neighbours ascend")
    prints = [only_json(call("describe", data, "--json"))["fingerprint"]]
    for more in (["hash"], ["hash", "--ties-seed", 1], ["item"]):
        outcome = call("prepare", log, "--out", data, "--ties", *more)
        assert outcome.code == 0 and "warning" not in outcome.err, outcome
        found = only_json(call("describe", data, "--json"))
        assert found["options"]["ties"] == more[0] and found["order"]["warning"] is None
        prints.append(found["fingerprint"])
    assert prints[3] == prints[0] and len(set(prints)) == 3
    outcome = call("prepare", log, "--out", data, "--ties", "chance")
    refused(outcome, "--ties chance: Input should be 'file', 'hash' or 'item'")


def test_recommend_for_people(call: Call, catalog_run: Finished) -> None:
    odd = "n1=[bold]lamp[/bold] :100: [/] 100%"
    outcome = call(
        *("recommend", catalog_run.run, "--history", "i3,n1", "-k", 31, "--new-item", odd),
        "--include-seen",
    )
    assert outcome.code == 0, outcome
    assert outcome.out.count("[bold]lamp[/bold] :100: [/] 100%") == 2  # as it was typed
    assert "recommended" in outcome.out and "31. " in outcome.out


def test_embed(call: Call, catalog_run: Finished, tmp_path: Path) -> None:
    outcome = call("embed", catalog_run.run, "--out", tmp_path / "v")
    assert outcome.code == 0 and "40 vectors of 32 numbers" in outcome.err
    outcome = call("embed", catalog_run.run, "--out", tmp_path / "w", "--no-users")
    assert outcome.code == 0 and not (tmp_path / "w" / "users.parquet").exists()


def test_the_data_set_was_moved(call: Call, catalog_run: Finished, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(catalog_run.run, run)
    identity = yaml.safe_load((run / "config.yaml").read_text())
    identity["dataset"]["path"] = str(tmp_path / "gone")
    (run / "config.yaml").write_text(yaml.safe_dump(identity))
    refused(call("recommend", run, "--user", "u1"), "no longer at .*--data")
    assert call("recommend", run, "--user", "u1", "--data", catalog_run.data).code == 0
    assert call("recommend", run, "--history", "i1").code == 0
