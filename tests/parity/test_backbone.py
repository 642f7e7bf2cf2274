"""Packed rows against Hugging Face's padded forward, and models and files that are refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support import reference, tiny
from tests.support.errors import one_line
from torch import Tensor, nn
from transformers import AutoModel, BertForMaskedLM

from l2rec.config import BackboneConfig
from l2rec.data.catalog import Catalog
from l2rec.errors import BackboneError
from l2rec.methods.l2rec import L2Rec
from l2rec.modules import packing as packing_module
from l2rec.modules.backbone import Backbone, load_backbone, minilm_source
from l2rec.modules.packing import Attend, Packing, pack, packed_attention

FAMILIES = tuple(tiny.CONFIGS)
ENCODERS = ("bert", "roberta", "electra")
LENGTHS = {"ragged": [5, 1, 9, 3], "even": [4, 4, 4], "one": [6]}
TEXTS = [
    "a small lamp",
    "Large red wooden table, seats eight people; the legs can be taken off.",
    "x",
    "Thin-soled running shoe (white)",
    "a cup",
]


def close(family: str) -> dict[str, float]:
    """Return tolerances; decoders compute norms, rotations and softmax in float32 at any dtype."""
    if family in ENCODERS:
        return {"rtol": 1e-9, "atol": 1e-10}
    return {"rtol": 1e-4, "atol": 2e-5}


def wrapped(model: nn.Module) -> Backbone:
    return Backbone(model, None, name="tiny", source="random", revision=None)


def both(family: str) -> tuple[Backbone, nn.Module]:
    """Return ours and a copy that runs Hugging Face's eager attention, both float64."""
    model = tiny.random_model(family).double()
    return wrapped(copy.deepcopy(model)), model


def padded(ids: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Pad on the right: ids and mask [B, T]."""
    rows = torch.split(ids, lengths)
    grid = nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=1)
    real = torch.arange(grid.shape[1])[None] < torch.tensor(lengths)[:, None]
    return grid, real


def block_ids(lengths: list[int]) -> list[list[int]]:
    """Number blocks of two tokens in every row, over the batch."""
    first, blocks = 0, []
    for n in lengths:
        blocks.append([first + t // 2 for t in range(n)])
        first = blocks[-1][-1] + 1
    return blocks


def run_packed(
    backbone: Backbone, ids: Tensor, lengths: list[int], attend: Attend
) -> tuple[Tensor, Packing]:
    blocks = torch.tensor([b for row in block_ids(lengths) for b in row])
    group, positions = pack(torch.tensor(lengths), attend, blocks=blocks)
    packing = Packing((group,), positions)
    return backbone(backbone.embed(ids), packing), packing


# ------------------------------------------------------------------------------- the forward


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_forward_is_the_padded_forward(family: str, lengths: list[int]) -> None:
    backbone, model = both(family)
    assert backbone.causal is (family not in ENCODERS)
    torch.manual_seed(1)
    ids = torch.randint(6, 60, (sum(lengths),))
    attend = Attend.CAUSAL if backbone.causal else Attend.FULL
    ours, packing = run_packed(backbone, ids, lengths, attend)
    grid, real = padded(ids, lengths)
    theirs = model(input_ids=grid, attention_mask=real.long()).last_hidden_state
    torch.testing.assert_close(ours, theirs[real], **close(family))
    assert packing.computed == grid.numel()
    for n, row in zip(lengths, torch.split(ours, lengths), strict=True):
        assert row.shape == (n, backbone.dim)


@pytest.mark.parametrize("attend", Attend)
@pytest.mark.parametrize("family", ["bert", "qwen3"])
def test_every_way_to_attend_is_an_explicit_mask(family: str, attend: Attend) -> None:
    backbone, model = both(family)
    lengths = LENGTHS["ragged"]
    ids = torch.randint(6, 60, (sum(lengths),))
    ours, _ = run_packed(backbone, ids, lengths, attend)
    start = 0
    for n, blocks in zip(lengths, block_ids(lengths), strict=True):
        mask = torch.full((1, 1, n, n), torch.finfo(torch.float64).min, dtype=torch.float64)
        for q in range(n):
            for k in range(n):
                block = torch.tensor(blocks)
                seen = {
                    Attend.FULL: True,
                    Attend.CAUSAL: k <= q,
                    Attend.BLOCK_CAUSAL: bool(block[k] <= block[q]),
                }[attend]
                if seen:
                    mask[..., q, k] = 0
        row = ids[start : start + n]
        theirs = model(inputs_embeds=backbone.embed(row)[None], attention_mask=mask)
        torch.testing.assert_close(
            ours[start : start + n], theirs.last_hidden_state[0], **close(family)
        )
        start += n


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_two_groups_in_one_batch_do_not_meet(family: str) -> None:
    backbone, _ = both(family)
    first, second = [5, 2, 3], [1, 4]
    ids = torch.randint(6, 60, (15,))
    attend = Attend.CAUSAL if backbone.causal else Attend.FULL
    a, pos_a = pack(torch.tensor(first), attend)
    b, pos_b = pack(torch.tensor(second), attend, start=10)
    together = backbone(backbone.embed(ids), Packing((a, b), torch.cat((pos_a, pos_b))))
    alone = [
        run_packed(backbone, part, lengths, attend)[0]
        for part, lengths in ((ids[:10], first), (ids[10:], second))
    ]
    torch.testing.assert_close(together, torch.cat(alone), **close(family))


@pytest.mark.parametrize("attend", Attend)
@pytest.mark.parametrize("shuffled", [False, True])
def test_rows_attend_in_buckets_of_like_length(attend: Attend, shuffled: bool) -> None:
    backbone, _ = both("bert")
    lengths = torch.tensor([25] * 20 + [24] * 9 + [1] * 11)
    torch.manual_seed(0)
    if shuffled:
        lengths = lengths[torch.randperm(len(lengths))]
    total = int(lengths.sum())
    ids, blocks = torch.randint(6, 60, (total,)), torch.arange(total) // 2
    group, positions = pack(lengths, attend, blocks=blocks, start=3)
    assert [(b.rows, b.width) for b in group.buckets] == [(29, 25), (11, 1)]
    assert (group.start, group.stop) == (3, total + 3)
    assert Packing((group,), positions).computed == total + 9
    group, _ = pack(lengths, attend, blocks=blocks)
    x = backbone.embed(ids)
    bucketed = backbone(x, Packing((group,), positions))
    for row, start in enumerate((lengths.cumsum(0) - lengths).tolist()):
        n = int(lengths[row])
        alone, places = pack(torch.tensor([n]), attend, blocks=blocks[start : start + n])
        expected = backbone(x[start : start + n], Packing((alone,), places))
        torch.testing.assert_close(bucketed[start : start + n], expected, **close("bert"))


def test_even_rows_in_order_are_not_moved() -> None:
    group, _ = pack(torch.tensor([5] * 4 + [3] * 4), Attend.FULL)
    assert group.pad is None and group.unpad is None
    assert [(b.rows, b.width, b.mask) for b in group.buckets] == [(4, 5, None), (4, 3, None)]


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_the_inputs_are_those_of_the_padded_forward(family: str) -> None:
    backbone, model = both(family)
    lengths = LENGTHS["ragged"]
    torch.manual_seed(1)
    ids = torch.randint(6, 60, (sum(lengths),))
    weight = torch.randn(sum(lengths), backbone.dim, dtype=torch.float64)
    x = backbone.embed(ids).requires_grad_()
    group, positions = pack(
        torch.tensor(lengths), Attend.CAUSAL if backbone.causal else Attend.FULL
    )
    (backbone(x, Packing((group,), positions)) * weight).sum().backward()

    grid, real = padded(ids, lengths)
    y = nn.functional.embedding(grid, model.get_input_embeddings().weight.detach())
    y.requires_grad_()
    extra = {}
    if family == "roberta":  # cannot tell padding from vectors
        extra["position_ids"] = torch.arange(2, 2 + grid.shape[1])[None].expand_as(grid)
    out = model(inputs_embeds=y, attention_mask=real.long(), **extra).last_hidden_state[real]
    (out * weight).sum().backward()
    assert x.grad is not None and y.grad is not None
    torch.testing.assert_close(x.grad, y.grad[real], **close(family))
    assert all(p.grad is None for p in backbone.parameters())


@pytest.mark.parametrize("attend", Attend)
@pytest.mark.parametrize("lengths", [[3, 1, 2], [2, 2]], ids=["ragged", "even"])
def test_packed_attention_is_attention(lengths: list[int], attend: Attend) -> None:
    """Compare values with loops, derivatives with finite differences; queries are grouped."""
    torch.manual_seed(0)
    n, heads, kv, d = sum(lengths), 2, 1, 2
    blocks = block_ids(lengths)
    flat = torch.tensor([b for row in blocks for b in row])
    group, positions = pack(torch.tensor(lengths), attend, blocks=flat)
    packing = Packing((group,), positions)
    q = torch.randn(1, heads, n, d, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(1, kv, n, d, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return packed_attention(nn.Identity(), q, k, v, None, packing=packing, scaling=0.7)[0]

    out = run(q, k, v)
    assert out.shape == (1, n, heads, d)
    start = 0
    for length, row in zip(lengths, blocks, strict=True):
        part = slice(start, start + length)
        for h in range(heads):
            expected = reference.attention(
                q[0, h, part], k[0, 0, part], v[0, 0, part], row, attend.value, 0.7
            )
            torch.testing.assert_close(out[0, part, h], expected)
        start += length
    assert torch.autograd.gradcheck(run, (q, k, v))


@pytest.mark.parametrize("longest", [0, 1000], ids=["fused", "explicit"])
@pytest.mark.parametrize("kind", ["of keys", "of pairs", "of contents"])
@pytest.mark.parametrize("attend", Attend)
@torch.no_grad()
def test_biases_are_added_inside_each_row(
    attend: Attend, kind: str, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare biases of ALiBi, T5 and DeBERTa with the scores of each row, written out."""
    monkeypatch.setattr(packing_module, "LONG_ROW", {torch.float64: longest})
    torch.manual_seed(0)
    lengths, scale = [5, 1, 9, 3, 8], 0.7
    blocks = block_ids(lengths)
    flat = torch.tensor([b for row in blocks for b in row])
    group, positions = pack(torch.tensor(lengths), attend, blocks=flat)
    q, k, v = (torch.randn(1, 2, sum(lengths), 4, dtype=torch.float64) for _ in range(3))
    width = 1 if kind == "of keys" else 12
    table = torch.randn(1, 2, width, 12, dtype=torch.float64)

    def of_contents(queries: Tensor, keys: Tensor) -> Tensor:
        return (queries.sin() @ keys.cos().transpose(2, 3)) ** 2

    with torch.set_grad_enabled(longest > 0):
        out, _ = packed_attention(
            nn.Identity(),
            *(q, k, v, None),
            packing=Packing((group,), positions),
            scaling=scale,
            position_bias=of_contents if kind == "of contents" else table,
        )
    start = 0
    for n, row in zip(lengths, blocks, strict=True):
        part = slice(start, start + n)
        a, b, c = (x[:, :, part] for x in (q, k, v))
        bias = of_contents(a, b) if kind == "of contents" else table[..., :n, :n]
        seen = torch.tensor(
            [
                [
                    {"full": True, "causal": j <= i, "block_causal": row[j] <= row[i]}[attend.value]
                    for j in range(n)
                ]
                for i in range(n)
            ]
        )
        scores = (scale * a @ b.transpose(2, 3) + bias).masked_fill(~seen, -torch.inf)
        expected = (scores.softmax(-1) @ c).transpose(1, 2)
        torch.testing.assert_close(out[:, part], expected)
        start += n


@pytest.mark.parametrize("attend", Attend)
def test_the_path_without_gradients_is_the_path_with_them(attend: Attend) -> None:
    backbone, _ = both("llama" if attend is Attend.CAUSAL else "bert")
    lengths = LENGTHS["ragged"]
    ids = torch.randint(6, 60, (sum(lengths),))
    with_grad, _ = run_packed(backbone, ids, lengths, attend)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            without, _ = run_packed(backbone, ids, lengths, attend)
        torch.testing.assert_close(without, with_grad, rtol=1e-10, atol=1e-11)


def test_every_query_of_a_mask_sees_something() -> None:
    """Check padding too: a softmax over nothing is NaN, and NaN times zero gradient is NaN."""
    lengths = LENGTHS["ragged"]
    blocks = torch.tensor([b for row in block_ids(lengths) for b in row])
    for attend in Attend:
        group, _ = pack(torch.tensor(lengths), attend, blocks=blocks)
        for bucket in group.buckets:
            assert bucket.mask is not None and bool(bucket.mask.any(-1).all())


def test_default_scale_and_a_window_that_no_row_leaves() -> None:
    group, positions = pack(torch.tensor([4, 2]), Attend.CAUSAL)
    packing = Packing((group,), positions)
    q, k, v = torch.randn(3, 1, 2, 6, 9)
    ours = packed_attention(nn.Identity(), q, k, v, None, packing=packing)[0]
    explicit = packed_attention(nn.Identity(), q, k, v, None, packing=packing, scaling=1 / 3)[0]
    torch.testing.assert_close(ours, explicit)
    wide = packed_attention(nn.Identity(), q, k, v, None, packing=packing, sliding_window=4)[0]
    assert torch.equal(wide, ours)


def test_the_backbone_stays_frozen_and_in_evaluation_mode() -> None:
    backbone = tiny.random_backbone("bert")
    backbone.train()
    assert not any(module.training for module in backbone.modules())
    assert not any(p.requires_grad for p in backbone.parameters())


@pytest.mark.parametrize(("family", "limit"), [("bert", 256), ("roberta", 254), ("llama", 256)])
def test_longest_row(family: str, limit: int) -> None:
    backbone = tiny.random_backbone(family)
    assert backbone.max_positions == limit
    group, positions = pack(torch.tensor([limit]), Attend.CAUSAL)
    assert backbone(torch.randn(limit, 32), Packing((group,), positions)).isfinite().all()


# ------------------------------------------------------------------------------- the real one


@pytest.mark.filterwarnings("ignore")  # what its import warns of is not ours
def test_minilm_text_vectors_are_those_of_sentence_transformers(minilm: Backbone) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = sentence_transformers.SentenceTransformer(minilm_source(), device="cpu")
    theirs = torch.from_numpy(model.encode(TEXTS, normalize_embeddings=True))
    options = tiny.small(behavioral_pool="encoder", text_tokens=64)
    ours = L2Rec(options, Catalog.of_texts(TEXTS), minilm).items.rows
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_minilm_text_vectors_are_mean_pooled_outputs(minilm: Backbone) -> None:
    model = AutoModel.from_pretrained(minilm_source(), dtype=torch.float32).eval()
    options = tiny.small(behavioral_pool="encoder", text_tokens=64)
    ours = L2Rec(options, Catalog.of_texts(TEXTS), minilm).items.rows
    for text, vector in zip(TEXTS, ours, strict=True):
        encoded = minilm.tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            states = model(**encoded).last_hidden_state[0]
        expected = nn.functional.normalize(reference.mean(list(states)), dim=0)
        torch.testing.assert_close(vector, expected, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------- loading


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write a complete tiny BERT as Hugging Face saves it."""
    path = tmp_path / "bert"
    tiny.random_model("bert").save_pretrained(path)
    tiny.tokenizer("bert").save_pretrained(path)
    return path


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def load(folder: Path, **options: Any) -> Backbone:
    return load_backbone(BackboneConfig(name=str(folder), dtype="float32", **options))


def test_a_folder_loads_as_it_was_saved(folder: Path) -> None:
    backbone = load(folder)
    expected = tiny.random_backbone("bert")
    assert backbone.weight_hash() == expected.weight_hash()
    assert backbone.weight_hash() != tiny.random_backbone("bert", seed=1).weight_hash()
    assert backbone.tokenizer("small red lamp")["input_ids"][0] == 2
    assert (backbone.dim, backbone.dtype, backbone.device.type) == (32, torch.float32, "cpu")
    assert load_backbone(BackboneConfig(name=str(folder), dtype="bfloat16")).dtype is torch.bfloat16


def test_random_weights_are_the_same_each_time_and_need_no_file(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    hashes = {load(folder, random_weights=True).weight_hash() for _ in range(2)}
    assert len(hashes) == 1


def test_a_checkpoint_with_a_head_and_without_pooler_loads(folder: Path) -> None:
    torch.manual_seed(3)
    saved = BertForMaskedLM(tiny.bert_config())
    saved.save_pretrained(folder)
    loaded = load(folder).model.state_dict()
    for name, tensor in saved.bert.encoder.state_dict().items():
        assert torch.equal(loaded[f"encoder.{name}"], tensor), name


def test_weights_that_lack_a_layer_are_refused(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop("encoder.layer.1.attention.self.key.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BackboneError, match=r"lack encoder\.layer\.1\..*key\.weight \(1 missing\)"):
        load(folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: (f / "model.safetensors").write_bytes(b"torn"),
        lambda f: (f / "model.safetensors").unlink(),
        lambda f: (f / "config.json").write_text("{"),
        lambda f: (f / "config.json").unlink(),
        lambda f: change_config(f, hidden_size=64),
        lambda f: change_config(f, model_type="no_such_model"),
        lambda f: [path.unlink() for path in f.glob("tokenizer*")],
    ],
    ids=["torn", "no weights", "bad config", "no config", "shape", "unknown type", "no tokenizer"],
)
def test_a_backbone_that_cannot_be_loaded_is_one_line_with_its_name(
    folder: Path, damage: Any
) -> None:
    damage(folder)
    with pytest.raises(BackboneError) as caught:
        load(folder)
    assert str(folder) in one_line(caught)


@pytest.mark.parametrize("name", ["nobody/nothing", "/no/such/folder"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(BackboneError, match=f"cannot be loaded: there is no folder '{name}'"):
        load_backbone(BackboneConfig(name=name))


def test_a_tokenizer_of_another_model_is_refused(folder: Path) -> None:
    change_config(folder, vocab_size=50)
    weights = load_file(folder / "model.safetensors")
    key = "embeddings.word_embeddings.weight"
    last = len(tiny.VOCABULARY) - 1
    save_file(
        weights | {key: weights[key][:50].clone()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(BackboneError, match=rf"has ids up to {last}, the weights 50 word vectors"):
        load(folder)


def test_a_tokenizer_that_reads_nothing_is_refused(folder: Path) -> None:
    """Words split at spaces, in a folder that says otherwise."""
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    values["model"] = {"type": "BPE", "vocab": {"zz": 0}, "merges": []}
    path.write_text(json.dumps(values))
    with pytest.raises(BackboneError, match="turns words into nothing; give the files"):
        load(folder)


def test_pickled_weights_are_not_opened(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(BackboneError, match="safetensors"):
        load(folder)


@pytest.mark.parametrize("known", [False, True], ids=["own model type", "posing as BERT"])
def test_remote_code_does_not_run_unless_allowed(folder: Path, tmp_path: Path, known: bool) -> None:
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w').close()\nclass C: ...\nclass M: ...\n"
    (folder / "custom.py").write_text(code)
    change_config(folder, auto_map={"AutoConfig": "custom.C", "AutoModel": "custom.M"})
    if known:  # the library's own class is used
        assert load(folder).weight_hash() == tiny.random_backbone("bert").weight_hash()
    else:
        change_config(folder, model_type="custom")
        asked = r"custom code.*read it, and pass backbone\.trust_remote_code=true if you trust it"
        with pytest.raises(BackboneError, match=asked) as error:
            load(folder)
        one_line(error)
    assert not ran.exists()
