"""Runs that are published: the folder, its card, the hub and back. The hub is on 127.0.0.1."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from tests.support import hub as fake
from tests.support.command import Call
from tests.support.errors import one_line
from tests.support.runs import Finished, Quiet

import l2rec
from l2rec.config import BackboneConfig
from l2rec.data.dataset import Dataset
from l2rec.errors import CheckpointError, ConfigError
from l2rec.modules.backbone import load_tokenizer
from l2rec.runs.folder import read_report
from l2rec.runs.hub import FILES, _without_paths, save_pretrained
from l2rec.runs.predictor import Predictor, load
from l2rec.runs.train import evaluate_run

BACKBONE = "org/tiny-bert"
HISTORY = ["i1", "i2", "i3"]


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[fake.Hub, str]]:
    """One for all tests: `huggingface_hub` remembers the first address in some places."""
    with fake.serving() as running:
        yield running


@pytest.fixture
def hub(server: tuple[fake.Hub, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> fake.Hub:
    """An empty hub."""
    hub, address = server
    for kept in (hub.repos, hub.private, hub.downloaded):
        kept.clear()
    fake.lead_to(address, tmp_path / "hub-cache", monkeypatch)
    return hub


@pytest.fixture
def with_backbone(hub: fake.Hub, backbone_folder: Path) -> fake.Hub:
    """A hub that has the backbone too."""
    hub.put(BACKBONE, backbone_folder)
    return hub


def items(predictor: Predictor) -> list[dict[str, Any]]:
    return predictor.recommend(HISTORY, 10).items


def edited(folder: Path, **changes: Any) -> None:
    """Change keys of the config inside config.yaml."""
    identity = yaml.safe_load((folder / "config.yaml").read_text())
    identity["config"] |= changes
    (folder / "config.yaml").write_text(yaml.safe_dump(identity))


# -- the folder ----------------------------------------------------------------------------------


def test_a_saved_run_recommends_what_the_run_does(sasrec_run: Path, tmp_path: Path) -> None:
    saved = load(sasrec_run).save_pretrained(tmp_path / "saved", license="mit")
    for again in (l2rec.load(str(saved)), Predictor.from_pretrained(saved)):
        assert items(again) == items(load(sasrec_run))
        assert again.version == load(sasrec_run).version


def test_a_blended_run_keeps_its_blend(
    blended_run: Finished, with_backbone: fake.Hub, tmp_path: Path
) -> None:
    saved = save_pretrained(blended_run.run, tmp_path / "saved", backbone=BACKBONE)
    assert (saved / "blend.safetensors").is_file()
    assert items(load(saved)) == items(load(blended_run.run))


def test_only_what_is_needed_is_in_it_and_no_path_of_this_machine(
    paper_run: Finished, tmp_path: Path
) -> None:
    saved = save_pretrained(paper_run.run, tmp_path / "saved", backbone=BACKBONE)
    names = {p.relative_to(saved).as_posix() for p in saved.rglob("*") if p.is_file()}
    tokenizer = {f"tokenizer/{name}" for name in ("tokenizer.json", "tokenizer_config.json")}
    assert names == {*FILES[:-1], *tokenizer} - {"blend.safetensors"}
    for folder in (paper_run.run, paper_run.data, paper_run.backbone):
        for file in saved.rglob("*"):
            inside = file.read_bytes() if file.is_file() else b""
            assert str(folder.parent).encode() not in inside, file


def test_a_published_folder_stays_as_it_is_when_it_is_loaded(
    paper_run: Finished, with_backbone: fake.Hub, tmp_path: Path
) -> None:
    saved = save_pretrained(paper_run.run, tmp_path / "saved", backbone=BACKBONE)
    before = sorted(saved.rglob("*"))
    load(saved)
    assert sorted(saved.rglob("*")) == before


def test_a_published_folder_that_is_scored_holds_no_users(
    sasrec_run: Path, chains: Dataset, tmp_path: Path
) -> None:
    saved = save_pretrained(sasrec_run, tmp_path / "saved")
    before = sorted(saved.rglob("*"))
    assert evaluate_run(saved, "test", Quiet(), chains.path)["users"] == chains.n_users
    assert sorted(saved.rglob("*")) == before
    save_pretrained(sasrec_run, saved)


def test_texts_are_read_with_the_tokenizer_that_was_saved(
    catalog_run: Finished, with_backbone: fake.Hub, tmp_path: Path
) -> None:
    saved = save_pretrained(catalog_run.run, tmp_path / "saved", backbone=BACKBONE)
    expected = load(catalog_run.run).encode_items(["red lamp"])
    torch.testing.assert_close(load(saved).encode_items(["red lamp"]), expected)
    vocabulary = saved / "tokenizer" / "tokenizer.json"
    swapped = vocabulary.read_text().replace('"red"', '"@"').replace('"lamp"', '"red"')
    vocabulary.write_text(swapped.replace('"@"', '"lamp"'))
    other = load(saved).encode_items(["red lamp"])
    assert not torch.allclose(other, expected)


def test_a_tokenizer_can_be_loaded_without_weights(backbone_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(backbone_folder, tmp_path / "b")
    (tmp_path / "b" / "model.safetensors").unlink()
    tokenizer = load_tokenizer(BackboneConfig(name=str(tmp_path / "b")))
    assert len(tokenizer("red lamp")["input_ids"]) == 4


def test_what_is_published_already_is_replaced_and_nothing_else_is(
    sasrec_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "saved"
    save_pretrained(sasrec_run, out)
    save_pretrained(sasrec_run, out, license="mit")
    assert "license: mit" in (out / "README.md").read_text()
    for other in (tmp_path, sasrec_run):
        with pytest.raises(CheckpointError, match="no published run; choose another folder") as e:
            save_pretrained(sasrec_run, other)
        one_line(e)


def test_what_cannot_be_published_is_refused_with_what_to_do(
    paper_run: Finished, sasrec_run: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="which one of the hub it is: backbone='org/name'") as e:
        save_pretrained(paper_run.run, tmp_path / "a")
    one_line(e)
    with pytest.raises(ConfigError, match="trained without one"):
        save_pretrained(sasrec_run, tmp_path / "a", backbone=BACKBONE)
    with pytest.raises(ConfigError, match=r"give an identifier, such as apache-2.0"):
        save_pretrained(sasrec_run, tmp_path / "a", license="Apache License")
    shutil.copytree(sasrec_run, tmp_path / "unfinished")
    (tmp_path / "unfinished" / "report.json").unlink()
    with pytest.raises(CheckpointError, match="not finished"):
        save_pretrained(tmp_path / "unfinished", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_items_that_were_added_are_not_left_out_in_silence(
    catalog_run: Finished, tmp_path: Path
) -> None:
    model = load(catalog_run.run)
    model.add_items({"n1": "red lamp"})
    with pytest.raises(ConfigError, match=r"1 items were added since .* load it again"):
        model.save_pretrained(tmp_path / "a", backbone=BACKBONE)
    with pytest.raises(ConfigError, match="no run as it was trained"):
        load(catalog_run.run).with_items({"n1": "red lamp"}).save_pretrained(tmp_path / "a")


# -- the card ------------------------------------------------------------------------------------


def test_the_card_has_data_scores_seed_licence_and_limits(
    paper_run: Finished, tmp_path: Path
) -> None:
    saved = save_pretrained(
        paper_run.run,
        tmp_path / "saved",
        license="cc-by-4.0",
        dataset="org/chains",
        backbone=BACKBONE,
        backbone_revision="abc",
        limits="Only for chains.",
    )
    card, report = ModelCard.load(saved / "README.md"), read_report(paper_run.run)
    assert card.data.license == "cc-by-4.0" and card.data.base_model == BACKBONE
    assert card.data.datasets == ["org/chains"] and card.data.library_name == "l2rec"
    found = {r.metric_type: r.metric_value for r in card.data.eval_results}
    ours = report["scores"]["L2Rec"]
    assert found["ndcg@10_masked"] == pytest.approx(ours["ndcg@10_masked"], abs=1e-6)
    for text in (
        report["dataset"]["fingerprint"],
        f"| **L2Rec** | {ours['recall@10']:.4f} |",
        f"| popularity | {report['scores']['popularity']['recall@10']:.4f} |",
        f"| seed | {report['seed']} |",
        "Only for chains.",
        "`cc-by-4.0`, as its publisher says",
        "at revision `abc`",
    ):
        assert text in card.text


def test_a_card_without_a_licence_says_so(sasrec_run: Path, tmp_path: Path) -> None:
    text = (save_pretrained(sasrec_run, tmp_path / "s") / "README.md").read_text()
    assert "license: unknown" in text and "has not said under which licence" in text
    assert "language model" not in text.split("## Limits")[0]
    assert "beam" not in text


# -- the hub -------------------------------------------------------------------------------------


def test_a_run_goes_to_the_hub_and_comes_back(paper_run: Finished, with_backbone: fake.Hub) -> None:
    model = load(paper_run.run)
    address = model.push_to_hub("org/chains-l2rec", license="mit", backbone=BACKBONE)
    assert address.endswith("/org/chains-l2rec")
    assert with_backbone.private == {"org/chains-l2rec": True}
    again = l2rec.load("org/chains-l2rec")
    assert items(again) == items(model) and again.version == model.version
    assert 'l2rec.load("org/chains-l2rec")' in (again.run / "README.md").read_text()


def test_a_download_is_kept_and_serves_without_a_network(
    sasrec_run: Path, hub: fake.Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(sasrec_run).push_to_hub("org/sasrec", license="mit")
    first = items(l2rec.load("org/sasrec"))
    count = len(hub.downloaded)
    monkeypatch.setattr(fake.constants, "HF_HUB_OFFLINE", True)
    assert items(l2rec.load("org/sasrec")) == first
    assert len(hub.downloaded) == count


def test_nothing_but_the_files_of_a_run_is_downloaded(sasrec_run: Path, hub: fake.Hub) -> None:
    load(sasrec_run).push_to_hub("org/sasrec", license="mit")
    for name in ("model.pkl", "pytorch_model.bin", "modeling.py", "tokenizer/code.py"):
        hub.repos["org/sasrec"][name] = b"\x80\x04not to be opened"
    assert l2rec.load("org/sasrec")
    assert {name.removeprefix("org/sasrec/") for name in hub.downloaded} <= {*FILES[:-1]}


def test_a_second_upload_deletes_what_the_run_no_longer_has(
    blended_run: Finished, sasrec_run: Path, hub: fake.Hub
) -> None:
    load(blended_run.run).push_to_hub("org/x", license="mit", backbone=BACKBONE)
    hub.repos["org/x"]["notes.md"] = b"kept"
    assert {"blend.safetensors", "tokenizer/tokenizer.json"} <= hub.repos["org/x"].keys()
    load(sasrec_run).push_to_hub("org/x", license="mit")
    left = set(hub.repos["org/x"])
    assert left == {*FILES[:-1], "notes.md"} - {"blend.safetensors"}


def test_a_run_of_the_hub_that_brings_code_is_refused(
    sasrec_run: Path, hub: fake.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = save_pretrained(sasrec_run, tmp_path / "saved")
    (tmp_path / "a_trap.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    edited(saved, method="a_trap:Method")
    hub.put("org/trap", saved)
    with pytest.raises(ConfigError, match=r"imports 'a_trap:Method'; read it.*trust_remote_code"):
        l2rec.load("org/trap")
    with pytest.raises(SystemExit, match="imported"):
        l2rec.load("org/trap", trust_remote_code=True)
    edited(saved, method=f"l2rec.methods./..{tmp_path}/a_trap.py:Method")  # begins as ours do
    hub.put("org/trap", saved)
    with pytest.raises(ConfigError, match=r"a_trap\.py:Method'; read it"):
        l2rec.load("org/trap")
    edited(saved, method="l2rec.methods.l2rec:L2Rec", backbone={"trust_remote_code": True})
    hub.put("org/trap", saved)
    with pytest.raises(ConfigError, match="runs code of the repository") as e:
        l2rec.load("org/trap")
    one_line(e)


def test_what_is_not_on_the_hub_is_an_error_in_one_line(hub: fake.Hub) -> None:
    with pytest.raises(CheckpointError, match="there is no folder 'org/none', and the hub:") as e:
        l2rec.load("org/none")
    one_line(e)
    hub.repos["org/other"] = {"config.json": b"{}"}
    with pytest.raises(CheckpointError, match="org/other"):
        l2rec.load("org/other")
    hub.repos["org/other"]["config.yaml"] = b"- 1"
    with pytest.raises(CheckpointError, match="torn or not of l2rec"):
        l2rec.load("org/other")


def test_folders_are_never_looked_for_on_the_hub(
    hub: fake.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos["runs/typo"] = {}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for run in ("runs/typo", Path("other/typo"), "./other/typo", "a/b/c"):
        with pytest.raises(CheckpointError, match="is not a run folder"):
            l2rec.load(run)
    with pytest.raises(ConfigError, match="is not on the hub; leave it out"):
        l2rec.load("runs/typo", revision="main")


def test_an_upload_without_a_token_says_so(
    sasrec_run: Path, hub: fake.Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(CheckpointError, match=r"org/x was not uploaded: .*401") as e:
        load(sasrec_run).push_to_hub("org/x", license="mit")
    one_line(e)


@pytest.mark.parametrize(
    ("name", "offered"),
    [
        ("my model", "your-name/my-model"),
        ("org/a--b", "org/a-b"),
        ("org/a..b", "org/a-b"),
        ("org/-a-", "org/a"),
        ("org/games.git", "org/games"),
        ("a/b/c", "b/c"),
        ("datasets", "your-name/datasets"),
    ],
)
def test_ids_follow_the_rules_of_the_hub(
    sasrec_run: Path, tmp_path: Path, name: str, offered: str
) -> None:
    with pytest.raises(ConfigError, match="no id for the hub") as e:
        load(sasrec_run).push_to_hub(name, license="mit")
    assert one_line(e).endswith(f"perhaps {offered!r}")
    with pytest.raises(ConfigError, match="no id for the hub"):
        save_pretrained(sasrec_run, tmp_path / "a", dataset=name)
    save_pretrained(sasrec_run, tmp_path / "a", dataset=offered)


@pytest.mark.parametrize(
    ("word", "published"),
    [
        ("../clients/acme/2026/", "2026"),
        ("--data=/home/me/data", "--data=data"),
        ("training.tracker=sqlite:////home/me/runs.db", "training.tracker=runs.db"),
        ("C:\\\\clients\\\\acme", "acme"),
        ("scientific/sasrec", "scientific/sasrec"),
        ("backbone.name=org/model", "backbone.name=org/model"),
        ("model.views=[behavioral]", "'model.views=[behavioral]'"),
    ],
)
def test_commands_say_what_was_read_and_not_where_it_lay(word: str, published: str) -> None:
    report = {"backbone": {"name": "org/model"}, "command": f"l2rec train '{word}'", "recipe": word}
    told = _without_paths(report)
    assert told["command"] == f"l2rec train {published}"
    assert told["recipe"] == published.strip("'")


def test_the_command_writes_a_folder_or_uploads(
    call: Call, sasrec_run: Path, hub: fake.Hub, tmp_path: Path
) -> None:
    code, out, _ = call("publish", sasrec_run, "--out", tmp_path / "p", "--license", "mit")
    assert code == 0 and str(tmp_path / "p" / "README.md") in out
    code, out, _ = call("publish", sasrec_run, "--to", "org/run", "--license", "mit")
    assert code == 0 and out.strip().endswith("/org/run")
    assert "model.safetensors" in hub.repos["org/run"] and hub.private["org/run"]
    code, _, err = call("publish", sasrec_run, "--to", "org/run")
    assert code == 2 and "--to needs --license" in err
    code, _, err = call("publish", sasrec_run)
    assert code == 2 and "give either --out FOLDER or --to org/name" in err
