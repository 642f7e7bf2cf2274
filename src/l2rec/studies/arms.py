"""The arms of an experiment, and who is in which: all that serving needs of the A/B test."""

from __future__ import annotations

__all__ = ["CONTROL", "SHARE", "TREATMENT", "arm"]

import hashlib

from l2rec.errors import ConfigError

TREATMENT, CONTROL = "treatment", "control"
SHARE = 0.06
"""Default share of users in the treatment: the 6% of the L2Rec paper."""


def arm(user: str, experiment: str, *, salt: str = "", treatment: float = SHARE) -> str:
    """Assign a user to ``treatment`` or ``control``.

    The same user, experiment and salt give the same arm in every process. ``treatment``: share of
    users in the treatment.

    Raises:
        ConfigError: a share outside 0..1.
    """
    if not 0 <= treatment <= 1:
        raise ConfigError(f"treatment={treatment}: a share from 0 to 1")
    digest = hashlib.sha256(f"{salt}\0{experiment}\0{user}".encode()).digest()
    return TREATMENT if int.from_bytes(digest[:8]) / 2**64 < treatment else CONTROL
