"""Families whose attention, or what goes with it, has to be led to the packed one by hand.

Most models ask for their attention by name, and get the packed one (`packing.packed_attention`).
The modules of the families below do not, or make something for one sequence of all tokens:

    attention in code of its own     BERT's many copies, XGLM, GPT-1, GPT-J, CodeGen, GPT-Neo
    biases of distance               ALiBi (BLOOM, Falcon, MPT), T5, MPNet: for the longest row
    disentangled attention           DeBERTa: biases made of each row's own queries and keys
    positions that count all tokens  encoders of BART, Marian, Pegasus, M2M100; RoFormer

What is replaced here does as before whenever the model does not run packed. Whether the result is
the model is not decided here: `probe` compares them at every load.
"""

from __future__ import annotations

__all__ = ["accepted", "lead_to_packed", "own_attention"]

import inspect
from collections.abc import Callable, Mapping
from functools import cache, partial
from types import MethodType
from typing import Any

from torch import Tensor, nn

from l2rec.modules.families import attentions, whole
from l2rec.modules.families.deberta import deberta

ATTENTIONS: dict[str, tuple[str, Any]] = {
    "BigBirdSelfAttention": ("forward", attentions.bert),
    "MegatronBertSelfAttention": ("forward", attentions.bert),
    "RemBertSelfAttention": ("forward", attentions.bert),
    "RoFormerSelfAttention": ("forward", attentions.roformer),
    "MPNetSelfAttention": ("forward", attentions.mpnet),
    "DisentangledSelfAttention": ("forward", deberta),
    "BloomAttention": ("forward", attentions.bloom),
    "FalconAttention": ("forward", attentions.falcon),
    "MptAttention": ("forward", attentions.mpt),
    "XGLMAttention": ("forward", attentions.xglm),
    "GPTJAttention": ("_attn", attentions.core),
    "CodeGenAttention": ("_attn", attentions.core),
    "GPTNeoXJapaneseAttention": ("_attn", attentions.core),
    "GPTNeoSelfAttention": ("_attn", attentions.gpt_neo),
    "Attention": ("_attn", attentions.gpt),
}
"""By class of the attention: the method that is replaced in packed passes, and by what."""

MADE_FOR_ALL: tuple[tuple[str, str, Any], ...] = (
    ("", "compute_bias", whole.narrow),
    ("", "compute_position_bias", whole.narrow),
    ("MptModel", "build_mpt_alibi_tensor", whole.mpt_alibi),
    ("DebertaEncoder", "get_rel_pos", whole.nothing),
    ("DebertaEncoder", "get_attention_mask", whole.nothing),
    ("DebertaV2Encoder", "get_rel_pos", whole.nothing),
    ("DebertaV2Encoder", "get_attention_mask", whole.nothing),
    *(
        (f"{kind}PositionalEmbedding", "forward", whole.positions)
        for kind in (
            *("BartLearned", "MBartLearned", "PLBartLearned", "BlenderbotLearned"),
            *("BlenderbotSmallLearned", "PegasusSinusoidal", "MarianSinusoidal"),
            "RoFormerSinusoidal",
        )
    ),
    ("M2M100SinusoidalPositionalEmbedding", "forward", whole.places),
    ("NllbMoeSinusoidalPositionalEmbedding", "forward", whole.places),
)
"""By the end of a class's name: a method that makes something for all tokens, and a substitute."""


def lead_to_packed(model: nn.Module, packing: Callable[[], Any], attention: Any) -> bool:
    """Change the modules of these families in place; return True if all attention is led by hand.

    packing: returns the `Packing` of the packed pass that is under way, or None. attention: the
    attention function of packed rows.
    """
    by_hand = False
    for module in model.modules():
        kind = type(module).__name__
        if kind in ATTENTIONS and hasattr(module, ATTENTIONS[kind][0]):
            name, led = ATTENTIONS[kind]
            _lead(module, name, partial(_attending, led, attention), packing)
            by_hand = True
        for ends, name, made in MADE_FOR_ALL:
            if kind.endswith(ends) and hasattr(type(module), name):
                _lead(module, name, made, packing)
    return by_hand


def _lead(module: nn.Module, name: str, led: Any, packing: Callable[[], Any]) -> None:
    """Replace a method of a module by ``led`` in packed passes."""
    of_class = getattr(type(module), name)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        plain, rows = partial(of_class, self), packing()
        return plain(*args, **kwargs) if rows is None else led(self, plain, rows, *args, **kwargs)

    setattr(module, name, MethodType(method, module))


def _attending(
    led: Any, attention: Any, self: nn.Module, plain: Any, rows: Any, *args: Any, **kwargs: Any
) -> Any:
    """Hand the packed attention to one of `attentions`."""

    def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        states: Tensor = attention(self, q, k, v, None, packing=rows, **options)[0]
        return states.flatten(2)

    return led(self, attend, *args, **kwargs)


def own_attention(model: nn.Module) -> str:
    """Return the name of the attention that is the model's own, to compare with.

    The eager one; but that of Falcon counts ALiBi twice (transformers 5.23), in the mask as well.
    """
    config: Any = model.config
    return "sdpa" if config.model_type == "falcon" else "eager"


def accepted(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs that a model's forward takes: not all know ``use_cache``, say."""
    parameters = _parameters(type(model).forward)
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return inputs
    return {name: value for name, value in inputs.items() if name in parameters}


@cache
def _parameters(forward: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(forward).parameters
