"""Cuts and draws against a sort and a cumulative sum in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from scipy.special import log_softmax, softmax

from nmjax.sampling import Sampling, argmax, choose, draw, keep_top_k, keep_top_p, token_logprob

V = 97  # not a multiple of the block that `draw` works in
ALMOST_ONE = np.nextafter(np.float32(1), np.float32(0))
P = (1e-6, 0.1, 0.35, 0.5, 0.8, 0.95, 0.999)
K = (1, 2, 3, 10, 50, 96)

top_p, top_k, drawn = jax.jit(keep_top_p), jax.jit(keep_top_k), jax.jit(draw)


def kinds():
    """name -> float32 [V]: logits that a cut may meet."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal(V)
    cut = normal * 3
    cut[rng.permutation(V)[:60]] = -np.inf
    signs = rng.integers(-2, 3, V) * 0.5
    signs[::9] = -0.0
    alone = np.full(V, -np.inf)
    alone[40] = -7.0
    made = {
        "random": normal * 2,
        "positive": normal + 20,
        "negative": normal - 20,
        "tied": rng.integers(0, 6, V),
        "tied around zero": signs,
        "all equal": np.full(V, -1.25),
        "peaked": normal * 40,
        "with cut tokens": cut,
        "one token left": alone,
        "extreme": np.where(normal > 1, 3e38, np.where(normal < 0, -3e38, 0.0)),
        "tiny": normal * 1e-30,
    }
    return {name: x.astype(np.float32) for name, x in made.items()}


KINDS = kinds()


def cut_by_sort(x, needed):
    """`x` with -inf below the last of the first `needed` entries, largest first; ties with the last stay."""
    return np.where(x >= np.sort(x)[::-1][needed - 1], x, -np.inf)


def in_nucleus(x, p):
    """How many of the likeliest tokens it takes to reach p, and how near the sums come to p."""
    mass = np.cumsum(np.sort(softmax(x.astype(np.float64)))[::-1])
    return int(np.searchsorted(mass, p) + 1), np.abs(mass - p).min()


def grid(values):
    """Every kind of logits with every value: float32 [B, V] and the values [B]."""
    rows = [(x, value) for x in KINDS.values() for value in values]
    return np.stack([x for x, _ in rows]), np.asarray([value for _, value in rows])


def test_top_p_is_the_sorted_nucleus():
    x, p = grid(P)
    seen = np.asarray(top_p(x, p.astype(np.float32)))
    sizes = set()
    for row, one, given in zip(seen, p, x, strict=True):
        needed, distance = in_nucleus(given, float(np.float32(one)))
        if distance < 2e-6:  # float32 may fall on the other side
            continue
        np.testing.assert_array_equal(row, cut_by_sort(given, needed))
        sizes.add(int(np.isfinite(row).sum()))
    assert len(sizes) > 10 and min(sizes) == 1, "the cuts were all alike"


def test_top_p_keeps_the_token_that_reaches_p_and_its_ties():
    share = np.log(np.asarray([[0.1, 0.4, 0.25, 0.25], [0.125, 0.5, 0.25, 0.125]], np.float32))
    seen = np.isfinite(top_p(share, np.float32([0.6, 0.45])))
    np.testing.assert_array_equal(seen, [[False, True, True, True], [False, True, False, False]])


def test_top_k_is_the_sorted_head():
    x, k = grid(K)
    seen = np.asarray(top_k(x, k.astype(np.int32)))
    wanted = np.stack([cut_by_sort(row, one) for row, one in zip(x, k, strict=True)])
    np.testing.assert_array_equal(seen, wanted)
    assert len(set(np.isfinite(seen).sum(1).tolist())) > 10, "the cuts were all alike"


def test_off_is_the_same_bits():
    """Next to rows which are cut: p = 1 is not a nucleus of mass 1, from which rounding drops tokens."""
    x, p = grid((1.0, 0.5))
    seen = np.asarray(top_p(x, p.astype(np.float32)))
    np.testing.assert_array_equal(seen[p == 1].view(np.int32), x[p == 1].view(np.int32))
    assert not np.array_equal(seen[p < 1], x[p < 1])
    x, k = grid((0, V, V + 5, 3))
    seen = np.asarray(top_k(x, k.astype(np.int32)))
    np.testing.assert_array_equal(seen[k != 3].view(np.int32), x[k != 3].view(np.int32))
    assert not np.array_equal(seen[k == 3], x[k == 3])


def test_the_likeliest_token_always_stays():
    x, _ = grid((0,))
    best = x.argmax(1)
    for seen in (top_p(x, np.full(len(x), 1e-30, np.float32)), top_k(x, np.ones(len(x), np.int32))):
        assert np.isfinite(np.asarray(seen)[np.arange(len(x)), best]).all()


def test_argmax_is_the_first_maximum():
    x, _ = grid((0,))
    np.testing.assert_array_equal(argmax(x), np.argmax(x, axis=1))
    ties = np.asarray([[1, 5, 5, 0], [-np.inf, -np.inf, -2, -2], [0.0, -0.0, -1, 0.0]], np.float32)
    np.testing.assert_array_equal(argmax(ties), [1, 2, 0])


def test_token_logprob_is_log_softmax(assert_close):
    names = [name for name in KINDS if name != "extreme"]
    x = np.stack([KINDS[name] for name in names])
    tokens = np.random.default_rng(1).integers(0, V, len(x)).astype(np.int32)
    tokens[names.index("with cut tokens")] = np.argmin(KINDS["with cut tokens"])  # -inf, not NaN
    wanted = log_softmax(x.astype(np.float64), axis=1)[np.arange(len(x)), tokens]
    assert np.isneginf(wanted).any()
    assert_close(token_logprob(x, tokens), wanted)


@pytest.mark.parametrize("size", [1, 2, 5, 16, 17, V, 1003])
def test_draw_is_the_inverse_cdf(size):
    """Token j is drawn for uniform numbers between the sums of what lies before and with it."""
    rng = np.random.default_rng(size)
    rows = 400
    x = (rng.standard_normal((rows, size)) * 2).astype(np.float32)
    x[rng.random(x.shape) < 0.3] = -np.inf
    x[:, rng.integers(size)] = 0.5  # not a row without any token
    uniform = rng.random(rows).astype(np.float32)
    edges = np.cumsum(softmax(x.astype(np.float64), axis=1), axis=1)
    clear = np.abs(edges - uniform[:, None]).min(1) > 2e-6
    assert clear.mean() > 0.9
    wanted = np.asarray([np.searchsorted(e, u, side="right") for e, u in zip(edges, uniform, strict=True)])
    np.testing.assert_array_equal(np.asarray(drawn(x, uniform))[clear], wanted[clear])
    assert len(set(wanted[clear].tolist())) > min(size, 50) // 2


@pytest.mark.parametrize("uniform", [0.0, ALMOST_ONE])
@pytest.mark.parametrize("size", [5, V, 1003])
def test_draw_at_the_ends_has_probability(size, uniform):
    """The first and the last token that can be drawn, wherever the rest of the vocabulary is cut."""
    rng = np.random.default_rng(2)
    x = (rng.standard_normal((300, size)) * 2).astype(np.float32)
    for i, row in enumerate(x):
        keep = rng.choice(size, min(size, 1 + i % 5), replace=False)
        row[np.setdiff1d(np.arange(size), keep)] = (-np.inf, -1e4)[i % 2]  # -1e4: exp underflows to 0
    possible = softmax(x.astype(np.float64), axis=1) > 0
    end = possible.argmax(1) if uniform == 0 else size - 1 - possible[:, ::-1].argmax(1)
    np.testing.assert_array_equal(drawn(x, np.full(300, uniform, np.float32)), end)


def test_rounding_never_draws_a_cut_token():
    """Sums of many small weights round, and then `uniform` times the total can lie beyond the last of them."""
    rng = np.random.default_rng(3)
    x = (rng.standard_normal((200, 1003)) * 0.1).astype(np.float32)
    x[rng.random(x.shape) < 0.5] = -np.inf
    x[:, -30:] = -np.inf
    x[:, 0] = 0.0
    uniform = 1 - rng.integers(1, 40, 200).astype(np.float32) * np.float32(2**-24)
    tokens = np.asarray(drawn(x, uniform))
    assert np.isfinite(x[np.arange(200), tokens]).all()
    assert (tokens > 900).all()  # and not just any of the others


pick = jax.jit(choose)


def sampling(rows, temperature, p=1.0, k=0):
    fill = functools.partial(np.full, rows)
    return Sampling(fill(temperature, np.float32), fill(p, np.float32), fill(k, np.int32))


def test_choose_follows_the_distribution():
    """5,000 draws under temperature, top-k and top-p together, which act in this order."""
    rows = 5000
    x = (np.random.default_rng(4).standard_normal(20) * 2).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), rows)
    tokens, logprob = pick(np.tile(x, (rows, 1)), sampling(rows, 1.5, 0.9, 12), keys)
    cut = cut_by_sort(x.astype(np.float64) / 1.5, 12)
    cut = cut_by_sort(cut, in_nucleus(cut, 0.9)[0])
    wanted = softmax(cut)
    assert 3 < (wanted > 0).sum() < 12, "top-p cut nothing more than top-k, or all"
    counts = np.bincount(tokens, minlength=20)
    assert counts[wanted == 0].sum() == 0
    assert scipy.stats.chisquare(counts[wanted > 0], rows * wanted[wanted > 0]).pvalue > 1e-3
    # The test has the power to tell: of the same cut without the temperature, it says no.
    colder = softmax(np.where(wanted > 0, x.astype(np.float64), -np.inf))
    assert scipy.stats.chisquare(counts[wanted > 0], rows * colder[wanted > 0]).pvalue < 1e-6
    np.testing.assert_allclose(logprob, np.log(wanted[np.asarray(tokens)]), atol=1e-5)


def test_choose_takes_every_row_as_it_is():
    """Greedy rows, and other parameters in each, in one batch; a row's draw depends on its own key alone."""
    rng = np.random.default_rng(5)
    rows = 48
    x = (rng.standard_normal((rows, V)) * 2).astype(np.float32)
    temperature = np.resize(np.float32([0, 0.3, 1, 2.5]), rows)
    p = np.resize(np.float32([1, 1, 0.7, 0.9, 0.2]), rows)
    k = np.resize(np.int32([0, 5, 0, 40, 3, 0, 0]), rows)
    keys = jax.random.split(jax.random.key(1), rows)
    tokens, logprob = map(np.asarray, pick(x, Sampling(temperature, p, k), keys))
    for i in range(rows):
        if temperature[i] == 0:
            assert (tokens[i], logprob[i]) == (np.argmax(x[i]), 0)
            continue
        cut = x[i].astype(np.float64) / temperature[i]
        cut = cut_by_sort(cut, k[i]) if k[i] else cut
        cut = cut_by_sort(cut, in_nucleus(cut, p[i])[0]) if p[i] < 1 else cut
        np.testing.assert_allclose(logprob[i], log_softmax(cut)[tokens[i]], atol=2e-5)
    hot = temperature > 0
    assert (tokens[hot] != x[hot].argmax(1)).mean() > 0.2, "as good as greedy"

    order = rng.permutation(rows)
    shuffled, again = pick(x[order], Sampling(temperature[order], p[order], k[order]), keys[order])
    np.testing.assert_array_equal(shuffled, tokens[order])
    np.testing.assert_array_equal(again, logprob[order])
    greedy, zeros = pick(x, sampling(rows, 0.0), keys)
    np.testing.assert_array_equal(greedy, x.argmax(1))
    np.testing.assert_array_equal(zeros, 0)


def test_choose_survives_a_tiny_temperature():
    """Logits divided by 1e-6 or a denormal overflow; the likeliest token must not."""
    x = np.asarray([[300.0, 299.0, -300.0, -np.inf]] * 2, np.float32)
    parameters = Sampling(np.float32([1e-6, 1e-38]), np.float32([1, 0.9]), np.int32([0, 2]))
    tokens, logprob = choose(jnp.asarray(x), parameters, jax.random.split(jax.random.key(2), 2))
    np.testing.assert_array_equal(tokens, 0)
    np.testing.assert_array_equal(logprob, 0)
