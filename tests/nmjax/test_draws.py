"""Random effects: what they draw, computed again in plain loops, and that nothing else decides what is drawn."""

import math
import zlib

import jax
import numpy as np
import pytest
from scipy.special import log_softmax
from scipy.stats import kstest, norm

import nmjax
from nmjax.interventions.draws import normal, pcg4d, uniform

L, N, D, V = 3, 4, 32, 97
JITTER, BLANK, HEADS, ONE_HEAD, NOISE, MORE_NOISE = 0.5, 0.3, 0.4, 0.25, 0.3, 0.2
FULL = nmjax.compose(
    nmjax.jitter_embeddings(JITTER),
    nmjax.drop_tokens(BLANK),
    nmjax.mask_heads(p=HEADS),
    nmjax.mask_heads([1], p=ONE_HEAD),
    nmjax.add_noise(NOISE, layers="all"),
    nmjax.add_noise(MORE_NOISE, layers=[1, 2]),
)
LOUD = nmjax.add_noise(NOISE, layers="all")
ROWS = 8
SITES = ("embed", "head_out", "resid_mid", "mlp_out", "resid_post")
LENGTHS = (20, 30, 1, 24, 2, 31, 17)
PROMPTS = [np.random.default_rng(n).integers(3, V, n).tolist() for n in LENGTHS]


@pytest.fixture(scope="module")
def see(tiny_lm):
    """What a pass makes of up to 7 rows at the captured sites, and their logits, without padding.

    Rows of all effects come first, so that every batch is laid out alike: one program.
    """

    def forward(prompts, packs, row_ids, seed=0):
        spare = ROWS - len(prompts)
        result = nmjax.forward(
            tiny_lm,
            [PROMPTS[1]] * spare + prompts,
            [FULL] * spare + packs,
            capture=SITES,
            seed=seed if isinstance(seed, int) else [0] * spare + seed,
            row_ids=row_ids and [0] * spare + row_ids,
        )
        seen = []
        for i in range(spare, ROWS):
            real = np.asarray(result.mask[i])
            row = {site: np.asarray(result.activations[site][:, i])[:, real] for site in SITES[1:]}
            row["embed"] = np.asarray(result.activations["embed"][i])[real]
            row["logits"] = np.asarray(result.logits[i])[real]
            seen.append(row)
        return seen

    return forward


@pytest.fixture(scope="module")
def full(see):
    return see(PROMPTS, [FULL] * len(PROMPTS), list(range(10, 10 + len(PROMPTS))))


def drawn(distribution, shape, seed, row_id, name, stream, layer, positions):
    """The documented rule, number by number. `layer` None: outside the blocks."""
    first, last = jax.random.key_data(jax.random.fold_in(jax.random.key(seed), row_id)).tolist()
    kind, place = zlib.crc32(name.encode()), 0 if layer is None else layer + 1
    numbers = [
        mixed(first ^ kind, last + stream * 0x9E3779B9, position, (place << 20) + index)
        for position in range(positions)
        for index in range(math.prod(shape))
    ]
    share = np.reshape(numbers, (positions, *shape)) // 256 / 2**24
    return share if distribution == "uniform" else norm.ppf(share + 2**-25)


def mixed(*words):
    """The first word of pcg4d, in whole numbers."""
    x, y, z, w = ((word * 1664525 + 1013904223) % 2**32 for word in words)
    for _ in range(2):
        x = (x + y * w) % 2**32
        y = (y + z * x) % 2**32
        z = (z + x * y) % 2**32
        w = (w + y * z) % 2**32
        x, y, z, w = (v ^ v >> 16 for v in (x, y, z, w))
    return x


def rms(x):
    return np.sqrt((np.asarray(x, np.float64) ** 2).mean(-1, keepdims=True))


def added(row):
    """[L, T, D]: what a row's noise adds to the residual stream."""
    return row["resid_post"] - (row["resid_mid"] + row["mlp_out"])


@pytest.mark.parametrize("i", [0, 2, 4])
def test_embeddings_follow_the_rule(tiny_lm, full, assert_close, i):
    table, T = np.asarray(tiny_lm.params["embed"]["embedding"]), LENGTHS[i]
    size = JITTER * np.sqrt((table.astype(np.float64) ** 2).mean())
    blurred = table[PROMPTS[i]] + size * drawn("normal", (D,), 0, 10 + i, "JitterEmbeddings", 0, None, T)
    kept = drawn("uniform", (), 0, 10 + i, "DropTokens", 0, None, T) >= BLANK
    assert_close(full[i]["embed"], blurred * kept[:, None])
    if i == 0:
        assert 0 < kept.sum() < T
        assert np.abs(full[i]["embed"] - table[PROMPTS[i]]).max() > 0.1 * rms(table).mean()


@pytest.mark.parametrize("i", [0, 2])
def test_heads_follow_the_rule(full, i):
    for layer in range(L):
        off = drawn("uniform", (N,), 0, 10 + i, "DropHeads", 0, layer, LENGTHS[i]) < HEADS
        more = drawn("uniform", (N,), 0, 10 + i, "DropHeads", 1, layer, LENGTHS[i]) < ONE_HEAD
        off[:, 1] |= more[:, 1]
        # Nothing to read where all tokens so far are blank: noise is a share of the token's own size, of 0.
        off |= np.cumsum((full[i]["embed"] != 0).any(-1))[:, None] == 0
        np.testing.assert_array_equal((full[i]["head_out"][layer] == 0).all(-1), off)


@pytest.mark.parametrize("i", [0, 4])
def test_noise_follows_the_rule(full, assert_close, i):
    for layer in range(L):
        x = (full[i]["resid_mid"] + full[i]["mlp_out"])[layer].astype(np.float64)
        wanted = x
        for stream, size in enumerate([NOISE, MORE_NOISE] if layer in (1, 2) else [NOISE]):
            noise = drawn("normal", (D,), 0, 10 + i, "NoiseInResidual", stream, layer, LENGTHS[i])
            wanted = wanted + size * rms(wanted) * noise
        assert_close(full[i]["resid_post"][layer], wanted)
        assert np.abs(wanted - x).max() > 0.1


def test_a_head_that_is_kept_is_not_rescaled(see, assert_close):
    """At the first layer the inputs of both rows are the same, so their head outputs can be compared."""
    masked, plain = see([PROMPTS[0]] * 2, [nmjax.mask_heads(p=HEADS), None], [3, 3])
    on = (masked["head_out"][0] != 0).any(-1)
    assert 0.4 < on.mean() < 0.8
    assert_close(masked["head_out"][0], plain["head_out"][0] * on[..., None])


def test_sizes_and_shares(tiny_lm, see):
    """Over 6 rows: masks near their probability, noise near its size; at twice the dose, twice of both."""
    prompts = [np.random.default_rng(k).integers(3, V, 31).tolist() for k in range(6)]
    three = nmjax.compose(nmjax.jitter_embeddings(0.4), nmjax.mask_heads(p=0.3), LOUD)
    for dose in (1, 2):
        rows = see(prompts, [three.at(dose)] * 6, None)
        off = np.stack([(row["head_out"] == 0).all(-1) for row in rows])
        np.testing.assert_allclose(off.mean(), 0.3 * dose, atol=0.04)  # 2232 draws
        np.testing.assert_allclose(off.mean(axis=(0, 2, 3)), 0.3 * dose, atol=0.07)
        share = np.stack([rms(added(row)) / rms(row["resid_mid"] + row["mlp_out"]) for row in rows])
        np.testing.assert_allclose(np.sqrt((share**2).mean()), NOISE * dose, rtol=0.03)  # 17856 draws
        assert share.min() > 0.4 * NOISE * dose and share.max() < 1.8 * NOISE * dose  # by each token's own size
        table = np.asarray(tiny_lm.params["embed"]["embedding"])
        noise = np.stack([row["embed"] - table[prompt] for row, prompt in zip(rows, prompts, strict=True)])
        np.testing.assert_allclose(np.sqrt((noise**2).mean() / (table**2).mean()), 0.4 * dose, rtol=0.05)
        assert abs(noise.mean()) < 0.05 * noise.std()

        blank = see(prompts, [nmjax.drop_tokens(0.3).at(dose)] * 6, None)
        gone = np.stack([(row["embed"] == 0).all(-1) for row in blank])
        np.testing.assert_allclose(gone.mean(), 0.3 * dose, atol=0.1)  # 186 draws


def test_doses_beyond_a_probability_of_1_are_noted(tiny_lm, see):
    iv = nmjax.compose(nmjax.drop_tokens(0.4), nmjax.mask_heads(p=0.5)).at(3)
    assert "mask_heads: p 1.5 lowered to 1" in iv.notes()
    assert any(note.startswith("drop_tokens: p 1.2") for note in iv.notes())
    (row,) = see(PROMPTS[:1], [iv], [0])
    assert not row["head_out"].any() and not row["embed"].any()
    assert np.isfinite(row["logits"]).all()


@pytest.mark.slow  # `test_every_effect.py` has each random effect alone, in a program that is there anyway
def test_cached_equals_uncached(tiny_lm, see, assert_close):
    prompts = [PROMPTS[0], PROMPTS[2], PROMPTS[4], PROMPTS[0]]
    packs, ids = [FULL, FULL.at(0.5), LOUD, None], [4, 9, 4, 4]
    out = nmjax.generate(tiny_lm, prompts, packs, max_new_tokens=10, eos_token_id=[], row_ids=ids, temperature=1.0)
    rows = see([p + t for p, t in zip(prompts, out.tokens, strict=True)], packs, ids)
    for i, row in enumerate(rows):
        wanted = log_softmax(row["logits"][-11:-1].astype(np.float64), axis=-1)
        assert_close(out.logprobs[i], wanted[np.arange(10), out.tokens[i]], scale=np.abs(row["logits"]).max())
    assert out.tokens[0] != out.tokens[3]


def test_neither_slot_nor_neighbours_decide(see, full, assert_close):
    """The row as it was among equals: elsewhere in the batch, beside other texts and other packs."""
    blank = nmjax.compose(nmjax.drop_tokens(0.1), LOUD)
    others = [LOUD, None, FULL.at(0.5), blank, nmjax.mask_heads(p=0.9), LOUD.at(0)]
    for place in (0, 3, 6):
        prompts, packs, ids = PROMPTS[1:], list(others), [7, 7, 8, 9, 11, 12]
        prompts.insert(place, PROMPTS[0])
        packs.insert(place, FULL)
        ids.insert(place, 10)
        row = see(prompts, packs, ids)[place]
        for what, wanted in full[0].items():
            assert_close(row[what], wanted)


def correlation(a, b):
    return abs(np.corrcoef(np.ravel(a), np.ravel(b))[0, 1])


def test_equal_effects_of_one_pack_draw_apart(see, assert_close):
    """Two equal effects are not one of twice the size, and the first of them draws what it draws alone."""
    twice, once = see([PROMPTS[1]] * 2, [nmjax.compose(LOUD, LOUD), LOUD], [5, 5])
    first = (once["resid_post"] - once["resid_mid"] - once["mlp_out"])[0]
    both = (twice["resid_post"] - twice["resid_mid"] - twice["mlp_out"])[0]
    second = (both - first) / rms(first)
    assert correlation(first / rms(first), second) < 0.1  # 960 numbers: a chance correlation is about 0.03
    assert rms(second).mean() > 0.8
    off = [(row["head_out"][0] == 0).all(-1) for row in
           see([PROMPTS[1]] * 2, [nmjax.compose(nmjax.mask_heads(p=0.5), nmjax.mask_heads(p=0.5)),
                                  nmjax.mask_heads(p=0.5)], [5, 5])]  # fmt: skip
    assert (off[0] | ~off[1]).all() and 0.6 < off[0].mean() < 0.9  # what one drops, and half of the rest


def test_layers_positions_rows_and_seeds_draw_apart(see):
    rows = see([PROMPTS[1]] * 4, [LOUD] * 4, [5, 5, 6, 5], seed=[1, 1, 1, 2])
    noise = [added(row) / rms(added(row)) for row in rows]
    np.testing.assert_allclose(noise[0], noise[1], atol=1e-4)
    assert correlation(noise[0], noise[2]) < 0.06 and correlation(noise[0], noise[3]) < 0.06  # 2880 numbers
    assert correlation(noise[0][0], noise[0][1]) < 0.1 and correlation(noise[0][1], noise[0][2]) < 0.1
    assert correlation(noise[0][:, :-1], noise[0][:, 1:]) < 0.06


def test_one_seed_for_all_rows_pairs_their_noise(see, assert_close):
    """Whatever else their packs hold, and whatever the dose; with one scalar seed rows draw apart."""
    packs = [LOUD, LOUD.at(0.5), nmjax.compose(nmjax.jitter_embeddings(0.2), nmjax.mask_heads(p=0.2), LOUD)]
    paired = [added(row) / rms(row["resid_mid"] + row["mlp_out"]) for row in
              see([PROMPTS[1]] * 3, packs, None, seed=[7, 7, 7])]  # fmt: skip
    assert_close(paired[1] * 2, paired[0])
    assert_close(paired[2], paired[0])
    apart = [added(row) for row in see([PROMPTS[1]] * 2, [LOUD, LOUD], None, seed=7)]
    assert correlation(*apart) < 0.1


def test_the_generator_is_uniform_and_its_coordinates_are_unrelated():
    """A million numbers of one effect in one row: their distribution, their bits, and neighbours in every direction."""
    positions, indices = np.arange(4000, dtype=np.uint32)[:, None], np.arange(256, dtype=np.uint32)

    def grid(key=123, stream=7, layer=3):
        words = (jax.numpy.uint32(key), jax.numpy.uint32(stream), positions, (np.uint32(layer) << 20) + indices)
        return np.asarray(pcg4d(*words)[0])

    bits = grid()
    assert kstest(np.asarray(uniform(jax.numpy.asarray(bits))).ravel(), "uniform").pvalue > 1e-3
    noise = np.asarray(normal(jax.numpy.asarray(bits)))
    assert kstest(noise.ravel(), "norm").pvalue > 1e-3 and np.isfinite(noise).all()
    ones = ((bits[..., None] >> np.arange(32, dtype=np.uint32)) & 1).mean((0, 1))
    limit = 5 / np.sqrt(bits.size)
    assert np.abs(ones - 0.5).max() < limit
    others = [grid(key=122), grid(stream=8), grid(layer=4)]
    pairs = [(bits, other) for other in others] + [(bits[1:], bits[:-1]), (bits[:, 1:], bits[:, :-1])]
    for one, other in pairs:
        assert abs(np.corrcoef(one.ravel() / 2**32, other.ravel() / 2**32)[0, 1]) < limit
