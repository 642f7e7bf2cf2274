"""Training and recommending by ``fit`` and ``recommend``, as in scikit-learn and RecTools.

    model = L2Rec("sasrec", training={"epochs": 5}).fit(dataset)
    model.recommend(users, k=10)            user_id, item_id, score, rank

A thin layer: a recipe with what is changed in it, the one training of ``l2rec train``, and its run.
"""

from __future__ import annotations

__all__ = ["L2Rec"]

import json
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from l2rec.config import RunConfig, as_trained, load_recipe
from l2rec.console import Console
from l2rec.data.dataset import Dataset, open_dataset
from l2rec.data.ids import as_ids
from l2rec.errors import ConfigError, L2RecError, as_arguments, shown
from l2rec.runs.folder import load_run_config, open_run_dataset, read_report
from l2rec.runs.frames import Frame, recommendations
from l2rec.runs.predictor import Predictor, load
from l2rec.runs.train import train_run

GROUPS = {"model": None, "training": None, "backbone": "name", "split": "kind"}
"""Groups of a recipe's keys, and the key that a plain value is for."""
ARGUMENTS = ("out", "init", "data", "split", "text", "resume=True")
"""What errors of a training name as flags of the command line."""


class L2Rec:
    """A recipe that can be fitted: any method of l2rec, or one of your own.

    recipe: what `l2rec train` takes: a shipped recipe or method (``"l2rec-plus"``, ``"sasrec"``), a
        YAML file, or the name of a class (``"my_method.py:MyMethod"``).
    model, training, backbone, split: keys of these groups that differ from the recipe's;
        ``backbone="minilm"`` stands for its name, ``split="time"`` for its kind.
    seed: instead of the recipe's.
    out: run folder to write; None: a temporary one, deleted with this object.
    init: finished run to start from; rows of its items are kept where the catalog is the same.
    progress: report on standard error.

    After `fit`: ``run_`` (the run folder), ``report_`` (its report.json: test scores of the model
    and of what it has to beat), ``predictor_`` (the model, as `l2rec.load` gives it).
    """

    def __init__(
        self,
        recipe: str | Path = "l2rec-plus",
        *,
        model: Mapping[str, Any] | None = None,
        training: Mapping[str, Any] | None = None,
        backbone: Mapping[str, Any] | str | None = None,
        split: Mapping[str, Any] | str | None = None,
        seed: int | None = None,
        out: str | Path | None = None,
        init: str | Path | None = None,
        progress: bool = True,
    ) -> None:
        self.recipe = recipe
        self.model, self.training = model, training
        self.backbone, self.split = backbone, split
        self.seed, self.out, self.init, self.progress = seed, out, init, progress
        self._dataset: Dataset | None = None

    @classmethod
    def load(cls, run: str | Path, data: str | Path | None = None) -> L2Rec:
        """Return the estimator of a finished run; ``data``: its data set, if that was moved.

        Raises:
            CheckpointError: it is no finished run, or its data set is gone or another one.
        """
        with _as_arguments():
            config, identity = load_run_config(Path(run))
            keys = as_trained(config.model_dump(mode="json"))
            groups = {name: keys[name] for name in GROUPS if name in keys}
            start = identity.get("init")
            fitted = cls(config.method, **groups, seed=config.seed, out=run, init=start)
            dataset = open_run_dataset(Path(run), None if data is None else Path(data))
            fitted._take(Path(run), dataset)
        return fitted

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the arguments of the constructor, as scikit-learn asks for them."""
        del deep
        names = ("recipe", *GROUPS, "seed", "out", "init", "progress")
        return {name: getattr(self, name) for name in names}

    def set_params(self, **params: Any) -> L2Rec:
        """Change arguments of the constructor.

        Raises:
            ConfigError: there is no such argument.
        """
        for name, value in params.items():
            if name not in self.get_params():
                known = ", ".join(self.get_params())
                raise ConfigError(f"L2Rec has no parameter {name!r} (it has: {known})")
            setattr(self, name, value)
        return self

    @property
    def config(self) -> RunConfig:
        """The recipe with everything that is changed in it.

        Raises:
            ConfigError: an unknown recipe or key, or a value that is not allowed.
        """
        if not isinstance(self.recipe, str | Path):
            raise ConfigError(
                f"recipe={shown(self.recipe)}: give a name or a file; a class is named by where it "
                "stands, as 'my_method.py:MyMethod' or 'package.module:MyMethod'"
            )
        overrides = [] if self.seed is None else [f"seed={self.seed}"]
        for group, plain in GROUPS.items():
            keys = getattr(self, group)
            if keys is None:
                continue
            if isinstance(keys, str) and plain is not None:
                keys = {plain: keys}
            if not isinstance(keys, Mapping):
                raise ConfigError(f"{group}={keys!r}: give a dictionary of the recipe's keys")
            overrides += [f"{group}.{key}={_as_yaml(value)}" for key, value in keys.items()]
        return load_recipe(str(self.recipe), overrides)

    def fit(self, dataset: Dataset | str | Path, *, resume: bool = False) -> L2Rec:
        """Train on a data set as ``l2rec train`` does, to the end of its test; return this object.

        One event of each user is held out for validation, which stops the training, and one for
        test, unless ``split`` says otherwise. The seed sets torch's global random state: of two
        fits at once in one process, in threads, neither is what its seed says.

        Args:
            dataset: `Dataset`, or its folder.
            resume: go on with the run at ``out`` from its last checkpoint.

        Raises:
            CheckpointError: there is a run at ``out`` already. And whatever the training refuses.
        """
        config = self.config
        opened = dataset if isinstance(dataset, Dataset) else open_dataset(dataset)
        if self.out is None:
            run = Path(tempfile.mkdtemp(prefix="l2rec-"))
            weakref.finalize(self, shutil.rmtree, run, ignore_errors=True)
        else:
            run = Path(self.out)
        with _as_arguments(), Console(quiet=not self.progress) as console:
            train_run(
                config,
                opened.path,
                run,
                progress=console,
                resume=resume,
                init=None if self.init is None else Path(self.init),
                recipe=str(self.recipe),
            )
        self._take(run, opened)
        return self

    def recommend(
        self,
        users: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
        k: int = 10,
        *,
        filter_viewed: bool = True,
        items_to_recommend: Sequence[str] | None = None,
        frame: Frame = "polars",
    ) -> Any:
        """Rank the next items for users of the data set, after all of their events, or for
        anybody's history.

        Args:
            users: ids of users of the data set, all by default; or histories (item ids, oldest
                first) by user id, which need not be known.
            k: most items of a user.
            filter_viewed: leave out the items of the user's history.
            items_to_recommend: item ids that may be recommended; None: all.
            frame: ``polars``, ``pandas`` or ``arrow``.

        Returns:
            A table of ``user_id``, ``item_id``, ``score``, ``rank`` (from 1), best first.

        Raises:
            ConfigError: not fitted. DataError: unknown ids, an empty history, k outside 1..N.
        """
        predictor = self._fitted("predictor_")
        if not isinstance(users, Mapping):
            users = self._histories(users)
        return recommendations(
            predictor,
            users,
            k,
            filter_viewed=filter_viewed,
            items_to_recommend=items_to_recommend,
            frame=frame,
        )

    def _histories(self, users: Sequence[str] | None) -> dict[str, list[str]]:
        """Return the item ids of users of the data set, oldest first, without cold ones; of all
        users, those who have any.
        """
        dataset = self._fitted("_dataset")
        given = (
            None if users is None else as_ids(users, "users", "user ids, or of histories by them")
        )
        ids = dataset.user_ids.to_pylist() if given is None else given
        rows: Sequence[int]
        rows = range(dataset.n_users) if users is None else dataset.user_indices(ids).tolist()
        items = self.predictor_.ids
        histories = {
            user: [items[int(i)] for i in dataset.warm_items(row)]
            for user, row in zip(ids, rows, strict=True)
        }
        return {user: row for user, row in histories.items() if row or users is not None}

    def _take(self, run: Path, dataset: Dataset) -> None:
        self.run_ = run
        self.report_: dict[str, Any] = read_report(run)
        self.predictor_: Predictor = load(run)
        self._dataset = dataset

    def _fitted(self, name: str) -> Any:
        if getattr(self, "predictor_", None) is None:
            raise ConfigError("this model is not fitted: call fit(dataset) first")
        return getattr(self, name)


@contextmanager
def _as_arguments() -> Iterator[None]:
    """Name arguments in errors as they are called here, not as flags of the command line."""
    try:
        yield
    except L2RecError as error:
        raise type(error)(as_arguments(str(error), ARGUMENTS)) from error


def _as_yaml(value: Any) -> str:
    """Write a value as an override of a recipe has it; JSON is YAML."""
    return json.dumps(value, default=str, ensure_ascii=False)
