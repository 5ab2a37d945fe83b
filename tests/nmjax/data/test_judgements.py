"""Judgements: prompts, the bundled statements, samples and splits of whole rows, and what length alone gives away."""

import collections
import itertools

import pytest
from sklearn.metrics import roc_auc_score

from nmjax.data.judgements import FORMS, YES_NO, describe, judge, read_judgements, sample_rows, split_by_row, text_of
from nmjax.data.world import bundled_world, held_out_statements, judgement_prompt


def some(task, rows, labels=(0, 1)):
    """Judgements with made-up texts, those of label 1 by one character longer."""
    fields = dict.fromkeys(FORMS[task].shown, "shown")
    return [judge(task, row, label, fields, f"{row:03d}{'!' * label}") for row in range(rows) for label in labels]


def tasks_of(judgements):
    return dict(collections.Counter(j.task for j in judgements))


def rows_of(judgements):
    return {j.group for j in judgements}


@pytest.mark.parametrize("task", FORMS)
def test_a_prompt_shows_every_field_and_the_answer_where_it_says(task):
    fields = {column: f"<{column}>\nmore" for column in FORMS[task].shown}
    right, wrong = (judge(task, 7, label, fields, answer) for label, answer in enumerate(("shown", "wrong")))
    for judgement in (right, wrong):
        at, end = judgement.answer_start, judgement.answer_end
        assert judgement.prompt[at:end] == judgement.answer and judgement.prompt[at - 2 : at] == ": "
        shown, question = judgement.prompt.split("\n\n")
        assert all(text in shown[:at] for text in fields.values()) and judgement.fields == fields
        assert question.count("?") == 1 and question.endswith("?\nAnswer (Yes or No):")
    assert right.prompt.replace("shown", "wrong") == wrong.prompt
    assert (right.id, wrong.id) == (f"{task}_7_cor", f"{task}_7_hal") and right.group == wrong.group == (task, 7)
    assert YES_NO[task] == (" Yes", " No") and len({right, wrong}) == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"b": "x"}, r"here has no field 'a'; it has \['b'\]"),
        ({"a": " \n"}, r"here: a is ' \\n'; wanted text"),
        ({"a": None}, "here: a is None; wanted text"),
        ({"a": ["x"]}, r"here: a is \['x'\]; wanted text"),
    ],
)
def test_a_field_must_hold_text(row, message):
    assert text_of("here", {"a": "\n x \n"}, "a") == "x"
    with pytest.raises(ValueError, match=message):
        text_of("here", row, "a")


# --- The bundled world ------------------------------------------------------------------------------------------------


def test_bundled_twins_state_one_fact_truly_and_falsely_in_the_same_words():
    world, judgements = bundled_world(), read_judgements("bundled", at_least=400)
    assert len(judgements) == 400 and len(rows_of(judgements)) == 200
    assert YES_NO["bundled"] == (" yes", " no")
    for right, wrong in zip(judgements[::2], judgements[1::2], strict=True):
        fact = world.facts[right.row]
        assert (right.row, right.label, wrong.label) == (wrong.row, 0, 1)
        for judgement in (right, wrong):
            assert judgement.prompt == judgement_prompt(judgement.answer)
            assert judgement.prompt[judgement.answer_start : judgement.answer_end] == judgement.answer
            assert fact.entity in judgement.answer and fact.relation.name in judgement.answer
        # Where the twins differ, the right one has the value of the fact.
        a, b = right.answer.rstrip(".").split(), wrong.answer.rstrip(".").split()
        assert [x for x, y in zip(a, b, strict=True) if x != y] == [fact.value]
    assert held_out_statements(1)[0].prompt == judgement_prompt(held_out_statements(1)[0].text)  # one form of prompt
    assert describe(judgements)["bundled"]["length_auroc"]["words"] == 0.5


def test_bundled_facts_are_drawn_by_exposure_and_seeded():
    few, many = (read_judgements("bundled", at_least=n) for n in (99, 300))
    assert few == many[:100] and many == read_judgements("bundled", ["bundled"], at_least=300)
    assert few != read_judgements("bundled", seed=1, at_least=99)
    everything = read_judgements("bundled", at_least=2944)
    assert {j.row for j in everything} == set(range(1472))
    first, last = ([bundled_world().facts[j.row].rank for j in part] for part in (everything[:200], everything[-200:]))
    assert sum(first) < sum(last) / 3
    for bad in (None, 0, 2945):
        with pytest.raises(ValueError, match=f"at_least is {bad}; wanted 1 to 2944"):
            read_judgements("bundled", at_least=bad)


# --- Samples and splits -----------------------------------------------------------------------------------------------


def test_samples_are_whole_rows_in_equal_shares():
    pool = some("qa", 5) + some("dialogue", 40) + some("general", 60, (0,)) + some("truthfulqa", 60)
    for n, seed in itertools.product((1, 2, 39, 40, 41, 200, 269), range(3)):
        sample = sample_rows(pool, n, seed)
        assert n <= len(sample) <= n + 1 and len({j.id for j in sample}) == len(sample)
        assert all(j in sample for j in pool if j.group in rows_of(sample))  # no half of a pair
        assert sample == sample_rows(pool, n, seed) == sample_rows(pool, 270, seed)[: len(sample)]
    assert tasks_of(sample_rows(pool, 40, 0)) == {"qa": 10, "dialogue": 10, "general": 10, "truthfulqa": 10}
    assert tasks_of(sample_rows(pool, 100, 0)) == {"qa": 10, "dialogue": 30, "general": 30, "truthfulqa": 30}
    assert sample_rows(pool, 40, 0) != sample_rows(pool, 40, 1)
    assert rows_of(sample_rows(pool, None, 0)) == rows_of(pool)
    # With pairs alone the number is exact, or one more where it is odd.
    assert [len(sample_rows(some("qa", 50), n, 0)) for n in (1, 2, 7, 8)] == [2, 2, 8, 8]
    # Every row has its chance: over many seeds each of 50 is drawn about equally often.
    drawn = collections.Counter(j.row for seed in range(500) for j in sample_rows(some("general", 50, (0,)), 10, seed))
    assert len(drawn) == 50 and 60 < min(drawn.values()) and max(drawn.values()) < 145


@pytest.mark.parametrize("how", [{}, {"share": 0.3}, {"folds": 2}, {"folds": 5}])
def test_parts_have_no_row_in_common_and_their_share_of_every_stratum(how):
    singles = some("general", 60, (0,)) + [j for j in some("general", 90, (1,)) if j.row >= 60]
    pool = sample_rows(some("qa", 21) + some("dialogue", 40) + singles, None, 0)
    parts = split_by_row(pool, 3, **how)
    assert sorted(j.id for part in parts for j in part) == sorted(j.id for j in pool)
    for a, b in itertools.combinations(parts, 2):
        assert not rows_of(a) & rows_of(b)
    folds = how.get("folds")
    shares = [1 / folds] * folds if folds else [how.get("share", 0.5), 1 - how.get("share", 0.5)]
    for part, share in zip(parts, shares, strict=True):
        assert part == [j for j in pool if j in part]  # the order is kept
        rows = {task: len({j.row for j in part if j.task == task}) for task in ("qa", "dialogue")}
        labels = collections.Counter(j.label for j in part if j.task == "general")
        for seen, of in ((rows["qa"], 21), (rows["dialogue"], 40), (labels[0], 60), (labels[1], 30)):
            assert abs(seen - share * of) < 1
    assert parts == split_by_row(pool, 3, **how) != split_by_row(pool, 4, **how)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pool: sample_rows(pool, 0, 0), "n_samples is 0; wanted 1 to 6"),
        (lambda pool: sample_rows(pool, 7, 0), "n_samples is 7; wanted 1 to 6"),
        (lambda pool: sample_rows([], None, 0), "there are no judgements"),
        (lambda pool: sample_rows(pool + pool[1:2], 2, 0), "the id 'qa_0_hal' occurs 2 times"),
        (lambda pool: split_by_row(pool, 0, share=1), "share is 1; wanted"),
        (lambda pool: split_by_row(pool, 0, folds=1), "folds is 1; wanted 2 or more"),
        (lambda pool: split_by_row(pool, 0, folds=4), "folds=4 leaves a part of 3 source rows empty"),
        (lambda pool: split_by_row(pool, 0, share=0.01), "share=0.01 leaves a part of 3 source rows empty"),
        (lambda pool: split_by_row([], 0), "there are no judgements"),
        (lambda pool: describe([]), "there are no judgements"),
        (lambda pool: read_judgements("nowhere.csv"), "dataset='nowhere.csv'; wanted 'bundled', 'halueval'"),
        (lambda pool: read_judgements("halueval", ["qa", "fun"]), r"tasks=\['qa', 'fun'\]; wanted some of \['qa', 'd"),
        (lambda pool: read_judgements("truthfulqa", []), r"tasks=\[\]; wanted some of \['truthfulqa'\]"),
    ],
)  # fmt: skip
def test_what_cannot_be_chosen_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(some("qa", 3))


# --- Descriptions -----------------------------------------------------------------------------------------------------


def test_a_description_counts_and_measures():
    pool = some("qa", 10) + some("general", 4, (0,))
    text = describe(pool)
    assert text["general"] == {
        "rows": 4,
        "correct": {"count": 4, "characters": 3.0, "words": 1.0},
        "hallucinated": {"count": 0, "characters": None, "words": None},
        "length_auroc": {"characters": None, "words": None},
    }
    assert text["qa"]["rows"] == 10 and text["qa"]["hallucinated"] == {"count": 10, "characters": 4.0, "words": 1.0}
    assert text["qa"]["length_auroc"] == {"characters": 1.0, "words": 0.5}


def test_length_alone_on_real_files(shared_data):
    """The published observation that no monitor on HaluEval's questions did better than the answers' length."""
    judgements = read_judgements(shared_data / "halueval")
    seen = describe(judgements)
    assert list(seen) == ["qa", "general"]
    qa, general = seen["qa"], seen["general"]
    assert (qa["rows"], qa["correct"]["count"], qa["hallucinated"]["count"]) == (1000, 1000, 1000)
    assert [qa[label]["characters"] for label in ("correct", "hallucinated")] == pytest.approx([13.6, 64.5], abs=0.05)
    assert qa["length_auroc"] == pytest.approx({"characters": 0.976, "words": 0.975}, abs=5e-4)
    assert (general["rows"], general["hallucinated"]["count"]) == (4507, 815)
    assert general["length_auroc"]["characters"] == pytest.approx(0.465, abs=5e-4)
    for task, unit in itertools.product(seen, ("characters", "words")):
        lengths = [len(j.answer if unit == "characters" else j.answer.split()) for j in judgements if j.task == task]
        expected = roc_auc_score([j.label for j in judgements if j.task == task], lengths)
        assert seen[task]["length_auroc"][unit] == pytest.approx(expected, abs=1e-12)
    table = shared_data / "truthfulqa" / "TruthfulQA.csv"
    drawn = [describe(read_judgements(table, seed=seed))["truthfulqa"] for seed in range(5)]
    aurocs = [text["length_auroc"]["characters"] for text in drawn]
    assert aurocs == pytest.approx([0.423] * 5, abs=0.03) and len(set(aurocs)) == 5
