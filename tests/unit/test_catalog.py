"""The catalog a method sees: texts, fields, and clear words where one is missing."""

from __future__ import annotations

import pyarrow as pa
import pytest

from l2rec.data.catalog import Catalog
from l2rec.errors import DataError


def test_texts_and_fields() -> None:
    table = {"item_id": ["a", "b"], "brand": ["Bosch", None], "text": ["a drill", None]}
    catalog = Catalog(pa.table(table))
    assert len(catalog) == 2 and catalog.fields == ["brand"]
    assert catalog.texts == ["a drill", ""] and catalog.field("brand") == ["Bosch", ""]
    with pytest.raises(DataError, match=r"no field 'brnd'.*'brand'.*it has: brand"):
        catalog.field("brnd")
    assert catalog.require_texts("X") == catalog.texts
    assert Catalog.of_texts(["x", "y"]).texts == ["x", "y"]


def test_a_method_that_reads_texts_says_that_there_are_none() -> None:
    with pytest.raises(DataError, match="LEARN reads item texts and no item of this data set has"):
        Catalog.of_texts(["", " "]).require_texts("LEARN")
    assert Catalog.of_texts([]).require_texts("LEARN") == []
