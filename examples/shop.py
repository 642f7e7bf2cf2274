"""A made-up shop, so that the examples need no download: two CSV files.

    events.csv   user_id, item_id, timestamp      people who buy what a project needs, one thing
                                                  after the other, mostly of their brand; then
                                                  what the next project needs
    items.csv    item_id, title, aisle            the title names brand, thing and aisle
    users.csv    user_id, member                  an attribute drawn by lot, for the diagnosis

It is a toy with a rule to be found, not a benchmark: real results are in the README.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

AISLES = {
    "coffee": "espresso beans, filter papers, milk jug, grinder, moka pot, kettle",
    "climbing": "carabiner, rope, chalk bag, harness, belay gloves, helmet",
    "baking": "sourdough starter, proofing basket, flour, oven thermometer, rolling pin, yeast",
    "garden": "tomato seeds, compost, pruning shears, greenhouse foil, watering can, mulch",
    "cycling": "inner tube, chain oil, saddle bag, bottle cage, pump, bar tape",
    "aquarium": "fish food, coral gravel, water filter, algae scraper, heater, air pump",
}
BRANDS = ("Alder", "Birch", "Cedar", "Dogwood")
THINGS = 6
"""Of each aisle, in the order in which a project needs them."""
LOYALTY = 0.7
"""Chance that a thing is of the customer's brand."""


def write_shop(folder: Path, users: int = 400, seed: int = 0) -> Path:
    """Write events.csv, items.csv and users.csv into a folder, and return it."""
    rng = random.Random(seed)
    items = [
        (f"{aisle[:2]}{n}{brand[0].lower()}", f"{brand} {thing} for {aisle}", aisle)
        for aisle, things in AISLES.items()
        for n, thing in enumerate(things.split(", "))
        for brand in BRANDS
    ]
    events, members = [], []
    for number in range(users):
        user, clock = f"u{number}", 1_700_000_000 + rng.randrange(10_000_000)
        members.append((user, rng.choice(["yes", "no"])))
        brand = rng.choice(BRANDS)
        for aisle in rng.sample(list(AISLES), k=3):
            start = rng.randrange(3)
            for n in range(start, rng.randint(start + 2, THINGS)):
                chosen = brand if rng.random() < LOYALTY else rng.choice(BRANDS)
                clock += rng.randrange(60, 200_000)
                events.append((user, f"{aisle[:2]}{n}{chosen[0].lower()}", clock))
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "events.csv", ("user_id", "item_id", "timestamp"), events)
    _write(folder / "items.csv", ("item_id", "title", "aisle"), items)
    _write(folder / "users.csv", ("user_id", "member"), members)
    return folder


def _write(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


if __name__ == "__main__":
    print(write_shop(Path("shop")))
