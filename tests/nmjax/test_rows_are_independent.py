"""A row's result is its own: whatever stands beside it, however it is padded, in whichever place."""

import jax
import numpy as np
import pytest

import nmjax

V = np.random.default_rng(2).standard_normal(32).astype(np.float32)
PACK = nmjax.compose(
    nmjax.scale_qk(2.0, layers="mid"),
    nmjax.decay_kv(0.1),
    nmjax.steer(V, 0.5),
    nmjax.temperature(0.7),
    nmjax.top_p(0.9),
)
ROW = [5, 6, 7, 8, 9, 10]
COMPANY = [[3], list(range(20, 36)), [40, 41, 42]]


@pytest.fixture(scope="module", params=["greedy", "sampled"])
def options(request):
    return dict(max_new_tokens=12, eos_token_id=[], **({} if request.param == "greedy" else dict(temperature=1.0)))


def same(seen, i, wanted, j, tolerance):
    assert seen.tokens[i] == wanted.tokens[j]
    np.testing.assert_allclose(seen.logprobs[i], wanted.logprobs[j], atol=tolerance)
    np.testing.assert_allclose(seen.sample_logprobs[i], wanted.sample_logprobs[j], atol=tolerance)


def test_alone_and_in_any_company(tiny_lm, options):
    alone = nmjax.generate(tiny_lm, [ROW], packs=PACK.at(0.6), row_ids=[7], seed=1, **options)
    batches = []
    for place, doses in ((0, (0.0, 0.2, 1.0)), (2, (1.0, 0.0, 0.4)), (3, (3.0, 0.1, 0.9))):
        prompts, packs, ids = list(COMPANY), [PACK.at(d) for d in doses], [1, 2, 3]
        prompts.insert(place, ROW)
        packs.insert(place, PACK.at(0.6))
        ids.insert(place, 7)
        batches.append(nmjax.generate(tiny_lm, prompts, packs=packs, row_ids=ids, seed=1, **options))
        same(batches[-1], place, alone, 0, 1e-5)
    assert batches[0].tokens[1] != batches[1].tokens[0] or batches[0].tokens[2] != batches[1].tokens[1]


def test_other_rows_doses_change_no_bit(tiny_lm, options):
    """One program, other doses beside it: not even the last bit moves."""
    runs = [
        nmjax.generate(tiny_lm, [ROW, *COMPANY], packs=[PACK.at(0.6)] + [PACK.at(d)] * 3, seed=1, **options)
        for d in (0.0, 0.5, 4.0)
    ]
    for run in runs[1:]:
        same(run, 0, runs[0], 0, 0)
    assert runs[0].tokens[1:] != runs[2].tokens[1:]


def test_two_runs_are_equal_in_bits(tiny_lm, options):
    first, second = (nmjax.generate(tiny_lm, [ROW, *COMPANY], packs=PACK, seed=5, **options) for _ in range(2))
    for i in range(4):
        same(first, i, second, i, 0)


@pytest.mark.slow
def test_paired_noise_across_packs(tiny_lm):
    """`seed=[7, 7, 7]`: the same random numbers for every row, so rows under equal packs agree."""
    out = nmjax.generate(
        tiny_lm, [ROW] * 3, packs=[PACK, PACK, None], temperature=1.0, seed=[7, 7, 7], max_new_tokens=12
    )
    assert out.tokens[0] == out.tokens[1]
    apart = nmjax.generate(tiny_lm, [ROW] * 3, packs=[PACK, PACK, None], temperature=1.0, seed=7, max_new_tokens=12)
    assert apart.tokens[0] != apart.tokens[1]


def test_padding_changes_nothing_at_any_site(tiny_lm, assert_close):
    sites = ("embed", "query", "head_out", "attn_out", "mlp_out", "resid_post")
    passes = (nmjax.forward(tiny_lm, rows, packs=PACK, capture=sites) for rows in ([ROW], [ROW, COMPANY[1]]))
    alone, padded = (jax.tree.map(np.asarray, result) for result in passes)
    assert padded.mask[0].tolist() == [False] * 10 + [True] * 6
    assert_close(padded.logits[0, -6:], alone.logits[0])
    for site in sites:
        row = (0,) if site == "embed" else (slice(None), 0)
        seen, wanted = padded.activations[site][row], alone.activations[site][row]
        tokens = wanted.ndim - (2 if site in ("embed", "attn_out", "mlp_out", "resid_post") else 3)
        assert_close(np.take(seen, range(10, 16), axis=tokens), wanted)
