"""Which families of transformers run packed as they run alone: a sweep with tiny random models.

    python benchmarks/backbones.py                        every family; some minutes
    python benchmarks/backbones.py bert qwen3 gemma2      these
    python benchmarks/backbones.py --write                and write docs/backbones.md

Every family that transformers maps to a base model is built from its own config class, with its
sizes made small, and its weights are drawn anew, large enough that attention is sharp and norms are
not one. Rows of 3, 11, 1, 19 and 28 tokens run packed, and alone through the model's own eager
attention. *exact*: the largest difference, relative to the spread of the states, is below 1e-3.
*refused*: `Backbone` raised an error of one line. *wrong*: neither. *not tried*: the family could
not be built with small sizes. The probe that every load makes is not trusted here.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from l2rec.errors import BackboneError
from l2rec.modules.backbone import Attend, Backbone, Packing, pack

DOCUMENT = Path(__file__).parent.parent / "docs" / "backbones.md"
BEGIN, END = "<!-- sweep -->", "<!-- /sweep -->"
LENGTHS = (3, 11, 1, 19, 28)
LIMIT = 1e-3
MOST_PARAMETERS, SECONDS = 20_000_000, 60
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "model_dim"), 32),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers"), 2
    ),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "n_inner", "d_ff", "ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 32),
    **dict.fromkeys(("pad_token_id", "bos_token_id"), 0),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "head_dim": 8,
    "kv_channels": 8,
    "vocab_size": 64,
    "eos_token_id": 1,
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    "sliding_window": 8,
}

DEBERTA = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": -1}
PUBLISHED: dict[str, dict[str, Any]] = {
    **{key: {"layer_types": ["conv", "full_attention"]} for key in ("lfm2", "lfm2_moe")},
    "deberta": DEBERTA,
    "deberta-v2": DEBERTA
    | {"position_buckets": 8, "share_att_key": True, "position_biased_input": False},
    "falcon": {"alibi": True, "multi_query": False, "parallel_attn": False},
    "big_bird": {"attention_type": "original_full"},
    **{key: {"embedding_size": 16} for key in ("albert", "electra", "rembert", "roformer")},
    "opt": {"word_embed_proj_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    **{key: {"rotary_dim": 4} for key in ("gptj", "codegen")},
}
"""What checkpoints of a family have, and its default config does not."""


@dataclass(frozen=True)
class Row:
    """What became of a family: its name, the outcome, and a figure or a line."""

    family: str
    outcome: str
    said: str


def small_config(family: str) -> Any:
    """Build the config of a family with small sizes, its text part too."""
    kind = CONFIG_MAPPING[family]
    sizes = _sizes(kind())
    return kind(**sizes | PUBLISHED.get(family, {}))


def _sizes(config: Any) -> dict[str, Any]:
    names = config.to_dict()
    sizes = _small(names)
    if isinstance(names.get("text_config"), dict):
        sizes["text_config"] = _small(names["text_config"])
    return sizes


def _small(names: dict[str, Any]) -> dict[str, Any]:
    """Make sizes small, with a layer of each kind that there is, and two layers at least."""
    sizes = {name: value for name, value in SMALL.items() if name in names}
    if isinstance(names.get("layer_types"), list):
        kinds = list(dict.fromkeys(names["layer_types"]))
        sizes["layer_types"] = kinds * (2 if len(kinds) == 1 else 1)
        sizes["num_hidden_layers"] = len(sizes["layer_types"])
    return sizes


def redrawn(model: nn.Module) -> nn.Module:
    """Draw the weights anew: matrices with gain about one, norms around one, small biases."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim > 1:
                weight.copy_(noise * (1.0 if "embed" in name else weight.shape[-1] ** -0.5 * 1.5))
            elif "norm" in name.lower() and name.endswith("weight"):
                weight.add_(0.2 * noise)
            else:
                weight.add_(0.1 * noise)
    return model


def difference(backbone: Backbone, alone: nn.Module) -> float:
    """Compare packed rows with each row alone; relative to the spread of the states."""
    generator = torch.Generator().manual_seed(1)
    longest = backbone.max_positions or max(LENGTHS)
    lengths = [min(n, longest) for n in LENGTHS]
    rows = [torch.randint(2, 64, (n,), generator=generator) for n in lengths]
    attend = Attend.CAUSAL if backbone.causal else Attend.FULL
    group, positions = pack(torch.tensor(lengths), attend)
    with torch.no_grad():
        found = backbone(backbone.embed(torch.cat(rows)), Packing((group,), positions))
        expected = torch.cat([_states(alone, row) for row in rows])
    return float((found - expected).abs().max() / expected.std())


def _states(model: nn.Module, row: Tensor) -> Tensor:
    with contextlib.suppress(TypeError):
        return model(input_ids=row[None], use_cache=False).last_hidden_state[0]  # type: ignore[no-any-return]
    return model(input_ids=row[None]).last_hidden_state[0]  # type: ignore[no-any-return]


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in the block after so many seconds."""

    def late(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def tried(family: str) -> Row:
    """Build a family twice, run one packed and the other alone."""
    try:
        with at_most(SECONDS):
            config = small_config(family)
            with torch.device("meta"):
                size = sum(p.numel() for p in AutoModel.from_config(config).parameters())
            if size > MOST_PARAMETERS:
                return Row(family, "not tried", f"{size / 1e6:,.0f}M parameters with small sizes")
            models = []
            for _ in range(2):
                torch.manual_seed(0)
                # Falcon's eager attention counts ALiBi twice, in the mask as well.
                own = "sdpa" if family == "falcon" else "eager"
                model = AutoModel.from_config(small_config(family), attn_implementation=own)
                models.append(redrawn(model.float().eval()))
    except Exception as error:  # each family has its own way not to be built
        return Row(family, "not tried", f"not built small: {_line(error)}")
    packed, alone = models
    try:
        with at_most(SECONDS):
            backbone = Backbone(packed, None, name=family, source=family, revision=None)
    except BackboneError as error:
        return Row(family, "refused", _line(error).removeprefix(f"backbone '{family}' "))
    except Exception as error:
        return Row(family, "wrong", f"traceback at load: {_line(error)}")
    try:
        with at_most(SECONDS):
            alone = _text_part(alone, backbone)
            error_of = difference(backbone, alone)
    except BackboneError as error:
        return Row(family, "refused", f"at the first pass: {_line(error)}")
    except Exception as error:
        return Row(family, "wrong", f"traceback: {_line(error)}")
    return Row(family, "exact" if error_of < LIMIT else "wrong", f"{error_of:.0e}")


def _text_part(alone: nn.Module, backbone: Backbone) -> nn.Module:
    """Find the part of the model that the backbone runs."""
    kind = type(backbone.model)
    return next(module for module in alone.modules() if type(module) is kind)


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 160 else f"{text[:157]}..."


def table(rows: list[Row]) -> str:
    """Write the sweep in Markdown, the families by outcome."""
    counts = Counter(row.outcome for row in rows)
    lines = [
        f"transformers {transformers.__version__}, torch {torch.__version__}, float32, CPU, "
        f"{datetime.date.today().isoformat()}: "
        + ", ".join(f"{counts[name]} {name}" for name in ("exact", "refused", "wrong", "not tried"))
        + ".",
    ]
    for outcome, head in (("exact", "largest difference"), ("refused", "line"), ("wrong", "what")):
        some = [row for row in rows if row.outcome == outcome]
        if some:
            lines += ["", f"| {outcome} | {head} |", "|---|---|"]
            lines += [f"| {row.family} | {row.said.replace('|', '/')} |" for row in some]
    left = ", ".join(row.family for row in rows if row.outcome == "not tried")
    return "\n".join([*lines, "", f"Not tried: {left or 'none'}."])


def main() -> None:
    """Try the families that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*")
    parser.add_argument("--write", action="store_true", help="write docs/backbones.md")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    rows = []
    for family in args.families or sorted(MODEL_MAPPING_NAMES):
        rows.append(tried(family))
        print(f"{family:30} {rows[-1].outcome:10} {rows[-1].said}", flush=True)
    if args.write:
        text = DOCUMENT.read_text(encoding="utf-8")
        before, _, rest = text.partition(BEGIN)
        after = rest.partition(END)[2]
        DOCUMENT.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{after}", encoding="utf-8")
    sys.exit(any(row.outcome == "wrong" for row in rows))


if __name__ == "__main__":
    main()
