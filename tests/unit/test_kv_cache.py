"""A decoder with a cache computes what it computes without, however the text is cut, and whatever else is in
the batch.
"""

import dataclasses

import pytest
import torch
from torch import Tensor

from tests.reference.small_run import DECODERS, VOCAB
from torchtitan.generation.kv_cache import KVCache
from torchtitan.layers.init import initialise
from torchtitan.layers.masks import Mask
from torchtitan.models.decoder.model import Decoder, initial_weight

CPU = torch.device("cpu")
PLACES = 24


def decoder(name: str) -> Decoder:
    config = dataclasses.replace(DECODERS[name], layers=2)
    model = Decoder(config, VOCAB, "sdpa", 64)
    initialise(model, lambda parameter: initial_weight(parameter, config), 1)
    model.tie_weights()
    return model.eval()


def whole(model: Decoder, tokens: list[int]) -> Tensor:
    """Logits [S, V] of one sequence, all at once and without a cache."""
    ids = torch.tensor([tokens])
    positions = torch.arange(len(tokens), dtype=torch.int32)[None]
    mask = Mask(torch.zeros_like(positions), causal=True)
    return model(model.tok_embeddings(ids), positions, mask)[0]


def cached(model: Decoder, sequences: int, places: int = PLACES) -> KVCache:
    config, cache = model.config, KVCache(sequences, places, CPU)
    cache.attach(model.layers.values(), config.kv_heads, config.head_dim, torch.float32)
    return cache


def send(model: Decoder, cache: KVCache, new: dict[int, list[int]], width: int) -> dict[int, Tensor]:
    """Logits [count, V] of the new tokens of each row."""
    where = cache.append(list(new), [len(tokens) for tokens in new.values()], width)
    ids = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens in new.values()])
    mask = Mask(where["document_ids"], True, where["kv_document_ids"], where["rows"], where["kv_rows"])
    logits = model(model.tok_embeddings(ids), where["positions"], mask)
    return {row: logits[i, : len(tokens)] for i, (row, tokens) in enumerate(new.items())}


@pytest.fixture(params=["llama", "qwen2", "qwen3"])
def models(request) -> tuple[Decoder, Decoder]:
    """The same weights, to be used without a cache and with one."""
    return decoder(request.param), decoder(request.param)


@torch.no_grad()
def test_in_pieces_of_any_length_it_gives_the_logits_of_the_whole(models):
    plain, model = models
    texts = {row: torch.randint(VOCAB, (20,)).tolist() for row in range(3)}
    cache, got = cached(model, 3), {row: [] for row in texts}
    for pieces in ((7, 3, 5), (1, 1, 1), (4, 0, 2), (1, 6, 1), (2, 2, 2)):
        begun = {row: sum(map(len, got[row])) for row in texts}
        new = {row: texts[row][begun[row] : begun[row] + n] for row, n in zip(texts, pieces, strict=True)}
        for row, logits in send(model, cache, new, max(pieces)).items():
            got[row].append(logits)
    for row, tokens in texts.items():
        expected = whole(plain, tokens)[: cache.lengths[row]]
        torch.testing.assert_close(torch.cat(got[row]), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_sequence_is_cut_and_goes_on_otherwise(models):
    plain, model = models
    cache = cached(model, 2)
    send(model, cache, {0: [1, 2, 3, 4, 5], 1: [9, 9]}, 5)
    cache.crop(0, 2)
    got = send(model, cache, {0: [7, 8]}, 3)[0]
    torch.testing.assert_close(got, whole(plain, [1, 2, 7, 8])[2:], atol=1e-5, rtol=1e-4)
    cache.crop(1, 0)
    got = send(model, cache, {1: [6, 5]}, 2)[1]
    torch.testing.assert_close(got, whole(plain, [6, 5]), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_neighbours_change_nothing_by_not_one_bit(models):
    _, model = models
    cache = cached(model, 3)
    alone = send(model, cache, {0: [3, 1, 4], 1: [], 2: []}, 4)[0]
    for row in range(3):
        cache.crop(row, 0)
    beside = send(model, cache, {0: [3, 1, 4], 1: [1, 5, 9, 2], 2: [6]}, 4)[0]
    assert torch.equal(alone, beside)


def test_more_than_a_sequence_may_have_is_refused():
    cache = cached(decoder("llama"), 1)
    cache.append([0], [PLACES], PLACES)
    with pytest.raises(ValueError, match=f"holds {PLACES} tokens a sequence, not {PLACES + 1}"):
        cache.append([0], [1], 1)
    with pytest.raises(ValueError, match="cannot be cut"):
        cache.crop(0, PLACES + 1)
