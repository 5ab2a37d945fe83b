"""The stream of tokens, its chunks, and batches by step."""

import json

import grain
import numpy as np
import pytest
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from nmjax.data import token_stream as module
from nmjax.data.bpe import train_bpe
from nmjax.data.token_stream import Chunks, batches, held_out_batches, token_stream

DOCUMENTS = ["Once upon a time.", "x", "It spells <|endoftext|> out.", "The end,\nat last!", "Ünï 🦆"]
L, B = 5, 4


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(DOCUMENTS, 280)


@pytest.fixture(scope="module")
def chunks():
    """10 of them, told by their first token: chunk i begins with i * L."""
    return Chunks(np.arange(10 * L + 4, dtype=np.int32), L)


def numbers(tokens):
    """Which chunks they are: [..., L + 2] -> [...]."""
    assert np.array_equal(tokens - tokens[..., :1], np.broadcast_to(np.arange(L + 2), tokens.shape))
    return tokens[..., 0] // L


@pytest.mark.parametrize("at_once", [1000, 2])
def test_every_document_and_its_end(tokenizer, monkeypatch, at_once):
    monkeypatch.setattr(module, "_DOCUMENTS_AT_ONCE", at_once)
    stream, end = token_stream(tokenizer, DOCUMENTS), tokenizer.eos_token_id
    assert stream.dtype == np.int32
    (ends,) = np.nonzero(stream == end)
    parts = np.split(stream, ends + 1)
    assert [tokenizer.decode(part[:-1]) for part in parts[:-1]] == DOCUMENTS and not len(parts[-1])
    assert parts[0].tolist() == [*tokenizer.encode(DOCUMENTS[0]), end]


def test_a_tokenizers_own_frame_is_left_out(tokenizer):
    end = tokenizer.eos_token_id
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.post_processor = processors.TemplateProcessing(single="x $A", special_tokens=[("x", core.token_to_id("x"))])
    framing = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>")
    plain = tokenizer.encode("a time")
    assert framing.encode("a time") == [core.token_to_id("x"), *plain]
    assert token_stream(framing, ["a time"]).tolist() == [*plain, end]


@pytest.mark.parametrize(("n", "context"), [(3, 1), (7, 5), (11, 5), (12, 5), (16, 5), (17, 5), (60, 7), (130, 128)])
def test_every_token_is_a_target_once(n, context):
    chunks = Chunks(np.arange(n, dtype=np.int32), context)
    taken = [chunks[i] for i in range(len(chunks))]
    assert all(chunk.shape == (context + 2,) and chunk.dtype == np.int32 for chunk in taken)
    reached = len(chunks) * context
    assert np.concatenate([chunk[1:-1] for chunk in taken]).tolist() == [*range(1, reached + 1)]
    assert np.concatenate([chunk[2:] for chunk in taken]).tolist() == [*range(2, reached + 2)]
    assert reached + 2 <= n < reached + context + 2  # as many as there is room for


def test_an_epoch_is_every_chunk_once(chunks):
    data = batches(chunks, B, 3)
    order = np.concatenate([numbers(data[step]["tokens"]) for step in range(5)])  # two epochs of 10
    epochs = order.reshape(2, 10)
    assert np.array_equal(np.sort(epochs), np.tile(np.arange(10), (2, 1)))
    assert len(np.unique(epochs, axis=0)) == 2 and not np.array_equal(epochs[0], np.arange(10))
    assert data[10**9]["tokens"].shape == (B, L + 2)


def test_a_seeds_order_depends_on_the_seed_alone(chunks):
    together = batches(chunks, B, [42, 43, 42])
    assert together[0]["tokens"].shape == (3, B, L + 2) and together[0]["tokens"].dtype == np.int32
    order = np.concatenate([numbers(together[step]["tokens"]) for step in range(5)], axis=1)  # [R, 2 epochs of 10]
    for row, seed in enumerate((42, 43, 42)):
        alone = batches(chunks, B, seed)
        assert np.array_equal(np.concatenate([numbers(alone[step]["tokens"]) for step in range(5)]), order[row])
        assert np.array_equal(batches(chunks, B, [seed])[4]["tokens"][0], together[4]["tokens"][row])
    # No epoch of one seed is an epoch of the other.
    assert len(np.unique(order[:2].reshape(4, 10), axis=0)) == 4


@pytest.mark.parametrize("seeds", [7, (7, 9)])
def test_an_iterator_goes_on_where_its_state_was_taken(chunks, seeds):
    data = batches(chunks, B, seeds)
    ahead = grain.ReadOptions(num_threads=2, prefetch_buffer_size=3)
    iterator = iter(data.to_iter_dataset(ahead))
    states = []
    for step in range(7):
        states.append(json.dumps(iterator.get_state()))
        assert np.array_equal(next(iterator)["tokens"], data[step]["tokens"])
    for step in (6, 0):
        other = iter(batches(chunks, B, seeds).to_iter_dataset(ahead))
        other.set_state(json.loads(states[step]))
        for later in range(step, step + 3):
            assert np.array_equal(next(other)["tokens"], data[later]["tokens"])


@pytest.mark.parametrize("size", [4, 10, 20])
def test_held_out_chunks_come_once(chunks, size):
    found = list(held_out_batches(chunks, size))
    assert len(found) == len(held_out_batches(chunks, size)) == -(-10 // size)
    tokens, weights = (np.concatenate([batch[name] for batch in found]) for name in ("tokens", "weights"))
    assert tokens.shape == (len(found) * size, L + 2) and weights.shape == (len(found) * size, L)
    assert weights.dtype == np.float32 and tokens.dtype == np.int32
    assert numbers(tokens[:10]).tolist() == [*range(10)] and (weights[:10] == 1).all()
    assert not tokens[10:].any() and not weights[10:].any()


def test_what_can_not_be_cut_or_batched(chunks, tokenizer):
    with pytest.raises(ValueError, match="stream must have 10 or more for context=8, got 9 tokens"):
        Chunks(np.zeros(9, np.int32), 8)
    with pytest.raises(ValueError, match="context must be 1 or more, got 0"):
        Chunks(np.zeros(9, np.int32), 0)
    for index in (-1, 10):
        with pytest.raises(IndexError, match=f"index must be 0 to 9, got {index}"):
            chunks[index]
    with pytest.raises(ValueError, match=r"batch_size=14 needs 72 tokens, got 54 \(10 chunks\)"):
        batches(chunks, 14, 0)
    for build in (lambda: batches(chunks, 0, 0), lambda: held_out_batches(chunks, 0)):
        with pytest.raises(ValueError, match="batch_size must be 1 or more, got 0"):
            build()
    for seeds in ([], [3, -1], -1):
        with pytest.raises(ValueError, match="seeds must be one or more numbers from 0, got "):
            batches(chunks, B, seeds)
    with pytest.raises(ValueError, match="documents must hold one text or more, got none"):
        token_stream(tokenizer, [])


def test_a_tokenizer_without_an_end(tokenizer):
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="tokenizer must have an eos_token to end documents with, got None"):
        token_stream(endless, DOCUMENTS)
