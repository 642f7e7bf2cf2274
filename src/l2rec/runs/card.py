"""The model card of a published run: what it is, how it was made and scored, what it is not for.

All of it comes from report.json and config.yaml; ``card.md.j2`` holds the words.
"""

from __future__ import annotations

__all__ = ["Publication", "model_card"]

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from l2rec.config import RunConfig
from l2rec.runs.numbers import as_count, as_duration, as_score
from l2rec.runs.remarks import remarks_of

SHOWN = {
    "recall@10": "Recall@10",
    "ndcg@10": "NDCG@10",
    "mrr": "MRR",
    "recall@10_masked": "Recall@10, history masked",
    "ndcg@10_masked": "NDCG@10, history masked",
}
"""Metrics of the card, and their names there."""
UNKNOWN_LICENSE = "unknown"


@dataclass(frozen=True)
class Publication:
    """What a card is made of.

    report: of the run. config: resolved. name: of the model. repo_id: on the hub, None if it has
    none yet. license, dataset, limits: as the publisher says. backbone, backbone_revision: on the
    hub, None for a method without one. started_from: data set (name, fingerprint) of the run that
    this one was fine-tuned from.
    """

    report: Mapping[str, Any]
    config: RunConfig
    name: str
    repo_id: str | None
    license: str | None
    dataset: str | None
    backbone: str | None
    backbone_revision: str | None
    started_from: Mapping[str, Any] | None
    limits: str


def model_card(publication: Publication) -> str:
    """Write the card as Markdown, under metadata that the hub reads."""
    report = publication.report
    environment = Environment(
        loader=PackageLoader("l2rec", "runs"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    method = report["method"]
    rows = [
        (name, name == method, [as_score(scores.get(metric)) for metric in SHOWN])
        for name, scores in report["scores"].items()
    ]
    text = environment.get_template("card.md.j2").render(
        p=publication,
        report=report,
        dataset=report["dataset"],
        options=publication.config.model_dump(mode="json"),
        remarks=remarks_of([publication.config]),
        metrics=list(SHOWN.values()),
        rows=rows,
        count=as_count,
        duration=as_duration,
    )
    return f"---\n{_metadata(publication).to_yaml()}\n---\n\n{text}"


def _metadata(publication: Publication) -> ModelCardData:
    report = publication.report
    scores = report["scores"][report["method"]]
    data = report["dataset"]
    results = [
        EvalResult(
            task_type="sequential-recommendation",
            task_name="Next-item recommendation",
            dataset_type=publication.dataset or data["name"],
            dataset_name=f"{data['name']} ({data['fingerprint']})",
            dataset_split=report["split"],
            metric_type=metric,
            metric_name=name,
            metric_value=round(scores[metric], 6),
        )
        for metric, name in SHOWN.items()
        if metric in scores
    ]
    return ModelCardData(
        model_name=publication.name,
        library_name="l2rec",
        license=publication.license or UNKNOWN_LICENSE,
        base_model=publication.backbone,
        datasets=None if publication.dataset is None else [publication.dataset],
        tags=["recommender-system", "sequential-recommendation", "l2rec"],
        eval_results=results,
    )
