"""Baichuan checkpoints read by the Llama classes of Hugging Face, without remote code.

Yang et al. Baichuan 2: Open Large-scale Language Models. https://arxiv.org/abs/2309.10305

The 7B models are Llama by other names. What differs, and what becomes of it:

    W_pack [3 D, D] of every layer, q, k and v      split into q_proj, k_proj, v_proj
    lm_head, normalised in Baichuan 2               not read: a backbone ends at its hidden states
    a rotation stored in old checkpoints            not read: it is computed
    BaichuanTokenizer, a sentencepiece model        converted (`convert_sentencepiece`)

The 13B models have ALiBi instead of a rotation, which the Llama classes lack: they are refused.
"""

from __future__ import annotations

__all__ = ["convert_sentencepiece", "register"]

import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2rec.errors import BackboneError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MODEL_TYPE = "baichuan"
ALIBI_WIDTH = 5120
"""Hidden size of the 13B models, whose position embedding their config.json need not name."""


@functools.cache
def register() -> None:
    """Teach the Auto classes of Hugging Face what ``model_type: baichuan`` is; done once.

    They then load such a checkpoint as any other, whatever its ``auto_map`` says; where remote code
    is trusted, that of the tokenizer still runs, and is the user's wish.
    """
    from transformers import AutoConfig, AutoModel, AutoTokenizer, LlamaConfig, LlamaModel
    from transformers import PreTrainedTokenizerFast as Fast
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping
    from transformers.core_model_loading import Chunk, WeightConverter

    class BaichuanConfig(LlamaConfig):
        """Configuration of Llama under the name of Baichuan: the 7B models use its field names."""

        model_type = MODEL_TYPE

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            """Read config.json; see `check_rotary` for what it raises."""
            check_rotary(config_dict)
            return super().from_dict(config_dict, **kwargs)

    class BaichuanModel(LlamaModel):
        """Llama, with the weights of `BaichuanConfig`."""

        config_class = BaichuanConfig

    class BaichuanTokenizer(Fast):
        """Tokenizer of a tokenizer.json, or else of a sentencepiece file."""

        vocab_files_names = {  # noqa: RUF012
            "vocab_file": "tokenizer.model",
            "tokenizer_file": "tokenizer.json",
        }

        @classmethod
        def convert_to_native_format(
            cls, trust_remote_code: bool = False, **kwargs: Any
        ) -> dict[str, Any]:
            """Replace the name of a sentencepiece file in ``kwargs`` by the tokenizer in it."""
            file = kwargs.pop("vocab_file", None)
            if file is not None and not os.path.isfile(kwargs.get("tokenizer_file") or ""):
                kwargs["tokenizer_object"] = convert_sentencepiece(Path(file))
            return kwargs

    AutoConfig.register(MODEL_TYPE, BaichuanConfig)
    AutoModel.register(BaichuanConfig, BaichuanModel)
    AutoTokenizer.register(BaichuanConfig, tokenizer_class=BaichuanTokenizer)
    packed = WeightConverter(
        source_patterns="self_attn.W_pack.weight",
        target_patterns=[f"self_attn.{part}_proj.weight" for part in "qkv"],
        operations=[Chunk(dim=0)],
    )
    register_checkpoint_conversion_mapping(MODEL_TYPE, [packed])


def check_rotary(config: dict[str, Any]) -> None:
    """Check that a config.json is that of a model with rotation, as Llama has.

    Raises:
        BackboneError: a model with ALiBi: its config.json says so, or has the width of the 13B
            models, or limits ``model_max_length`` instead of ``max_position_embeddings``.
    """
    named = str(config.get("position_embedding", "")).lower()
    if (
        named == "alibi"
        or config.get("hidden_size") == ALIBI_WIDTH
        or ("model_max_length" in config and "max_position_embeddings" not in config)
    ):
        raise BackboneError(
            "this Baichuan (13B) has ALiBi, and the Llama classes that read Baichuan here have "
            "rotation; choose a 7B model"
        )


def convert_sentencepiece(file: Path) -> Tokenizer:
    """Convert a sentencepiece model of byte pairs to a tokenizer of the same ids.

    Its merges are all pairs of pieces that make a piece, best score first, as sentencepiece merges.
    Spaces beside a special token inside a text may become another piece than there.

    Raises:
        BackboneError: not such a file, or the package protobuf is missing, which reads it.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
    from transformers.convert_slow_tokenizer import import_protobuf
    from transformers.tokenization_utils_base import generate_merges

    try:
        proto = import_protobuf().ModelProto()
    except ImportError as error:
        raise BackboneError(
            f"{file.name} is a sentencepiece file, and reading one needs protobuf: "
            "pip install protobuf"
        ) from error
    try:
        proto.ParseFromString(file.read_bytes())
    except Exception as error:  # a class of protobuf
        raise BackboneError(f"{file} is not a sentencepiece model") from error
    trained, normal = proto.trainer_spec, proto.normalizer_spec
    if trained.model_type != trained.BPE:
        raise BackboneError(f"{file} is a sentencepiece model, but not one of byte pairs (BPE)")

    piece_kind = proto.SentencePiece
    ids = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    scores = {p.piece: p.score for p in proto.pieces if p.type == piece_kind.NORMAL}
    whole = {p.piece for p in proto.pieces if p.type != piece_kind.NORMAL}
    tokenizer = Tokenizer(
        models.BPE(
            ids,
            generate_merges(ids, scores, skip_tokens=whole),
            unk_token=trained.unk_piece,
            fuse_unk=True,
            byte_fallback=trained.byte_fallback,
        )
    )
    steps: list[Any] = []
    if normal.precompiled_charsmap:
        steps.append(normalizers.Precompiled(normal.precompiled_charsmap))
    if normal.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if normal.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    kinds = {piece_kind.CONTROL: True, piece_kind.USER_DEFINED: False, piece_kind.UNKNOWN: True}
    for piece in proto.pieces:
        if piece.type in kinds:
            special = kinds[piece.type]
            tokenizer.add_tokens([AddedToken(piece.piece, normalized=False, special=special)])
    return tokenizer
