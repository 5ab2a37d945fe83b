"""Training on introspection records: both ways to compute it against each other and against the public engine."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
import nmjax
from nmjax.adapters import stack_layers
from nmjax.data.introspection_batches import Examples, held_out_batches, span, training_batches
from nmjax.data.introspection_chat import Segments
from nmjax.data.introspection_records import YES_NO, Record, unit_vectors
from nmjax.training import introspection as method
from nmjax.training import lora
from nmjax.training.introspection import (
    IntrospectionLoss,
    answer_logprobs,
    introspection_loss,
    kl_but_for_the_answer,
)

CONFIG = models.LlamaConfig.from_hf(
    {"architectures": ["Qwen2ForCausalLM"], "vocab_size": 23, "hidden_size": 8, "num_hidden_layers": 3,
     "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 12, "max_position_embeddings": 64,
     "tie_word_embeddings": True}
)  # fmt: skip
L, D, V = 3, 8, 23
SCANNED = models.ScannedLlama(CONFIG)
VECTORS = unit_vectors(5, D, 0)


def random_tree(tree, seed, size=0.5):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * size, jnp.float32), tree)


@pytest.fixture(scope="module")
def lm():
    module = models.Llama(CONFIG)
    params = random_tree(jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"], 0)
    adapter = lora.init(module, lora.LoraConfig(r=2, dropout=0.0), jax.random.key(1))
    return nmjax.LanguageModel(module, params).with_adapter(adapter.replace(weights=random_tree(adapter.weights, 1)))


@pytest.fixture(scope="module")
def variables(lm):
    """Of the scanned module."""
    return {"params": models.stack_layers(lm.params)} | stack_layers(lm.adapter, L).variables


def record(k, **fields):
    fields = {"kind": "clean", "answers": YES_NO, "answer": k % 2} | fields
    return Record(id=str(k), system="s", context="c", reply="r", question="q", **fields)


def examples(answers, sentence=None):
    """Four rows of different lengths: a vector, noise, nothing, another vector (somewhere in the prefix only)."""
    rng = np.random.default_rng(3)
    kinds = [
        {"kind": "steered", "vector": 3, "layers": (0, 2), "magnitude": 2.0},
        {"kind": "noise", "noise_seed": 5, "layers": (1, 2), "magnitude": 3.0},
        {},
        {"kind": "steered", "vector": 1, "layers": (1, 3), "magnitude": 4.0},
    ]
    texts = tuple(f" {k}" for k in range(len(answers)))
    records = [record(k, answers=texts, answer=(k + 1) % len(texts), **kind) for k, kind in enumerate(kinds)]
    segments = []
    for k, (P, Q) in enumerate([(6, 3), (4, 5), (7, 4), (5, 2)]):
        prefix, question = (tuple(rng.integers(3, V, n).tolist()) for n in (P, Q))
        inside = [k < 3 or 1 <= t < 3 for t in range(P)]
        segments.append(Segments(prefix, question, tuple(inside), answers))
    return Examples(records, segments, VECTORS, L)


SINGLE, SEVERAL = examples(((20,), (21,))), examples(((20, 5), (21,), (20, 6, 7)))


@pytest.fixture(scope="module")
def by_the_engine(lm):
    """[B, C] of SINGLE and SEVERAL from `continuation_logprobs` row by row, and the same where nothing is done."""
    prompts, continuations, packs = [], [], []
    for given in (SINGLE, SEVERAL):
        for one, segments in zip(given.records, given.segments, strict=True):
            pack = None
            if one.layers is not None:
                noise = one.kind == "noise"
                vectors = unit_vectors(len(segments.prefix), D, one.noise_seed) if noise else VECTORS[one.vector]
                pack = nmjax.steer_span(vectors, one.magnitude, range(*one.layers), span(segments))
            for answer in segments.answers:
                prompts.append(list(segments.prefix + segments.question))
                continuations.append(list(answer))
                packs.append(pack)
    every = nmjax.continuation_logprobs(lm, prompts * 2, continuations * 2, packs=packs + [None] * len(packs))
    found, clean = np.reshape([np.sum(tokens) for tokens in every], (2, -1))
    moved = np.abs(found - clean)[8:].reshape(4, 3).max(1) > 0.01
    assert moved.tolist() == [True, True, False, True]
    return np.reshape(found[:8], (4, 2)), np.reshape(found[8:], (4, 3))


def frozen_of(variables):
    return {name: tree for name, tree in variables.items() if name != "lora"}


def gradients(variables, given, **config):
    """((loss, metrics), gradient) of one segment and of two."""
    losses = [introspection_loss(SCANNED, IntrospectionLoss(**config, segments=segments)) for segments in (1, 2)]

    @jax.jit
    def of(weights, batch, frozen):
        return [jax.value_and_grad(loss, has_aux=True)(weights, batch, None, frozen=frozen) for loss in losses]

    return of(variables["lora"], given.batch(range(4)), frozen_of(variables))


@pytest.fixture(scope="module")
def single_gradients(variables):
    return gradients(variables, SINGLE)


def test_answers_equal_the_engines(lm, variables, by_the_engine):
    @jax.jit
    def ask(stacked, unrolled):
        several = [answer_logprobs(SCANNED, stacked, SEVERAL.batch(range(4)), segments=way) for way in (1, 2)]
        return *several, answer_logprobs(lm.module, unrolled, SINGLE.batch(range(4)))

    one, two, single = ask(variables, lm.variables)
    for (found, first), wanted in zip((one, two, single), by_the_engine[1:] * 2 + by_the_engine[:1], strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)
        np.testing.assert_allclose(np.exp(first).sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(single[1][:, [20, 21]], by_the_engine[0], atol=1e-5)


def test_both_ways_have_the_same_gradient(single_gradients):
    chex.assert_trees_all_close(*single_gradients, atol=1e-5)
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(single_gradients[0][1]))


@pytest.mark.slow
def test_both_ways_have_the_same_gradient_with_all_there_is(variables):
    found = gradients(variables, SEVERAL, loss="full", kl_to_base=0.3)
    chex.assert_trees_all_close(*found, atol=1e-5)
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(found[0][1]))
    (value, metrics), _ = found[0]
    assert metrics["kl_to_base"] > 1e-2
    np.testing.assert_allclose(value, gradients(variables, SEVERAL, loss="full")[0][0][0] + 0.3 * metrics["kl_to_base"])


def test_the_gradient_stops_at_the_conversation(variables, single_gradients):
    """A pass that is not cut there has another gradient; the loss follows the one that is cut, in which the adapter of
    the conversation's pass is another variable than that of the question's."""
    batch, weights, frozen = SINGLE.batch(range(4)), variables["lora"], frozen_of(variables)

    def scores(own, other):
        """The loss where the conversation is read under other weights."""
        B, P = batch["prefix"].shape
        effects = method._effects(batch, 1)
        before = method.plain_context(batch["prefix"], batch["prefix_mask"])
        cache = SCANNED.init_cache(B, P, jnp.float32)
        _, cache = SCANNED.apply({**frozen, "lora": other}, batch["prefix"], ctx=before, effects=effects, cache=cache)
        cache = jax.tree.map(lambda x: jnp.pad(x, [(0, 0)] * 3 + [(0, batch["rows"].shape[-1]), (0, 0)]), cache)
        ctx = method._behind(batch["rows"][:, 0], batch["rows_mask"][:, 0], before.k_pos).replace(slot=P)
        hidden, _ = SCANNED.apply({**frozen, "lora": own}, batch["rows"][:, 0], ctx=ctx, cache=cache)
        logits = SCANNED.apply(frozen, hidden[:, -1:], method="unembed")[:, 0][:, jnp.asarray([20, 21])]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["target"][:, None], 1).mean()

    cut, through = jax.jit(jax.grad(scores, (0, 1)))(weights, weights)
    chex.assert_trees_all_close(single_gradients[1][1], cut, atol=1e-5)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(through)) > 1e-3


def test_the_loss_is_the_mean_cross_entropy_of_the_answers(variables, by_the_engine, single_gradients):
    full = jax.jit(introspection_loss(SCANNED, IntrospectionLoss(loss="full")))
    rows = range(1, 4)  # of a part of a batch, so that parts can be added up
    found = full(variables["lora"], SEVERAL.batch(rows), None, frozen=frozen_of(variables))
    single, several = by_the_engine[0], by_the_engine[1][rows]
    among = single - np.log(np.exp(single).sum(1, keepdims=True))
    for (value, metrics), logprobs, scores, target in (
        (single_gradients[1][0], single, among, SINGLE.batch(range(4))["target"]),
        (found, several, several, SEVERAL.batch(rows)["target"]),
    ):
        np.testing.assert_allclose(value, -scores[np.arange(len(scores)), target].mean(), atol=1e-5)
        np.testing.assert_allclose(metrics["pair_mass"], np.exp(logprobs).sum(1).mean(), atol=1e-5)
        assert metrics["accuracy"] == np.mean(logprobs.argmax(1) == target, dtype=np.float32)


def test_kl_takes_the_answers_as_one_outcome():
    p, q = (np.log(np.random.default_rng(k).dirichlet(np.ones(6), 2)) for k in (0, 1))
    answers = np.asarray([[1, 4], [2, 2]])
    for row, (a, b) in enumerate(answers):
        inside = [t in (a, b) for t in range(6)]

        def lump(x, inside=inside):
            x = np.exp(x)
            return np.append(x[~np.asarray(inside)], x[inside].sum())

        wanted = (lump(p[row]) * np.log(lump(p[row]) / lump(q[row]))).sum()
        np.testing.assert_allclose(kl_but_for_the_answer(p, q, answers)[row], wanted, rtol=1e-5)
    swapped = q.copy()
    swapped[0, [1, 4]] = q[0, [4, 1]]
    np.testing.assert_allclose(
        kl_but_for_the_answer(p, swapped, answers), kl_but_for_the_answer(p, q, answers), rtol=1e-6
    )


def test_dropout_acts_in_both_segments(variables, by_the_engine, monkeypatch):
    monkeypatch.setattr(method, "_rngs", lambda keys, segment: {"dropout": keys[segment]})
    batch, frozen = SINGLE.batch(range(4)), frozen_of(variables)

    @jax.jit
    def asked(rate, *seeds):
        settings = jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf + rate if path[-1].key == "dropout" else leaf, frozen["lora_settings"]
        )
        given = {**variables, "lora_settings": settings}
        return answer_logprobs(SCANNED, given, batch, key=[jax.random.key(seed) for seed in seeds])[0]

    found = [asked(0.5, *seeds) for seeds in ((1, 2), (1, 2), (3, 2), (1, 3))]
    np.testing.assert_array_equal(found[0], found[1])
    assert all(np.abs(found[0] - other).max() > 1e-3 for other in found[2:])
    np.testing.assert_allclose(asked(0.0, 1, 2), by_the_engine[0], atol=1e-5)


def test_what_is_for_another_model_is_named(lm, variables):
    """Else an adapter with layers of another form would be passed over, and blocks beyond the last be the last."""
    frozen, batch = {k: v for k, v in variables.items() if k != "lora"}, SINGLE.batch(range(4))
    loss = introspection_loss(SCANNED)
    for weights, changes, message in [
        (lm.adapter.weights, {}, "layers_0/attn/k is no projection of this model"),
        (variables["lora"], {"vectors": np.ones((4, 1, D + 1))}, "vectors have 9 numbers each; wanted 8"),
        (variables["lora"], {"coefficients": np.ones((4, L - 1))}, "coefficients have 2 numbers each; wanted 3"),
        (variables["lora"], {"prefix": np.zeros((4, 64))}, "prefix and rows have 69 tokens; wanted at most 64"),
    ]:
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda w, b: loss(w, b, None, frozen=frozen), weights, batch | changes)  # noqa: B023


# --- Batches ----------------------------------------------------------------------------------------------------------


def test_every_epoch_has_every_record_once():
    many = Examples([record(k) for k in range(6)], [SINGLE.segments[0]] * 6, VECTORS, L)
    data = training_batches(many, 2, seed=4)
    epochs = [np.concatenate([data[step]["index"] for step in range(3 * e, 3 * e + 3)]) for e in range(2)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs) and (epochs[0] != epochs[1]).any()
    np.testing.assert_array_equal(data[1]["index"], training_batches(many, 2, seed=4)[1]["index"])
    held = held_out_batches(many, 4)
    assert [counts.tolist() for counts, _ in held] == [[True] * 4, [True, True, False, False]]
    assert np.concatenate([batch["index"][counts] for counts, batch in held]).tolist() == list(range(6))
    ((counts, batch),) = held_out_batches(many, 8)  # as many rows as a mesh divides, whatever there is
    assert counts.sum() == 6 and batch["index"].tolist() == [0, 1, 2, 3, 4, 5, 0, 0]


def test_noise_has_a_vector_of_its_own_at_every_position():
    """Which one does not depend on where the span begins."""
    kind = {"kind": "noise", "noise_seed": 5, "layers": (0, 2), "magnitude": 2.0}
    inside = [(True,) * 4, (False, True, True, False)]
    segments = [Segments((3, 4, 5, 6), (7,), at, ((20,), (21,))) for at in inside]
    batch = Examples([record(k, **kind) for k in range(2)], segments, VECTORS, L).batch(range(2))
    drawn = unit_vectors(4, D, 5)
    np.testing.assert_array_equal(batch["vectors"][0], drawn)
    np.testing.assert_array_equal(batch["vectors"][1, :2], drawn[1:3])
    assert (batch["start"].tolist(), batch["end"].tolist()) == ([0, 1], [4, 3])


def test_bad_examples_are_named():
    def steered(vector=1, layers=(0, 2), magnitude=1.0):
        return [record(0, kind="steered", vector=vector, layers=layers, magnitude=magnitude)]

    for records, segments, message in [
        ([], [], "at least one"),
        (steered(vector=7), SINGLE.segments[:1], "vector is 7; wanted below 5"),
        (steered(vector=-1), SINGLE.segments[:1], "vector is -1"),
        (steered(layers=(0, 9)), SINGLE.segments[:1], "the model has 3"),
        (steered(layers=(2, 2)), SINGLE.segments[:1], r"layers is \(2, 2\)"),
        (steered(magnitude=float("nan")), SINGLE.segments[:1], "magnitude is nan"),
        ([record(0), record(1)], [SINGLE.segments[0], SEVERAL.segments[0]], "as many in all"),
    ]:
        with pytest.raises(ValueError, match=message):
            Examples(records, segments, VECTORS, L)
    with pytest.raises(ValueError, match="batch_size=9"):
        training_batches(SINGLE, 9, 0)
    for bad in ({"loss": "sum"}, {"kl_to_base": -1.0}, {"segments": 3}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            IntrospectionLoss(**bad)
