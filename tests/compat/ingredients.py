"""A tiny random backbone, a log of chains with its catalog, and recipes, all into one folder."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, BertConfig, PreTrainedTokenizerFast

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = "red blue green black white small large old wood paper glass metal lamp table chair book"
USERS, ITEMS, EVENTS = 48, 24, 8

L2REC: dict[str, Any] = {
    "max_items": 6,
    "semantic_items": 4,
    "max_tokens": 48,
    "item_tokens": 6,
    "text_tokens": 12,
    "view_experts": 3,
    "rank": 2,
    "router_width": 4,
}
TRAINING = {
    "epochs": 3,
    "lr": 5e-3,
    "batch_users": 8,
    "log_every": 3,
    "checkpoint_minutes": 0.0,
}
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    # The paper's form.
    "l2rec": ("l2rec:L2Rec", L2REC | {"negatives": 3, "normalize_views": True}),
    # Every named option of the shipped l2rec-plus recipes, two stages.
    "l2rec-plus": (
        "l2rec:L2Rec",
        L2REC
        | {
            "items": "table",
            "supervision": "all",
            "user_pooling": "running",
            "pooling": "blend",
            "last_item_skip": True,
            "matrices": ["q", "k", "v", "o"],
            "temperature": 0.07,
            "view_loss": 0.5,
            "bpc": 0.0,
            "text_dropout": 0.3,
            "repeat_bias": True,
            "cooccurrence": True,
            "text_neighbors": True,
            "behavioral_epochs": 1,
        },
    ),
    "hdrec": (
        "hdrec:HDRec",
        {
            "max_items": 5,
            "item_tokens": 6,
            "max_tokens": 96,
            "sequence_prompt": "red [SEQ]",
            "align_prompt": "blue [ALIGN]",
            "rank": 2,
            "id_dim": 32,
            "sasrec_epochs": 2,
            "align_items": 4,
            "neighbours": 3,
        },
    ),
    "sasrec": ("sasrec:SASRec", {"dim": 32, "max_items": 6}),
    "unisrec": (
        "unisrec:UniSRec",
        {
            "text_tokens": 12,
            "experts": 2,
            "dim": 32,
            "inner": 32,
            "max_items": 6,
            "pretrain_epochs": 2,
        },
    ),
}


def backbone(folder: Path) -> None:
    words = {word: number for number, word in enumerate((*SPECIAL, *WORDS.split()))}
    raw = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="[UNK]", pad_token="[PAD]", mask_token="[MASK]"
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    AutoModel.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(out: Path) -> None:
    backbone(out / "backbone")
    rng = np.random.default_rng(0)
    words = WORDS.split()
    with (out / "items.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["item_id", "title", "colour"])
        for item in range(ITEMS):
            some = rng.choice(words, 4, replace=False)
            rows.writerow([f"i{item}", " ".join(some), words[item % 5]])
    cycle = rng.permutation(ITEMS)
    with (out / "events.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["user_id", "item_id", "timestamp"])
        for user in range(USERS):
            start = int(rng.integers(ITEMS))
            for step in range(EVENTS):
                # Mostly along the cycle; now and then anywhere, so that no score is perfect.
                place = start + step if rng.random() < 0.8 else int(rng.integers(ITEMS))
                rows.writerow([f"u{user}", f"i{cycle[place % ITEMS]}", step])
    (out / "recipes").mkdir()
    for name, (method, model) in RECIPES.items():
        values: dict[str, Any] = {"method": f"l2rec.methods.{method}", "model": model}
        if name != "sasrec":
            values["backbone"] = {"name": "backbone", "dtype": "float32"}
        values["training"] = TRAINING
        (out / "recipes" / f"{name}.yaml").write_text(yaml.safe_dump(values, sort_keys=False))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
