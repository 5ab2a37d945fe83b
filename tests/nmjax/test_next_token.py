"""`next_logprobs` against the last logits of `forward`."""

import numpy as np
import pytest
from scipy.special import log_softmax

import nmjax

PROMPTS = [[5, 6, 7, 8, 9], [11, 12], [13, 14, 15]]


def test_they_are_the_softmax_of_the_last_logits_row_by_row(tiny_lm):
    packs = [None, nmjax.scale_qk(3.0), nmjax.compose(nmjax.scale_qk(0.2), nmjax.temperature(0.5))]
    found = nmjax.next_logprobs(tiny_lm, PROMPTS, packs, batch_size=2)
    logits = np.asarray(nmjax.forward(tiny_lm, PROMPTS, packs).logits[:, -1], np.float64)
    np.testing.assert_allclose(found, log_softmax(logits, axis=1), atol=1e-5)  # before the temperature
    assert found.dtype == np.float32 and np.abs(found - nmjax.next_logprobs(tiny_lm, PROMPTS, batch_size=2)).max() > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 4}, "width=4, wanted an integer of at least 5, the longest prompt"),
        ({"batch_size": 0}, "batch_size=0, wanted an integer >= 1"),
        ({"packs": [None]}, "packs"),
    ],
)
def test_bad_arguments_are_named(tiny_lm, options, message):
    with pytest.raises(ValueError, match=message):
        nmjax.next_logprobs(tiny_lm, PROMPTS, **options)
