"""Tensors of the items, where a run goes on from one on fewer items."""

from __future__ import annotations

import pytest
import torch

from l2rec.errors import CheckpointError
from l2rec.runs.start import _with_rows


def test_earlier_rows_come_first() -> None:
    own, earlier = torch.arange(10.0).reshape(5, 2), -torch.ones(3, 2)
    rows = _with_rows(own, earlier, 3, 5, "residual")
    assert torch.equal(rows, torch.cat((earlier, own[3:])))


def test_a_mean_over_as_many_items_as_it_has_numbers_is_no_row_of_items() -> None:
    own, earlier = torch.arange(3.0), -torch.ones(3)
    assert torch.equal(_with_rows(own, earlier, 3, 5, "mean"), own)


def test_a_tensor_of_another_catalog_is_refused() -> None:
    with pytest.raises(CheckpointError, match="codebook is made for one catalog"):
        _with_rows(torch.ones(5, 2), torch.ones(4, 2), 3, 5, "codebook")
