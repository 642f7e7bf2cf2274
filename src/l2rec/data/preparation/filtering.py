"""Users and items that stay: those with a text, k-core."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from l2rec.data.preparation.events import CHUNK_EVENTS, Log
from l2rec.data.preparation.items import RawCatalog
from l2rec.data.preparation.state import Ints, Mask, State
from l2rec.errors import DataError


@dataclass(frozen=True)
class Remaining:
    """Users and items that stay: ``users`` [users] and ``items`` [items + 1] bool (the last item
    is "unknown", so item -1 never stays). ``counts`` [users] int64: events that stay.
    """

    users: Mask
    items: Mask
    counts: npt.NDArray[np.int64]


def filter_events(log: Log, catalog: RawCatalog, state: State) -> Remaining:
    """Choose the users and items that stay, by the options of the preparation.

    Raises:
        DataError: nothing is left.
    """
    config = state.config
    items = np.ones(len(catalog.ids) + 1, dtype=np.bool_)
    items[-1] = False
    if config.drop_textless:
        has_text = pc.not_equal(pc.utf8_trim_whitespace(catalog.table["text"]), "")
        items[:-1] = has_text.to_numpy()
        state.counters["textless_items_dropped"] = int((~items[:-1]).sum())
    remaining = core(
        log.users,
        log.items,
        items,
        n_users=len(log.user_ids),
        user_min=max(config.k_core, config.min_history, 1),
        item_min=config.k_core,
        chunk=state.chunk,
    )
    if not remaining.users.any():
        if (np.asarray(log.items) < 0).all():
            raise DataError(
                f"no event is left: {'; '.join(state.notes)}; the catalog's ids are such as "
                f"{catalog.ids[0].as_py()!r} (are zeros at the front of ids lost?)"
            )
        limits = f"k_core={config.k_core}, min_history={config.min_history}"
        raise DataError(
            f"no event is left of {len(log.users):,} after filtering with {limits}, "
            f"drop_textless={config.drop_textless}; choose smaller limits"
        )
    if config.keep_all_items and config.k_core > 1:
        # What has no event at all does not have too few: it is kept as an item without events.
        seen = np.zeros(len(items), dtype=np.bool_)
        for at in log.chunks(state.chunk):
            seen[log.items[at]] = True
        return replace(remaining, items=remaining.items | (items & ~seen))
    return remaining


def core(
    users: Ints,
    items: Ints,
    item_ok: Mask,
    *,
    n_users: int,
    user_min: int,
    item_min: int,
    chunk: int = CHUNK_EVENTS,
) -> Remaining:
    """Find the largest set of events with ``user_min`` for each user, ``item_min`` for each item.

    Events count, not distinct pairs. ``users``, ``items``: [E]; ``item_ok``: [items + 1], False
    for items that are dropped from the start, the last one always. The set does not depend on the
    order of dropping.
    """
    user_ok = np.ones(n_users, dtype=np.bool_)
    chunk = max(chunk, n_users, len(item_ok))  # each chunk adds up counts of all of them
    while True:
        user_counts = np.zeros(n_users, dtype=np.int64)
        item_counts = np.zeros(len(item_ok), dtype=np.int64)
        for at in range(0, len(users), chunk):
            u, i = np.asarray(users[at : at + chunk]), np.asarray(items[at : at + chunk])
            alive = user_ok[u] & item_ok[i]
            if not alive.all():
                u, i = u[alive], i[alive]
            user_counts += np.bincount(u, minlength=n_users)
            if item_min > 1:
                item_counts += np.bincount(i, minlength=len(item_ok))
        users_left = user_ok & (user_counts >= user_min)
        items_left = item_ok & (item_counts >= item_min) if item_min > 1 else item_ok
        # Dropping users who have no event left changes nothing for the items.
        stable = not (user_counts[user_ok & ~users_left]).any() and not (
            item_counts[item_ok & ~items_left].any()
        )
        user_ok, item_ok = users_left, items_left
        if stable:
            return Remaining(user_ok, item_ok, np.where(user_ok, user_counts, 0))
