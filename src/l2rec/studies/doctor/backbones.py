"""Backbones as shapes: a config.json is enough, and some configs stand here."""

from __future__ import annotations

__all__ = ["BUILT_IN", "shape_backbone", "weights_at_hand"]

import re
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from l2rec.config import BackboneConfig
from l2rec.errors import BackboneError
from l2rec.modules import gguf
from l2rec.modules.backbone import Backbone, minilm_source, reason_of, refuse_adapter

_LLAMA: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
}
_GROUPED = {"num_key_value_heads": 8, "max_position_embeddings": 131072}
_QWEN3: dict[str, Any] = {"vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128} | {
    "max_position_embeddings": 40960
}
BUILT_IN: dict[str, PretrainedConfig] = {
    "Qwen3-0.6B": Qwen3Config(
        **_QWEN3,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
    ),
    "Qwen3-8B": Qwen3Config(
        **_QWEN3,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
    ),
    "Llama-2-7B": LlamaConfig(**_LLAMA),
    "R1-Distill-Llama-8B": LlamaConfig(
        **_LLAMA | _GROUPED | {"vocab_size": 128256, "intermediate_size": 14336}
    ),
    # One matrix W_pack is q, k and v side by side; as Llama has them, the parameters are as many.
    "Baichuan2-7B": LlamaConfig(**_LLAMA | {"vocab_size": 125696}),
}
"""Shapes that need no file, by the last part of their hub ids."""
PIECE = r"\p{L}{1,7}|\p{N}{1,3}|\n|[^\s\p{L}\p{N}]"
"""About one token of a text, where the backbone's own tokenizer is not at hand."""


def _key(name: str) -> str:
    last = name.rpartition("/")[2].lower().removeprefix("deepseek-")
    return re.sub(r"(-hf|-base|-chat|-instruct)+$", "", last)


def _settings(config: BackboneConfig) -> tuple[str, PretrainedConfig]:
    """Return where a backbone comes from, and its config: of a folder, the cache, or built in.

    Raises:
        BackboneError: it is nowhere.
    """
    source = minilm_source() if config.name == "minilm" else config.name
    file = gguf.find_gguf(source)
    if file is not None:
        return source, gguf.load_settings(file)
    built_in = {_key(name): settings for name, settings in BUILT_IN.items()}
    here_alone = _key(source) in built_in
    try:
        refuse_adapter(config, source, here_alone=here_alone)
        return source, AutoConfig.from_pretrained(
            source,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            local_files_only=here_alone,
        )
    except BackboneError:
        raise
    except (OSError, ValueError, KeyError) as error:
        if not Path(source).exists() and _key(source) in built_in:
            return source, built_in[_key(source)]
        raise BackboneError(
            f"backbone {config.name!r} has no shapes: {reason_of(error)} (give a folder with a "
            f"config.json, a hub id, or one of {', '.join(BUILT_IN)})"
        ) from error


def shape_backbone(config: BackboneConfig) -> tuple[Backbone, bool]:
    """Build a backbone on the ``meta`` device: shapes and dtypes, no weights.

    Weights are bfloat16 unless the config says float32.

    Returns:
        The backbone, and whether its tokenizer is its own: otherwise one that cuts words into
        pieces of up to seven letters stands in, and numbers of tokens are estimates.

    Raises:
        BackboneError: unknown, or a model that cannot run packed.
    """
    source, settings = _settings(config)
    dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
    with torch.device("meta"):
        model = AutoModel.from_config(
            settings, dtype=dtype, trust_remote_code=config.trust_remote_code
        )
    file = gguf.find_gguf(source)
    folder, options = (source, {}) if file is None else gguf.place(file)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, use_fast=True, local_files_only=True, **options
        )
        own = len(tokenizer) > len(tokenizer.all_special_ids)
    except (OSError, ValueError, KeyError):
        own = False
    if not own:
        tokenizer = _stand_in()
    revision = config.revision
    return Backbone(model, tokenizer, name=config.name, source=source, revision=revision), own


def _stand_in() -> PreTrainedTokenizerFast:
    """Return a tokenizer that cuts texts into about as many tokens as others do."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    raw = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE), "removed", invert=True)
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]")


def weights_at_hand(config: BackboneConfig) -> bool:
    """Say whether a backbone's weights lie on this machine, so that steps can be measured."""
    from transformers.utils.hub import cached_file

    source = minilm_source() if config.name == "minilm" else config.name
    if gguf.find_gguf(source) is not None:
        return True
    for name in ("model.safetensors", "model.safetensors.index.json"):
        found = cached_file(
            source,
            name,
            revision=config.revision,
            local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
        if found is not None:
            return True
    return False
