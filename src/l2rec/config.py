"""Typed, closed configuration: every default lives once, an unknown key is an error.

A run is described by one YAML file, the recipe, and ``key=value`` overrides:

    method: l2rec.methods.l2rec:L2Rec     import path of the method, or FILE.py:Class; no registry
    backbone: {name: minilm}
    model: {...}                          options of the method's Config class
    split: {kind: leave-one-out}
    training: {...}

Recipes hold only what differs from the defaults of the classes below.
"""

from __future__ import annotations

__all__ = [
    "BackboneConfig",
    "RunConfig",
    "SplitConfig",
    "TrainingConfig",
    "as_trained",
    "check_use",
    "find_recipe",
    "from_options",
    "load_recipe",
    "method_class",
    "names_file",
    "recipe_names",
    "resolve",
]

import contextlib
import datetime
import hashlib
import importlib
import importlib.util
import re
import sys
from collections.abc import Mapping, Sequence
from importlib import resources
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from l2rec.errors import ConfigError, closest, nearest
from l2rec.yaml_files import read_yaml

Options = TypeVar("Options", bound=BaseModel)
METHOD = re.compile(r"[^:]+:[A-Za-z_]\w*")
"""Import path of a method where the name of a recipe could stand."""
Tracker = Literal["tensorboard", "mlflow", "wandb", "trackio"]
SplitKind = Literal["auto", "leave-one-out", "tied-day", "time", "given"]


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BackboneConfig(_Closed):
    """The frozen language model."""

    name: str = "minilm"
    """``minilm`` (the real pretrained all-MiniLM-L6-v2), a Hugging Face hub id, a folder, or a GGUF
    file of Llama or Qwen (or a folder with one), which is read as plain weights."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; null: its main branch."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """``auto``: bfloat16 where the processor multiplies it faster, else float32. Weights saved in
    float16 are rounded to bfloat16 by the former; ``float32`` keeps them as they are."""
    quantize: Literal["none", "8bit", "4bit"] = "none"
    """Hold the matrices of linear layers in 8 bits (int8, a scale for each row) or 4 (NF4), which
    needs `pip install 'l2rec[quantized]'`. Products are made in ``dtype``. Weights that are stored
    so by bitsandbytes are read as they are, with ``none`` too."""
    trust_remote_code: bool = False
    """Run code that comes with the weights of a hub id, which can do anything."""
    random_weights: bool = False
    """Seeded random weights instead of the pretrained ones: for tests and timings."""

    @model_validator(mode="after")
    def _consistent(self) -> BackboneConfig:
        if self.random_weights and self.quantize != "none":
            raise ValueError("random_weights and quantize do not go together; choose one of them")
        return self


class TrainingConfig(_Closed):
    """Options of the training loop."""

    epochs: int = Field(30, ge=1)
    """Epochs of each stage; ``max_steps`` and ``patience`` also count per stage."""
    max_steps: int | None = Field(None, ge=1)
    """Optimiser steps after which a stage stops, even before its ``epochs`` are done."""
    max_minutes: float | None = Field(None, gt=0)
    """Training time (resumed parts summed) after which the run stops, with a last validation. A
    stage that others follow may use an equal share of what is left, so that each has its time."""
    user_share: float = Field(1.0, gt=0, le=1)
    """Share of the users to train on, drawn by the seed; all users are evaluated."""
    lr: float = Field(1e-4, gt=0)
    """Learning rate of AdamW at its highest; parts of a method may have one of their own."""
    weight_decay: float = Field(0.01, ge=0)
    """Weight decay of AdamW, of matrices alone."""
    warmup: float = Field(0.05, ge=0, le=1)
    """Share of the planned steps in which the learning rate rises linearly."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up: falling to 0 along a cosine, or staying."""
    clip: float = Field(1.0, gt=0)
    """Largest gradient norm."""
    batch_users: int = Field(32, ge=1)
    """Largest number of users in a batch."""
    batch_tokens: int = Field(8192, ge=1)
    """Largest number of input tokens of user histories in a batch."""
    checkpointing: bool = False
    """Gradient checkpointing: keep only the inputs of the backbone's blocks for the backward, and
    compute the rest once more there. The same gradients from less memory, in more time."""
    shard: bool = False
    """Of several processes: divide the backbone's frozen layers among them (FSDP2), for one that
    does not fit a card. Each layer is put together when it runs, which costs time; what is learned
    is the same. One process alone has the whole backbone."""
    eval_every: float = Field(1.0, gt=0)
    """Epochs between validations (of all users, or of ``split.users``)."""
    patience: int = Field(5, ge=1)
    """Validations without a better NDCG@10, the history masked, before training stops. It chooses
    the best step of every method: what a method that compares vectors says of items the user has
    already hides what it knows of the next one, and repeats are the business of ``l2rec blend``."""
    checkpoint_minutes: float = Field(3.0, ge=0)
    """Minutes between checkpoints within an epoch."""
    log_every: int = Field(10, ge=1)
    """Steps between log lines and points of the tracker."""
    tracker: Tracker = "tensorboard"
    """Where points go: TensorBoard files in the run folder, or the server that MLflow, Weights &
    Biases or trackio is set up for; these take `pip install 'l2rec[distributed]'` and their own
    package."""
    gather_negatives: bool = True
    """Of several processes (`torchrun`, `accelerate launch`): in-batch negatives and expert loads
    are those of the whole batch, not of each process' own rows."""


class SplitConfig(_Closed):
    """Which events are trained on, validated and tested: `l2rec.data.splits`."""

    kind: SplitKind = "auto"
    """``auto``: as the data came, where it came split, otherwise leave-one-out."""
    valid_from: float | str | None = None
    """With ``time``, the first moment of validation: a date, a number in the unit of the data, or,
    between 0 and 1, the share of events before it."""
    test_from: float | str | None = None
    """The first moment of test, likewise."""
    users: int | None = Field(None, ge=1)
    """Most users who are validated, and who are tested, evenly spread over all: ranking the whole
    catalog for millions takes longer than training. All users are trained on."""

    @field_validator("valid_from", "test_from", mode="before")
    @classmethod
    def _as_written(cls, value: Any) -> Any:
        # YAML reads a date as a date.
        return value.isoformat() if isinstance(value, datetime.date) else value

    @model_validator(mode="after")
    def _consistent(self) -> SplitConfig:
        if self.kind != "time" and (self.valid_from, self.test_from) != (None, None):
            raise ValueError("valid_from and test_from need split.kind=time (--split time)")
        return self


class RunConfig(_Closed):
    """Configuration of a whole run, as ``config.yaml`` of a run folder stores it."""

    method: str = "l2rec.methods.l2rec:L2Rec"
    """Import path of the method, or FILE.py:Class."""
    seed: int = Field(0, ge=0)
    """Of the first weights, the order of users, dropout and whatever else is drawn."""
    backbone: BackboneConfig = BackboneConfig()
    model: Any = None
    split: SplitConfig = SplitConfig()
    training: TrainingConfig = TrainingConfig()

    @model_validator(mode="before")
    @classmethod
    def _typed_model(cls, values: Any) -> Any:
        """Parse ``model`` with the Config class of the method that ``method`` names."""
        if isinstance(values, Mapping):
            # A group whose lines are all commented out is as if it were not there.
            values = {key: value for key, value in values.items() if value is not None}
            method = values.get("method", cls.model_fields["method"].default)
            model = values.get("model") or {}
            options = method_class(method).Config
            if isinstance(model, Mapping):
                values["model"] = options(**model)
            elif not isinstance(model, options):
                raise ValueError(f"model={model!r} is not a group of keys")
        return values


def from_options(kind: type[Options], options: Mapping[str, Any], /, **flags: str) -> Options:
    """Build a configuration from options of the command line; None stands for the default.

    ``flags``: names of options that are not those of the fields.

    Raises:
        ConfigError: a value that is not allowed, by the name of its option.
    """
    try:
        return kind(**{name: value for name, value in options.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        if not first["loc"]:  # of several options together
            raise ConfigError(message) from None
        field = str(first["loc"][0])
        name = flags.get(field, field).replace("_", "-")
        raise ConfigError(f"--{name} {first['input']}: {message}") from None


def method_class(path: str) -> Any:
    """Import the method class at ``package.module:Name``, or ``FILE.py:Name``.

    Raises:
        ConfigError: it cannot be imported, or is no method.
    """
    try:
        if names_file(path):
            file, _, name = path.rpartition(":")
            method = getattr(_module_of(Path(file)), name)
        else:
            module_name, _, name = path.partition(":")
            method = getattr(importlib.import_module(module_name), name)
    except (
        ImportError,
        AttributeError,
        ValueError,
        TypeError,
        OSError,
        SyntaxError,
        NameError,
    ) as e:
        raise ConfigError(f"method={path!r} cannot be imported: {e}") from e
    if not hasattr(method, "Config"):
        raise ConfigError(f"method={path!r} is no method: it has no Config; name module:Class")
    return method


def names_file(method: str) -> bool:
    """Tell whether a method is named by a file, ``FILE.py:Name``, and not by an import path."""
    return ".py:" in method


def _module_of(file: Path) -> ModuleType:
    """Import a Python file from wherever it lies: once, so that its classes stay the same, and anew
    when it was edited.
    """
    file = file.resolve()
    source = file.read_bytes()
    name = f"l2rec_file_{hashlib.sha256(str(file).encode() + source).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    loader = SourceFileLoader(name, str(file))
    spec = importlib.util.spec_from_file_location(name, file, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses and pydantic look it up
    try:
        # Not what the import system has kept of it: that knows edits by the second and the size.
        exec(loader.source_to_code(source, str(file)), vars(module))
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _with_whole_path(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the keys of a recipe; a method in a file has its whole path, seen from ``folder``."""
    method = values.get("method")
    if not isinstance(method, str) or not names_file(method):
        return values
    file, _, name = method.rpartition(":")
    return {**values, "method": f"{(folder / file).resolve()}:{name}"}


def recipe_names() -> list[str]:
    """List the names of the shipped recipes, such as ``scientific/l2rec``."""
    root = Path(str(resources.files("l2rec") / "recipes"))
    return sorted(p.relative_to(root).with_suffix("").as_posix() for p in root.rglob("*.yaml"))


def find_recipe(recipe: str) -> Path:
    """Find the YAML file of ``recipe``: a path, or the name of a shipped recipe.

    A bare method name (``l2rec``) is the recipe of that method's defaults.

    Raises:
        ConfigError: nothing has that name.
    """
    if recipe.endswith((".yaml", ".yml")):
        path = Path(recipe)
        if not path.is_file():
            raise ConfigError(f"recipe {recipe!r}: no such file")
        return path
    shipped = Path(str(resources.files("l2rec") / "recipes")) / f"{recipe}.yaml"
    if shipped.is_file():
        return shipped
    known = recipe_names()
    raise ConfigError(
        f"no recipe {recipe!r}{nearest(recipe, known)} "
        f"(shipped: {', '.join(known)}; or a .yaml file)"
    )


def load_recipe(recipe: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe, apply ``dotted.key=value`` overrides (values are YAML), check and resolve it.

    Instead of a recipe, a class (``package.module:Name`` or ``FILE.py:Name``) is that method with
    its defaults.

    A recipe with ``extends: OTHER`` (a shipped name, or a path from its folder) takes from the
    other all keys, group by group, that it does not set itself.

    Raises:
        ConfigError: unknown recipe or key (the nearest name is offered), or a bad value.
    """
    path = None if METHOD.fullmatch(recipe) else find_recipe(recipe)
    values = {"method": recipe} if path is None else _read(path)
    for override in overrides:
        _set(values, override)
    values = _with_whole_path(values, Path())
    try:
        config = RunConfig(**values)
    except ValidationError as error:
        where = recipe if path is None else _origin(path, overrides, _faults_of(error)[0])
        raise ConfigError(f"{where}: {_explain(error, values)}") from None
    given = [f"override {word!r}" for word in overrides if word.startswith("backbone")]
    check_use(values, config.method, [recipe if path is None else str(path), *given][-1])
    return config


def check_use(values: Mapping[str, Any], method: str, where: str) -> None:
    """Check that a backbone is named only for a method that reads one; ``where``: as in `resolve`.

    Raises:
        ConfigError: it would change nothing but what ``config.yaml`` says.
    """
    group = values.get("backbone")
    if group and not method_class(method).uses_backbone:
        keys = ", ".join(f"backbone.{key}" for key in group)
        raise ConfigError(
            f"{where}: {keys} changes nothing: {method.rpartition(':')[2]} reads no language "
            "model; leave it out, or choose a method that reads texts"
        )


def as_trained(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config that a run folder holds, without a backbone that its method never read."""
    method = values.get("method", RunConfig.model_fields["method"].default)
    if method_class(method).uses_backbone:
        return dict(values)
    return {key: value for key, value in values.items() if key != "backbone"}


Fault = tuple[tuple[int | str, ...], str]
"""Place and message of a fault."""


def _faults(values: Mapping[str, Any]) -> list[Fault]:
    """List what is wrong with the values of a recipe."""
    try:
        RunConfig(**values)
    except ValidationError as error:
        return _faults_of(error)
    return []


def _faults_of(error: ValidationError) -> list[Fault]:
    return [(one["loc"], one["msg"]) for one in error.errors()]


def _origin(path: Path, overrides: Sequence[str], fault: Fault) -> str:
    """Name the override that brought a fault, or the file: the recipe, or one that it extends."""
    for n in range(len(overrides), 0, -1):
        values = _read(path)
        for override in overrides[: n - 1]:
            _set(values, override)
        if fault not in _faults(values):
            return f"override {overrides[n - 1]!r}"
    while (base := _base(path, _load(path))) is not None and fault in _faults(_read(base)):
        path = base
    return str(path)


def _base(path: Path, values: Mapping[str, Any]) -> Path | None:
    """Find the recipe that this one ``extends``: a file beside it, or what `find_recipe` finds."""
    base = values.get("extends")
    if base is None:
        return None
    if not isinstance(base, str):
        raise ConfigError(f"{path}: extends={base!r} is no other recipe")
    beside = path.parent / base
    if beside.suffix in (".yaml", ".yml") and beside.is_file():
        return beside
    try:
        return find_recipe(base)
    except ConfigError as error:
        raise ConfigError(f"{path}: extends={base!r}: {error}") from None


def _load(path: Path) -> dict[str, Any]:
    """Read the keys that stand in a recipe's file."""
    values = read_yaml(path) or {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of keys, got {type(values).__name__}")
    if strange := [key for key in values if not isinstance(key, str)]:
        raise ConfigError(f"{path}: {strange[0]!r} is no key of a recipe")
    if "run_version" in values and isinstance(values.get("config"), dict):
        values = as_trained(values["config"])  # of a run, to train as it was
    return _with_whole_path(values, path.parent)


def _read(path: Path, extended: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read the keys of a recipe, over those of the recipe that it ``extends``."""
    values = _load(path)
    base = _base(path, values)
    if base is None:
        return values
    extends = values.pop("extends")
    if path in extended:
        raise ConfigError(f"{path}: extends={extends!r} is no other recipe")
    inherited = _read(base, (*extended, path))
    for key, value in values.items():
        base_value = inherited.get(key)
        merge = isinstance(base_value, dict) and isinstance(value, dict)
        inherited[key] = base_value | value if merge else value
    return inherited


def override_values(overrides: Sequence[str]) -> dict[str, Any]:
    """Parse ``dotted.key=value`` overrides into groups of keys, as in a recipe."""
    values: dict[str, Any] = {}
    for override in overrides:
        _set(values, override)
    return values


def resolve(values: Mapping[str, Any], where: str) -> RunConfig:
    """Build a checked RunConfig from plain values; ``where`` names their origin in errors.

    Raises:
        ConfigError: an unknown key or a bad value.
    """
    try:
        return RunConfig(**values)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_explain(error, values)}") from None


def _set(values: dict[str, Any], override: str) -> None:
    key, sep, text = override.partition("=")
    if not sep or not key:
        raise ConfigError(f"override {override!r}: write key=value, such as training.epochs=3")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not YAML") from error
    # YAML 1.1 reads 1e-4 (no dot) as a string, and Python's None too; people who type them mean a
    # number and nothing. What is quoted is a string.
    if isinstance(value, str) and not text.lstrip().startswith(('"', "'")):
        with contextlib.suppress(ValueError):
            value = None if value == "None" else float(value)
    node = values
    *parents, leaf = key.split(".")
    for parent in parents:
        if node.get(parent) is None:  # absent, or an empty group
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {parent!r} is not a group of keys")
    node[leaf] = value


def _groups(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the class of each group of keys."""
    method = values.get("method", RunConfig.model_fields["method"].default)
    return {
        "training": TrainingConfig,
        "backbone": BackboneConfig,
        "split": SplitConfig,
        "model": method_class(method).Config,
    }


def _meant(location: tuple[Any, ...], values: Mapping[str, Any]) -> str:
    """Return what to do about a key that is not known: "; did you mean 'x'?", which is what has its
    name elsewhere, else the nearest, in its group or, of no group, anywhere; or all keys of the
    group. And the command that lists them.
    """
    name, group = str(location[-1]), str(location[0])
    groups = {group: list(kind.model_fields) for group, kind in _groups(values).items()}
    keys = {field: f"{group}.{field}" for group in reversed(groups) for field in groups[group]}
    keys |= {field: field for field in RunConfig.model_fields}
    group = group if group in groups else "model"  # whose Config names its keys alone
    offered: str | None
    if name in keys:
        offered, known = keys[name], []
    elif len(location) == 1 and name in values:
        found = closest(name, RunConfig.model_fields) or closest(name, keys)
        offered, known = keys[found] if found else None, list(RunConfig.model_fields)
        group = "a recipe"
    else:
        offered, known = closest(name, groups[group]), groups[group]
    listed = f"`l2rec recipes {_short_name(values)}` says what each is"
    if offered is None:
        return f"; {group} has {', '.join(known)}: {listed}"
    return f"; did you mean {offered!r}? {listed.replace('each', 'every key')}"


def _short_name(values: Mapping[str, Any]) -> str:
    """Return the name of the shipped recipe of a method's defaults, or else the method's path."""
    method = str(values.get("method", RunConfig.model_fields["method"].default))
    bare = (name for name in recipe_names() if "/" not in name)
    return next((name for name in bare if _read(find_recipe(name)).get("method") == method), method)


def _explain(error: ValidationError, values: Mapping[str, Any]) -> str:
    first = error.errors()[0]
    location = first["loc"]
    key = ".".join(str(part) for part in location)
    if first["type"] == "extra_forbidden":
        return f"unknown key {key!r}{_meant(location, values)}"
    message = first["msg"].removeprefix("Value error, ")
    return f"{key}={first['input']!r}: {message}" if key else message
