"""Time and memory of one training step, against PEFT LoRA in the same process.

    python benchmarks/step.py                                 everything, some minutes
    python benchmarks/step.py --quick                         a first impression
    python benchmarks/step.py --backbone minilm --matrices q,v --dtypes bfloat16
    python benchmarks/step.py --device cuda --backbone qwen3 --layers 28 --rows 50 --tokens 1024

One step is forward and backward of texts of one length, without padding, through the frozen
backbone with trained adapters; no optimiser. Everybody gets the same token ids, the same adapted
matrices, the same rank and the same loss. Token ids follow a Zipf law over the vocabulary, which
is all that an embedding lookup can tell from real text.

    bare            the frozen backbone, forward only, no gradient: a scale, not a rival
    peft ...        Hugging Face model + PEFT LoRA, with eager and with SDPA attention; in bfloat16
                    also with adapters kept in bfloat16 (PEFT's default keeps them in float32, as
                    l2rec does). The fastest of them is the peer, and has ratio 1
    l2rec           DPMoE of one view: shared and routed experts, packed rows
    l2rec, 2 views  semantic rows and behavioural rows, half of the rows each, in one pass
    loop of N       the same number of LoRA adapters called one after the other, mixed by a router
    X-LoRA of N     the same number of LoRA adapters in PEFT's own mixture, trained, dense

Backbones: minilm is all-MiniLM-L6-v2; qwen3 has the shapes of Qwen3-0.6B, a small vocabulary,
random weights and few layers: what is reported are ratios between steps of like depth.

Method. After one step that counts GFLOP and warms up, every round runs each contender once, in
turn, so that a machine that gets slower or busier hits all of them. Seconds are wall time of a
step: median (min - max). CPU is the processor time of all threads, which neighbours disturb less.
The ratio is the median over rounds of the contender's time by the peer's time in the same round.
Memory is measured with the first of the matrices, in a process of its own per contender (not of
slower PEFTs): peak resident set over two steps, less the resident set with everything loaded; on
CUDA allocated memory, in this process. The share is GFLOP/s of the median step by the speed of a
large square matrix product in the same dtype, with the same threads; GFLOP are counted by torch
(matrix products, forward and backward, as each contender really computes them; fused attention of a
CPU it does not see, 8% of a step of MiniLM).
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from measure import (
    arguments,
    from_child,
    interleave,
    matmul_peak,
    median,
    needs,
    peak_mb,
    ratio,
    report,
    shown,
    synchronize,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from l2rec.config import BackboneConfig
from l2rec.modules.adapters import find_linears
from l2rec.modules.backbone import Backbone, fast_bfloat16, load_backbone
from l2rec.modules.experts import DPMoE, ViewSlice
from l2rec.modules.packing import Attend, Packing, pack
from l2rec.modules.views import BehavioralProjector, mean_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BARE, PEER, OURS, TWO_VIEWS, LOOP, XLORA = (
    "bare",
    "peft",
    "l2rec",
    "l2rec, 2 views",
    "loop",
    "X-LoRA",
)
BALANCE = 0.01  # weight of the load-balancing term in l2rec's loss, as in training


@dataclass(frozen=True)
class Workload:
    rows: int = 32
    tokens: int = 128
    matrices: tuple[str, ...] = ("q", "v")
    rank: int = 8
    experts: int = 8
    top: int = 2

    def ids(self, vocabulary: int) -> Tensor:
        """Sample token ids [rows, tokens] int64 by a Zipf law."""
        rng = np.random.default_rng(0)
        weight = 1.0 / np.arange(1, vocabulary + 1)
        ids = rng.choice(vocabulary, (self.rows, self.tokens), p=weight / weight.sum())
        return torch.from_numpy(rng.permutation(vocabulary)[ids])


@dataclass(frozen=True)
class Contender:
    """forward() gives the scalar loss; ``trained`` gets gradients (none: forward only)."""

    name: str
    forward: Callable[[], Tensor]
    trained: list[nn.Parameter]
    device: str = "cpu"

    def step(self) -> None:
        for parameter in self.trained:
            parameter.grad = None
        if self.trained:
            self.forward().backward()
        else:
            with torch.no_grad():
                self.forward()
        synchronize(self.device)


Load = Callable[[], Backbone]


def qwen3_shapes(layers: int, dtype: torch.dtype, device: str) -> Backbone:
    """Build a model with the shapes of Qwen3-0.6B, fewer layers and words, random weights."""
    from transformers import AutoModel, Qwen3Config

    config = Qwen3Config(
        vocab_size=4096,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
    )
    torch.manual_seed(0)
    model = AutoModel.from_config(config).to(device, dtype)
    return Backbone(model, None, name="qwen3", source="random", revision=None)


def loader(name: str, dtype: str, device: str = "cpu", layers: int = 2) -> Load:
    """Return a function that loads a new backbone in each call."""
    if name == "qwen3":
        return lambda: qwen3_shapes(layers, DTYPES[dtype], device)
    config = BackboneConfig.model_validate({"name": name, "dtype": dtype})
    return lambda: load_backbone(config, device)


def score(states: Tensor) -> Tensor:
    """Compute the loss of every contender: all final states count, each with another weight."""
    weight = torch.linspace(-1, 1, states.shape[-1], dtype=states.dtype, device=states.device)
    loss: Tensor = (states @ weight).float().square().mean()
    return loss


# -- contenders ----------------------------------------------------------------------------------


def plain(load: Load, work: Workload, attention: str) -> tuple[nn.Module, Tensor]:
    """Return the Hugging Face model as it is used without l2rec, and its token ids."""
    backbone = load()
    model = backbone.model
    model.set_attn_implementation(attention)  # type: ignore[operator]
    model.config.use_cache = False  # type: ignore[union-attr]  # nobody generates
    ids = work.ids(backbone.word_embeddings.num_embeddings)
    return model, ids.to(backbone.device)


def contender(name: str, model: nn.Module, ids: Tensor, trained: list[nn.Parameter]) -> Contender:
    def forward() -> Tensor:
        return score(model(input_ids=ids).last_hidden_state)

    return Contender(name, forward, trained, ids.device.type)


def fastest_attention(dtype: torch.dtype, device: str) -> str:
    """Choose the faster attention of an ordinary model at this row length; `peft` runs both."""
    return "eager" if device == "cpu" and dtype is torch.bfloat16 else "sdpa"


def bare(load: Load, work: Workload) -> Contender:
    model, ids = plain(load, work, "sdpa")
    return contender(BARE, model, ids, [])


def peft_lora(name: str, load: Load, work: Workload, attention: str, float32: bool) -> Contender:
    model, ids = plain(load, work, attention)
    model = with_lora(model, work, float32)
    return contender(name, model, ids, [p for p in model.parameters() if p.requires_grad])


def with_lora(model: nn.Module, work: Workload, float32: bool) -> Any:
    """Add one PEFT adapter, in float32 or in the dtype of the frozen weights."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=work.rank,
        lora_alpha=2 * work.rank,
        target_modules=list(find_linears(model, work.matrices)),
    )
    with warnings.catch_warnings():  # transformers' own deprecation, which PEFT runs into
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, config, autocast_adapter_dtype=float32)


class Inside(nn.Module):
    """A wrapper for X-LoRA, which needs a model whose transformer is called ``model``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)


def xlora(load: Load, work: Workload, dtype: torch.dtype, device: str) -> Contender:
    """Build PEFT's mixture; it reads adapters from files, so one is written and read N times."""
    from peft import XLoraConfig, get_peft_model

    adapters = 1 + work.experts
    model, ids = plain(load, work, fastest_attention(dtype, device))
    dim = model.config.hidden_size  # type: ignore[union-attr]
    with tempfile.TemporaryDirectory() as folder:
        one = with_lora(Inside(model), work, float32=False)
        one.save_pretrained(folder)
        config = XLoraConfig(
            hidden_size=dim,
            adapters={str(i): folder for i in range(adapters)},
            use_trainable_adapters=True,
        )
        mixed = get_peft_model(one.unload(), config, autocast_adapter_dtype=False)
    # What is read from files is float32; like its rivals it may have the frozen weights' dtype.
    mixed.to(dtype)
    trained = [p for p in mixed.parameters() if p.requires_grad]
    return contender(f"{XLORA} of {adapters}", mixed, ids, trained)


class LoopOfLoras(nn.Module):
    """A mixture without stacking: one LoRA after the other, mixed by a softmax router."""

    def __init__(self, base: nn.Linear, adapters: int, rank: int) -> None:
        super().__init__()
        self.base = base
        self.a = nn.ModuleList(nn.Linear(base.in_features, rank, False) for _ in range(adapters))
        self.b = nn.ModuleList(nn.Linear(rank, base.out_features, False) for _ in range(adapters))
        self.router = nn.Linear(base.in_features, adapters)
        for b in self.b:
            nn.init.zeros_(b.weight)  # type: ignore[arg-type]  # as LoRA starts
        self.to(base.weight.device, base.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x)
        gates = self.router(x).softmax(-1)
        for i, (a, b) in enumerate(zip(self.a, self.b, strict=True)):
            out = out + 2.0 * gates[..., i : i + 1] * b(a(x))
        return out


def loop(load: Load, work: Workload, dtype: torch.dtype, device: str) -> Contender:
    model, ids = plain(load, work, fastest_attention(dtype, device))
    trained = []
    for name, linear in find_linears(model, work.matrices).items():
        adapted = LoopOfLoras(linear, 1 + work.experts, work.rank)
        model.set_submodule(name, adapted)
        trained += [p for n, p in adapted.named_parameters() if not n.startswith("base.")]
    return contender(f"{LOOP} of {1 + work.experts}", model, ids, trained)


def dpmoe(name: str, load: Load, work: Workload, views: int) -> Contender:
    backbone = load()
    device = backbone.device
    ids = work.ids(backbone.word_embeddings.num_embeddings).to(device)
    experts = DPMoE(
        find_linears(backbone.model, work.matrices),
        backbone.dim,
        views=views,
        view_experts=work.experts,
        rank=work.rank,
        top=min(work.top, work.experts),
    ).to(device)
    experts.attach()
    projector = BehavioralProjector(backbone.dim, backbone.word_dim).to(device)
    per_view = ids.chunk(views)
    attend = Attend.CAUSAL if backbone.causal else Attend.FULL

    def forward() -> Tensor:
        inputs, slices, groups, positions, start = [], [], [], [], 0
        for view, part in enumerate(per_view):
            x = backbone.embed(part.flatten())
            if view == 1:
                x = projector(x.float())  # the behavioural view's input is trained
            rows, width = part.shape
            row = torch.arange(rows, device=device).repeat_interleave(width)
            lengths = torch.full((rows,), width, device=device)
            group, position = pack(lengths, attend, start=start)
            u = mean_of(x, row, rows)
            slices.append(ViewSlice(view, start, group.stop, u, row))
            inputs.append(x.to(backbone.dtype))
            groups.append(group)
            positions.append(position)
            start = group.stop
        packing = Packing(tuple(groups), torch.cat(positions))
        with experts.routed(slices) as routing:
            states = backbone(torch.cat(inputs), packing)
        balance = torch.cat(list(routing.balance.values())).mean()
        return score(states) + BALANCE * balance

    trained = list(experts.parameters()) + list(projector.parameters()) * (views - 1)
    return Contender(name, forward, trained, device.type)


def contenders(
    work: Workload, dtype: torch.dtype, device: str = "cpu"
) -> dict[str, Callable[[Load], Contender]]:
    """Return a function for each contender, by name, that builds it on a new backbone."""
    build: dict[str, Callable[[Load], Contender]] = {BARE: partial(bare, work=work)}
    for attention in ("eager", "sdpa"):
        name = f"{PEER}, {attention}"
        build[name] = partial(peft_lora, name, work=work, attention=attention, float32=True)
        if dtype is torch.bfloat16:
            name += ", bf16 adapters"
            build[name] = partial(peft_lora, name, work=work, attention=attention, float32=False)
    for views, name in ((1, OURS), (2, TWO_VIEWS)):
        build[name] = partial(dpmoe, name, work=work, views=views)
    build[f"{LOOP} of {1 + work.experts}"] = partial(loop, work=work, dtype=dtype, device=device)
    build[f"{XLORA} of {1 + work.experts}"] = partial(xlora, work=work, dtype=dtype, device=device)
    return build


# -- measurements --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Settings that all contenders of one table share."""

    backbone: str
    dtype: str
    work: Workload

    @property
    def title(self) -> str:
        return f"{self.backbone}, {','.join(self.work.matrices)}, {self.dtype}"


@dataclass(frozen=True)
class Result:
    """Measurements of one contender: seconds [rounds], wall and CPU; GFLOP of a step; MB.

    failed: why it could not run; then there are no rounds.
    """

    name: str
    wall: list[float]
    cpu: list[float]
    gflop: float = 0.0
    trained: int = 0
    memory_mb: float | None = None
    failed: str = ""

    @property
    def seconds(self) -> float:
        return median(self.wall)


def count_gflop(contender: Contender) -> float:
    with FlopCounterMode(display=False) as counter:
        contender.step()
    return float(counter.get_total_flops()) / 1e9


def two_steps(contender: Contender) -> None:
    for _ in range(2):
        contender.step()


def measure(
    case: Case,
    load: Load,
    *,
    steps: int,
    memory: Callable[[Contender], float | None] = lambda contender: None,
    device: str = "cpu",
    only: str = "",
) -> list[Result]:
    """Measure all contenders of one case.

    ``memory`` measures the MB of one contender; it is called for the fastest PEFT and for those
    that are compared to it.
    """
    rivals: list[Contender] = []
    gflops: list[float] = []
    failed: list[Result] = []
    for name, build in contenders(case.work, DTYPES[case.dtype], device).items():
        if only not in name and not name.startswith(PEER):
            continue
        try:
            rival = build(load)
            gflops.append(count_gflop(rival))  # a first step, which warms up
        except Exception as error:
            if not name.startswith(XLORA):  # others' mixtures may not run in every version
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            failed.append(Result(name, [], [], failed=reason))
        else:
            rivals.append(rival)
    wall, cpu = interleave([rival.step for rival in rivals], steps, warmup=0)
    timed = [
        Result(rival.name, wall[i], cpu[i], gflops[i], sum(p.numel() for p in rival.trained))
        for i, rival in enumerate(rivals)
    ]
    peer = peer_of(timed)
    weighed = [
        result if slower_peft(result, peer) else replace(result, memory_mb=memory(rival))
        for result, rival in zip(timed, rivals, strict=True)
    ]
    return weighed + failed


def peer_of(results: Sequence[Result]) -> Result:
    """Find the fastest PEFT contender."""
    return min((r for r in results if r.name.startswith(PEER)), key=lambda r: r.seconds)


def slower_peft(result: Result, peer: Result) -> bool:
    return result.name.startswith(PEER) and result is not peer


# -- the report ----------------------------------------------------------------------------------

COLUMNS = [
    ("case", "backbone, matrices, dtype"),
    ("contender", "contender"),
    ("seconds", "step, s"),
    ("spread", "min - max"),
    ("ratio", "by peer"),
    ("cpu_ratio", "CPU by peer"),
    ("tokens_per_second", "tokens/s"),
    ("memory_mb", "memory, MB"),
    ("share_of_peak", "of matmul peak"),
    ("trained", "trained"),
]


def rows(case: Case, results: Sequence[Result], peak: float) -> Iterator[dict[str, Any]]:
    """Build the table row of each contender of one case; the peer is marked."""
    peer = peer_of(results)
    for r in results:
        if r.failed:
            yield {"case": case.title, "contender": f"{r.name}: {r.failed}"}
            continue
        yield {
            "case": case.title,
            "contender": r.name + (" *" if r is peer else ""),
            "seconds": r.seconds,
            "spread": f"{shown(min(r.wall))} - {shown(max(r.wall))}",
            "ratio": ratio(r.wall, peer.wall),
            "cpu_ratio": ratio(r.cpu, peer.cpu),
            "tokens_per_second": case.work.rows * case.work.tokens / r.seconds,
            "memory_mb": r.memory_mb,
            "share_of_peak": f"{r.gflop / r.seconds / peak:.0%}",
            "trained": r.trained,
            "wall": r.wall,
        }


def summary(case: Case, results: Sequence[Result]) -> Iterator[dict[str, Any]]:
    """List the goals of one case whose contenders ran."""
    ran = {r.name: r for r in results if not r.failed}
    peer, ours, two = peer_of(results), ran.get(OURS), ran.get(TWO_VIEWS)
    if ours is None:
        return

    def goal(path: str, wanted: str, measured: float, reached: bool) -> dict[str, Any]:
        matrices = ",".join(case.work.matrices)
        return {
            "path": f"{path} ({case.backbone}, {matrices})",
            "goal": wanted,
            "measured": f"{case.dtype} {measured:.2f}",
            "reached": reached,
        }

    share = ratio(ours.wall, peer.wall)
    yield goal("step: l2rec / fastest PEFT LoRA", "at most 1.10", share, share <= 1.10)
    if two is not None:
        share = ratio(two.wall, ours.wall)
        yield goal("step: 2 views / 1 view, as many rows", "at most 1.15", share, share <= 1.15)
    if ours.memory_mb is not None and peer.memory_mb:
        share = ours.memory_mb / peer.memory_mb
        yield goal("step memory: l2rec / that PEFT LoRA", "at most 1.10", share, share <= 1.10)
    for name, rival in ran.items():
        gain = ratio(rival.wall, ours.wall)
        if name.startswith(LOOP):
            yield goal(f"step: {name} LoRAs / l2rec", "at least 2.3", gain, gain >= 2.3)
        elif name.startswith(XLORA):
            yield goal(f"step: PEFT {name} / l2rec", "above 1", gain, gain > 1)


def join_dtypes(goals: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join goals of one path into one line, reached if every dtype reached it."""
    joined: dict[str, dict[str, Any]] = {}
    for goal in goals:
        known = joined.setdefault(goal["path"], goal)
        if known is not goal:
            known["measured"] += f", {goal['measured']}"
            known["reached"] &= goal["reached"]
    return list(joined.values())


def parser() -> argparse.ArgumentParser:
    p = arguments(__file__, __doc__)
    p.add_argument("--steps", type=int, default=3, help="timed rounds (default %(default)s)")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument(
        "--backbone",
        nargs="+",
        default=["minilm", "qwen3"],
        help="minilm, qwen3, a hub id or a folder (default: minilm qwen3)",
    )
    p.add_argument("--layers", type=int, default=2, help="of qwen3 (default %(default)s)")
    p.add_argument(
        "--matrices",
        nargs="+",
        default=["q,v", "q,k,v,o"],
        help="adapted matrices: any of q,k,v,o,gate,up,down (default: q,v q,k,v,o)",
    )
    p.add_argument(
        "--dtypes",
        nargs="+",
        choices=list(DTYPES),
        default=list(DTYPES) if fast_bfloat16() else ["float32"],
        help="of the frozen weights (default: what is native here)",
    )
    p.add_argument("--rows", type=int, default=0, help="texts (default: 32; 8 of qwen3)")
    p.add_argument("--tokens", type=int, default=128, help="of a text (default %(default)s)")
    p.add_argument("--rank", type=int, default=8, help="of every LoRA (default %(default)s)")
    p.add_argument("--experts", type=int, default=8, help="routed experts (default %(default)s)")
    p.add_argument("--only", default="", metavar="TEXT", help="contenders so named, and the peer")
    p.add_argument("--memory-of", help=argparse.SUPPRESS)  # what a child process is asked
    return p


def cases(args: argparse.Namespace) -> Iterator[Case]:
    work = Workload(tokens=args.tokens, rank=args.rank, experts=args.experts)
    for backbone in args.backbone:
        rows = args.rows or (8 if backbone == "qwen3" else 32)
        for matrices in args.matrices:
            for dtype in args.dtypes:
                yield Case(
                    backbone, dtype, replace(work, rows=rows, matrices=tuple(matrices.split(",")))
                )


def main(argv: Sequence[str] | None = None) -> None:
    p = parser()
    args = p.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error(
            "--device cuda: this PyTorch sees no CUDA device; install its CUDA build, or omit it"
        )
    needs(p, "bench", "peft")
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.quick:
        args.steps = 1
    device = args.device
    if args.memory_of:
        (case,) = cases(args)
        load = loader(case.backbone, case.dtype, device, args.layers)
        build = contenders(case.work, DTYPES[case.dtype])[args.memory_of]
        print(peak_mb(partial(two_steps, build(load))))
        return
    peaks = {dtype: matmul_peak(DTYPES[dtype], device=device) for dtype in args.dtypes}
    table: list[dict[str, Any]] = []
    goals: list[dict[str, Any]] = []
    for case in cases(args):

        def memory(rival: Contender, case: Case = case) -> float | None:
            first = ",".join(case.work.matrices) == args.matrices[0]
            if args.quick or not first or rival.name == BARE:
                return None
            if device == "cuda":
                return peak_mb(partial(two_steps, rival), device)
            return memory_in_child(rival.name, case, args)

        results = measure(
            case,
            loader(case.backbone, case.dtype, device, args.layers),
            steps=args.steps,
            memory=memory,
            device=device,
            only=args.only,
        )
        table += rows(case, results, peaks[case.dtype])
        goals += summary(case, results)
    described = ", ".join(f"{dtype} {peak:,.0f}" for dtype, peak in peaks.items())
    report(
        "step" if device == "cpu" else f"step-{device}",
        args.json,
        goal="nine experts for the price of one LoRA: a step of DPMoE by PEFT LoRA's",
        columns=COLUMNS,
        rows=table,
        notes=[
            "The peer (*) is the fastest PEFT LoRA: ratio 1. Ratios are medians over interleaved "
            "rounds; seconds are this machine's, on this day.",
            f"Matmul peak in GFLOP/s: {described}. {args.steps} rounds; "
            f"{args.tokens} tokens a row; rank {args.rank}; {args.experts} routed experts and a "
            f"shared one; qwen3 has {args.layers} layers.",
        ],
        summary=join_dtypes(goals),
    )


def memory_in_child(name: str, case: Case, args: argparse.Namespace) -> float | None:
    """Measure one contender's peak MB in a fresh process; None if it cannot be measured."""
    work = case.work
    options = {
        "backbone": case.backbone,
        "matrices": ",".join(work.matrices),
        "dtypes": case.dtype,
        "rows": work.rows,
        "tokens": work.tokens,
        "rank": work.rank,
        "experts": work.experts,
        "layers": args.layers,
        "threads": args.threads,
        "memory-of": name,
    }
    return from_child(__file__, *(f"--{key}={value}" for key, value in options.items()))


if __name__ == "__main__":
    main()
