"""The constrained decoder, against exhaustive scoring and against Transformers' own search."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from l2rec.data.ragged import Ragged
from l2rec.errors import DataError
from l2rec.modules.beam import (
    Beams,
    CausalDecoder,
    Decoder,
    Seq2SeqDecoder,
    beam_search,
    item_scores,
)
from l2rec.modules.trie import END, Trie

PAD, EOS, FIRST, V = 0, 1, 2, 20
USERS, PROMPT = 3, 7
Start = Callable[[PreTrainedModel, Tensor, Tensor], Decoder]


def t5() -> PreTrainedModel:
    config = T5Config(
        vocab_size=V,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=PAD,
        pad_token_id=PAD,
        eos_token_id=EOS,
    )
    return T5ForConditionalGeneration(config)


def llama() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    return LlamaForCausalLM(config)


FAMILIES: dict[str, tuple[Callable[[], PreTrainedModel], Start]] = {
    "t5": (t5, Seq2SeqDecoder),
    "llama": (llama, CausalDecoder),
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, Start]:
    build, start = FAMILIES[request.param]
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # far from uniform, so that beams differ
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return model, start


def prompts() -> tuple[Tensor, Tensor]:
    """Three prompts of different lengths, padded on the left."""
    ids = torch.from_numpy(np.random.default_rng(1).integers(FIRST, V, (USERS, PROMPT)))
    real = torch.arange(PROMPT) >= torch.tensor([[0], [3], [5]])
    return ids * real, real.long()


def random_codes(n: int, length: int, seed: int = 0) -> Ragged:
    """Codes that all have one length; some items share one."""
    rng = np.random.default_rng(seed)
    return Ragged.from_rows(rng.integers(FIRST, FIRST + 4, (n, length)).tolist())


def ending_codes(n: int) -> Ragged:
    """Codes of one to four tokens, each with the token that ends it."""
    rng = np.random.default_rng(3)
    rows = [[*rng.integers(FIRST, FIRST + 6, rng.integers(1, 5)).tolist(), EOS] for _ in range(n)]
    return Ragged.from_rows(rows)


def log_probability(model: PreTrainedModel, prompt: list[int], code: list[int]) -> float:
    """One prompt without padding, one code, one pass of Transformers' own model."""
    if model.config.is_encoder_decoder:
        said = torch.tensor([[PAD, *code]])
        logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=said).logits[0, :-1]
    else:
        logits = model(input_ids=torch.tensor([prompt + code])).logits[0, len(prompt) - 1 : -1]
    return float(logits.double().log_softmax(-1)[range(len(code)), code].sum())


@torch.no_grad()
def exhaustive(model: PreTrainedModel, codes: Ragged) -> Tensor:
    ids, real = prompts()
    rows = [row[keep].tolist() for row, keep in zip(ids, real.bool(), strict=True)]
    return torch.tensor(
        [[log_probability(model, row, code.tolist()) for code in codes] for row in rows]
    )


@torch.no_grad()
def searched(model: PreTrainedModel, start: Start, codes: Ragged, beams: int) -> tuple[Beams, Trie]:
    trie = Trie.of(codes)
    return beam_search(start(model, *prompts()), trie, beams, USERS), trie


CODES = {"equal": random_codes(30, 3), "ending": ending_codes(30), "one": random_codes(6, 1)}


@pytest.mark.parametrize("kind", CODES)
def test_a_beam_as_wide_as_the_catalog_scores_every_item(
    family: tuple[PreTrainedModel, Start], kind: str
) -> None:
    found, trie = searched(*family, CODES[kind], beams=len(CODES[kind]))
    scores = item_scores(found, trie)
    torch.testing.assert_close(scores, exhaustive(family[0], CODES[kind]), atol=1e-4, rtol=1e-5)
    assert bool((found.scores.diff() <= 0).all()), "best first"


def test_a_narrow_beam_is_that_of_transformers(family: tuple[PreTrainedModel, Start]) -> None:
    model, start = family
    codes = CODES["equal"]
    found, trie = searched(model, start, codes, beams=4)
    rows = {tuple(code.tolist()) for code in codes}
    ids, real = prompts()
    skipped = 1 if model.config.is_encoder_decoder else PROMPT

    def allowed(_: int, said: Tensor) -> list[int]:
        begun = tuple(said.tolist()[skipped:])
        return sorted({row[len(begun)] for row in rows if row[: len(begun)] == begun}) or [EOS]

    output = model.generate(
        input_ids=ids,
        attention_mask=real,
        num_beams=4,
        num_return_sequences=4,
        max_new_tokens=3,
        length_penalty=0.0,
        do_sample=False,
        prefix_allowed_tokens_fn=allowed,
        return_dict_in_generate=True,
        output_scores=True,
    )
    theirs = output.sequences[:, skipped:].view(USERS, 4, 3)
    torch.testing.assert_close(
        found.scores, output.sequences_scores.view(USERS, 4), atol=1e-4, rtol=1e-5
    )
    for user, beam in itertools.product(range(USERS), range(4)):
        item = int(trie.items[trie.items_first[found.leaves[user, beam]]])
        assert codes[item].tolist() == theirs[user, beam].tolist()


def test_every_answer_is_an_item_and_the_batch_changes_nothing(
    family: tuple[PreTrainedModel, Start],
) -> None:
    model, start = family
    trie = Trie.of(CODES["ending"])
    ids, real = prompts()
    with torch.no_grad():
        together = beam_search(start(model, ids, real), trie, 5, USERS)
        for user in range(USERS):
            keep = real[user].bool()
            alone = beam_search(
                start(model, ids[user, keep][None], real[user, keep][None]), trie, 5, 1
            )
            assert torch.equal(alone.leaves[0], together.leaves[user])
            torch.testing.assert_close(alone.scores[0], together.scores[user], atol=1e-4, rtol=1e-5)
    assert bool((together.leaves < len(trie.items_first) - 1).all())
    assert all(len(set(row.tolist())) == 5 for row in together.leaves), "no code twice"


def test_items_of_one_code_tie_and_what_was_not_found_comes_last() -> None:
    trie = Trie.of(Ragged.from_rows([[4, 5], [2, 3], [4, 5], [2, 2]]))
    beams = Beams(torch.tensor([[2, 0]]), torch.tensor([[-1.0, -2.0]]))
    assert item_scores(beams, trie).tolist() == [[-1.0, float("-inf"), -1.0, -2.0]]
    assert trie.collisions == 0.5


def test_fewer_codes_than_beams(family: tuple[PreTrainedModel, Start]) -> None:
    found, trie = searched(*family, Ragged.from_rows([[2, 3], [4, 3], [2, 3]]), beams=9)
    assert found.leaves.shape == (USERS, 2) and bool(item_scores(found, trie).isfinite().all())


def test_vectors_as_prompts_are_read_as_their_tokens(family: tuple[PreTrainedModel, Start]) -> None:
    model, start = family
    trie, (ids, real) = Trie.of(CODES["equal"]), prompts()
    with torch.no_grad():
        of_ids = beam_search(start(model, ids, real), trie, 4, USERS)
        vectors: Any = model.get_input_embeddings()(ids)
        of_vectors = beam_search(start(model, vectors, real), trie, 4, USERS)
    assert torch.equal(of_ids.leaves, of_vectors.leaves)
    assert torch.equal(of_ids.scores, of_vectors.scores)


@pytest.mark.parametrize("kind", CODES)
def test_a_trie_holds_every_code_and_no_other(kind: str) -> None:
    codes = CODES[kind]
    trie = Trie.of(codes)
    paths: list[tuple[int, list[int]]] = [(0, [])]
    for depth, tokens in enumerate(trie.tokens):
        longer = []
        for node, path in paths:
            children, real = trie.children(depth, torch.tensor([node]))
            longer += [(int(c), [*path, int(tokens[c])]) for c in children[real]]
        paths = longer
    assert [leaf for leaf, _ in paths] == list(range(len(trie.items_first) - 1))
    for leaf, path in paths:
        for item in trie.items[trie.items_first[leaf] : trie.items_first[leaf + 1]]:
            assert codes[int(item)].tolist() == [t for t in path if t != END]
            assert int(trie.leaf[item]) == leaf
    assert sorted(trie.items.tolist()) == list(range(len(codes)))


@pytest.mark.parametrize("rows", [[], [[2], []], [[2, 3], [2]], [[2, 3], [4], [2]]])
def test_codes_that_cannot_be_told_apart_are_refused(rows: list[list[int]]) -> None:
    with pytest.raises(DataError, match="code"):
        Trie.of(Ragged.from_rows(rows))
