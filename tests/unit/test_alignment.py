"""`l2rec alignment`: each statistic against plain loops, and three ways to have two views."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import rbf_kernel
from tests.support import runs
from tests.support.command import Call
from tests.support.runs import Finished
from torch.nn import functional as F

from l2rec.data.dataset import Dataset
from l2rec.disk import read_json
from l2rec.errors import CheckpointError, ConfigError
from l2rec.methods.l2rec import L2Rec
from l2rec.runs.folder import load_run_config, open_run_dataset, read_report, split_of
from l2rec.runs.predictor import load
from l2rec.studies.alignment import statistics as found
from l2rec.studies.alignment.study import measure_alignment

Vectors = list[list[float]]


@pytest.fixture(scope="module")
def views() -> tuple[torch.Tensor, torch.Tensor]:
    """Draw two sets of vectors that have something in common, one of them off its middle."""
    generator = torch.Generator().manual_seed(3)
    common = torch.randn(17, 6, generator=generator, dtype=torch.float64)
    x = common + 0.4 * torch.randn(17, 6, generator=generator, dtype=torch.float64) + 1.0
    y = common @ torch.randn(6, 6, generator=generator, dtype=torch.float64)
    return found.on_sphere(x), found.on_sphere(y)


def dot(a: list[float], b: list[float]) -> float:
    return sum(p * q for p, q in zip(a, b, strict=True))


def apart(a: list[float], b: list[float]) -> float:
    return sum((p - q) ** 2 for p, q in zip(a, b, strict=True))


def centred(rows: Vectors) -> Vectors:
    means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    return [[v - m for v, m in zip(row, means, strict=True)] for row in rows]


def hsic(a: Vectors, b: Vectors) -> float:
    """Compute the trace of K H L H: CKA by kernels, where the code has features."""
    return sum(dot(a[i], a[j]) * dot(b[i], b[j]) for i in range(len(a)) for j in range(len(a)))


def test_cka_is_that_of_centred_kernels(views: Any) -> None:
    x, y = (centred(view.tolist()) for view in views)
    plain = hsic(x, y) / math.sqrt(hsic(x, x) * hsic(y, y))
    assert found.linear_cka(*views) == pytest.approx(plain, rel=1e-10)
    assert 0 < plain < 1


def test_cka_knows_no_rotation_and_no_scale(views: Any) -> None:
    x, _ = views
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    assert found.linear_cka(x, 3 * x @ rotation) == pytest.approx(1)
    stretched = x * torch.tensor([9.0, 1, 1, 1, 1, 1])
    assert found.linear_cka(x, stretched) < 0.99


def test_cosine_and_alignment_are_of_a_users_two_vectors(views: Any) -> None:
    x, y = (view.tolist() for view in views)
    cosines = [dot(a, b) / math.sqrt(dot(a, a) * dot(b, b)) for a, b in zip(x, y, strict=True)]
    assert found.mean_cosine(*views) == pytest.approx(sum(cosines) / len(x))
    squares = [apart(a, b) for a, b in zip(x, y, strict=True)]
    assert found.alignment(*views) == pytest.approx(sum(squares) / len(x))
    assert found.alignment(*views) == pytest.approx(2 - 2 * found.mean_cosine(*views))


def test_mmd_is_unbiased_with_the_median_distance(views: Any) -> None:
    x, y = (view.tolist() for view in views)
    both = x + y
    distances = [math.sqrt(apart(a, b)) for i, a in enumerate(both) for b in both[:i]]
    scale = float(np.median(distances))

    def kernel(a: list[float], b: list[float]) -> float:
        return math.exp(-apart(a, b) / (2 * scale**2))

    def within(rows: Vectors) -> float:
        n = len(rows)
        pairs = [kernel(rows[i], rows[j]) for i in range(n) for j in range(n) if i != j]
        return sum(pairs) / (n * (n - 1))

    across = sum(kernel(a, b) for a in x for b in y) / (len(x) * len(y))
    plain = within(x) + within(y) - 2 * across
    assert found.mmd(*views) == pytest.approx(plain, rel=1e-9)

    k = rbf_kernel(np.array(both), gamma=1 / (2 * scale**2))  # and with scikit-learn's kernel
    n = len(x)
    theirs = (k[:n, :n].sum() - n) / (n * (n - 1)) + (k[n:, n:].sum() - n) / (n * (n - 1))
    assert found.mmd(*views) == pytest.approx(theirs - 2 * k[:n, n:].mean(), rel=1e-9)


def test_mmd_of_one_distribution_is_about_zero() -> None:
    drawn = found.on_sphere(torch.randn(800, 8, generator=torch.Generator().manual_seed(0)))
    same, other = found.mmd(drawn[:400], drawn[400:]), found.mmd(drawn[:400], drawn[400:].abs())
    assert abs(same) < 0.005 < 0.05 < other


def test_uniformity_is_the_log_of_a_mean_over_pairs(views: Any) -> None:
    x = views[0].tolist()
    pairs = [math.exp(-2 * apart(a, b)) for i, a in enumerate(x) for b in x[:i]]
    assert found.uniformity(views[0]) == pytest.approx(math.log(sum(pairs) / len(pairs)))
    assert found.uniformity(torch.ones(5, 4, dtype=torch.float64) / 2) == pytest.approx(0)


def test_effective_rank_is_the_exponential_of_an_entropy(views: Any) -> None:
    rows = np.array(centred(views[0].tolist()))
    values = np.sqrt(np.linalg.eigvalsh(rows.T @ rows).clip(0))
    shares = [v / values.sum() for v in values]
    plain = math.exp(-sum(p * math.log(p) for p in shares if p > 0))
    assert found.effective_rank(views[0]) == pytest.approx(plain)
    crossed = torch.cat((torch.eye(3), -torch.eye(3))).double()
    assert found.effective_rank(crossed) == pytest.approx(3)
    assert found.effective_rank(crossed[:, :1]) == pytest.approx(1)


def test_views_of_different_users_share_nothing(views: Any) -> None:
    x = views[0].repeat(1, 1)
    found_of = found.statistics(x, x)
    assert found_of["cka"] == pytest.approx(1) and found_of["cosine"] == pytest.approx(1)
    assert found_of["cka_others"] < 0.9 and found_of["cosine_others"] < 0.99
    cosines = x @ x.T
    off = (cosines.sum() - cosines.trace()) / (len(x) * (len(x) - 1))
    assert found_of["cosine_others"] == pytest.approx(float(off), abs=0.2)


@pytest.mark.parametrize("rows", [7, 8, 12, 100])
def test_equal_vectors_have_no_statistics_but_no_error_either(rows: int) -> None:
    """The mean of equal rows differs from them by rounding, which is no direction."""
    same = torch.randn(4, generator=torch.Generator().manual_seed(rows)).expand(rows, 4)
    found_of = found.statistics(same, same)
    none = ("cka", "cka_others", "rank_semantic", "rank_behavioral")
    assert all(math.isnan(found_of[name]) for name in none)
    assert found_of["mmd"] == pytest.approx(0)


# -- of models -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def single(backbone_folder: Path, chains: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Train a run of each view alone."""

    def run(view: str) -> Path:
        config = runs.config(backbone_folder, "catalog", model={"views": [view]})
        return runs.finished(config, chains.path, tmp_path_factory.mktemp(view) / "run").run

    return run("semantic"), run("behavioral")


@pytest.mark.parametrize("kind", ["paper_run", "catalog_run"])
def test_the_last_depths_are_the_models_outputs(kind: str, request: pytest.FixtureRequest) -> None:
    run: Finished = request.getfixturevalue(kind)
    model = load(run.run).model
    assert isinstance(model, L2Rec)
    config = load_run_config(run.run)[0]
    histories = split_of(config, open_run_dataset(run.run, None)).test.histories
    depths = model.view_layers(histories)
    assert list(depths) == ["input", "layer 1", "layer 2", "h", "h~"]
    with torch.inference_mode():
        state = model.user_states(histories)
        assert state.behavioral is not None and state.semantic is not None
        torch.testing.assert_close(depths["h~"]["behavioral"], state.behavioral)
        torch.testing.assert_close(depths["h~"]["semantic"], state.semantic)
        one = model(histories.take(np.array([4])))
        torch.testing.assert_close(depths["h"]["semantic"][4:5], one.outputs["semantic"])
    # BERT has no norm behind its layers, so that the topmost layer is what h^v is read from.
    if kind == "paper_run":
        torch.testing.assert_close(depths["layer 2"]["semantic"], depths["h"]["semantic"])
    unequal = [F.cosine_similarity(v["semantic"], v["behavioral"]) for v in depths.values()]
    assert all(cosine.max() < 0.9999 for cosine in unequal)


def test_layers_below_the_entry_are_not_read(
    backbone_folder: Path, chains: Dataset, tmp_path: Path
) -> None:
    config = runs.config(backbone_folder, "catalog", model={"item_layers": 1})
    run = runs.finished(config, chains.path, tmp_path / "run").run
    model: Any = load(run).model
    histories = split_of(config, open_run_dataset(run, None)).test.histories
    depths = model.view_layers(histories)
    assert list(depths) == ["input", "layer 2", "h", "h~"]
    assert not torch.equal(depths["input"]["semantic"], depths["layer 2"]["semantic"])


def test_a_report_has_three_ways_and_their_costs(
    catalog_run: Finished, single: Any, tmp_path: Path, call: Call
) -> None:
    out = tmp_path / "out"
    runs_of = [str(catalog_run.run), *map(str, single)]
    printed = call("alignment", *runs_of, "--out", str(out), "--users", "30")
    assert "two backbones over one" in printed.out
    report = read_json(out / "report.json")
    kinds = [arm["kind"] for arm in report["arms"]]
    assert kinds == ["one backbone", "two backbones", "untrained"]
    one, two, untrained = report["arms"]
    assert two["runs"] == [str(run) for run in single]
    assert report["two_over_one"]["frozen"] == 2
    assert 1 < report["two_over_one"]["megabytes"] < 2.1
    assert report["two_over_one"]["seconds"] > 0
    trained = [read_report(run)["backbone"]["trained_parameters"] for run in single]
    assert two["cost"]["trained"] == sum(trained)
    for arm, names in ((one, [catalog_run.run]), (two, single), (untrained, [])):
        scores = [read_report(Path(name)) for name in names]
        assert arm["scores"] == [s["scores"]["L2Rec"]["ndcg@10_masked"] for s in scores]
    assert one["depths"]["h~"] != untrained["depths"]["h~"]
    assert one["depths"]["input"]["cka"] == pytest.approx(untrained["depths"]["input"]["cka"], 0.5)
    page = (out / "report.html").read_text()
    assert "<svg" in page and "effective rank" in page
    text = (out / "report.md").read_text()
    assert "| two backbones over one | × 2.00 |" in text


def test_statistics_are_those_of_the_models(
    catalog_run: Finished, single: Any, tmp_path: Path
) -> None:
    report = measure_alignment([catalog_run.run], tmp_path, users=5000, progress=runs.Quiet())
    config = load_run_config(catalog_run.run)[0]
    histories = split_of(config, open_run_dataset(catalog_run.run, None)).test.histories
    state = load(catalog_run.run).model.user_states(histories)
    expected = found.statistics(state.semantic, state.behavioral)
    assert report["arms"][0]["depths"]["h~"] == pytest.approx(expected, abs=1e-5)
    assert report["two_over_one"] is None and report["users"] == len(histories)
    pair = measure_alignment(list(single), tmp_path, users=5000, progress=runs.Quiet())
    assert [arm["kind"] for arm in pair["arms"]] == ["two backbones", "untrained"]
    models = [load(run).model for run in single]
    semantic = models[0].user_states(histories).semantic
    behavioral = models[1].user_states(histories).behavioral
    expected = found.statistics(semantic, behavioral)
    assert pair["arms"][0]["depths"]["h~"] == pytest.approx(expected, abs=1e-5)


def test_what_cannot_be_measured_is_refused(
    catalog_run: Finished, single: Any, sasrec_run: Path, backbone_folder: Path, tmp_path: Path
) -> None:
    def measured(*given: Path, users: int = 50) -> None:
        measure_alignment(given, tmp_path / "out", users=users, progress=runs.Quiet())

    with pytest.raises(ConfigError, match="no run of L2Rec"):
        measured(sasrec_run)
    before = (catalog_run.run / "report.json").read_bytes()
    with pytest.raises(CheckpointError, match="holds no `l2rec alignment`; choose another"):
        measure_alignment([catalog_run.run], catalog_run.run, progress=runs.Quiet())
    assert (catalog_run.run / "report.json").read_bytes() == before
    with pytest.raises(ConfigError, match="as many of either"):
        measured(catalog_run.run, single[0])
    with pytest.raises(ConfigError, match="choose 10 to"):
        measured(catalog_run.run, users=5)
    with pytest.raises(ConfigError, match="give a run"):
        measured()
    other = runs.save_backbone(tmp_path / "other", seed=1)
    config = runs.config(other, "catalog")
    strange = runs.finished(config, catalog_run.data, tmp_path / "strange").run
    with pytest.raises(CheckpointError, match="same data, split and backbone"):
        measured(catalog_run.run, strange)
    assert not (tmp_path / "out").exists()
