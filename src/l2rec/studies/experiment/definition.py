"""An experiment as data: what is trained, what is compared, and what the paper has beside it.

    title: ...                    what the page is called
    reproduces: ...               which table or figure of which paper
    seeds: [1, 2, 3]
    rows:                         what is trained, or made of what is trained
      - {name: SASRec, recipe: sasrec, blend: true}
      - {name: L2Rec, recipe: l2rec, overrides: [model.rank=4]}
    comparisons:                  named before anything is run, five at most
      - {a: L2Rec, b: SASRec}
    published: {...}              the paper's figures, and of which data they are

docs/experiments.md describes every key.
"""

from __future__ import annotations

__all__ = [
    "BLENDED",
    "MASKED",
    "Average",
    "Comparison",
    "Experiment",
    "Figure",
    "Fusion",
    "Published",
    "Row",
    "experiment_names",
    "experiment_titles",
    "folder_of",
    "load_experiment",
]

import re
import unicodedata
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    field_validator,
    model_validator,
)

from l2rec.errors import ConfigError, nearest
from l2rec.runs.numbers import MAIN, METRICS
from l2rec.yaml_files import read_yaml

BLENDED = ", blended"
"""Ending of the name of a row that `l2rec blend` makes of another."""
MOST_COMPARISONS = 5
MASKED = "_masked"
LONGEST = 200
"""Most letters of a row's part of a folder name: with seeds and ending, file systems take 255."""


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Seed = Annotated[int, Field(strict=True, ge=0)]
"""Strict, since YAML's ``yes`` would be 1."""


def _checked_metric(name: str) -> str:
    if name.removesuffix(MASKED) not in METRICS:
        known = [m + ending for m in METRICS for ending in ("", MASKED)]
        raise ValueError(f"no such metric{nearest(name, known)} ({', '.join(known)})")
    return name


def _twice(values: Iterable[Any]) -> list[Any]:
    """Return what stands in a list more than once, a time for each."""
    values = list(values)
    return [value for at, value in enumerate(values) if value in values[:at]]


def _checked_once(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if found := _twice(values):
        raise ValueError(f"{found[0]} twice")
    return values


def _check_seeds(overrides: Iterable[str], where: str) -> None:
    """Raise ValueError where an override would be the seed of all runs."""
    if any(override.startswith("seed=") for override in overrides):
        raise ValueError(f"{where}give seeds: [...], not the override seed=")


def folder_of(name: str) -> str:
    """Write the name of a row as a part of a path: ``w/o Semantic`` as ``w-o-semantic``."""
    plain = unicodedata.normalize("NFKC", name).lower()
    return re.sub(r"[^\w.+]+", "-", plain).strip("-.")


class Average(_Closed):
    """The mean of several runs' scores: of rows with one seed, or of one row's seeds."""

    rows: tuple[str, ...] = Field(min_length=1)
    seeds: tuple[tuple[Seed, ...], ...] = ()
    """Groups of seeds, one average of each; by default every seed is a group of its own. Groups
    share no seed: averages of the same runs would vary too little."""


class Fusion(_Closed):
    """A trained HDRec at another weight or in another order of its sides (`l2rec fusion`)."""

    row: str
    alpha: FiniteFloat = Field(ge=0)
    dominant: Literal["text", "id", "both"] | None = None


class Row(_Closed):
    """One row of a table, or one point of a figure."""

    name: str = Field(min_length=1)
    recipe: str | None = None
    """A recipe by name or file, or a method. A bare name is first looked for under the name of the
    data set: ``sasrec`` is ``scientific/sasrec`` on scientific, if that is shipped."""
    recipes: dict[str, str] = {}
    """Recipes by data set, where the rule above does not find the right one."""
    overrides: tuple[str, ...] = ()
    """``key=value`` of this row alone."""
    seeds: tuple[Seed, ...] = ()
    """Instead of the experiment's."""
    blend: bool = False
    """Also make the row ``NAME, blended`` of it, with `l2rec blend`."""
    pretraining: bool = False
    """Trained on the data set of ``--source``, and in no table."""
    init: str | None = None
    """Row whose run of the same seed is the start."""
    average_of: Average | None = None
    fusion: Fusion | None = None
    series: str = ""
    """Line of the figure that this is a point of."""
    x: FiniteFloat | None = None
    published: str | None = None
    """Its name among the published figures, if it is another one there."""

    _seeds = field_validator("seeds")(_checked_once)

    @model_validator(mode="after")
    def _one_kind(self) -> Row:
        ways = [self.recipe is not None, self.average_of is not None, self.fusion is not None]
        if sum(ways) != 1:
            raise ValueError(f"row {self.name!r}: give one of recipe, average_of and fusion")
        if self.recipe is None and (self.blend or self.init or self.pretraining or self.overrides):
            raise ValueError(
                f"row {self.name!r}: blend, init, pretraining and overrides are of rows with a "
                "recipe"
            )
        if self.average_of is not None and self.seeds:
            raise ValueError(f"row {self.name!r}: the seeds of an average stand in average_of")
        if self.name.endswith(BLENDED):
            raise ValueError(f"row {self.name!r}: set blend: true on the row it is made of")
        if not self.name.isprintable():
            raise ValueError(f"row {self.name!r}: a name is one line of a table")
        if len(folder_of(self.name + BLENDED)) > LONGEST:
            raise ValueError(f"row {self.name!r}: a name is that of a folder; give a shorter one")
        if self.pretraining and self.blend:
            raise ValueError(f"row {self.name!r}: with pretraining it is in no table; no blend")
        _check_seeds(self.overrides, f"row {self.name!r}: ")
        return self

    @property
    def bases(self) -> tuple[str, ...]:
        """Names of the rows that this one is made of."""
        if self.average_of is not None:
            return self.average_of.rows
        if self.fusion is not None:
            return (self.fusion.row,)
        return () if self.init is None else (self.init,)


class Comparison(_Closed):
    """Two rows whose difference, ``a`` minus ``b``, is tested. Named before they are run."""

    a: str
    b: str
    metric: str = f"{MAIN}{MASKED}"
    targets: Literal["all", "cold", "warm"] = "all"
    """Which targets: those that training never met, or the others, of data with cold items."""
    about: str = ""
    """The question it answers."""

    _metric = field_validator("metric")(_checked_metric)


class Figure(_Closed):
    """A plot of a metric over the ``x`` of the rows, a line for each ``series``."""

    x: str
    """Label of the axis."""
    y: str = f"{MAIN}{MASKED}"
    log: bool = False
    """Whether the axis of x is logarithmic."""

    _y = field_validator("y")(_checked_metric)


class Published(_Closed):
    """Figures of the paper."""

    source: str
    data: str
    """Which version of the data they are of, and that ours is another."""
    backbone: str = ""
    """That of the figures, where it is one; pages name it beside that of the rows."""
    backbones: dict[str, dict[str, str]] = {}
    """Figures of other backbones: by backbone and row, the row of the figures. A row with one of
    these backbones has no other figure."""
    versions: dict[str, str] = {}
    """Data sets here that are versions of one of the figures', by its name there, if that is
    another: ``games-days: games``."""
    figures: dict[str, dict[str, dict[str, float]]]
    """Values by data set, row and metric."""

    def name_of(self, row: Row, backbone: str | None) -> str:
        """Return the name of a row's figures, with the backbone it has here; empty if none."""
        name = row.published or row.name
        return name if backbone not in self.backbones else self.backbones[backbone].get(name, "")


class Experiment(_Closed):
    """A grid of rows, data sets and seeds, and how to read it."""

    title: str
    reproduces: str = ""
    about: str = ""
    statistics: bool = False
    """Nothing is trained: counts of the data sets."""
    rows: tuple[Row, ...] = ()
    seeds: tuple[Seed, ...] = Field((1, 2, 3), min_length=1)
    overrides: tuple[str, ...] = ()
    """``key=value`` of all rows."""
    splits: dict[str, tuple[str, ...]] = {}
    """Overrides by the name of a way to split; each is a grid of its own."""
    recipes_of: dict[str, str] = {}
    """Data sets that take the recipes of another where they have none: ``games-days: games``."""
    metrics: tuple[str, ...] = ("recall@10", MAIN)
    """Columns, each with the history in the ranking and with it masked."""
    improvement: tuple[str, ...] = ()
    """Rows of which the table ends with their improvement over the best of all others."""
    comparisons: tuple[Comparison, ...] = ()
    priority: tuple[str, ...] = ()
    """Rows that are trained first and left out last, after those that are compared; the others
    follow as they stand."""
    figure: Figure | None = None
    published: Published | None = None

    _once = field_validator("seeds", "metrics")(_checked_once)

    @field_validator("metrics")
    @classmethod
    def _known_metrics(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in METRICS:
                raise ValueError(f"{name}: no such metric{nearest(name, METRICS)}")
        return names

    @field_validator("splits")
    @classmethod
    def _named_splits(cls, splits: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        for name in splits:
            if re.fullmatch(r"[\w.+-]+", name) is None:
                raise ValueError(f"{name!r}: a name is a part of a folder; give letters or digits")
        return splits

    @model_validator(mode="after")
    def _fits_together(self) -> Experiment:
        rows = {row.name: row for row in self.rows}
        _check_seeds((*self.overrides, *(o for s in self.splits.values() for o in s)), "")
        if self.statistics == bool(self.rows):
            raise ValueError("give rows, or statistics: true and none")
        started_from = {row.init for row in self.rows}
        for row in self.rows:
            if row.pretraining and row.name not in started_from:
                raise ValueError(f"row {row.name!r}: nothing starts from it (init)")
        folders: dict[str, str] = {}
        for row in self.rows:
            for name in self.lines_of(row):
                other = folders.setdefault(folder_of(name), name)
                if other != name or [r.name for r in self.rows].count(row.name) > 1:
                    raise ValueError(f"rows {other!r} and {name!r} have one folder; rename one")
        for row in self.rows:
            self._check_bases(row, rows)
        self._check_comparisons(rows)
        for key, names in (("priority", self.priority), ("improvement", self.improvement)):
            for name in names:
                if name not in rows:
                    raise ValueError(f"{key}: no row {name!r}{nearest(name, rows)}")
        if self.figure is not None and not any(row.x is not None for row in self.rows):
            raise ValueError("a figure needs rows with x")
        points = [(row.series, row.x) for row in self.rows if row.x is not None]
        if self.figure is not None and (found := _twice(points)):
            series, x = found[0]
            raise ValueError(f"figure: two rows of series {series!r} with x={x:g}")
        if self.figure is not None and self.figure.log:
            for row in self.rows:
                if row.x is not None and row.x <= 0:
                    raise ValueError(
                        f"row {row.name!r}: x={row.x:g} has no place on a logarithmic axis; give "
                        "one above 0, or leave log out of the figure"
                    )
        return self

    def _check_bases(self, row: Row, rows: Mapping[str, Row]) -> None:
        for name in row.bases:
            base = rows.get(name)
            if base is None:
                raise ValueError(f"row {row.name!r}: no row {name!r}{nearest(name, rows)}")
            if base.recipe is None:
                raise ValueError(f"row {row.name!r}: {name!r} is not a row with a recipe")
            if base.pretraining and row.init is None:
                raise ValueError(f"row {row.name!r}: {name!r} is trained on other data (--source)")
            if row.pretraining and not base.pretraining:
                raise ValueError(
                    f"row {row.name!r}: {name!r} is not trained on --source; set pretraining: true"
                )
        if row.average_of is not None:
            self._check_average(row, row.average_of)
        drawn = {seed for group in self.groups_of(row) for seed in group}
        for name in row.bases:
            if missing := sorted(drawn - set(rows[name].seeds or self.seeds)):
                raise ValueError(f"row {row.name!r}: {name!r} has no seed {missing[0]}")
        seen = [row.name]
        while row.init is not None:
            row = rows.get(row.init, row)
            if row.name in seen:
                raise ValueError(f"row {row.name!r} starts from itself")
            seen.append(row.name)

    def _check_average(self, row: Row, average: Average) -> None:
        groups = self.groups_of(row)
        if _twice(seed for group in groups for seed in group):
            raise ValueError(f"row {row.name!r}: a seed is in two averages; give each its own")
        if name := next(iter(_twice(average.rows)), None):
            raise ValueError(f"row {row.name!r}: {name!r} twice in one average")
        if any(len(group) * len(average.rows) < 2 for group in groups):
            raise ValueError(f"row {row.name!r}: an average needs two runs: two rows or two seeds")

    def _check_comparisons(self, rows: Mapping[str, Row]) -> None:
        if len(self.comparisons) > MOST_COMPARISONS:
            raise ValueError(
                f"{len(self.comparisons)} comparisons; name {MOST_COMPARISONS} at most: with more, "
                "something will differ by chance"
            )
        names = {name for row in self.rows for name in self.lines_of(row)}
        for comparison in self.comparisons:
            for name in (comparison.a, comparison.b):
                if name not in names:
                    raise ValueError(f"comparison: no row {name!r}{nearest(name, names)}")
                row = rows[name.removesuffix(BLENDED)]
                if row.pretraining or row.fusion is not None:
                    raise ValueError(f"comparison: {name!r} has no ranks of users to compare")
            if comparison.a == comparison.b:
                raise ValueError(f"comparison: {comparison.a!r} with itself")
        # Holm's correction would count it twice.
        asked = [({c.a, c.b}, c.metric, c.targets) for c in self.comparisons]
        if found := _twice(asked):
            names_of = " and ".join(map(repr, sorted(found[0][0])))
            raise ValueError(f"comparison: {names_of} twice by one metric")

    def lines_of(self, row: Row) -> tuple[str, ...]:
        """Return the names that a row has in tables: its own, and that of its blend."""
        return (row.name, row.name + BLENDED) if row.blend else (row.name,)

    def groups_of(self, row: Row) -> tuple[tuple[int, ...], ...]:
        """Return the seeds behind each cell of a row: one, or those that are averaged."""
        if row.average_of is not None and row.average_of.seeds:
            return row.average_of.seeds
        return tuple((seed,) for seed in row.seeds or self.seeds)

    def ordered(self) -> list[Row]:
        """Return the rows by importance: those that are compared and what they are made of, then
        by ``priority``, then as they stand.
        """
        rows = {row.name: row for row in self.rows}
        wanted = [n.removesuffix(BLENDED) for c in self.comparisons for n in (c.a, c.b)]
        compared: set[str] = set()
        while wanted:
            name = wanted.pop()
            if name not in compared:
                compared.add(name)
                wanted += rows[name].bases
        ranks = {name: place for place, name in enumerate(self.priority)}
        return sorted(
            self.rows, key=lambda r: (r.name not in compared, ranks.get(r.name, len(ranks)))
        )


# -- reading -------------------------------------------------------------------------------------


def _shipped() -> dict[str, Path]:
    root = Path(str(resources.files("l2rec") / "experiments"))
    return {path.stem: path for path in sorted(root.glob("*.yaml"))}


def experiment_names() -> list[str]:
    """List the names of the shipped experiments."""
    return list(_shipped())


def experiment_titles() -> dict[str, str]:
    """Return what each shipped experiment is called on its page, by name."""
    return {name: load_experiment(name).title for name in _shipped()}


def load_experiment(name: str) -> Experiment:
    """Read an experiment: a YAML file, or one that is shipped, by name.

    Raises:
        ConfigError: there is none, it is not YAML, or it says something that cannot be.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else _shipped().get(name)
    if path is None:
        raise ConfigError(
            f"no experiment {name!r}{nearest(name, _shipped())} "
            f"(shipped: {', '.join(_shipped())}; or a .yaml file)"
        )
    try:
        values = read_yaml(path)
    except FileNotFoundError:
        raise ConfigError(f"experiment {name!r}: no such file") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: an experiment is a mapping of keys")
    try:
        return Experiment.model_validate(_beside(values, path.parent))
    except ValidationError as error:
        raise ConfigError(f"{path}: {_explained(error, values)}") from None


def _beside(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the values with recipe files that lie beside the experiment by their paths."""

    def found(recipe: Any) -> Any:
        is_file = isinstance(recipe, str) and recipe.endswith((".yaml", ".yml"))
        return str(folder / recipe) if is_file and (folder / recipe).is_file() else recipe

    rows = values.get("rows")
    if not isinstance(rows, list):
        return values
    placed = []
    for row in rows:
        if isinstance(row, dict):
            row = {**row} | ({"recipe": found(row["recipe"])} if "recipe" in row else {})
            if isinstance(row.get("recipes"), dict):
                row["recipes"] = {data: found(recipe) for data, recipe in row["recipes"].items()}
        placed.append(row)
    return values | {"rows": placed}


GROUPS: dict[str, type[BaseModel]] = {
    "rows": Row,
    "average_of": Average,
    "fusion": Fusion,
    "comparisons": Comparison,
    "figure": Figure,
    "published": Published,
}


def _explained(error: ValidationError, values: Mapping[str, Any]) -> str:
    """Put the first fault of an experiment into one line."""
    first = error.errors()[0]
    where = first["loc"]
    if first["type"] == "invalid_key":  # a number; or yes or no, which YAML reads as truth values
        return f"key {first['input']!r} is no text; quote it"
    key = ".".join(str(part + 1) if isinstance(part, int) else part for part in where)
    message = re.sub(r"^Value error, ", "", first["msg"])
    message = message.replace("valid tuple", "list")
    if first["type"] == "extra_forbidden":
        group = next((GROUPS[str(part)] for part in where[-2::-1] if part in GROUPS), Experiment)
        return f"unknown key {key!r}{nearest(str(where[-1]), group.model_fields)}"
    named = ""
    if where[:1] == ("rows",) and len(where) > 1 and isinstance(where[1], int):
        row = values["rows"][where[1]]
        if isinstance(row, dict) and isinstance(row.get("name"), str):
            named = f" (row {row['name']!r})"
    if first["type"] == "missing":
        return f"{key} is missing{named}"
    return f"{key}: {message}{named}" if key else message
