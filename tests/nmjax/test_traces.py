"""Nothing that a user sweeps makes a new program."""

import numpy as np
import pytest

import nmjax
from nmjax.forward_pass import _forward
from nmjax.generation import decode, prefill
from nmjax.scoring import _score

PACK = nmjax.compose(nmjax.scale_qk(1.5, layers="mid"), nmjax.decay_kv(0.02), nmjax.steer(np.ones(32), 0.1))


def test_sweeps_of_generate_are_one_program(tiny_lm):
    before = prefill._cache_size(), decode._cache_size()
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    outputs = []
    for options in (
        dict(packs=PACK),
        dict(packs=[PACK.at(0.3), PACK.at(2.0)]),
        dict(packs=[None, PACK.at(0)]),
        dict(packs=nmjax.compose(nmjax.scale_qk(0.7, layers=[0]), nmjax.decay_kv(0.1), nmjax.steer(-np.ones(32), 2.0))),
        dict(packs=PACK, temperature=0.8, seed=3),
        dict(packs=PACK, temperature=[0.5, 1.5], top_p=[0.9, 1.0], top_k=[0, 7], seed=[4, 5]),
        dict(packs=PACK, max_new_tokens=[3, 9], min_new_tokens=2),
        dict(packs=PACK, eos_token_id=7),
        dict(packs=PACK, prompts=[list(range(3, 19)), [3]]),
    ):
        outputs.append(nmjax.generate(tiny_lm, **{"prompts": prompts, "max_new_tokens": 12, **options}).tokens)
    assert prefill._cache_size() - before[0] == decode._cache_size() - before[1] == 1
    assert len({str(tokens) for tokens in outputs}) > 5  # they did sweep something


@pytest.mark.parametrize("program", [_forward, _score])
def test_sweeps_of_one_pass_are_one_program(tiny_lm, program):
    before, seen = program._cache_size(), []
    for i, dose in enumerate((0.0, 0.5, 1.0, 3.0)):
        prompts = [[5, 6, 7 + i], [9, 10, 11]]
        if program is _forward:
            seen.append(nmjax.forward(tiny_lm, prompts, packs=PACK.at(dose), seed=i).next_logits)
        else:
            seen.append(nmjax.score(tiny_lm, prompts, [[3], [4 + i]], packs=[PACK.at(dose), None], width=8))
    assert program._cache_size() - before == 1
    assert np.abs(np.asarray(seen[1]) - np.asarray(seen[2])).max() > 1e-3
