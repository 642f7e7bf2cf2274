"""The user encoder of a run as an ONNX graph, for programs without Python or torch.

    OUT/user_encoder.onnx   items [B, T] int64, lengths [B] int64 -> users [B, D] float32
    OUT/items.safetensors   vectors [N, D] float32: scores are their inner products with users
    OUT/item_ids.json       the N ids, in the order of the rows
    OUT/manifest.json       method, version, data, max_items, D, opset, SHA-256 of the files

``items`` are rows of the catalog, oldest first, padded on the right with 0; ``lengths``, 1 to T,
says how many of a row are real. T is at most max_items: the caller cuts histories to their newest.
"""

from __future__ import annotations

__all__ = ["Export", "onnx_run", "write_graph"]

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2rec.config import method_class
from l2rec.data.dataset import Dataset
from l2rec.data.ragged import Ragged
from l2rec.disk import digest_of, read_json, replacing_folder, write_json, write_text
from l2rec.errors import CheckpointError, ConfigError
from l2rec.modules.sequences import pad, stacked
from l2rec.protocols import Exportable, Freezable, UserEncoder
from l2rec.runs.checkpoint import save_tensors
from l2rec.runs.folder import load_run_config, open_run_dataset
from l2rec.runs.predictor import Predictor, load

GRAPH, ITEMS, IDS, MANIFEST = (
    "user_encoder.onnx",
    "items.safetensors",
    "item_ids.json",
    "manifest.json",
)
Floats = npt.NDArray[np.float32]

KIND = "l2rec onnx"
"""What a manifest says that it is of."""
OPSET = 18
COMPARED, WITHIN = 64, 1e-4
"""Users that the graph is compared on, and how far from the model's vectors, in their lengths, it
may be: float32 sums in another order.
"""


@dataclass(frozen=True)
class Export:
    """``manifest``: as written. ``difference``: largest of any number of the graph's user vectors
    from the model's; None where onnxruntime is not installed.
    """

    manifest: dict[str, Any]
    difference: float | None


def onnx_run(run: Path, out: Path, data: Path | None = None) -> Export:
    """Write a run's user encoder and item vectors, compared with the model before they are there.

    Args:
        run: folder of the run.
        out: folder to write, a new or empty one, or one of an earlier export.
        data: data set of the run, if it was moved; some of its histories are compared.

    Raises:
        ConfigError: a package is not installed; the method's users are no function of stored item
            vectors, or the run is blended; the folder holds something else.
        CheckpointError: the run cannot be loaded, its data set is gone, the folder cannot be
            written, or the graph does not give the model's vectors.
    """
    _require_packages()
    _require_free(out)
    _require_exportable(run)
    dataset = open_run_dataset(run, data)
    predictor = load(run)
    if predictor.blend is not None:
        raise ConfigError(
            f"{run} is blended: its co-occurrence and repeats are no inner products; export the "
            "run it was made of, or use `l2rec serve`"
        )
    model = predictor.model.cpu()  # a GPU may round more: its GRU multiplies in TF32
    if isinstance(model, Freezable):
        model.freeze()
    encoder = model.user_encoder()
    rows = _some_histories(dataset, encoder.max_items)
    users = model.encode_users(rows).numpy()
    with replacing_folder(out, remedy="free some space") as folder:
        opset = write_graph(model, encoder, folder / GRAPH)
        difference = _largest_difference(folder / GRAPH, rows, users)
        _write_items(predictor, folder)
        manifest = {
            "kind": KIND,
            "method": type(model).__name__,
            "version": predictor.version,
            "data": dataset.fingerprint,
            "items": len(predictor.ids),
            "max_items": encoder.max_items,
            "dim": users.shape[1],
            "opset": opset,
            "sha256": {p.name: digest_of(p) for p in sorted(folder.iterdir())},
        }
        write_json(folder / MANIFEST, manifest)
    return Export(manifest, difference)


# -- refusals ------------------------------------------------------------------------------------


def _require_packages() -> None:
    """Ask for what writes a graph; what runs one may be missing."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"`l2rec onnx` needs {error.name}: pip install 'l2rec[onnx]'") from None


def _require_free(out: Path) -> None:
    """Refuse to replace a folder that holds anything but an export."""
    held = {path.name for path in out.iterdir()} if out.exists() else set()
    manifest = read_json(out / MANIFEST) if MANIFEST in held else {}
    ours = {MANIFEST, *manifest["sha256"]} if manifest.get("kind") == KIND else set()
    if not held <= ours:
        raise ConfigError(f"{out} holds something else than an export; choose another --out")


def _require_exportable(run: Path) -> None:
    """Refuse a method that cannot be exported, before it is loaded."""
    config, _ = load_run_config(run)
    method = method_class(config.method)
    if not issubclass(method, Exportable):
        reads = "reads texts in its language model at each request" if method.uses_backbone else ""
        raise ConfigError(
            f"{run}: {method.__name__} {reads or 'has no user_encoder'}, so there is no graph of "
            "ids and stored vectors; use `l2rec serve`, or `l2rec embed` if it has vectors"
        )


# -- the graph -----------------------------------------------------------------------------------


class _Graph(nn.Module):
    """What is exported: ``items`` [B, T], ``lengths`` [B] -> users [B, D]; item vectors inside."""

    def __init__(self, model: nn.Module, encoder: UserEncoder) -> None:
        super().__init__()
        self.model, self.encode = model, encoder.encode  # the model holds the weights of `encode`
        self.register_buffer("items", encoder.items.float().clone())
        self.items: Tensor

    def forward(self, items: Tensor, lengths: Tensor) -> Tensor:
        real = torch.arange(items.shape[1], device=items.device) < lengths[:, None]
        return self.encode(F.embedding(items, self.items), real).float()


def write_graph(model: nn.Module, encoder: UserEncoder, path: Path) -> int:
    """Trace and write the graph of a model's user encoder, in which B and T are free.

    Args:
        model: on the CPU and in evaluation mode; it holds the weights of ``encoder``.
        encoder: of the model.
        path: file to write.

    Returns:
        The opset of the graph.

    Raises:
        ConfigError: the installed versions of torch and onnxscript cannot export it.
    """
    import onnx_ir

    try:
        with _quiet():
            program = torch.onnx.export(
                _Graph(model, encoder),
                (torch.zeros(3, 2, dtype=torch.int64), torch.tensor([1, 2, 1])),
                verbose=False,
                opset_version=OPSET,
                dynamo=True,
                input_names=["items", "lengths"],
                output_names=["users"],
                dynamic_shapes={"items": {0: "batch", 1: "length"}, "lengths": {0: "batch"}},
            )
    except torch.onnx.OnnxExporterError as error:
        raise ConfigError(
            f"PyTorch {torch.__version__} cannot export this encoder with the onnxscript that is "
            f"installed: {str(error).splitlines()[0]}"
        ) from error
    assert program is not None
    # Every node has a stack trace, with the paths of this machine; half of a small file.
    written = program.model
    onnx_ir.passes.common.ClearMetadataAndDocStringPass()(written)
    program.save(path)
    return written.opset_imports[""]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the exporter says of its own code, and of packages it does without, to itself."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


# -- the comparison ------------------------------------------------------------------------------


def _some_histories(dataset: Dataset, max_items: int) -> Ragged:
    """Return the newest items of users from all over the data set; of the last row, one item."""
    sequences = dataset.sequences
    users = np.flatnonzero(sequences.lengths > 0)
    chosen = users[np.unique(np.linspace(0, len(users) - 1, COMPARED).astype(np.int64))]
    return stacked(sequences.take(chosen).tail(max_items), sequences.take(users[:1]).tail(1))


def _largest_difference(path: Path, rows: Ragged, users: Floats) -> float | None:
    """Run the graph on all rows, and on the last one alone; return how far it is from ``users``
    [B, D] at most, or None without onnxruntime.

    Raises:
        CheckpointError: too far.
    """
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    worst = 0.0
    for part in (np.arange(len(rows)), np.arange(len(rows))[-1:]):
        some = rows.take(part)
        given = {"items": pad(some)[0].numpy(), "lengths": some.lengths}
        (vectors,) = session.run(["users"], given)
        worst = max(worst, float(np.abs(vectors - users[part]).max()))
    if not worst <= WITHIN * float(np.linalg.norm(users, axis=1).mean()):
        raise CheckpointError(
            f"the graph's user vectors are up to {worst:.2g} from the model's, so none was "
            "written; try other versions of torch, onnx and onnxscript"
        )
    return worst


# -- beside the graph ----------------------------------------------------------------------------


def _write_items(predictor: Predictor, folder: Path) -> None:
    """Write the item vectors as a run folder has them, and the ids of their rows."""
    assert predictor.vectors is not None
    vectors = predictor.vectors.float()
    save_tensors(folder / ITEMS, {"vectors": vectors}, model=predictor.version)
    write_text(folder / IDS, json.dumps(predictor.ids, ensure_ascii=False) + "\n")
