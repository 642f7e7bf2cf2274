"""GGUF files of Llama and Qwen models: found, and what Hugging Face leaves unread of them.

Hugging Face turns blocks into plain weights at load, and rows of Llama's q and k back into their
order. It reads neither the size of a head nor the scaling of the rotary positions; the first is
read here, of the second the factors that Llama 3.1 and its like come with, and the rest refused.

    angle of position p, pair i       p / (base^(2i/d) factor_i)      `rope_freqs.weight`
"""

from __future__ import annotations

__all__ = ["find_gguf", "load_settings", "place", "scale_rotation"]

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import nn

from l2rec.errors import BackboneError

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Those that are tested against the models they were written from."""
FACTORS = "rope_freqs.weight"
PACKAGES = ("gguf", "accelerate")
"""What reading needs; the latter by Hugging Face's own reader."""


def find_gguf(name: str) -> Path | None:
    """Return the GGUF file that a backbone's name means: a file, or the only one in a folder
    without a config.json; None if it means none.

    Raises:
        BackboneError: a folder of several, or no such file.
    """
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        files = sorted(path.glob("*.gguf"))
        if len(files) > 1:
            raise BackboneError(
                f"backbone {name!r}: {len(files)} GGUF files in this folder, such as "
                f"{files[0].name} and {files[1].name}; name one of them"
            )
        return files[0].resolve() if files else None
    if path.suffix != ".gguf":
        return None
    if not path.is_file():
        raise BackboneError(f"backbone {name!r}: no such file")
    return path.resolve()


def place(file: Path) -> tuple[str, dict[str, str]]:
    """Return where ``from_pretrained`` finds a file, and the option that names it."""
    return str(file.parent), {"gguf_file": str(file)}


def _reader(path: Path) -> Any:
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise BackboneError(f"{path} needs {package}: pip install 'l2rec[quantized]'")
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    except (OSError, ValueError, KeyError, IndexError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise BackboneError(f"{path} is no GGUF file, or torn: {reason}") from error


def load_settings(path: Path) -> Any:
    """Read the configuration of a model from its GGUF file.

    Raises:
        BackboneError: another family, or rotary positions that are scaled in another way than by
            `FACTORS`.
    """
    from transformers import AutoConfig

    fields = _reader(path).fields
    family = fields["general.architecture"].contents()
    if family not in ARCHITECTURES:
        raise BackboneError(
            f"{path} holds a model of the family {family!r}; of GGUF files, those of "
            f"{', '.join(ARCHITECTURES)} are read; give the checkpoint that it was made of"
        )
    scaling = fields.get(f"{family}.rope.scaling.type")
    if scaling is not None and scaling.contents() != "none":
        raise BackboneError(
            f"{path}: its rotary positions are scaled ({scaling.contents()}), which is not read "
            "from GGUF files; give the checkpoint that it was made of"
        )
    folder, options = place(path)
    settings: Any = AutoConfig.from_pretrained(folder, **options)
    size = fields.get(f"{family}.attention.key_length")
    if size is not None:
        settings.head_dim = int(size.contents())
    return settings


def scale_rotation(model: nn.Module, path: Path) -> None:
    """Divide a model's rotary frequencies [d / 2] by the factors of its file, if it has any."""
    for tensor in _reader(path).tensors:
        if tensor.name == FACTORS:
            rotation: Any = model.rotary_emb
            rotation.inv_freq = rotation.inv_freq / torch.tensor(tensor.data)
            rotation.original_inv_freq = rotation.inv_freq.clone()
