"""Options of the downstream study."""

from __future__ import annotations

__all__ = ["DownstreamConfig"]

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from l2rec.config import override_values
from l2rec.errors import ConfigError
from l2rec.studies.downstream.dlrm import DLRMConfig

ARMS = CONTROL, TREATMENT = "control", "treatment"


TASKS = "click", "reply"


Ints = npt.NDArray[np.int64]


Floats = npt.NDArray[np.float32]


Doubles = npt.NDArray[np.float64]


class DownstreamConfig(BaseModel):
    """Options of the comparison, the same for both arms."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dlrm: DLRMConfig = DLRMConfig()
    test_days: int = Field(2, ge=1)
    """The last days of the log; the day before them chooses the epoch, those before it train."""
    epochs: int = Field(10, ge=1)
    patience: int = Field(2, ge=1)
    """Epochs without a better day before the test days, until training stops."""
    batch: int = Field(512, ge=2)
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(1e-5, ge=0)
    max_history: int = Field(50, ge=1)
    """Newest clicks that are read of a user."""
    user_buckets: int = Field(1 << 14, ge=1)
    """Rows of the table of user hashes."""
    window_hours: float = Field(24.0, gt=0)
    """How long after an exposure a click or reply may belong to it."""
    fields: tuple[str, ...] | None = None
    """Catalog fields that are attributes; by default those of few different values."""
    ks: tuple[int, ...] = (10, 50, 100)
    """Of Recall@k of the matching stage."""
    alpha: float = Field(0.05, gt=0, lt=1)
    """Of the intervals."""


def downstream_config(overrides: Sequence[str] = ()) -> DownstreamConfig:
    """The options with ``key=value`` overrides, such as ``dlrm.dim=32``.

    Raises:
        ConfigError: an unknown key or a bad value.
    """
    try:
        return DownstreamConfig(**override_values(overrides))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        known = ", ".join(DownstreamConfig.model_fields)
        raise ConfigError(f"{key}={first['input']!r}: {first['msg']} (keys: {known})") from None
