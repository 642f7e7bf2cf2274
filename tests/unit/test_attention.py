"""The two ways to compute attention on a CPU are one function."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from l2rec.modules import packing as packing_module
from l2rec.modules.packing import Attend, Packing, pack, packed_attention


@pytest.mark.parametrize("attend", list(Attend))
@pytest.mark.parametrize("lengths", [[5, 1, 9, 3], [4, 4]], ids=["ragged", "even"])
def test_explicit_products_equal_the_fused_kernel(
    attend: Attend, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = torch.cat([torch.arange(n) // 2 for n in lengths])
    group, positions = pack(torch.tensor(lengths), attend, blocks=blocks)
    packing = Packing((group,), positions)
    results: list[list[Tensor]] = []
    for longest in (0, 1000):
        monkeypatch.setattr(packing_module, "LONG_ROW", {torch.float64: longest})
        torch.manual_seed(0)
        inputs = [torch.randn(1, 2, sum(lengths), 8, dtype=torch.float64) for _ in range(3)]
        for x in inputs:
            x.requires_grad_()
        out, _ = packed_attention(torch.nn.Identity(), *inputs, None, packing=packing)
        (out * torch.linspace(-1, 1, 8)).square().sum().backward()
        results.append([out.detach(), *(x.grad for x in inputs if x.grad is not None)])
    fused, explicit = results
    assert len(fused) == len(explicit) == 4
    for a, b in zip(fused, explicit, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
