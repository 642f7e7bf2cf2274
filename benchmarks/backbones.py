"""Which families of transformers run packed as they run alone: a sweep with tiny random models.

    python benchmarks/backbones.py                        every family; some minutes
    python benchmarks/backbones.py bert qwen3 gemma2      these
    python benchmarks/backbones.py --write                and write docs/backbones.md
    python benchmarks/backbones.py --papers DATA          write what the papers' backbones take

Every family that transformers maps to a base model is built from its own config class, with its
sizes made small, and its weights are drawn anew, large enough that attention is sharp and norms are
not one. Rows of 3, 11, 1, 19 and 28 tokens run packed, and alone through the model's own eager
attention.

*exact*: the largest difference, relative to the spread of the states, is below 1e-3. *refused*:
`Backbone` raised an error of one line; of a family that is not made small, its full size without
weights, so for what is seen at first sight. *wrong*: neither. *not tried*: the family could not be
built with small sizes. The probe that every load makes is not trusted here.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import re
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

from l2rec.config import load_recipe
from l2rec.console import Console
from l2rec.errors import BackboneError
from l2rec.modules.backbone import Backbone
from l2rec.modules.packing import Attend, Packing, pack
from l2rec.studies.doctor.study import doctor

DOCUMENT = Path(__file__).parent.parent / "docs" / "backbones.md"
PAPERS = ("Qwen3-0.6B", "Llama-2-7B", "Baichuan2-7B", "Qwen3-8B", "R1-Distill-Llama-8B")
CARD = 80.0
"""GB of the card that the papers' backbones should fit."""
LENGTHS = (3, 11, 1, 19, 28)
LIMIT = 1e-3
MOST_PARAMETERS, SECONDS = 120_000_000, 60
HEADS = 4
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "model_dim"), 32),
    **dict.fromkeys(("emb_dim", "out_hidden_size", "text_hidden_size", "projection_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads"), HEADS),
    **dict.fromkeys(("attention_heads", "encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "n_inner", "d_ff", "ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("ffn_hidden_size", "expert_ffn_hidden_size"), 24),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 32),
    **dict.fromkeys(("pad_token_id", "bos_token_id"), 0),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "lru_width"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("n_group", "num_expert_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("vocab_size", "n_words", "vocab_size_per_layer_input"), 64),
    "num_key_value_heads": 2,
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token"), 2),
    "index_n_heads": 2,
    "head_dim": 8,
    "kv_channels": 8,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
    "eos_token_id": 1,
    "sliding_window": 8,
}
SEES = {"image_size": 28, "patch_size": 14, "spatial_merge_size": 1, "num_channels": 3}
"""Sizes of what sees or hears, besides."""

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
    **{key: {"mamba_n_heads": 4, "mamba_d_head": 16} for key in ("bamba", "granitemoehybrid")},
    "mamba2": {"head_dim": 16, "n_groups": 1},
    "zaya": {"num_experts_per_tok": 1},
    "dots1": {"n_shared_experts": 1},
    "dbrx": {
        **{"n_heads": 4, "n_layers": 2, "max_seq_len": 32},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    },
    **{key: {"vocabulary_map": {"<image>": 5}} for key in ("chameleon", "emu3")},
    "longcat_flash": {"head_dim": 8},
    "unlimited_ocr_text": {"num_key_value_heads": HEADS},
    "deepseek_ocr2_text": {"num_key_value_heads": HEADS, "mlp_layer_types": ["dense", "sparse"]},
    "qwen4_exp_text": {
        **{"indexer_budget": 8, "indexer_compress_ratio": 4, "indexer_n_heads": 2},
        **{"indexer_kv_heads": 1, "indexer_head_dim": 8},
    },
    **{
        key: {"prediction_length": 4}
        for key in ("autoformer", "informer", "time_series_transformer")
    },
    "deepseek_v4": {"head_dim": 16},
    "glm5_next_text": {"qk_rope_head_dim": 0},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "hybrid_layer_ids": [1]},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
}
"""What checkpoints of a family have, and its default config does not."""


MROPE = {
    **{f"{kind}_text": [2, 1, 1] for kind in ("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni")},
    **{f"{kind}_text": [2, 1, 1] for kind in ("glm4v", "glm_image", "glm_ocr", "paddleocr_vl")},
    "glm4v_moe_text": [1, 1, 0],
    "hunyuan_vl_text": [1, 1, 1, 1],
}
"""Sections of rotary positions that small heads have, where the default is in the model's code."""


@dataclass(frozen=True)
class Row:
    """What became of a family: its name, the outcome, and a figure or a line."""

    family: str
    outcome: str
    said: str


WAYS = [(parts_small, shared) for parts_small in (True, False) for shared in (True, False)]
"""Ways to make a family small, of which the first that it allows is taken: parts that see or hear
small, or of their own sizes with few layers; fewer heads for keys and values, or as many."""


def small_config(family: str, parts_small: bool, shared: bool) -> Any:
    """Build the config of a family with small sizes, its parts too, in one of `WAYS`."""
    kind = CONFIG_MAPPING[family]
    return kind(**_small(kind().to_dict(), parts_small, shared))


def _small(names: dict[str, Any], parts_small: bool, shared: bool) -> dict[str, Any]:
    """Make sizes small, with a layer of each kind that there is, and two layers at least."""
    sizes = _fitting(SMALL, names)
    if not shared or "kv_lora_rank" in names:
        sizes |= {"num_key_value_heads": HEADS} if "num_key_value_heads" in names else {}
    if isinstance(names.get("layer_types"), list):
        kinds = list(dict.fromkeys(names["layer_types"]))
        sizes["layer_types"] = kinds * (2 if len(kinds) == 1 else 1)
        sizes["num_hidden_layers"] = len(sizes["layer_types"])
    if "qk_rope_head_dim" in names:  # the size of a head follows from it
        sizes.pop("head_dim", None)
    if isinstance(names.get("rope_parameters"), dict):
        sections = MROPE.get(names["model_type"])
        more = {} if sections is None else {"mrope_section": sections}
        sizes["rope_parameters"] = _rope(names["rope_parameters"], 8) | more
    for key, part in names.items():
        if isinstance(part, dict) and "model_type" in part:
            reads = any(word in key for word in ("text", "llm", "language", "decoder"))
            small = _small(part, parts_small, shared)
            if not reads and not parts_small:
                small = {k: v for k, v in small.items() if "layers" in k or k == "depth"}
            elif not reads:
                small |= _fitting(SEES, part)
            sizes[key] = {"model_type": part["model_type"], **small}
    return sizes | PUBLISHED.get(names["model_type"], {})


def _fitting(sizes: dict[str, Any], names: dict[str, Any]) -> dict[str, Any]:
    """Choose the sizes that a config has, as one number: lists, one a stage, stay as they are."""
    return {
        key: value
        for key, value in sizes.items()
        if key in names and (names[key] is None or isinstance(names[key], type(value)))
    }


def _rope(given: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """Fit the sections of rotary positions of time, height and width to small heads."""
    if any(isinstance(value, dict) for value in given.values()):  # of each kind of layer
        return {k: _rope(v, head_dim) if isinstance(v, dict) else v for k, v in given.items()}
    if "mrope_section" not in given:
        return given
    half = int(head_dim * given.get("partial_rotary_factor", 1.0)) // 2
    return given | {"mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}


def small_models(family: str) -> list[nn.Module]:
    """Build the family twice, with the same weights.

    Raises:
        Exception: none of the ways makes a small model; the error of the first is raised.
    """
    errors: list[Exception] = []
    for way in WAYS:
        try:
            config = small_config(family, *way)
            with torch.device("meta"):
                size = sum(p.numel() for p in AutoModel.from_config(config).parameters())
            if size > MOST_PARAMETERS:
                raise ValueError(f"{size / 1e6:,.0f}M parameters with small sizes")
            models = []
            for _ in range(2):
                torch.manual_seed(0)
                # Falcon's eager attention counts ALiBi twice, in the mask as well.
                own = "sdpa" if family == "falcon" else "eager"
                model = AutoModel.from_config(small_config(family, *way), attn_implementation=own)
                models.append(redrawn(model.float().eval()))
            return models
        except Exception as error:  # each family has its own way not to be built
            errors.append(error)
    raise errors[0]


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
            packed, alone = small_models(family)
    except Exception as error:
        return _without_weights(family) or Row(family, "not tried", _line(error))
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


def _without_weights(family: str) -> Row | None:
    """Say what `Backbone` refuses at first sight, of a model in its full size without weights."""
    try:
        with at_most(SECONDS), torch.device("meta"):
            model = AutoModel.from_config(CONFIG_MAPPING[family]())
            Backbone(model, None, name=family, source=family, revision=None)
    except BackboneError as error:
        return Row(family, "refused", _line(error).removeprefix(f"backbone '{family}' "))
    except Exception:
        pass
    return None


def _text_part(alone: nn.Module, backbone: Backbone) -> nn.Module:
    """Find the part of the model that the backbone runs."""
    kind = type(backbone.model)
    return next(module for module in alone.modules() if type(module) is kind)


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 240 else f"{text[:237]}..."


def table(rows: list[Row]) -> str:
    """Write the sweep in Markdown, the families by outcome."""
    counts = Counter(row.outcome for row in rows)
    lines = [
        f"transformers {transformers.__version__}, torch {torch.__version__}, float32, CPU, "
        f"{datetime.date.today().isoformat()}: "
        + ", ".join(f"{counts[name]} {name}" for name in ("exact", "refused", "wrong", "not tried"))
        + ".",
    ]
    exact = [row for row in rows if row.outcome == "exact"]
    lines += ["", "| exact | largest difference |", "|---|---|"]
    lines += [f"| {row.family} | {row.said} |" for row in exact]
    for outcome in ("refused", "wrong", "not tried"):
        by_reason: dict[str, list[str]] = {}
        for row in rows:
            if row.outcome == outcome:
                by_reason.setdefault(_reason(row), []).append(row.family)
        if by_reason:
            lines += ["", f"| {outcome}: why | families |", "|---|---|"]
            for why, names in sorted(by_reason.items(), key=lambda item: -len(item[1])):
                lines.append(f"| {why} | {', '.join(names)} |")
    return "\n".join(lines)


def _reason(row: Row) -> str:
    """Return the line without name and advice, so that like ones stand together."""
    said = row.said.replace("|", "/")
    if row.outcome != "not tried":
        said = re.sub(r"^\(\S+\) ", "", said)
        said = re.sub(r"; choose .*|; c?h?o?o?\.\.\.$", "", said)
        return "no language model: " + said if "word embeddings" in said else said
    library = re.search(r"requires the (\S+) library", said)
    if library:
        return f"needs {library[1]}, which is not installed here"
    if "M parameters" in said:
        return f"more than {MOST_PARAMETERS / 1e6:.0f}M parameters with small sizes"
    return "its code takes none of the small configs"


def papers(data: Path) -> str:
    """Write what `l2rec` trains and takes on the papers' backbones in Markdown, from shapes."""
    lines = [
        f"`l2rec`, a card of {CARD:g} GB, sizes in GB, {datetime.date.today().isoformat()}. Of the "
        "largest step that the recipe's batches make.",
        "",
        "| backbone | trained | weights | frozen | trained + Adam | checkpointing | activations "
        "| total | fits | largest `batch_tokens` |",
        "|---|---:|---|---:|---:|---|---:|---:|---|---:|",
    ]
    for name in PAPERS:
        for checkpointing in ("false", "true"):
            report = doctor(
                load_recipe("l2rec", [f"training.checkpointing={checkpointing}"]),
                data,
                backbones=[name],
                gpu_memory=CARD,
                measure=False,
                progress=Console(),
            )
            shapes = report["backbones"][0]["shapes"]
            trained = f"{shapes['trained_parameters'] / 1e6:.1f}M"
            for row in shapes["memory"]:
                frozen, adam, activations, total = (
                    f"{row[size] / 1e9:.2f}"
                    for size in ("frozen", "trained_with_moments", "activations", "total")
                )
                again = "yes" if checkpointing == "true" else "no"
                fits = "yes" if row["fits"] else "no"
                most = "any" if row["unlimited"] else f"{row['largest_batch_tokens'] or 0:,}"
                cells = (name, trained, row["weights"], frozen, adam, again, activations, total)
                lines.append(f"| {' | '.join((*cells, fits, most))} |")
    return "\n".join(lines)


def write(part: str, text: str) -> None:
    """Replace a part of the document, which stands between two comments of its name."""
    document = DOCUMENT.read_text(encoding="utf-8")
    before, begin, rest = document.partition(f"<!-- {part} -->")
    _, end, after = rest.partition(f"<!-- /{part} -->")
    DOCUMENT.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def main() -> None:
    """Try the families that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*")
    parser.add_argument("--write", action="store_true", help="write docs/backbones.md")
    parser.add_argument("--papers", type=Path, help="data set folder, for the other table there")
    args = parser.parse_args()
    if args.papers:
        write("papers", papers(args.papers))
        return
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    rows = []
    for family in args.families or sorted(MODEL_MAPPING_NAMES):
        rows.append(tried(family))
        print(f"{family:30} {rows[-1].outcome:10} {rows[-1].said}", flush=True)
    if args.write:
        write("sweep", table(rows))
    sys.exit(any(row.outcome == "wrong" for row in rows))


if __name__ == "__main__":
    main()
