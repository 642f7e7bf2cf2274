"""What tests ask of an error's message."""

from __future__ import annotations

from typing import Any

import pytest


def one_line(raised: pytest.ExceptionInfo[Any]) -> str:
    """Return the message of an error, which has to be a single line."""
    text = str(raised.value)
    assert "\n" not in text
    return text
