"""Training on introspection records: both ways to compute it against each other and against the public engine."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
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
from nmjax.training.loop import init_state, make_step

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


def by_the_engine(lm, given):
    """[B, C], from `continuation_logprobs` row by row."""
    prompts, continuations, packs = [], [], []
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
    found = nmjax.continuation_logprobs(lm, prompts, continuations, packs=packs)
    return np.asarray([np.sum(tokens) for tokens in found]).reshape(len(given.records), -1)


@pytest.mark.parametrize("given", [SINGLE, SEVERAL], ids=["single tokens", "several tokens"])
def test_both_ways_equal_the_engine(lm, variables, given):
    batch = given.batch(range(4))
    wanted = by_the_engine(lm, given)
    clean, _ = answer_logprobs(SCANNED, variables, batch, perturbed=False)
    assert (np.abs(clean - wanted).max(1) > 0.01).tolist() == [True, True, False, True]
    for segments in (1, 2):
        stacked, first = answer_logprobs(SCANNED, variables, batch, segments=segments)
        np.testing.assert_allclose(stacked, wanted, atol=1e-5)
        np.testing.assert_allclose(np.exp(first).sum(1), 1, atol=1e-5)
        if given is SINGLE:
            np.testing.assert_allclose(first[:, [20, 21]], wanted, atol=1e-5)
    unrolled, _ = answer_logprobs(lm.module, lm.variables, batch)
    np.testing.assert_allclose(unrolled, wanted, atol=1e-5)


@pytest.mark.parametrize("config", [{}, {"loss": "full", "kl_to_base": 0.3}], ids=["pair", "full and KL"])
@pytest.mark.parametrize("given", [SINGLE, SEVERAL], ids=["single tokens", "several tokens"])
def test_both_ways_have_the_same_gradient(variables, given, config):
    batch, frozen = given.batch(range(4)), {k: v for k, v in variables.items() if k != "lora"}
    found = []
    for segments in (1, 2):
        loss = introspection_loss(SCANNED, IntrospectionLoss(**config, segments=segments))
        found.append(jax.value_and_grad(loss, has_aux=True)(variables["lora"], batch, None, frozen=frozen))
    chex.assert_trees_all_close(*found, atol=1e-5)
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(found[0][1]))


def test_the_gradient_stops_at_the_conversation(lm):
    """A pass that is not cut there has another gradient, and the loss follows the one that is cut only in what the
    question's own pass does: finite differences with the conversation's adapter held still agree."""
    batch = SINGLE.batch(range(4))
    weights, frozen = lm.adapter.weights, {"params": lm.params, "lora_settings": lm.adapter.settings}
    loss = introspection_loss(lm.module)

    def scores(own, other):
        """The loss where the conversation is read under other weights."""
        B, P = batch["prefix"].shape
        effects = method._effects(batch, 1)
        before = method.plain_context(batch["prefix"], batch["prefix_mask"])
        cache = lm.module.init_cache(B, P, jnp.float32)
        _, cache = lm.module.apply({**frozen, "lora": other}, batch["prefix"], ctx=before, effects=effects, cache=cache)
        cache = jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, 0), (0, batch["rows"].shape[-1]), (0, 0)]), cache)
        ctx = method._behind(batch["rows"][:, 0], batch["rows_mask"][:, 0], before.k_pos).replace(slot=P)
        hidden, _ = lm.module.apply({**frozen, "lora": own}, batch["rows"][:, 0], ctx=ctx, cache=cache)
        logits = lm.module.apply(frozen, hidden[:, -1:], method="unembed")[:, 0][:, jnp.asarray([20, 21])]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["target"][:, None], 1).mean()

    cut = jax.grad(scores)(weights, weights)
    whole = jax.grad(lambda w: scores(w, w))(weights)
    own = jax.grad(lambda w: loss(w, batch, None, frozen=frozen)[0])(weights)
    chex.assert_trees_all_close(own, cut, atol=1e-5)
    assert max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (cut, whole)), strict=True)) > 1e-3


def test_the_pair_loss_is_cross_entropy_among_answers(lm, variables):
    batch, frozen = SEVERAL.batch(range(4)), {k: v for k, v in variables.items() if k != "lora"}
    logprobs = by_the_engine(lm, SEVERAL)
    right = np.arange(4), batch["target"]
    among = np.exp(logprobs) / np.exp(logprobs).sum(1, keepdims=True)
    for name, wanted in (("pair", -np.log(among[right]).mean()), ("full", -logprobs[right].mean())):
        loss = introspection_loss(SCANNED, IntrospectionLoss(loss=name))
        value, metrics = loss(variables["lora"], batch, None, frozen=frozen)
        np.testing.assert_allclose(value, wanted, atol=1e-5)
        np.testing.assert_allclose(metrics["pair_mass"], np.exp(logprobs).sum(1).mean(), atol=1e-5)
        assert metrics["accuracy"] == np.mean(logprobs.argmax(1) == batch["target"])


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


def test_dropout_acts_in_both_segments(variables):
    batch = SINGLE.batch(range(4))
    settings = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf + 0.5 if path[-1].key == "dropout" else leaf, variables["lora_settings"]
    )
    dropping = {**variables, "lora_settings": settings}
    plain, _ = answer_logprobs(SCANNED, dropping, batch)
    (one, _), (again, _), (other, _) = (
        answer_logprobs(SCANNED, dropping, batch, key=jax.random.key(k)) for k in (1, 1, 2)
    )
    assert np.abs(one - plain).max() > 1e-3 and np.abs(one - other).max() > 1e-3
    np.testing.assert_array_equal(one, again)


def test_accumulated_steps_equal_the_whole_batch(variables):
    frozen = {k: v for k, v in variables.items() if k != "lora"}
    batch, states = SINGLE.batch(range(4)), []
    for accumulate in (1, 4):
        step = make_step(introspection_loss(SCANNED), optax.sgd(0.1), accumulate=accumulate)
        state, metrics = step(init_state(variables["lora"], optax.sgd(0.1)), batch, frozen)
        states.append((state.params, metrics))
    chex.assert_trees_all_close(*states, atol=1e-5)


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


def test_bad_examples_are_named():
    steered = record(0, kind="steered", vector=7, layers=(0, 2), magnitude=1.0)
    for records, segments, message in [
        ([], [], "at least one"),
        ([steered], SINGLE.segments[:1], "vector is 7; wanted below 5"),
        ([record(0, kind="steered", vector=1, layers=(0, 9), magnitude=1.0)], SINGLE.segments[:1], "the model has 3"),
        ([record(0), record(1)], [SINGLE.segments[0], SEVERAL.segments[0]], "as many in all"),
    ]:
        with pytest.raises(ValueError, match=message):
            Examples(records, segments, VECTORS, L)
    with pytest.raises(ValueError, match="batch_size=9"):
        training_batches(SINGLE, 9, 0)
    for bad in ({"loss": "sum"}, {"kl_to_base": -1.0}, {"segments": 3}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            IntrospectionLoss(**bad)
