"""RecTools' sequential models, in an interpreter that has RecTools and not l2rec.

    PYTHON benchmarks/rectools_child.py CONTENDER EVENTS.npz EPOCHS THREADS SEED BATCH FOLDER

Called by `sasrec.py`. CONTENDER is SASRec, FlatSASRec or UniSRec. EVENTS.npz has of `train`,
`valid` and `test` the users and items of all events, those of a user oldest first; `n_items`; and
for UniSRec `vectors` [n_items, d]. FOLDER gets result.json, and of every epoch the vectors that
RecTools scores with, as epoch-N.npz: `valid` and `test` [users, dim], `items` [n_items, dim], and
`known` [n_items], the items that the model can recommend.
"""

from __future__ import annotations

import importlib
import json
import logging
import resource
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

# As RecBole's defaults and l2rec's; RecTools' SASRec has a feed-forward part as wide as its states.
DIM, LAYERS, HEADS, MAX_ITEMS, DROPOUT, LR = 64, 2, 2, 50, 0.5, 1e-3
K = 10
BLOCK = 256

Events = tuple[np.ndarray, np.ndarray]
"""Users and items, [n] each."""


class Watch:
    """Clock of processor seconds, and file of the vectors after each epoch."""

    def __init__(self, events: Mapping[str, Events], n_items: int, folder: Path) -> None:
        self.events, self.n_items, self.folder = events, n_items, folder
        self.epoch_seconds: list[float] = []
        self.eval_seconds: list[float] = []
        self.prepare_seconds: float | None = None
        self.started = time.process_time()

    def begin(self) -> None:
        now = time.process_time()
        if self.prepare_seconds is None:
            self.prepare_seconds = now - self.started
        self.started = now

    def end(self) -> None:
        self.epoch_seconds.append(time.process_time() - self.started)

    def callback(self, then: Callable[[Any], None] = lambda _: None) -> Any:
        """Return a callback of Lightning that keeps the time, and calls ``then`` with the module.

        Its state is in the closure: RecTools trains by a deep copy of the trainer.
        """
        from pytorch_lightning import Callback

        watch = self

        class Timed(Callback):
            def on_train_epoch_start(self, *_: Any) -> None:
                watch.begin()

            def on_train_epoch_end(self, _: Any, module: Any) -> None:
                watch.end()
                then(module)

        return Timed()

    def rank(
        self,
        recommend: Callable[[Events], object],
        users: Callable[[Events], Tensor],
        items: Callable[[], tuple[np.ndarray, Tensor]],
    ) -> None:
        """Time the model's own recommendation for all users; write what it scores with.

        ``items``: item ints and their vectors.
        """
        started = time.process_time()
        recommend(self.events["valid"])
        self.eval_seconds.append(time.process_time() - started)
        ints, vectors = items()
        table = np.zeros((self.n_items, vectors.shape[1]), dtype=np.float32)
        table[ints] = vectors.numpy()
        known = np.zeros(self.n_items, dtype=bool)
        known[ints] = True
        np.savez(
            self.folder / f"epoch-{len(self.epoch_seconds)}.npz",
            valid=users(self.events["valid"]).numpy(),
            test=users(self.events["test"]).numpy(),
            items=table,
            known=known,
        )


def as_dataset(events: Events) -> Any:
    import pandas as pd
    from rectools import Columns
    from rectools.dataset import Dataset

    users, items = events
    moments = pd.to_datetime(np.arange(len(users)), unit="s")
    columns = {Columns.User: users, Columns.Item: items, Columns.Weight: 1.0}
    return Dataset.construct(pd.DataFrame({**columns, Columns.Datetime: moments}))


def left_padded(events: Events, known: np.ndarray) -> Tensor:
    """Arrange the newest items of each user as RecTools reads them: [users, MAX_ITEMS].

    ``known``: ascending item ints; the first is 1 in the result, and others are left out.
    """
    users, items = events
    rows = np.zeros((users.max() + 1, MAX_ITEMS), dtype=np.int64)
    kept = np.isin(items, known)
    users, items = users[kept], items[kept]
    ends = np.searchsorted(users, users, side="right")
    column = MAX_ITEMS - ends + np.arange(len(users))
    newest = column >= 0
    rows[users[newest], column[newest]] = 1 + np.searchsorted(known, items[newest])
    return torch.from_numpy(rows)


def in_blocks(compute: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([compute(block) for block in rows.split(BLOCK)])


def sasrec(
    events: Mapping[str, Events], watch: Watch, epochs: int, batch: int, _: np.ndarray
) -> dict[str, Any]:
    """Train `SASRecModel`, RecTools' main one, an epoch at a time."""
    from pytorch_lightning import Trainer
    from rectools.models import SASRecModel

    model = SASRecModel(
        n_blocks=LAYERS,
        n_heads=HEADS,
        n_factors=DIM,
        dropout_rate=DROPOUT,
        session_max_len=MAX_ITEMS,
        loss="softmax",
        lr=LR,
        batch_size=batch,
        recommend_torch_device="cpu",
    )
    model._trainer = Trainer(
        accelerator="cpu",
        callbacks=[watch.callback()],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        logger=False,
    )
    train = as_dataset(events["train"])

    def users(cases: Events) -> Tensor:
        everyone = np.unique(cases[0])
        prepared = model.data_preparator.transform_dataset_u2i(as_dataset(cases), everyone)
        loader = model.data_preparator.get_dataloader_recommend(prepared, BLOCK)
        found, _ = model.lightning_model._get_user_item_embeddings(loader, "cpu")
        return found[np.argsort(prepared.user_id_map.external_ids)]

    def items() -> tuple[np.ndarray, Tensor]:
        with torch.no_grad():
            vectors = model.torch_model.item_model.get_all_embeddings()
        extra = model.data_preparator.n_item_extra_tokens
        return model.data_preparator.get_known_item_ids().astype(np.int64), vectors[extra:]

    def recommend(cases: Events) -> object:
        everyone = np.unique(cases[0])
        return model.recommend(everyone, as_dataset(cases), k=K, filter_viewed=False)

    for _ in range(epochs):
        model.fit_partial(train, min_epochs=1, max_epochs=1)
        watch.rank(recommend, users, items)
    return {"parameters": trained(model.torch_model)}


def flat_sasrec(
    events: Mapping[str, Events], watch: Watch, epochs: int, batch: int, _: np.ndarray
) -> dict[str, Any]:
    """Train `FlatSASRecNet`, which RecTools gives no trainer and no initialisation of its own.

    Both are here as RecTools' SASRec has them.
    """
    from rectools.fast_transformers import FlatSASRecNet, SequenceBatchDataset, build_sequences

    train_users, train_items = map(torch.from_numpy, events["train"])
    x, y, known, _ = build_sequences(
        train_users, train_items, torch.arange(len(train_users)), MAX_ITEMS
    )
    net = FlatSASRecNet(len(known), DIM, LAYERS, HEADS, MAX_ITEMS, DROPOUT)
    for parameter in net.parameters():
        if parameter.dim() > 1:
            torch.nn.init.xavier_normal_(parameter)
    optimizer = torch.optim.Adam(net.parameters(), lr=LR, betas=(0.9, 0.98))
    loader = DataLoader(SequenceBatchDataset(x, y), batch_size=batch, shuffle=True)
    ints = known.numpy()

    def users(cases: Events) -> Tensor:
        return in_blocks(net.encode_last, left_padded(cases, ints))

    def recommend(cases: Events) -> object:
        def top(rows: Tensor) -> Tensor:
            return (net.encode_last(rows) @ net.all_item_embeddings().T).topk(K).indices

        return in_blocks(top, left_padded(cases, ints))

    nan = False
    for _ in range(epochs):
        net.train()
        watch.begin()
        for rows in loader:
            logits = net(rows)
            loss = F.cross_entropy(logits.flatten(0, 1), rows["y"].flatten() - 1, ignore_index=-1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        watch.end()
        net.eval()
        if not nan and not torch.isfinite(users(events["valid"])).all():
            # The fused attention of PyTorch's evaluation mode has NaN for a padded position, which
            # sees nothing, and the next layer spreads it; without it there are scores to compare.
            nan = True
            torch.backends.mha.set_fastpath_enabled(False)
        watch.rank(recommend, users, lambda: (ints, net.all_item_embeddings().detach()))
    return {"parameters": trained(net), "nan": nan}


def unisrec(
    events: Mapping[str, Events], watch: Watch, epochs: int, batch: int, vectors: np.ndarray
) -> dict[str, Any]:
    """Train `UniSRecModel`, with its default adaptor and feed-forward part.

    Its item 0 is padding, so that items are counted from 1 here.
    """
    from rectools.fast_transformers import UniSRecModel

    def ranked(module: Any) -> None:
        net = model._net = module.net  # `fit` sets it at its end, and `predict_topk` reads it
        known = model.item_id_mapping.numpy() - 1
        net.eval()
        watch.rank(
            lambda cases: in_blocks(
                lambda rows: model.predict_topk(rows, K)[1], left_padded(cases, known)
            ),
            lambda cases: in_blocks(net.encode_last, left_padded(cases, known)),
            lambda: (known, net.project_all()[1:].detach()),
        )
        net.train()

    class Watched(UniSRecModel):
        def _make_trainer(self, *given: Any) -> Any:
            trainer = super()._make_trainer(*given)
            trainer.callbacks.append(watch.callback(ranked))
            return trainer

    model = Watched(
        torch.from_numpy(np.concatenate((np.zeros_like(vectors[:1]), vectors))),
        n_factors=DIM,
        n_blocks=LAYERS,
        n_heads=HEADS,
        session_max_len=MAX_ITEMS,
        dropout=DROPOUT,
        epochs=epochs,
        lr=LR,
        loss="softmax",
        batch_size=batch,
    )
    users, items = map(torch.from_numpy, events["train"])
    model.fit(users, items + 1, torch.arange(len(users)))
    return {"parameters": trained(model.net)}


CONTENDERS = {"SASRec": sasrec, "FlatSASRec": flat_sasrec, "UniSRec": unisrec}


def trained(net: torch.nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def main() -> None:
    contender, file, epochs, threads, seed, batch, folder = sys.argv[1:]
    torch.set_num_threads(int(threads))
    torch.manual_seed(int(seed))
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    for module in ("pandas", "pytorch_lightning", "rectools.models", "rectools.fast_transformers"):
        importlib.import_module(module)  # before the clock starts
    data = np.load(file)
    events = {
        part: (data[f"{part}_users"], data[f"{part}_items"]) for part in ("train", "valid", "test")
    }
    watch = Watch(events, int(data["n_items"]), Path(folder))
    found = CONTENDERS[contender](events, watch, int(epochs), int(batch), data["vectors"])
    result = {
        "epoch_seconds": watch.epoch_seconds,
        "eval_seconds": watch.eval_seconds,
        "prepare_seconds": watch.prepare_seconds,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        **found,
    }
    Path(folder, "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
