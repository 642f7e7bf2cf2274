"""RecBole's SASRec on atomic files, in an interpreter that has RecBole and not l2rec.

    PYTHON benchmarks/recbole_child.py FOLDER NAME EPOCHS THREADS SEED RESULT.json

Called by `sasrec.py`. Leave-one-out by time and full ranking, as RecBole's sequential models have
it by default; SASRec with its default sizes and the full softmax.
"""

from __future__ import annotations

import json
import resource
import sys
import time

import numpy as np

# RecBole 1.2.1 was written for NumPy 1, whose aliases it uses.
for alias, name in (("float_", "float64"), ("complex_", "complex128"), ("unicode_", "str_")):
    if not hasattr(np, alias):
        setattr(np, alias, getattr(np, name))
for builtin in (bool, int, float, object, str):
    if builtin.__name__ not in np.__dict__:
        setattr(np, builtin.__name__, builtin)

import torch  # noqa: E402


def main() -> None:
    folder, name, epochs, threads, seed, result = sys.argv[1:]
    torch.set_num_threads(int(threads))
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.model.sequential_recommender import SASRec
    from recbole.trainer import Trainer
    from recbole.utils import init_seed

    sys.argv = sys.argv[:1]  # RecBole reads options from there
    config = Config(
        model=SASRec,
        dataset=name,
        config_dict={
            "data_path": folder,
            "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
            "eval_args": {
                "split": {"LS": "valid_and_test"},
                "order": "TO",
                "group_by": "user",
                "mode": "full",
            },
            "train_neg_sample_args": None,
            "loss_type": "CE",
            "metrics": ["Recall", "NDCG", "MRR"],
            "topk": [10],
            "valid_metric": "NDCG@10",
            "epochs": int(epochs),
            "eval_step": 0,  # evaluations are timed by hand
            "train_batch_size": 2048,
            "eval_batch_size": 256,
            "MAX_ITEM_LIST_LENGTH": 50,
            "use_gpu": False,
            "seed": int(seed),
            "show_progress": False,
            "state": "ERROR",
            "checkpoint_dir": folder,
        },
    )
    started = time.process_time()
    init_seed(config["seed"], config["reproducibility"])
    dataset = create_dataset(config)
    train, valid, test = data_preparation(config, dataset)
    model = SASRec(config, train.dataset)
    trainer = Trainer(config, model)
    prepare_seconds = time.process_time() - started
    epoch_seconds, eval_seconds, scores = [], [], []
    best, best_test = -1.0, {}
    for epoch in range(int(epochs)):
        started = time.process_time()
        trainer._train_epoch(train, epoch, show_progress=False)
        epoch_seconds.append(time.process_time() - started)
        started = time.process_time()
        found = trainer.evaluate(valid, load_best_model=False, show_progress=False)
        eval_seconds.append(time.process_time() - started)
        scores.append(float(found["ndcg@10"]))
        if scores[-1] > best:
            best = scores[-1]
            best_test = trainer.evaluate(test, load_best_model=False, show_progress=False)
    with open(result, "w", encoding="utf-8") as file:
        json.dump(
            {
                "prepare_seconds": prepare_seconds,
                "epoch_seconds": epoch_seconds,
                "eval_seconds": eval_seconds,
                "valid": scores,
                "best_valid": best,
                "test": {key: float(value) for key, value in best_test.items()},
                "parameters": sum(p.numel() for p in model.parameters()),
                "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            },
            file,
        )


if __name__ == "__main__":
    main()
