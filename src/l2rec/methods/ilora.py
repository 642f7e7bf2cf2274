"""iLoRA: Customizing Language Models with Instance-wise LoRA for Sequential Recommendation.

Kong, Wu, Zhang, Sheng, Lin, Wang, He. NeurIPS '24, https://arxiv.org/abs/2408.10159

    LLaRA (`l2rec.methods.llara`): its prompts, curriculum, loss and ranking; its LoRA of rank R is
    cut into K experts of rank R / K, A in rows and B in columns, weighed for each user:

    w        = softmax(W_g z)             z: the frozen SASRec's state after the user's newest item
    dW x     = alpha/(R / K) sum_k w_k B_k A_k x

One w for all tokens of a user's prompt and answer, all matrices and all layers. LoRA has as many
weights as LLaRA's; W_g [K, id_dim] is all that is added.

Choices where the paper leaves one, and deviations, beside LLaRA's:

- alpha/(R / K) is the scale of an expert, of its own rank, as in the authors' code: with even
  weights an update is LLaRA's of the same alpha.
- All K experts are used, with no loss that balances them. W_g has no bias.
- z is read without dropout, in training too: SASRec is frozen.
- K = 4. The gate is the paper's W_g; that of the authors' code is said to be a small convolution.
"""

from __future__ import annotations

__all__ = ["ILoRA", "ILoRAConfig"]

from pathlib import Path

from pydantic import Field, model_validator
from torch import Tensor, nn

from l2rec.data.catalog import Catalog
from l2rec.data.ragged import Ragged
from l2rec.methods.llara import LLaRA, LLaRAConfig
from l2rec.modules.backbone import Backbone


class ILoRAConfig(LLaRAConfig):
    """Options of iLoRA, beside LLaRA's."""

    experts: int = Field(4, ge=1)
    """K, experts into which ``rank`` is cut; it divides it."""

    @model_validator(mode="after")
    def _consistent(self) -> ILoRAConfig:
        if self.rank % self.experts:
            raise ValueError(f"experts={self.experts} does not divide rank={self.rank}")
        return self


class ILoRA(LLaRA):
    """The recommender."""

    Config = ILoRAConfig
    config: ILoRAConfig

    def __init__(
        self,
        config: ILoRAConfig,
        catalog: Catalog,
        backbone: Backbone,
        *,
        cache: Path | None = None,
    ) -> None:
        super().__init__(config, catalog, backbone, cache=cache)
        self.gate = nn.Linear(config.id_dim, config.experts, bias=False)

    def expert_weights(self, histories: Ragged) -> Tensor:
        """Compute w = softmax(W_g z), [B, K]."""
        # A copy, for what was computed without gradients may not enter a graph.
        users = self.sasrec.encode_users(histories).to(self.gate.weight, copy=True)
        return self.gate(users).softmax(-1)  # type: ignore[no-any-return]

    def rank_weights(self, histories: Ragged) -> Tensor:
        """Return K w_k at each of the R / K ranks of expert k, [B, R]: LoRA's own scale is alpha/R,
        an expert's K times that.
        """
        k = self.config.experts
        weights = k * self.expert_weights(histories)
        return weights.repeat_interleave(self.config.rank // k, dim=1)
