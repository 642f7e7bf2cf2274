"""Literal reference of LLaRA and iLoRA: one user at a time, by Hugging Face's own model, float64.

Slow on purpose. Nothing is packed, padded or cached; updates are added into copies of the matrices.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from tests.support import tiny
from torch import Tensor, nn


def words(family: str, text: str) -> list[int]:
    """Return the token ids of some words."""
    found: list[int] = tiny.tokenizer(tiny.STYLES[family])(text, add_special_tokens=False).input_ids
    return found


def ends(family: str) -> tuple[list[int], list[int]]:
    """Return the token ids that begin a row, and those that end each of its lines."""
    by_style = {"bert": (["[CLS]"], "[SEP]"), "llama": (["<s>"], "\n"), "qwen": ([], "\n")}
    start, end = by_style[tiny.STYLES[family]]
    return [tiny.VOCABULARY.index(word) for word in start], [tiny.VOCABULARY.index(end)]


def gelu(x: float) -> float:
    return x * (1 + math.erf(x / math.sqrt(2))) / 2


def projected(project: nn.Sequential, row: Tensor) -> Tensor:
    """Compute W_2 gelu(W_1 e + b_1) + b_2 of one row e [id_dim]."""
    first, _, second = project
    hidden = [gelu(float(w @ row + b)) for w, b in zip(first.weight, first.bias, strict=True)]
    out: Tensor = second.weight @ torch.tensor(hidden, dtype=row.dtype) + second.bias
    return out


def prompt(
    model: Any, family: str, texts: Sequence[str], history: Sequence[int], hybrid: bool = True
) -> Tensor:
    """Write the inputs [S, d] of one user, token after token."""
    table = model.backbone.word_embeddings.weight
    start, end = ends(family)

    def vectors(ids: list[int]) -> list[Tensor]:
        return [table[token] for token in ids]

    said = vectors([*start, *words(family, model.config.prompt), *end])
    for item in history[-model.config.max_items :]:
        said += vectors(words(family, texts[item])[: model.config.item_tokens])
        if hybrid:
            said.append(projected(model.project, model.sasrec.items.weight[item]))
        said += vectors(end)
    return torch.stack([*said, *vectors([*words(family, model.config.question), *end])])


def merged(model: Any, family: str, weights: Sequence[float] = (1.0,), **changes: Any) -> nn.Module:
    """Copy the bare model, each matrix W as W + alpha/r sum_k w_k B_k A_k for the given w.

    B_k and A_k are the k-th of as many slices of the ranks as there are weights, r ranks each.
    """
    bare = copy.deepcopy(tiny.random_model(family, **changes)).double()
    config = model.config
    width = config.rank // len(weights)
    for name, a, b in zip(model.lora.names, model.lora.a, model.lora.b, strict=True):
        matrix = bare.get_submodule(name).weight
        for k, weight in enumerate(weights):
            ranks = slice(k * width, (k + 1) * width)
            update = b[:, ranks] @ a[ranks]
            matrix.data += config.lora_alpha / width * weight * update
    return bare


def states(bare: nn.Module, inputs: Tensor) -> Tensor:
    """Run one row [S, d] by the model's own code: last hidden states [S, D]."""
    found: Tensor = bare(inputs_embeds=inputs[None]).last_hidden_state[0]
    return found


def said(model: Any, family: str, bare: nn.Module, inputs: Tensor, title: str) -> list[Tensor]:
    """Return the log-probability of each token of a title and its end, after a prompt [S, d]."""
    table = model.backbone.word_embeddings.weight
    code = [*words(family, title)[: model.config.item_tokens], *ends(family)[1]]
    row = torch.cat((inputs, table[code[:-1]]))
    logits = states(bare, row)[len(inputs) - 1 :] @ table.T
    return [scores.log_softmax(-1)[token] for scores, token in zip(logits, code, strict=True)]
