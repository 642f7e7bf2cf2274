"""Memory of a process on a CPU that meets ever-new shapes of matrix products.

In bfloat16 oneDNN compiles code for every new shape, and batches without padding bring dozens of
them at each step. PyTorch and oneDNN keep the code in a cache each, of 1,024 shapes by default: a
gigabyte in all. glibc keeps the room between them, and between blocks of ever-new sizes.

    rungs          fewer shapes: tokens of a packed batch on a ladder
    bound_caches   few of them kept
    trim           free room given back
"""

from __future__ import annotations

__all__ = ["PASSES", "bound_caches", "rungs", "trim"]

import ctypes
import os
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""Environment variables of oneDNN's cache and of PyTorch's; the one alone does not help."""
CACHED = 64
"""Shapes of each cache: those of one step, so that its layers share them."""
PASSES = 32
"""Passes of a backbone from one `trim` to the next. What is taken anew afterwards costs a fault for
each page: a sixth of a training step, too much for each of them."""


RUNGS = 64
"""Fewest rungs of the ladder between a number of tokens and its double: each view of a batch is
filled up by less than 1 / RUNGS of the batch."""


def rungs(tokens: int, x: Tensor) -> int:
    """Return the distance of the rungs on which ``tokens`` tokens of rows x [n, D] are laid.

    A power of two, so that runs of several views and their sum are on rungs together; 1 where
    nothing is compiled for a shape, on a GPU and in other dtypes than bfloat16.
    """
    if x.device.type != "cpu" or x.dtype != torch.bfloat16:
        return 1
    return max(1, (1 << (tokens.bit_length() - 1)) // RUNGS)


def bound_caches() -> None:
    """Bound both caches of compiled shapes, each unless the user has set its variable.

    They are read at the first bfloat16 product of a process (the PyTorch one, of a thread); after
    that this does nothing.
    """
    for name in CACHES:
        os.environ.setdefault(name, str(CACHED))


def trim() -> None:
    """Give the C library's free room back to the system, where the library is glibc."""
    if (malloc_trim := _malloc_trim()) is not None:
        malloc_trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # musl, macOS; Windows has no CDLL(None)
        return None
    return found
