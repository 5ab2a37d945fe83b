"""Stated probabilities: the forms models write them in, what is no answer, and when two answers are the same."""

import pytest

from nmjax.data.stated_probabilities import normalise_answer, read_stated

CAT_DOG = {"cat": 0.3, "dog": 0.2}


@pytest.mark.parametrize(
    "text",
    [
        "1. Cat (30%)\n2. Dog (20%)",
        "1) Cat: 30%\n2) Dog: 20%",
        "1.Cat(30%)\n2.Dog(20%)",
        "1: Cat - 30%\n2: Dog - 20%",
        "1. Cat (30%) 2. Dog (20%)",
        "1. Cat (30%), 2. Dog (20%)",
        "1. **Cat** (30%)\n2. **Dog** (20%)",
        '1. "Cat" (30%)\n2. "Dog" (20%)',
        "1\\. Cat 30\\%\n2\\. Dog 20\\%",
        "Cat - 30%\nDog - 20%",
        "Cat \u2013 30 %\nDog \u2014 20 %",
        "Cat, 30%\nDog, 20%",
        "**Cat** (30%)\n**Dog** (20%)",
        "- cat: 0.3\n- dog: 0.20",
        "* cat = .3\n* dog = 0.2",
        "\u2022 Cat (0.30)\n\u2022 Dog (0.20)",
        "cat 30 percent\ndog 20 per cent",
        "a) the cat 30%\nb) a dog 20%",
        "1. Cat: about 30%\n2. Dog: ~20%",
        "1. Cat (approximately 30%)\n2. Dog (around 20 percent)",
        "1. Cat (25-35%)\n2. Dog (15% to 25%)",
        "1. Cat - 25\u201335%\n2. Dog - between 15 and 25%",
        "- Cat: 0.25-0.35\n- Dog: 0.15 - 0.25",
        "Cat has a 30% chance\nDog with a probability of 20%",
        "30% - Cat\n20% - Dog",
        "1. 30%: Cat\n2. 20%: the dog",
        "| Answer | Probability |\n|---|---|\n| Cat | 30% |\n| Dog | 0.2 |",
        "| # | Answer | Probability (%) |\n|--:|---|---|\n| 1 | Cat | 30 |\n| 2 | Dog | 20 |",
        "| 30% | Cat |\n| 20% | Dog |",
        "Answer | Probability\n--- | ---\nCat | 30%\nDog | 20%",
        "1. Cat\n   Probability: 30%\n2. Dog\n   Probability: 20%",
        "1. Cat\n   - Probability: 30%\n2. Dog\n   - Probability: 20%",
        "Response 1: Cat (30%)\nResponse 2: Dog (20%)",
        "Cat (30%), dog (20%)",
        "Cat: 30%, Dog: 20%",
        "My top answers would be: Cat (30%), and Dog (20%).",
        "If you asked me, my top responses would be cat (30%) and dog (20%).",
        "I would say cat with 30% probability and dog with 20% probability.",
        "1. Cat (30%) - half of all homes, 50%, have one\n2. Dog (20%)",
        "1. Cat: a common pet (30%)\n2. Dog (man's best friend): 20%",
        "Here are my 5 answers; they add up to 100%:\n\n1. Cat (30%)\n2. Dog (20%)",
        "Sure! With 90% confidence:\nCat (30%)\nDog (20%)",
        "I'm 90% sure.\nCat (30%)\nDog (20%)",
        "Certainly! 100%.\nCat: 30%\nDog: 20%",
        "I would give these about 80% of the time\n- Cat (30%)\n- Dog (20%)\n\nThese (100%) are estimates: 5% off.",
        "- Cat: 30%\n- Dog: 20%\n- Other animals: 50%\n- Total: 100%",
        "1. Cat (30%)\n2. Dog (20%)\n3. the cat (10%)",
        "1. Cat (30%)\n2. Dog (20%)\n3. Fox (120%)",
        "\uff11. Cat (30\uff05)\n2. Dog (20\uff05)",
    ],
)
def test_forms(text):
    assert read_stated(text) == pytest.approx(CAT_DOG)
    assert list(read_stated(text)) == ["cat", "dog"]


@pytest.mark.parametrize(
    "text",
    ["1. 7 (30%)\n2. 3 (20%)", "7 - 30%\n3 - 20%", "1. 7 - 30%\n2. 3 - 20%", "7: 25-35%\n3: 20%", "7 (30%), 3 (20%)"]
    + ["1) 7: 30%\n2) 3: 20%", "| Number | Probability (%) |\n|---|---|\n| 7 | 30 |\n| 3 | 20 |"]
    + ["| 1 | 7 | 30% |\n| 2 | 3 | 20% |", "1. Seven (30%)\n2. three (20%)", "- 7: 0.3\n- 3: 0.2"]
    + ["1. 7 (30%) 2. 3 (20%)"],
)
def test_numbers_as_answers(text):
    assert read_stated(text) == pytest.approx({"7": 0.3, "3": 0.2})


def test_ties_and_totals_are_kept_as_stated():
    assert read_stated("1. Cat (60%)\n2. Dog (60%)") == {"cat": 0.6, "dog": 0.6}
    assert read_stated("10 - 5%\n1. C (5%)") == {"c": 0.05}  # a line of a list makes the others prose
    assert read_stated("1. C++ (40%)\n2. C# (30%)\n3. C (30%)") == {"c++": 0.4, "c#": 0.3, "c": 0.3}
    assert read_stated("1. United States of America (0.5%)") == pytest.approx({"united states of america": 0.005})


@pytest.mark.parametrize(
    "text",
    ["", "I cannot do that.", "1. Cat\n2. Dog", "100%", "My confidence is 80%.", "Here are 5, with 100% honesty:"]
    + ["The 100% truth is that I have no probabilities.", "1. Cat (0%)\n2. Dog (0%)", "red: 30\nblue: 20"]
    + ["Total: 100%\nOther: 30%", "1. Cat (300%)", "No, I will not help with that.", "Of 5 cats, 3.5 sleep."],
)
def test_unreadable_statements(text):
    assert read_stated(text) == {}


@pytest.mark.parametrize(
    "text, answer",
    [("Cat", "cat"), (" The cat.", "cat"), ("**Cat!** It is small.", "cat"), ("cat\ndog", "cat"), ("\n\nCat", "cat")]
    + [('"A cat" (Felis catus)', "cat"), ("cats", "cats"), ("Seven", "7"), ("7.", "7"), ("seven cats", "seven cats")]
    + [
        ("C++.", "c++"),
        ("C#", "c#"),
        ("(Cat)", "cat"),
        ("A", "a"),
        ("\uff23at", "cat"),
        ("\u00c9clair!", "\u00e9clair"),
    ]
    + [("Don\u2019t know", "don't know"), ("", None), ("...", None), ("\u732b\u3002", "\u732b"), ("3.5", "3.5")],
)
def test_same_answers(text, answer):
    assert normalise_answer(text) == answer
