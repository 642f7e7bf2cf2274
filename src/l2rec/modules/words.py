"""Output layer from last hidden states to words, over the frozen backbone's word embeddings."""

from __future__ import annotations

__all__ = ["Speaker", "WordHead", "mask_token"]

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2rec.errors import BackboneError
from l2rec.modules.backbone import Backbone
from l2rec.modules.views import near_identity_


def mask_token(backbone: Backbone) -> int:
    """Return the token id that stands for a hidden word: the mask token, or the unknown-word one.

    Raises:
        BackboneError: the tokenizer has neither.
    """
    for token in (backbone.tokenizer.mask_token_id, backbone.tokenizer.unk_token_id):
        if token is not None:
            return int(token)
    raise BackboneError(
        f"the tokenizer of backbone {backbone.name!r} has no mask token to hide words behind; "
        "choose another backbone"
    )


class WordHead(nn.Module):
    """Output layer with logits h E^T over the word embeddings E.

    A causal language model whose output layer is tied to E, as in small Qwen and Llama models,
    needs no more: then nothing is trained here. A backbone is loaded without an output layer, so
    for any other a trained map stands in for it, (W h + b) E^T + c: BERT's head without its
    nonlinearity. W starts at the identity (`near_identity_`), b at zero and c at the log share of
    each word, which a bias would take thousands of steps to reach.

    Args:
        backbone: the language model, which is not trained here.
        texts: token ids of the texts to be predicted, for the shares of words.
    """

    def __init__(self, backbone: Backbone, texts: npt.NDArray[np.integer]) -> None:
        super().__init__()
        tied = getattr(backbone.model.config, "tie_word_embeddings", False)
        words, word_dim = backbone.word_embeddings.weight.shape
        self.trained = not (backbone.causal and tied and word_dim == backbone.dim)
        if self.trained:
            self.transform = nn.Linear(backbone.dim, word_dim)
            counts = torch.from_numpy(np.bincount(texts, minlength=words))
            self.bias = nn.Parameter(((counts + 0.1) / (counts + 0.1).sum()).float().log())
            near_identity_(self.transform.weight)
            nn.init.zeros_(self.transform.bias)

    def forward(self, states: Tensor, matrix: Tensor, words: Tensor | None = None) -> Tensor:
        """Compute logits [..., V] float32.

        Args:
            states: [..., D] last hidden states.
            matrix: [V', word_dim] the word embeddings E.
            words: [V] int64 ids of the words to choose among; None for all V' of them.
        """
        rows = matrix if words is None else matrix.index_select(0, words)
        if not self.trained:
            return F.linear(states.to(rows.dtype), rows).float()
        logits = F.linear(self.transform(states.float()).to(rows.dtype), rows).float()
        return logits + (self.bias if words is None else self.bias.index_select(0, words))


class Said(NamedTuple):
    """Output of `Speaker`. logits: [B, T, V] float32."""

    logits: Tensor


class Speaker:
    """A decoder-only backbone with an output layer, as `l2rec.modules.beam.CausalDecoder` takes it.

    Args:
        model: the Hugging Face model, as `Backbone.unpacked` yields it.
        head: its output layer, states and word embeddings -> logits, as `WordHead`.
        matrix: [V, word_dim] the word embeddings.
    """

    def __init__(
        self, model: Any, head: Callable[[Tensor, Tensor], Tensor], matrix: Tensor
    ) -> None:
        self._model, self._head, self._matrix = model, head, matrix
        self.dtype = matrix.dtype

    def __call__(self, *, logits_to_keep: int = 0, **inputs: Any) -> Said:
        """Run the model and return logits [B, T, V], of the last places only where so asked."""
        states = self._model(**inputs).last_hidden_state[:, -logits_to_keep:]
        return Said(self._head(states, self._matrix))
