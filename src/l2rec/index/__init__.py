"""Search for the k item vectors with the largest inner product: exact, FAISS, Milvus.

    exact    blocked matmul and top-k, nothing to build; every other kind is measured against it
    flat     FAISS over all rows: exact as well
    hnsw     FAISS graph
    ivf      FAISS inverted lists
    int8     FAISS over all rows, a byte for each number
    binary   FAISS over all rows, a bit for each number (RaBitQ), the best scored once more in int8
    milvus   a Milvus server by URI (token from L2REC_MILVUS_TOKEN), or a file with milvus-lite

Rows are numbered as in the vectors an index was built from.
"""

from l2rec.index.building import build, build_folder, recall
from l2rec.index.exact import Exact
from l2rec.index.faiss import Faiss
from l2rec.index.folder import load, save
from l2rec.index.milvus import Milvus
from l2rec.index.protocol import KINDS, Attribute, Index

__all__ = [
    "KINDS",
    "Attribute",
    "Exact",
    "Faiss",
    "Index",
    "Milvus",
    "build",
    "build_folder",
    "load",
    "recall",
    "save",
]
