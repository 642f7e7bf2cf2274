"""The peer of `serving.py`: a recommender service of a few lines, as one would write it by hand.

    python benchmarks/serving_peer.py RUN PORT [ITEM_TOKENS]

It gets what the run has: the same backbone in the same precision, the same items. A history is its
items' texts, one after the other, encoded by sentence-transformers; its nearest items are found by
a flat FAISS index. ITEM_TOKENS cuts every text to as many tokens, so that it reads as much as l2rec
does.
"""

from __future__ import annotations

import sys
from pathlib import Path

import faiss
import numpy as np
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import SentenceTransformer

from l2rec.modules.backbone import dtype_of, minilm_source
from l2rec.runs.folder import load_run_config, read_catalog

run, port = Path(sys.argv[1]), int(sys.argv[2])
backbone = load_run_config(run)[0].backbone
encoder = SentenceTransformer(
    minilm_source() if backbone.name == "minilm" else backbone.name,
    device="cpu",
    model_kwargs={"dtype": dtype_of(backbone)},
)
catalog = read_catalog(run)
ids, texts = catalog.table["item_id"].to_pylist(), catalog.texts
index_of = {item: n for n, item in enumerate(ids)}
vectors = encoder.encode(texts, normalize_embeddings=True)
index = faiss.IndexFlatIP(vectors.shape[1])
index.add(vectors)
if len(sys.argv) > 3:
    cut = encoder.tokenizer(texts, truncation=True, max_length=int(sys.argv[3]) + 2)["input_ids"]
    texts = encoder.tokenizer.batch_decode(cut, skip_special_tokens=True)
app = FastAPI()


class Request(BaseModel):
    history: list[str]
    k: int = 10


@app.post("/v1/recommend")
def recommend(body: Request) -> dict[str, object]:
    rows = [index_of[item] for item in body.history]
    user = encoder.encode([" ".join(texts[row] for row in rows)], normalize_embeddings=True)
    scores, found = index.search(np.asarray(user), body.k + len(rows))
    best = [(n, s) for n, s in zip(found[0], scores[0], strict=True) if n not in rows][: body.k]
    return {"items": [{"id": ids[n], "score": float(s), "text": texts[n]} for n, s in best]}


@app.get("/livez")
def livez() -> dict[str, str]:
    return {"status": "alive"}


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")
