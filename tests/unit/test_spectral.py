"""The tree of items: planted communities are found, and every item has a code of its own."""

from __future__ import annotations

import numpy as np
import pytest
from tests.support.rows import rows_of

from l2rec.data.ragged import Ragged
from l2rec.modules import spectral
from l2rec.modules.spectral import spectral_clusters, together, tree_codes


def communities(sizes: list[int], rows: int = 300, seed: int = 0) -> Ragged:
    """Draw sequences of four items of one community each; items of one stand next to each other,
    and in one sequence of twenty the last item is of any.
    """
    rng = np.random.default_rng(seed)
    first = np.cumsum([0, *sizes])
    drawn = []
    for _ in range(rows):
        which = rng.integers(len(sizes))
        row = rng.choice(sizes[which], 4, replace=False) + first[which]
        if rng.random() < 0.05:
            row[-1] = rng.integers(first[-1])
        drawn.append(row.tolist())
    return Ragged.from_rows(drawn)


def test_counts_by_hand() -> None:
    rows = Ragged.from_rows([[0, 1, 1, 2], [1, 0], [3], [2, 2]])
    expected = [[0, 2, 1, 0], [2, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    assert together(rows, 4).toarray().tolist() == expected


@pytest.mark.parametrize("dense", [1, 512])
def test_planted_communities_are_found(dense: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By both ways to the eigenvectors."""
    monkeypatch.setattr(spectral, "DENSE", dense)
    labels = spectral_clusters(together(communities([20, 12]), 32), 2, seed=0)
    assert len(set(labels[:20])) == len(set(labels[20:])) == 1 and labels[0] != labels[-1]


def test_eigenvectors_are_those_of_the_least_cut() -> None:
    both = together(communities([9, 7, 5]), 21).toarray()
    degree = both.sum(1)
    laplacian = np.eye(21) - both / np.sqrt(degree[:, None] * degree[None])
    values, expected = np.linalg.eigh(laplacian)
    found = spectral._eigenvectors(together(communities([9, 7, 5]), 21), 3, 0)
    assert values[2] < 0.5 < values[3], "three communities"
    np.testing.assert_allclose(found @ found.T, expected[:, :3] @ expected[:, :3].T, atol=1e-8)


def test_items_of_a_community_begin_alike() -> None:
    codes = tree_codes(together(communities([20, 12]), 32), clusters=2, leaf=8, seed=0)
    begins = [code[0] for code in codes]
    assert len(set(begins[:20])) == len(set(begins[20:])) == 1 and begins[0] != begins[-1]


def shares_a_beginning(codes: list[tuple[int, ...]]) -> bool:
    whole = set(codes)
    return any(code[:n] in whole for code in codes for n in range(1, len(code)))


@pytest.mark.parametrize(("clusters", "leaf"), [(2, 2), (3, 5), (10, 10)])
def test_codes_are_different_and_none_begins_another(clusters: int, leaf: int) -> None:
    both = together(communities([20, 12, 30]), 70)  # eight items of no sequence
    codes = tree_codes(both, clusters=clusters, leaf=leaf, seed=0)
    assert len(set(codes)) == 70 and not shares_a_beginning(codes)
    assert max(map(max, codes)) < leaf
    assert codes == tree_codes(both, clusters=clusters, leaf=leaf, seed=0)


def test_items_of_no_sequence_are_a_cluster_of_their_own() -> None:
    codes = tree_codes(together(communities([20, 12]), 36), clusters=3, leaf=8, seed=0)
    begins = [code[0] for code in codes]
    assert len(set(begins[32:])) == 1 and begins[32] not in begins[:32]


def test_where_nothing_tells_items_apart_they_are_cut_into_equal_parts() -> None:
    nothing = together(Ragged.from_rows([[0]]), 9)
    assert spectral_clusters(nothing, 3, 0).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    everything = together(Ragged.from_rows([list(range(9))]), 9)
    codes = tree_codes(everything, clusters=2, leaf=2, seed=0)
    assert len(set(codes)) == 9 and not shares_a_beginning(codes)


def test_a_sequence_moves_only_what_it_holds() -> None:
    """Counts are of the sequences that are given, and of nothing else."""
    rows = communities([20, 12])
    fewer = Ragged.from_rows(rows_of(rows)[:-1])
    difference = (together(rows, 32) - together(fewer, 32)).toarray()
    assert set(np.flatnonzero(difference.sum(1))) <= set(rows[len(rows) - 1])
