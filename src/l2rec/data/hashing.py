"""SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): 64-bit words that look random."""

from __future__ import annotations

__all__ = ["GOLDEN", "mixed"]

import numpy as np
import numpy.typing as npt

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""Odd constant that sets consecutive inputs apart."""


def mixed(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Apply the finaliser: one to one, every bit of the result depends on every bit of a word."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
