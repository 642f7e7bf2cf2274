"""The cache of encoded users: by history, bounded by their number and by what they take."""

from __future__ import annotations

__all__ = ["Users", "key_of"]

from collections import OrderedDict
from collections.abc import Set

import numpy as np
import numpy.typing as npt

from l2rec.service.ranking import User
from l2rec.service.version import Version

Key = tuple[int, int, bytes]


def key_of(version: Version, row: npt.NDArray[np.integer]) -> Key:
    """Return the key of a history of item ints."""
    # What a method that only ranks says of a user is one score per item, and items may be added.
    scores = len(version) if version.predictor.vectors is None else 0
    return version.serial, scores, row.tobytes()


class Users:
    """Users by key, the least recently used dropped first.

    Args:
        most: users. within: bytes of all of them: the scores of a method that only ranks are as
            many as the items, and the prior of a blended run is hundreds of times a vector.
    """

    def __init__(self, most: int, within: int) -> None:
        self.most, self.within = most, within
        self.nbytes = 0
        self._users: OrderedDict[Key, User] = OrderedDict()

    def __len__(self) -> int:
        return len(self._users)

    def get(self, key: Key) -> User | None:
        """Return the user of a key, if kept, as the one used last."""
        user = self._users.get(key)
        if user is not None:
            self._users.move_to_end(key)
        return user

    def keep(self, key: Key, user: User) -> None:
        """Keep a user, at the cost of those used least recently; not one who is too much alone."""
        if _nbytes(key, user) > self.within:
            return
        self._drop(key)
        self._users[key] = user
        self.nbytes += _nbytes(key, user)
        while len(self._users) > self.most or self.nbytes > self.within:
            self._drop(next(iter(self._users)))

    def keep_only(self, serials: Set[int]) -> None:
        """Drop the users of other loadings than these."""
        for key in [key for key in self._users if key[0] not in serials]:
            self._drop(key)

    def _drop(self, key: Key) -> None:
        user = self._users.pop(key, None)
        if user is not None:
            self.nbytes -= _nbytes(key, user)


def _nbytes(key: Key, user: User) -> int:
    return len(key[2]) + user.vector.nbytes + user.rows.nbytes + user.added.nbytes
