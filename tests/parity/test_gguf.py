"""GGUF files are the models they were written from, with the blocks' own rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tests.support import gguf_files
from tests.support.errors import one_line
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModel

from l2rec.config import BackboneConfig
from l2rec.errors import BackboneError
from l2rec.modules import gguf as gguf_module
from l2rec.modules.backbone import Backbone, load_backbone
from l2rec.modules.packing import Attend, Packing, pack
from l2rec.studies.doctor.backbones import shape_backbone, weights_at_hand

ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def model_of(family: str, **changes: Any) -> Any:
    words = len(gguf_files.PIECES if family == "llama" else gguf_files.BYTES) + 2
    shape = gguf_files.SHAPE | {"vocab_size": words}
    if family == "qwen3":
        shape |= {"head_dim": 8}  # not hidden_size / heads, nor what Hugging Face assumes
    torch.manual_seed(0)
    model: nn.Module = AutoModel.from_config(CONFIG_MAPPING[family](**shape | changes))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def load(name: Path, dtype: Any = "float32", **options: Any) -> Backbone:
    return load_backbone(BackboneConfig(name=str(name), dtype=dtype, **options))


@torch.no_grad()
def states(backbone: Backbone, ids: Tensor) -> Tensor:
    group, positions = pack(torch.tensor([len(ids)]), Attend.CAUSAL)
    return backbone(backbone.embed(ids), Packing((group,), positions))


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@torch.no_grad()
def test_weights_and_states_are_those_of_the_file(family: str, kind: str, tmp_path: Path) -> None:
    model = model_of(family)
    expected = gguf_files.write(tmp_path / "a.gguf", model, kind)
    backbone = load(tmp_path / "a.gguf")
    found = backbone.model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    model.load_state_dict(expected)
    ids = torch.randint(3, 250, (40,))
    theirs = model(ids[None]).last_hidden_state[0]
    torch.testing.assert_close(states(backbone, ids), theirs, rtol=1e-3, atol=1e-4)
    assert (backbone.max_positions, backbone.causal) == (128, True)
    half = load(tmp_path / "a.gguf", "bfloat16")
    assert torch.equal(half.word_embeddings.weight, expected["embed_tokens.weight"].bfloat16())


def test_the_tokenizer_is_the_file_s(tmp_path: Path) -> None:
    text = "the lamp, 42"
    for family in ("llama", "qwen2"):
        gguf_files.write(tmp_path / f"{family}.gguf", model_of(family), "F16")
        tokenizer = load(tmp_path / f"{family}.gguf").tokenizer
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids).strip() == text
        if family == "qwen2":
            assert tokenizer.convert_ids_to_tokens(ids)[:2] == ["th", "e"]


@torch.no_grad()
def test_the_rotation_of_llama_3_is_read(tmp_path: Path) -> None:
    """Its factors are a tensor of the file, and in Hugging Face's config.json otherwise."""
    plain, scaled = model_of("llama"), model_of("llama", rope_parameters=ROPE)
    factors = (plain.rotary_emb.inv_freq / scaled.rotary_emb.inv_freq).numpy()
    assert factors.max() == pytest.approx(8) and factors.min() == pytest.approx(1)
    gguf_files.write(tmp_path / "a.gguf", scaled, "F32", factors=factors)
    ids = torch.randint(3, 250, (100,))
    theirs = scaled(ids[None]).last_hidden_state[0]
    torch.testing.assert_close(states(load(tmp_path / "a.gguf"), ids), theirs, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(plain(ids[None]).last_hidden_state[0], theirs, atol=1e-2)


def test_a_folder_means_its_only_file(tmp_path: Path) -> None:
    gguf_files.write(tmp_path / "a.gguf", model_of("llama"), "Q8_0")
    assert load(tmp_path).weight_hash() == load(tmp_path / "a.gguf").weight_hash()
    backbone, own = shape_backbone(BackboneConfig(name=str(tmp_path)))
    assert own and backbone.dim == 64 and weights_at_hand(BackboneConfig(name=str(tmp_path)))
    (tmp_path / "b.gguf").write_bytes(b"")
    with pytest.raises(
        BackboneError, match=r"2 GGUF files .* a.gguf and b.gguf; name one"
    ) as error:
        load(tmp_path)
    one_line(error)
    with pytest.raises(BackboneError, match=r"no.gguf'?: no such file"):
        load(tmp_path / "no.gguf")
    with pytest.raises(BackboneError, match=r"is a GGUF file, read as plain weights; leave out"):
        load(tmp_path / "a.gguf", quantize="8bit")


def test_what_is_not_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.gguf"
    gguf_files.write(path, model_of("llama"), "F32", scaling="yarn")
    with pytest.raises(BackboneError, match=r"rotary positions are scaled \(yarn\)"):
        load(path)
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "bloom")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(BackboneError, match="family 'bloom'; of GGUF files, those of llama, qwen2"):
        load(tmp_path / "b.gguf")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(BackboneError, match="is no GGUF file, or torn") as error:
        load(path)
    one_line(error)
    monkeypatch.setattr(gguf_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackboneError, match=r"needs gguf: pip install 'l2rec\[quantized\]'"):
        load(path)
