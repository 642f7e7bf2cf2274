"""Check at load that a packed model computes what Hugging Face's own code computes.

A model may say that it takes attention functions by name and still be another thing packed: layers
that mix tokens elsewhere (convolutions, recurrences) leak from row to row, a mask may hold what the
attention function is never told, layers may read token ids. No list of families keeps up with that,
so a few random rows are run both ways.
"""

from __future__ import annotations

__all__ = [
    "call_order",
    "check_cut",
    "check_exact",
    "check_search",
    "check_text_part",
    "sees_future",
    "state_size",
    "with_attention",
]

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2rec.errors import BackboneError
from l2rec.modules.families import accepted, own_attention
from l2rec.modules.packing import ATTENTION, LED, Attend, Packing, pack, packed_attention

if TYPE_CHECKING:
    from l2rec.modules.backbone import Backbone
    from l2rec.modules.layers import LayerCut

ROWS = (6, 1, 9)
"""Tokens of the probe's rows: what leaks from a row is seen in the next ones."""
LONGEST = 300
"""Longest row that is worth its time at every load, to look beyond a window."""
ROUNDING = {torch.float64: 1e-3, torch.float32: 1e-3}
COARSE = 0.25
"""Largest difference of a token's states, relative to them, that may be rounding: in the dtypes of
`ROUNDING`, and in the shorter ones. Models found to be another one differ by about 1."""
CHEAP = 5 * 10**9
"""Most tokens times weights that are worth their time at every load, to run many tokens."""
DRAWS = 3
"""Draws of token ids in the shorter dtypes."""


@torch.no_grad()
def check_exact(backbone: Backbone) -> int | None:
    """Compare packed rows with the model's own eager attention on each row alone.

    Returns:
        The most tokens of a row for which packed attention is known to be the model's, None if it
        is for all. Beyond a sliding window, Hugging Face's masks and kernels do not always agree.

    Raises:
        BackboneError: one of the two ways fails, or they differ by more than rounding.
    """
    windows = _windows(backbone)
    limit = backbone.max_positions or LONGEST
    declared = _declared_window(backbone.model.config)
    lengths = [min(n, limit, declared or limit, *windows) for n in ROWS]
    if not _agrees(backbone, lengths):
        raise BackboneError(
            f"backbone {backbone.name!r} ({_family(backbone.model)}) is another model when it runs "
            f"packed: {_what_differs(backbone, lengths)}; choose another one"
        )
    if not windows:
        return declared
    long = [min(w + 3, limit) for w in windows if w + 3 <= LONGEST]
    tried = len(long) == len(windows) or backbone.causal  # causal windows are one thing everywhere
    return None if tried and _agrees(backbone, [*long, ROWS[0]]) else min(windows)


@torch.no_grad()
def check_cut(backbone: Backbone, cut: LayerCut) -> None:
    """Compare the two parts of a cut backbone, one after the other, with the whole of it.

    Raises:
        BackboneError: they differ by more than rounding, or do not run.
    """
    lengths = [min(n, backbone.max_positions or n) for n in ROWS]
    with _one_line(backbone.name, backbone.model, "cannot be cut between layers"):
        if backbone.device.type == "meta":  # nothing to compare, but what layers return is seen
            x = torch.empty(sum(lengths), backbone.word_dim, device="meta")
            backbone.lower(cut, x, _packing(backbone, lengths, "cpu"))
            return
        packing = _packing(backbone, lengths)
        x = backbone.embed(torch.cat(_random_rows(backbone, lengths)))
        whole = backbone(x, packing)
        parts = backbone.upper(cut, backbone.lower(cut, x, packing), packing)
    if not _same([parts], [whole]):
        raise BackboneError(
            f"backbone {backbone.name!r} ({_family(backbone.model)}) is another model when it is "
            "cut between layers, which hand on more than states; set item_layers=0"
        )


@torch.no_grad()
def check_search(backbone: Backbone, longest: int) -> None:
    """Compare packed rows with the model's own code on a padded grid with a cache, as a beam search
    reads them (`beam.CausalDecoder`).

    longest: most tokens of a row.

    Raises:
        BackboneError: they differ by more than rounding, or the model does not run so: with biases
            of distance, or with a window that is shorter than a row.
    """
    with _one_line(backbone.name, backbone.model, "cannot search with beams"):
        if not any(_searches(backbone, longest, seed) for seed in range(DRAWS)):
            raise ValueError(f"its states differ in rows of {longest} tokens")


@torch.no_grad()
def call_order(backbone: Backbone, modules: Sequence[nn.Module]) -> list[nn.Module]:
    """Return those of the modules that a packed pass calls, in its order, each as often as it is
    called.
    """
    called: list[nn.Module] = []
    handles = [m.register_forward_pre_hook(lambda m, _: called.append(m)) for m in modules]
    try:
        (row,) = _random_rows(backbone, [2])
        backbone(backbone.embed(row), _packing(backbone, [2]))
    finally:
        for handle in handles:
            handle.remove()
    return called


def _searches(backbone: Backbone, longest: int, seed: int) -> bool:
    """Return True if the ends of two random rows come out of a search of two beams as packed.

    The last token of a row goes on from the other beam than its own.
    """
    from l2rec.modules.beam import CausalDecoder
    from l2rec.modules.words import Speaker

    rows = _random_rows(backbone, [longest, 2 + longest // 2], seed)
    expected = torch.stack([states[-1] for states in _packed(backbone, rows)])
    ids = torch.stack([F.pad(row, (longest - len(row), 0)) for row in rows])
    real = torch.stack([F.pad(torch.ones_like(row), (longest - len(row), 0)) for row in rows])
    with backbone.unpacked() as model:
        speaker = Speaker(model, lambda states, _: states, backbone.word_embeddings.weight)
        decoder = CausalDecoder(speaker, backbone.embed(ids[:, :-2]), real[:, :-2])
        decoder.start()
        said, first = ids[:, -2:], torch.zeros_like(ids[:, -2:])
        decoder.extend(said, first)
        found = decoder.extend(said, first + torch.tensor([1, 0], device=first.device))
    return _same([found[:, 1]], [expected])


def _agrees(backbone: Backbone, lengths: Sequence[int]) -> bool:
    """Return True if rows of these lengths come out as alone, at every place in one of the draws.

    Rounding may send a token to other experts; in another draw that is another token.
    """
    least = torch.full((sum(lengths),), torch.inf, dtype=torch.float64)
    for seed in range(1 if backbone.dtype in ROUNDING else DRAWS):
        rows = _random_rows(backbone, lengths, seed)
        least = torch.minimum(least, _error(_packed(backbone, rows), _reference(backbone, rows)))
        if bool((least <= ROUNDING.get(backbone.dtype, COARSE)).all()):  # False for NaN
            return True
    return False


def _windows(backbone: Backbone) -> set[int]:
    """Find the sliding windows that layers give to the attention function."""
    from transformers import AttentionInterface

    windows: set[int] = set()

    def recording(*args: Any, sliding_window: int | None = None, **kwargs: Any) -> Any:
        if sliding_window is not None:
            windows.add(int(sliding_window))
        return packed_attention(*args, sliding_window=sliding_window, **kwargs)

    name = f"{ATTENTION}_probe"
    AttentionInterface.register(name, recording)
    if not backbone.model._can_set_attn_implementation():  # type: ignore[operator]
        name = LED  # led by hand, to the attention function itself
    with with_attention(backbone.model, name):
        try:
            _packed(backbone, _random_rows(backbone, [2, 1]))
        except BackboneError:
            raise
        except Exception as error:  # whatever the code of any model raises
            raise _cannot_run(backbone, error) from error
        many = "takes no more tokens in all rows together than one row may have"
        with _one_line(backbone.name, backbone.model, many):
            _packed(backbone, _random_rows(backbone, _more_than_a_row(backbone)))
    return windows


def _more_than_a_row(backbone: Backbone) -> list[int]:
    """Return rows that have more tokens together than one may, or one row if that takes too long.

    Some models cut or check something by the number of all tokens.
    """
    limit = backbone.max_positions or 0
    weights = sum(parameter.numel() for parameter in backbone.parameters())
    row = min(ROWS[-1], limit)
    return [row] * (limit // row + 1) if limit and limit * weights <= CHEAP else [1]


def _cannot_run(backbone: Backbone, error: Exception) -> BackboneError:
    """Say in words why a model cannot run packed, as far as its own ways to run can tell."""
    name, model, [row] = backbone.name, backbone.model, _random_rows(backbone, [ROWS[0]])
    with _one_line(name, model, "does not run on text alone"):
        _own(model, input_ids=row[None])
    try:
        _own(model, inputs_embeds=backbone.embed(row)[None])
    except Exception:  # as above
        reason = "takes token ids alone, not word vectors"
    else:
        reason = f"cannot run packed: {_short(error)}"
        if "'NoneType'" in str(error):
            reason = (
                "cannot run packed: its layers read the attention mask themselves, as sparse "
                "attention with an indexer does"
            )
    return BackboneError(f"backbone {name!r} ({_family(model)}) {reason}; choose another one")


def _declared_window(config: Any) -> int | None:
    """Return a window that a config names for its layers, which then is in their masks alone."""
    window, types = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    return int(window) if window and (not types or "sliding_attention" in types) else None


def _reference(backbone: Backbone, rows: Sequence[Tensor]) -> list[Tensor]:
    with _one_line(backbone.name, backbone.model, "does not run on token ids"):
        return [_own(backbone.model, input_ids=row[None]) for row in rows]


@torch.no_grad()
def state_size(model: nn.Module, name: str) -> int:
    """Return the size of a model's last hidden states, which its config need not say."""
    words: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    with _one_line(name, model, "does not run on text alone"):
        states = _own(model, input_ids=_random_ids(1, words, model.config)[None])
    return states.shape[-1]


def check_text_part(model: nn.Module, part: nn.Module, name: str) -> None:
    """Compare the text part of a larger model with that model on a row of text alone.

    Raises:
        BackboneError: they differ, or the larger model does not run on text alone.
    """
    words: Tensor = part.get_input_embeddings().weight  # type: ignore[operator]
    ids = _random_ids(ROWS[-1], words, part.config)[None]
    with _one_line(name, model, "does not run on text"):
        same = _same([_own(part, input_ids=ids)], [_own(model, input_ids=ids)])
    if not same:
        raise BackboneError(
            f"backbone {name!r} ({_family(model)}) is more than its text part, even on text; "
            "choose another one"
        )


@torch.no_grad()
def sees_future(model: nn.Module, name: str) -> bool:
    """Return True if the states of a row depend on tokens that follow, in the model's own code.

    Raises:
        BackboneError: the model, called ``name``, does not run on token ids.
    """
    words: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    with _one_line(name, model, "does not run on token ids"):
        return _moves(lambda row: _own(model, input_ids=row[None]), words, model.config)


def _moves(run: Any, words: Tensor, config: Any) -> bool:
    """Return True if another last token changes the states [n, D] of those before it."""
    row = _random_ids(ROWS[-1] + 1, words, config)
    one, other = run(row[:-1]), run(torch.cat((row[:-2], row[-1:])))
    return not torch.allclose(one[:-1], other[:-1], rtol=1e-5, atol=1e-6)


def _random_rows(backbone: Backbone, lengths: Sequence[int], seed: int = 0) -> list[Tensor]:
    words, config = backbone.word_embeddings.weight, backbone.model.config
    return list(_random_ids(sum(lengths), words, config, seed).split(list(lengths)))


def _random_ids(n: int, words: Tensor, config: Any, seed: int = 0) -> Tensor:
    """Draw n token ids, none of them special to the model; the global generators stay as they are.

    words: [V, D] word embeddings.
    """
    special = {
        value
        for key in vars(config)
        if key.endswith(("token_id", "token_index"))
        for value in torch.tensor(getattr(config, key) or 0).flatten().tolist()
    }
    plain = torch.tensor([i for i in range(len(words)) if i not in special] or [0])
    generator = torch.Generator().manual_seed(seed)
    ids: Tensor = plain[torch.randint(len(plain), (n,), generator=generator)]
    return ids.to(words.device)


def _packed(backbone: Backbone, rows: Sequence[Tensor]) -> list[Tensor]:
    """Run rows of token ids packed: states [n, D] of each."""
    lengths = [len(row) for row in rows]
    states = backbone(backbone.embed(torch.cat(list(rows))), _packing(backbone, lengths))
    return list(states.split(lengths))


def _packing(
    backbone: Backbone, lengths: Sequence[int], device: str | torch.device | None = None
) -> Packing:
    attend = Attend.CAUSAL if backbone.causal else Attend.FULL
    group, positions = pack(torch.tensor(lengths, device=device or backbone.device), attend)
    return Packing((group,), positions)


def _own(model: nn.Module, **inputs: Tensor) -> Tensor:
    """Run one row by the model's own attention: states [n, D]."""
    given = accepted(model, {**inputs, "use_cache": False})
    with with_attention(model, own_attention(model)), torch.no_grad():
        states: Tensor | None = getattr(model(**given), "last_hidden_state", None)
    if states is None:
        raise ValueError("it gives no last hidden states")
    return states.squeeze(0)


@contextmanager
def with_attention(model: Any, name: str) -> Iterator[None]:
    """Give a model the attention of this name within this context."""
    before = model.config._attn_implementation
    _set_attention(model, name)
    try:
        yield
    finally:
        _set_attention(model, before)


def _set_attention(model: Any, name: str) -> None:
    if model._can_set_attn_implementation():
        model.set_attn_implementation(name)
    else:  # led by hand, see `families`: the name decides on masks alone
        model.config._attn_implementation = name


@contextmanager
def _one_line(name: str, model: nn.Module, what: str) -> Iterator[None]:
    try:
        yield
    except BackboneError:
        raise
    except Exception as error:  # whatever the code of any model raises
        raise BackboneError(
            f"backbone {name!r} ({_family(model)}) {what}: {_short(error)}; choose another one"
        ) from error


def _short(error: Exception) -> str:
    """Return what an error of a model's code says, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _family(model: nn.Module) -> str:
    config: Any = model.config
    return str(config.model_type)


def _error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> Tensor:
    """Return the difference of each token's states, relative to them: [n] float64 on the CPU."""
    a, b = (torch.cat(list(rows)).double().cpu() for rows in (found, expected))
    error: Tensor = (a - b).norm(dim=-1) / b.norm(dim=-1).clamp_min(1e-12)
    return error


def _same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return bool((_error(found, expected) <= ROUNDING.get(found[0].dtype, COARSE)).all())


def _what_differs(backbone: Backbone, lengths: Sequence[int]) -> str:
    """Say in words what a difference comes from, as far as further runs can tell."""
    model, rows = backbone.model, _random_rows(backbone, lengths)
    expected = _reference(backbone, rows)
    with _one_line(backbone.name, model, "does not run on word vectors"):
        vectors = [_own(model, inputs_embeds=backbone.embed(row)[None]) for row in rows]
    if not _same(vectors, expected):
        return "its layers read token ids, not only word vectors"
    if _same([_packed(backbone, [row])[0] for row in rows], expected):
        return "rows leak into each other, for its layers mix tokens outside of attention"
    ours = _moves(
        lambda row: _packed(backbone, [row])[0], backbone.word_embeddings.weight, model.config
    )
    if ours != sees_future(model, backbone.name):
        return f"it {'sees' if ours else 'does not see'} the future"
    return "its attention is another formula or has another mask"
