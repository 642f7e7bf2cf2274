"""All errors that a user can cause, in one hierarchy.

    L2RecError
    ├── DataError        input files, datasets, unknown ids
    ├── ConfigError      recipes, overrides, options that do not fit together
    ├── BackboneError    a language model that cannot be loaded or adapted
    ├── CheckpointError  a run folder that is missing, torn, does not match or cannot be written
    ├── StorageError     an event log that cannot be read or written now (away, full disk)
    └── TrainingError    a training that cannot go on (NaN, full disk)

Each message is one line: the value, the limit, the remedy. The command line prints it
and exits with code 2. All but the root are also ``ValueError``.
"""

__all__ = [
    "BackboneError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "L2RecError",
    "StorageError",
    "TrainingError",
    "as_arguments",
    "closest",
    "nearest",
    "shown",
]

import difflib
import re
from collections.abc import Iterable
from typing import Any


class L2RecError(Exception):
    """Root of all errors raised on purpose."""


class DataError(L2RecError, ValueError):
    """Input files, datasets or ids that cannot be used as they are."""


class ConfigError(L2RecError, ValueError):
    """A recipe or option that is unknown or does not fit the others."""


class BackboneError(L2RecError, ValueError):
    """A language model that cannot be loaded or adapted."""


class CheckpointError(L2RecError, ValueError):
    """A run folder that is missing, torn, inconsistent or cannot be written."""


class StorageError(L2RecError, ValueError):
    """An event log that cannot be read or written now; it may be tried again."""


class TrainingError(L2RecError, ValueError):
    """A training that cannot go on."""


def as_arguments(text: str, names: Iterable[str]) -> str:
    """Name flags of the command line in an error as arguments of Python, ``--k-core`` as
    ``k_core``; whole commands (``l2rec train ...``) stay as they are.

    names: of the arguments, with a value where the flag has none (``resume=True``).
    """
    flags = {f"--{name.partition('=')[0].replace('_', '-')}": name for name in names}
    of_flags = "|".join(rf"{flag}\b(?!-)" for flag in flags)
    return re.sub(rf"l2rec [a-z]+ [^;`]*|{of_flags}", lambda m: flags.get(m[0], m[0]), text)


def shown(value: Any) -> str:
    """Return what an error says of a value: it, in one line of not too many characters."""
    return " ".join(repr(value).split())[:60]


def closest(name: str, known: Iterable[str]) -> str | None:
    """Return the closest known name, or None if none is close."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)), None)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest known name, or an empty string."""
    found = closest(name, known)
    return "" if found is None else f"; did you mean {found!r}?"
