"""Metrics of a server. Labels have few values: routes, statuses, arms, loaded versions."""

from __future__ import annotations

__all__ = ["Failure", "Metrics"]

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Summary,
    generate_latest,
)

from l2rec.service.version import Version

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
JOBS = (1, 2, 4, 8, 16, 32, 64, 128)
TOKENS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
SHARE = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
FAILURES = 50
"""Requests that failed which are remembered."""


@dataclass(frozen=True)
class Failure:
    """A request that was answered with an error. at: unix seconds. detail: line of the answer,
    which may name ids. request: its id, as in the log.
    """

    at: float
    method: str
    route: str
    status: int
    detail: str
    request: str


class Metrics:
    """Metrics of one server, in a registry that no other server shares.

    failures: the newest requests that failed, oldest first; the metrics have only their number.
    """

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        self.failures: deque[Failure] = deque(maxlen=FAILURES)
        started = time.time()
        self.gauge("l2rec_start_time_seconds", "Unix seconds of the start.", lambda: started)
        self.requests = Counter(
            "l2rec_requests",
            "Requests that were answered.",
            ["route", "method", "status"],
            registry=r,
        )
        self.seconds = Histogram(
            "l2rec_request_seconds",
            "Seconds from the first byte of a request to the last of its answer.",
            ["route"],
            buckets=SECONDS,
            registry=r,
        )
        self.recommendations = Counter(
            "l2rec_recommendations",
            "Answers of /v1/recommend.",
            ["arm", "version"],
            registry=r,
        )
        self.fallbacks = Counter(
            "l2rec_fallbacks",
            "Answers of /v1/recommend to users of whom nothing is known.",
            ["segment"],
            registry=r,
        )
        self.recommend_seconds = Histogram(
            "l2rec_recommend_seconds",
            "Seconds to recommend, by arm.",
            ["arm"],
            buckets=SECONDS,
            registry=r,
        )
        self.batch_jobs = Histogram(
            "l2rec_batch_histories", "Histories of a batch.", buckets=JOBS, registry=r
        )
        self.batch_tokens = Histogram(
            "l2rec_batch_tokens", "Tokens of a batch.", buckets=TOKENS, registry=r
        )
        self.batch_wait = Histogram(
            "l2rec_batch_wait_seconds",
            "Seconds that the first history of a batch has waited.",
            buckets=SECONDS,
            registry=r,
        )
        self.cache = Counter(
            "l2rec_user_cache", "Look-ups of user vectors: hit or miss.", ["found"], registry=r
        )
        self.refused = Counter(
            "l2rec_refused",
            "Requests refused: queue, inflight, rate, timeout.",
            ["reason"],
            registry=r,
        )
        self.events = Counter(
            "l2rec_events", "Events stored, or ignored as known.", ["result"], registry=r
        )
        self.storage_failures = Counter(
            "l2rec_storage_failures", "Calls of the event log that failed.", ["call"], registry=r
        )
        self.items = Counter(
            "l2rec_item_changes",
            "Items put (kept, updated, new) and deleted.",
            ["change"],
            registry=r,
        )
        self.swaps = Counter(
            "l2rec_candidates", "Candidates loaded or refused.", ["result"], registry=r
        )
        self.version = Gauge(
            "l2rec_version_info",
            "1 for each loaded version.",
            ["role", "name", "version"],
            registry=r,
        )
        self.shadow = Counter(
            "l2rec_shadow_requests",
            "Requests ranked by the shadow, or dropped.",
            ["result"],
            registry=r,
        )
        self.shadow_overlap = Histogram(
            "l2rec_shadow_overlap",
            "Share of the live answer's items that the shadow lists too.",
            buckets=SHARE,
            registry=r,
        )
        self.shadow_correlation = Summary(  # a histogram has no sum of negative numbers
            "l2rec_shadow_rank_correlation",
            "Spearman's, between both orders of the live answer's items.",
            registry=r,
        )
        self.shadow_seconds = Histogram(
            "l2rec_shadow_seconds",
            "Seconds that the shadow needs for a request.",
            buckets=SECONDS,
            registry=r,
        )

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a gauge whose value is read when it is asked for."""
        Gauge(name, text, registry=self.registry).set_function(value)

    def answered(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count one answer, by its status; none where the client went away before it."""
        method = method if method in ("GET", "POST", "PUT", "DELETE") else "other"
        self.requests.labels(route, method, str(status) if status else "none").inc()
        self.seconds.labels(route).observe(seconds)

    def loaded(self, versions: Mapping[str, Version]) -> None:
        """Report the versions that are loaded now; forget others, or labels would only grow."""
        self.version.clear()
        hashes = set()
        for role, version in versions.items():
            self.version.labels(role, version.name, version.version).set(1)
            hashes.add(version.version)
        for metric in self.recommendations.collect():
            for sample in metric.samples:
                known = sample.labels["version"]
                if known not in hashes and sample.name.endswith("_total"):
                    self.recommendations.remove(sample.labels["arm"], known)

    def text(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        return generate_latest(self.registry)
