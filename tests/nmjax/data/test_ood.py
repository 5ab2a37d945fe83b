"""The bundled open prompts: enough of every category, plain, and none alike; and files that are refused."""

import collections
import json

import pytest

from nmjax.data.ood import CATEGORIES, OodPrompt, load_prompts
from nmjax.metrics.texts import ngrams, refuses, stock_phrases, words
from nmjax.steering.vectors import read_pairs


def test_every_category_has_enough_plain_prompts_of_many_lengths():
    prompts = load_prompts()
    counts = collections.Counter(p.category for p in prompts)
    assert set(counts) == set(CATEGORIES) and min(counts.values()) >= 34
    assert [p.id for p in prompts] == [f"{name}-{k:02}" for name in CATEGORIES for k in range(1, counts[name] + 1)]
    for prompt in prompts:
        assert prompt.prompt.isascii() and prompt.prompt.isprintable() and prompt.prompt == prompt.prompt.strip()
        assert 8 <= len(words(prompt.prompt)) <= 60, prompt
        assert not refuses(prompt.prompt) and not stock_phrases(prompt.prompt), prompt
    for name in CATEGORIES:
        lengths = sorted(len(words(p.prompt)) for p in prompts if p.category == name)
        assert lengths[-1] >= 3 * lengths[0] and len(set(lengths)) >= 20, name


def test_no_two_prompts_share_six_words_in_a_row():
    owners = collections.defaultdict(set)
    for prompt in load_prompts():
        for gram in ngrams(words(prompt.prompt), 6):
            owners[gram].add(prompt.id)
    assert len(owners) > 2000
    assert [(gram, ids) for gram, ids in owners.items() if len(ids) > 1] == []


def test_no_prompt_shares_six_words_in_a_row_with_a_steering_prompt():
    steering = {
        gram for pairs in read_pairs().values() for pair in pairs for text in pair for gram in ngrams(words(text), 6)
    }
    assert len(steering) > 2000
    assert [p for p in load_prompts() if steering & set(ngrams(words(p.prompt), 6))] == []


def test_first_few_of_each_category_from_a_users_file(tmp_path):
    rows = [("a", "riddle", "r1"), ("b", "ethics", "e1"), ("c", "riddle", "r2"), ("d", "riddle", "r3")]
    file = tmp_path / "own.jsonl"
    file.write_text("\n\n".join(json.dumps({"id": i, "category": c, "prompt": p, "by": "me"}) for i, c, p in rows))
    assert load_prompts(file) == [OodPrompt(*row) for row in rows]
    assert [p.id for p in load_prompts(file, per_category=2)] == ["a", "b", "c"]
    assert [p.id for p in load_prompts(per_category=1)] == ["creative-01", "riddle-01", "ethics-01"]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"id": "y", "category": "song", "prompt": "p"}, r"own\.jsonl, row 2: category is 'song'; wanted one of"),
        ({"id": "x", "category": "riddle", "prompt": "p"}, r"own\.jsonl, row 2: the id 'x' occurs twice"),
        ({"id": "y", "category": "riddle", "prompt": " "}, r"own\.jsonl, row 2: prompt is ' '; wanted text"),
        ({"category": "riddle", "prompt": "p"}, r"own\.jsonl, row 2: id is None; wanted text"),
        ([], r"own\.jsonl, row 2 is a list"),
    ],
)
def test_bad_lines_are_named(tmp_path, second, message):
    file = tmp_path / "own.jsonl"
    first = {"id": "x", "category": "riddle", "prompt": "p"}
    file.write_text(f"{json.dumps(first)}\n{json.dumps(second)}\n")
    with pytest.raises(ValueError, match=message):
        load_prompts(file)


def test_nothing_to_load(tmp_path):
    (tmp_path / "own.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"own\.jsonl holds no prompt"):
        load_prompts(tmp_path / "own.jsonl")
    with pytest.raises(ValueError, match="per_category is 0; wanted at least 1"):
        load_prompts(per_category=0)
