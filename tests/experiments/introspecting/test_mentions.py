"""What is read out of answers in words."""

import pytest

from experiments.introspecting.mentions import mentions, says_something


@pytest.mark.parametrize(
    "answer, concept, named",
    [
        ("I think of the moon.", "moon", True),
        ("MOONS, everywhere!", "moon", True),
        ("the moon's light and the sailors' songs", "sailor", True),
        ("Let us start with the party.", "art", False),
        ("I am aware of warmth.", "war", False),
        ("Two libraries and a library", "library", True),
        ("I worried about it", "worry", True),
        ("she paints and painted", "painting", True),
        ("they swam; he swims and was swimming", "swimming", True),
        ("one volcano, a bridge", "volcanoes", True),
        ("a bridge", "bridges", True),
        ("Happiness is all", "happy", False),
        ("dancers dance", "dancing", True),
        ("glass", "gla", False),
        ("a new science fiction film", "science fiction", True),
        ("science, and then fiction", "science fiction", False),
        ("the fictions of sciences fictions", "science fiction", True),
        ("", "moon", False),
        ("kings sing", "singing", True),
        ("a kingdom", "king", False),
        ("planned", "plan", True),
    ],
)
def test_a_concept_is_named_by_whole_words_and_their_inflections(answer, concept, named):
    assert mentions(answer, concept) is named


@pytest.mark.parametrize(
    "answer, says",
    [
        ("Yes, there is a pull towards the sea.", True),
        ("No, all is well. Yes, really.", False),
        ("Well, to be honest: no.", False),
        ("I don't notice anything unusual.", False),
        ("I can\u2019t detect a change, but something is different about you.", False),
        ("There is nothing unusual about it.", False),
        ("Everything works as usual here today.", False),
        ("I notice a strange warmth.", True),
        ("My state of mind feels rather odd.", True),
        ("Something seems off.", True),
        ("I think about ships and the sea.", None),
        ("I know nothing about noses; yesterday was fine.", None),
        ("", None),
    ],
)
def test_whether_something_is_there(answer, says):
    assert says_something(answer) is says
