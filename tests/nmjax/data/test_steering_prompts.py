"""The bundled prompt pairs: enough of every type, and alike but for what they mean."""

import collections

import numpy as np

from nmjax.steering.vectors import read_pairs

TYPES = (
    "associative creative visionary synesthesia prosocial playful ego_thin goal_focused abstract affiliative calm "
    "salient"
).split()


def template(positive: str, negative: str) -> str:
    """What the two share, word by word; where they differ in length, how the positive begins."""
    words, others = positive.lower().split(), negative.lower().split()
    if len(words) != len(others):
        return " ".join(words[:3])
    return " ".join(word if word == other else "_" for word, other in zip(words, others, strict=True))


def test_every_type_has_a_hundred_unique_pairs():
    pairs = read_pairs()
    assert list(pairs) == TYPES
    for name, its_pairs in pairs.items():
        assert len(set(its_pairs)) == len(its_pairs) >= 100, name
        for side in (0, 1):
            assert len({pair[side] for pair in its_pairs}) == len(its_pairs), name


def test_length_and_format_give_no_side_away():
    for name, its_pairs in read_pairs().items():
        lengths = np.array([[len(text.split()) for text in pair] for pair in its_pairs])
        assert np.abs(lengths[:, 0] - lengths[:, 1]).max() <= 2, name
        assert abs((lengths[:, 0] - lengths[:, 1]).mean()) <= 0.5, name
        ends = [[text.rstrip('"')[-1] for text in pair] for pair in its_pairs]
        assert all(positive == negative for positive, negative in ends), name


def test_no_template_is_worn_out():
    counts = collections.Counter(template(*pair) for pairs in read_pairs().values() for pair in pairs)
    assert counts.most_common(1)[0][1] <= 5
