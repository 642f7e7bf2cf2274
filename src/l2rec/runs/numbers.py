"""Numbers as reports and tables show them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeGuard

METRICS = {
    "recall@5": "R@5",
    "recall@10": "R@10",
    "recall@20": "R@20",
    "ndcg@5": "N@5",
    "ndcg@10": "N@10",
    "ndcg@20": "N@20",
    "mrr": "MRR",
}
"""Column heading of each metric."""
MAIN = "ndcg@10"
"""Metric that decides which model is best."""
UNTRAINED, PRETRAINED = "untrained", "before fine-tuning"
"""What the model of step 0 is called: as a seed has made it, and as another run has left it."""
NONE = "–"
"""Text of a cell without a value."""
SIGNIFICANT = 0.05
"""Largest p value of a difference that is called significant."""


def is_number(value: object) -> TypeGuard[float]:
    """Say whether a value is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def formatted(value: Any, write: Callable[[Any], str]) -> str:
    """Write a number, or NONE where there is none."""
    return write(value) if is_number(value) else NONE


def as_score(value: Any) -> str:
    """Write a metric with four decimals."""
    return formatted(value, lambda v: f"{v:.4f}")


def as_count(value: Any) -> str:
    """Write a whole number with thousands separators."""
    return formatted(value, lambda v: f"{v:,.0f}")


def as_percent(value: Any) -> str:
    """Write a share as percent."""
    return formatted(value, lambda v: f"{v:.1%}" if v < 0.0995 else f"{v:.0%}")


def as_signed(value: Any) -> str:
    """Write a difference with its sign."""
    return formatted(value, lambda v: f"{v:+.4f}".replace("-", "−"))


def as_probability(value: Any) -> str:
    """Write a p value."""
    return formatted(value, lambda v: "p < 0.001" if v < 0.001 else f"p = {v:.3f}")


def as_large(value: Any) -> str:
    """Write a large number with k, M or B."""

    def write(v: float) -> str:
        for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
            if v >= size:
                return f"{v / size:.3g}{unit}"
        return f"{v:.0f}"

    return formatted(value, write)


def as_memory(megabytes: Any) -> str:
    """Write megabytes as MB or GB."""
    return formatted(megabytes, lambda v: f"{v / 1000:.2f} GB" if v >= 1000 else f"{v:.0f} MB")


def as_duration(seconds: Any) -> str:
    """Write seconds as s, min or h."""

    def write(v: float) -> str:
        if v < 60:
            return f"{v:.1f} s" if v < 10 else f"{v:.0f} s"
        minutes, rest = divmod(round(v), 60)
        if minutes < 60:
            return f"{minutes} min {rest} s"
        return f"{minutes // 60} h {minutes % 60} min"

    return formatted(seconds, write)
