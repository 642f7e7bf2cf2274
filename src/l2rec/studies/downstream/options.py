"""Options of the downstream study, and the names of its arms and tasks."""

from __future__ import annotations

__all__ = ["ARMS", "CONTROL", "TASKS", "TREATMENT", "DownstreamConfig", "downstream_config"]

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from l2rec.config import override_values
from l2rec.errors import ConfigError
from l2rec.studies.downstream.dlrm import DLRMConfig

ARMS = CONTROL, TREATMENT = "control", "treatment"
"""Both arms, in the order of training."""
TASKS = "click", "reply"
"""What the ranking stage predicts of an exposure, in the order of its logits."""


class DownstreamConfig(BaseModel):
    """Options of the study, the same for both arms."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dlrm: DLRMConfig = DLRMConfig()
    """Options of both models."""
    test_days: int = Field(2, ge=1)
    """Days at the end of the log to test on; the day before them chooses the epoch, the days
    before that one train."""
    epochs: int = Field(10, ge=1)
    """Most epochs of a training."""
    patience: int = Field(2, ge=1)
    """Epochs without a better score on the choosing day after which training stops."""
    batch: int = Field(512, ge=2)
    """Exposures of a batch."""
    lr: float = Field(1e-3, gt=0)
    """Learning rate of AdamW."""
    weight_decay: float = Field(1e-5, ge=0)
    """Weight decay of AdamW."""
    max_history: int = Field(50, ge=1)
    """Newest clicks of a user that the models read."""
    user_buckets: int = Field(1 << 14, ge=1)
    """Rows of the table of user hashes."""
    window_hours: float = Field(24.0, gt=0)
    """Longest time from an exposure to a click or reply that is counted as its result."""
    fields: tuple[str, ...] | None = None
    """Catalog fields used as attributes; by default those with few different values."""
    ks: tuple[int, ...] = (10, 50, 100)
    """Cut-offs k of the matching stage's Recall@k."""
    alpha: float = Field(0.05, gt=0, lt=1)
    """Significance level: intervals have the level 1 - alpha."""


def downstream_config(overrides: Sequence[str] = ()) -> DownstreamConfig:
    """Build the options from ``key=value`` overrides, such as ``dlrm.dim=32``.

    Raises:
        ConfigError: an unknown key or an invalid value.
    """
    try:
        return DownstreamConfig(**override_values(overrides))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        known = ", ".join(DownstreamConfig.model_fields)
        raise ConfigError(f"{key}={first['input']!r}: {first['msg']} (keys: {known})") from None
