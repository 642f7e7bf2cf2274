"""Random models and tokenizers of a few thousand weights: everything but the knowledge."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoModel,
    BertConfig,
    ElectraConfig,
    LlamaConfig,
    MptConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    RobertaConfig,
)

from l2rec.data.synthetic import COLOURS, KINDS, MATERIALS, THINGS
from l2rec.methods.l2rec import L2RecConfig
from l2rec.modules.backbone import Backbone

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "<s>", "\n")
VOCABULARY = (*SPECIAL, *dict.fromkeys((*COLOURS, *KINDS, *MATERIALS, *THINGS)))
Style = Literal["bert", "llama", "qwen"]

_SHAPE: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}


def tokenizer(style: Style = "bert") -> PreTrainedTokenizerFast:
    """Return one that splits words at spaces; [CLS] text [SEP], <s> text, or the bare text."""
    words = {word: number for number, word in enumerate(VOCABULARY)}
    raw = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    around = {"bert": "[CLS] $A [SEP]", "llama": "<s> $A", "qwen": "$A"}[style]
    used = [(word, words[word]) for word in around.split() if word in words]
    raw.post_processor = processors.TemplateProcessing(single=around, special_tokens=used)
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]", pad_token="[PAD]")


def bert_config(**changes: Any) -> PretrainedConfig:
    """Return a tiny BERT."""
    return BertConfig(**_SHAPE | changes)


def roberta_config(**changes: Any) -> PretrainedConfig:
    """Return a tiny RoBERTa."""
    return RobertaConfig(**_SHAPE | {"pad_token_id": 1, "type_vocab_size": 1} | changes)


def qwen3_config(**changes: Any) -> PretrainedConfig:
    """Return a tiny Qwen3."""
    return Qwen3Config(**_SHAPE | {"num_key_value_heads": 2, "head_dim": 8} | changes)


def llama_config(**changes: Any) -> PretrainedConfig:
    """Return a tiny Llama."""
    return LlamaConfig(**_SHAPE | {"num_key_value_heads": 1} | changes)


def mpt_config(**changes: Any) -> PretrainedConfig:
    """Return a tiny MPT, whose attention is biased by distances in the cache."""
    sizes = {"vocab_size": len(VOCABULARY), "d_model": 32, "n_layers": 2, "n_heads": 4}
    return MptConfig(**sizes | changes)


def distill_config(**changes: Any) -> PretrainedConfig:
    """Return what DeepSeek-R1-Distill-Llama is: a Llama with its long-context rotation."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    return llama_config(rope_parameters=rope, **changes)


def electra_config(**changes: Any) -> PretrainedConfig:
    """Return a tiny ELECTRA, whose word vectors are half as wide as its states."""
    return ElectraConfig(**_SHAPE | {"embedding_size": 16} | changes)


CONFIGS = {
    "bert": bert_config,
    "electra": electra_config,
    "roberta": roberta_config,
    "qwen3": qwen3_config,
    "tied": partial(qwen3_config, tie_word_embeddings=True),
    "llama": llama_config,
    "distill": distill_config,
    "mpt": mpt_config,
}
STYLES: dict[str, Style] = {
    "bert": "bert",
    "electra": "bert",
    "roberta": "bert",
    "qwen3": "qwen",
    "tied": "qwen",
    "llama": "llama",
    "distill": "llama",
    "mpt": "qwen",
}


def random_model(family: str, seed: int = 0, **changes: Any) -> nn.Module:
    """Draw weights large enough that attention is not uniform."""
    torch.manual_seed(seed)
    model: nn.Module = AutoModel.from_config(
        CONFIGS[family](initializer_range=0.2, **changes), attn_implementation="eager"
    )
    return model.eval()


def random_backbone(family: str = "bert", seed: int = 0, **changes: Any) -> Backbone:
    """Wrap a random model with its tokenizer."""
    return Backbone(
        random_model(family, seed, **changes),
        tokenizer(STYLES[family]),
        name=f"tiny-{family}",
        source="random",
        revision=None,
    )


def small(**changes: Any) -> L2RecConfig:
    """Return options of L2Rec that fit the tiny backbones."""
    values: dict[str, Any] = {
        "max_items": 8,
        "semantic_items": 8,
        "max_tokens": 64,
        "item_tokens": 6,
        "text_tokens": 12,
        "view_experts": 4,
        "rank": 2,
        "router_width": 4,
    }
    if changes.get("form") != "catalog":
        values["negatives"] = 3
    return L2RecConfig(**values | changes)
