"""How long one training step takes, against PEFT LoRA in the same process.

    python benchmarks/step.py                      the whole table, some minutes
    python benchmarks/step.py --quick              a first impression
    python benchmarks/step.py --matrices q,k,v,o   four adapted matrices instead of two
    python benchmarks/step.py --json step.json     also as JSON

One step is forward and backward of 32 texts of 128 tokens, without padding, through the frozen
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

Method. After warm-up, every round runs each contender once, in turn, so that a machine that gets
slower or busier hits all of them. Seconds are wall time of a step: median (min - max). CPU is the
processor time of all threads, which neighbours disturb less. The ratio is the median over rounds
of the contender's time by the peer's time in the same round. Memory is measured in a process of
its own per contender: peak resident set over its steps, less the resident set with everything
loaded. GFLOP are counted by torch (matrix products, forward and backward, as each contender really
computes them; fused attention of a CPU it does not see, 8% of a step of MiniLM); the share is
GFLOP/s of the median step by the speed of a large square matrix product in the same dtype, with the
same threads.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import l2rec
from l2rec.backbone import Attend, Backbone, Packing, load_backbone, native_bfloat16, pack
from l2rec.config import BackboneConfig
from l2rec.experts import DPMoE, ViewSlice, find_linears
from l2rec.views import BehavioralProjector, mean_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PEER, BARE = "peft", "bare"
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
        """[rows, tokens] int64 token ids, the frequent ones often."""
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

    def step(self) -> None:
        for parameter in self.trained:
            parameter.grad = None
        if not self.trained:
            with torch.no_grad():
                self.forward()
            return
        self.forward().backward()


Load = Callable[[], Backbone]


def score(states: Tensor) -> Tensor:
    """The loss of every contender: all final states count, none alike."""
    weight = torch.linspace(-1, 1, states.shape[-1], dtype=states.dtype)
    loss: Tensor = (states @ weight).float().square().mean()
    return loss


# -- contenders ----------------------------------------------------------------------------------


def plain(load: Load, work: Workload, attention: str) -> tuple[nn.Module, Tensor]:
    """The Hugging Face model as it is used without l2rec, and its token ids."""
    backbone = load()
    model = backbone.model
    model.set_attn_implementation(attention)  # type: ignore[operator]
    return model, work.ids(backbone.word_embeddings.num_embeddings)


def bare(load: Load, work: Workload) -> Contender:
    model, ids = plain(load, work, "sdpa")
    return Contender(BARE, lambda: score(model(input_ids=ids).last_hidden_state), [])


def peft_lora(name: str, load: Load, work: Workload, attention: str, float32: bool) -> Contender:
    from peft import LoraConfig, get_peft_model

    model, ids = plain(load, work, attention)
    config = LoraConfig(
        r=work.rank,
        lora_alpha=2 * work.rank,
        target_modules=list(find_linears(model, work.matrices)),
    )
    model = get_peft_model(model, config, autocast_adapter_dtype=float32)
    trained = [p for p in model.parameters() if p.requires_grad]
    return Contender(name, lambda: score(model(input_ids=ids).last_hidden_state), trained)


class LoopOfLoras(nn.Module):
    """What stacking avoids: one LoRA after the other, mixed by a softmax router."""

    def __init__(self, base: nn.Linear, adapters: int, rank: int) -> None:
        super().__init__()
        self.base, dtype = base, base.weight.dtype
        self.a = nn.ModuleList(nn.Linear(base.in_features, rank, False) for _ in range(adapters))
        self.b = nn.ModuleList(nn.Linear(rank, base.out_features, False) for _ in range(adapters))
        self.router = nn.Linear(base.in_features, adapters)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x)
        gates = self.router(x).softmax(-1)
        for i, (a, b) in enumerate(zip(self.a, self.b, strict=True)):
            out = out + 2.0 * gates[..., i : i + 1] * b(a(x))
        return out


def loop(load: Load, work: Workload) -> Contender:
    model, ids = plain(load, work, "eager")
    trained = []
    for name, linear in find_linears(model, work.matrices).items():
        adapted = LoopOfLoras(linear, 1 + work.experts, work.rank)
        model.set_submodule(name, adapted)
        trained += [p for n, p in adapted.named_parameters() if not n.startswith("base.")]
    return Contender(
        f"loop of {1 + work.experts}",
        lambda: score(model(input_ids=ids).last_hidden_state),
        trained,
    )


def dpmoe(name: str, load: Load, work: Workload, views: int) -> Contender:
    backbone = load()
    ids = work.ids(backbone.word_embeddings.num_embeddings)
    experts = DPMoE(
        find_linears(backbone.model, work.matrices),
        backbone.dim,
        views=views,
        view_experts=work.experts,
        rank=work.rank,
        top=work.top,
    )
    experts.attach()
    projector = BehavioralProjector(backbone.dim)
    per_view = ids.chunk(views)

    def forward() -> Tensor:
        inputs, slices, groups, positions, start = [], [], [], [], 0
        for view, part in enumerate(per_view):
            x = backbone.embed(part.flatten())
            if view == 1:
                x = projector(x.float())  # the behavioural view's input is trained
            row = torch.arange(len(part)).repeat_interleave(part.shape[1])
            group, position = pack(
                torch.full((len(part),), part.shape[1]), Attend.FULL, start=start
            )
            u = mean_of(x, row, len(part))
            slices.append(ViewSlice(view, start, group.stop, u, row))
            inputs.append(x.to(backbone.dtype))
            groups.append(group)
            positions.append(position)
            start = group.stop
        packing = Packing(tuple(groups), torch.cat(positions))
        with experts.routed(slices) as routing:
            states = backbone(torch.cat(inputs), packing)
        balance = torch.stack([t for terms in routing.balance.values() for t in terms]).mean()
        return score(states) + BALANCE * balance

    trained = list(experts.parameters()) + list(projector.parameters()) * (views - 1)
    return Contender(name, forward, trained)


def contenders(work: Workload, dtype: torch.dtype) -> dict[str, Callable[[Load], Contender]]:
    """By name, how to build each: it loads a backbone of its own."""
    build: dict[str, Callable[[Load], Contender]] = {BARE: partial(bare, work=work)}
    for attention in ("eager", "sdpa"):
        name = f"{PEER}, {attention}"
        build[name] = partial(peft_lora, name, work=work, attention=attention, float32=True)
        if dtype is torch.bfloat16:
            name += ", bf16 adapters"
            build[name] = partial(peft_lora, name, work=work, attention=attention, float32=False)
    for views, name in ((1, "l2rec"), (2, "l2rec, 2 views")):
        build[name] = partial(dpmoe, name, work=work, views=views)
    build[f"loop of {1 + work.experts}"] = partial(loop, work=work)
    return build


# -- measurements --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """Of one contender: seconds [rounds] of each step, wall and CPU; GFLOP of a step; MB."""

    name: str
    dtype: str
    wall: list[float]
    cpu: list[float]
    gflop: float
    trained: int
    memory_mb: float | None

    @property
    def seconds(self) -> float:
        return statistics.median(self.wall)


def matmul_peak(dtype: torch.dtype, size: int = 2048, repeats: int = 10) -> float:
    """GFLOP/s of the fastest of some large square matrix products."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    out, best = a @ b, float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best / 1e9


def count_gflop(contender: Contender) -> float:
    with FlopCounterMode(display=False) as counter:
        contender.step()
    return float(counter.get_total_flops()) / 1e9


def resident_mb(field: str) -> float:
    """VmRSS (now) or VmHWM (largest since the last reset) of this process, on Linux."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {field}")


def step_memory(contender: Contender, steps: int = 2) -> float:
    """MB that the peak of some steps stands above the process with everything loaded.

    Raises:
        OSError: the system cannot reset a process's peak (Linux can).
    """
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_mb("VmRSS")
    for _ in range(steps):
        contender.step()
    return resident_mb("VmHWM") - before


def memory_in_child(name: str, dtype: str, arguments: Sequence[str]) -> float | None:
    """`step_memory` of one contender in a fresh process; None where it cannot be measured."""
    command = [sys.executable, __file__, *arguments, "--dtypes", dtype, "--memory-of", name]
    done = subprocess.run(command, capture_output=True, text=True)
    return float(done.stdout) if done.returncode == 0 else None


def interleave(
    rivals: Sequence[Contender], steps: int, warmup: int
) -> tuple[list[list[float]], list[list[float]]]:
    """Wall and CPU seconds per contender, each [steps]: A B C A B C ..."""
    wall: list[list[float]] = [[] for _ in rivals]
    cpu: list[list[float]] = [[] for _ in rivals]
    for number in range(warmup + steps):
        for i, rival in enumerate(rivals):
            started, busy = time.perf_counter(), time.process_time()
            rival.step()
            if number >= warmup:
                wall[i].append(time.perf_counter() - started)
                cpu[i].append(time.process_time() - busy)
    return wall, cpu


def measure(
    load: Load,
    work: Workload,
    dtype: str,
    *,
    steps: int,
    warmup: int,
    memory: Callable[[str], float | None] = lambda name: None,
    only: str = "",
) -> list[Result]:
    """All contenders in one dtype. ``memory`` gives the MB of a contender by name."""
    rivals = [
        build(load)
        for name, build in contenders(work, DTYPES[dtype]).items()
        if only in name or name.startswith(PEER)
    ]
    gflops = [count_gflop(rival) for rival in rivals]  # a first step that is not timed
    wall, cpu = interleave(rivals, steps, warmup)
    return [
        Result(
            name=rival.name,
            dtype=dtype,
            wall=wall[i],
            cpu=cpu[i],
            gflop=gflops[i],
            trained=sum(p.numel() for p in rival.trained),
            memory_mb=memory(rival.name),
        )
        for i, rival in enumerate(rivals)
    ]


def machine() -> dict[str, Any]:
    """Where and when: printed above the table, kept in the JSON."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        fields = dict(
            line.split(":", 1) for line in info.read_text().splitlines() if line.count(":")
        )
        named = {key.strip(): value.strip() for key, value in fields.items()}
        cpu = named.get("model name", cpu)
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "l2rec": l2rec.__version__,
        **{name: version(name) for name in ("torch", "transformers", "peft")},
    }


# -- the report ----------------------------------------------------------------------------------


def rows(results: Sequence[Result], work: Workload, peak: float) -> list[dict[str, Any]]:
    """What is reported of each contender of one dtype, the peer being the fastest PEFT."""
    peer = min((r for r in results if r.name.startswith(PEER)), key=lambda r: r.seconds)
    return [
        {
            "contender": r.name,
            "dtype": r.dtype,
            "peer": r is peer,
            "seconds": r.seconds,
            "seconds_min": min(r.wall),
            "seconds_max": max(r.wall),
            "cpu_seconds": statistics.median(r.cpu),
            "tokens_per_second": work.rows * work.tokens / r.seconds,
            "ratio": statistics.median(a / b for a, b in zip(r.wall, peer.wall, strict=True)),
            "cpu_ratio": statistics.median(a / b for a, b in zip(r.cpu, peer.cpu, strict=True)),
            "memory_mb": r.memory_mb,
            "gflop": r.gflop,
            "share_of_peak": r.gflop / r.seconds / peak,
            "trained_parameters": r.trained,
        }
        for r in results
    ]


def table(lines: Sequence[dict[str, Any]], dtype: str, peak: float) -> str:
    head = (
        f"{dtype}: matmul peak {peak:,.0f} GFLOP/s",
        f"{'':<28}{'seconds (min - max)':>23}{'CPU s':>8}{'ratio':>8}{'CPU':>7}{'tokens/s':>10}"
        f"{'memory':>10}{'GFLOP':>7}{'share':>7}{'trained':>9}",
    )
    body = []
    for r in lines:
        spread = f"{r['seconds']:.3f} ({r['seconds_min']:.3f} - {r['seconds_max']:.3f})"
        memory = "-" if r["memory_mb"] is None else f"{r['memory_mb']:,.0f} MB"
        body.append(
            f"{r['contender'] + (' *' if r['peer'] else ''):<28}{spread:>23}"
            f"{r['cpu_seconds']:>8.3f}{r['ratio']:>8.2f}{r['cpu_ratio']:>7.2f}"
            f"{r['tokens_per_second']:>10,.0f}{memory:>10}{r['gflop']:>7.0f}"
            f"{r['share_of_peak']:>7.0%}{r['trained_parameters'] / 1e6:>7.2f} M"
        )
    return "\n".join((*head, *body))


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="benchmarks/step.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--steps", type=int, default=9, help="timed rounds (default %(default)s)")
    p.add_argument("--warmup", type=int, default=2, help="rounds before (default %(default)s)")
    p.add_argument("--threads", type=int, default=0, help="threads of torch (default: its own)")
    p.add_argument("--quick", action="store_true", help="3 rounds, 1 warm-up, no memory")
    p.add_argument("--json", type=Path, metavar="PATH", help="also write everything as JSON")
    p.add_argument(
        "--dtypes",
        default="float32,bfloat16" if native_bfloat16() else "float32",
        help="of the frozen weights, comma-separated (default %(default)s: what is native here)",
    )
    p.add_argument(
        "--matrices",
        default="q,v",
        help="adapted matrices: any of q,k,v,o,gate,up,down (default %(default)s)",
    )
    p.add_argument("--rows", type=int, default=32, help="texts (default %(default)s)")
    p.add_argument("--tokens", type=int, default=128, help="of a text (default %(default)s)")
    p.add_argument("--rank", type=int, default=8, help="of every LoRA (default %(default)s)")
    p.add_argument("--experts", type=int, default=8, help="routed experts (default %(default)s)")
    p.add_argument("--only", default="", metavar="TEXT", help="contenders so named, and the peer")
    p.add_argument("--backbone", default="minilm", help="name, hub id or folder")
    p.add_argument(
        "--random-weights", action="store_true", help="the backbone's architecture, no weights"
    )
    p.add_argument("--memory-of", help=argparse.SUPPRESS)  # what memory_in_child asks a child
    return p


def main(argv: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.quick:
        args.steps, args.warmup = 3, 1
    work = Workload(
        rows=args.rows,
        tokens=args.tokens,
        matrices=tuple(args.matrices.split(",")),
        rank=args.rank,
        experts=args.experts,
    )

    def loader(dtype: str) -> Load:
        config = BackboneConfig.model_validate(
            {"name": args.backbone, "dtype": dtype, "random_weights": args.random_weights}
        )
        return lambda: load_backbone(config)

    dtypes = args.dtypes.split(",")
    if args.memory_of:
        build = contenders(work, DTYPES[dtypes[0]])[args.memory_of]
        print(step_memory(build(loader(dtypes[0]))))
        return
    where = machine()
    print("  ".join(f"{key} {value}" for key, value in where.items()))
    print(
        f"{work.rows} x {work.tokens} tokens through {args.backbone}, "
        f"{args.matrices} adapted, rank {work.rank}; {args.steps} rounds after {args.warmup}"
    )
    report: list[dict[str, Any]] = []
    peaks: dict[str, float] = {}
    for dtype in dtypes:
        peaks[dtype] = matmul_peak(DTYPES[dtype])
        results = measure(
            loader(dtype),
            work,
            dtype,
            steps=args.steps,
            warmup=args.warmup,
            memory=lambda name, dtype=dtype: (  # type: ignore[misc]
                None if args.quick else memory_in_child(name, dtype, arguments)
            ),
            only=args.only,
        )
        lines = rows(results, work, peaks[dtype])
        report += [{**line, "wall": r.wall} for line, r in zip(lines, results, strict=True)]
        print("\n" + table(lines, dtype, peaks[dtype]))
    print("\n* the peer: ratio 1. Read the ratios; seconds are this machine's, on this day.")
    if args.json:
        document = {
            "machine": where,
            "workload": {**asdict(work), "backbone": args.backbone},
            "rounds": args.steps,
            "matmul_peak_gflops": peaks,
            "results": report,
        }
        args.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
