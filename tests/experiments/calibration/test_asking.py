"""The exam and the essay on the bundled model: against whole prompts, finite differences and `generate` itself."""

import dataclasses

import numpy as np
import pytest
from scipy.special import log_softmax

import models
import nmjax
from experiments.calibration import arms as conditions
from experiments.calibration.asking import (
    Examinee,
    common_beginning,
    encode_prompts,
    make_batches,
    padded_widths,
)
from experiments.calibration.study import Settings, prepare, shared_beginnings
from experiments.calibration.writing import Style, Writer, encode_ood
from nmjax import paths
from nmjax.data.letters import letters_of
from nmjax.data.ood import load_prompts
from nmjax.data.question_prompts import few_shot_prefix
from nmjax.data.questions import format_mmlu, read_pool, sample_by_subject

PACKS = ("none", "cocaine_50", "dxm", "cocaine_100")  # dxm draws noise, so its prefix can't be shared


@pytest.fixture(scope="module")
def lm():
    return models.load(paths.checkpoint_dir("tiny"))


@pytest.fixture(scope="module")
def pool():
    return read_pool("bundled", 0, ["biology", "people"], at_least=8)


@pytest.fixture(scope="module")
def examinee(lm, pool):
    """Builds an examinee: 7 questions of two subjects in batches of 2, behind two worked examples."""

    def build(share=True, **changes):
        questions = sample_by_subject(pool.questions, 7, 0)
        examples = {subject: shown[:2] for subject, shown in pool.examples.items()}
        ids = encode_prompts(lm, questions, examples, chat=False)
        shared = shared_beginnings(lm, questions, ids, examples, chat=False) if share else {}
        arms = conditions.from_packs(PACKS, None)
        built = Examinee("tiny", lm, arms, letters_of(lm, chat=False), questions, ids, shared, 2, 0)
        return dataclasses.replace(built, **changes)

    return build


def answers(examinee):
    found = {}
    for batch, width in examinee.batches:
        found.update(zip(batch, examinee.ask(batch, width), strict=True))
    return [found[i] for i in range(len(examinee.questions))]


def test_behind_shared_examples_as_with_whole_prompts(examinee, pool):
    sharing, whole = examinee(), examinee(share=False)
    assert sharing.sharing == [0, 1, 3] and sharing.apart == [2] and whole.sharing == []
    shared, apart = answers(sharing), answers(whole)
    for a, b, question in zip(shared, apart, sharing.questions, strict=True):
        assert a["id"] == b["id"] == question.id and a["answer"] == question.answer
        for name in ("probs", "logprobs", "sober_logprobs", "removed", "other_mass"):
            np.testing.assert_allclose(a[name], b[name], atol=3e-5, err_msg=name)
    moved = np.array([row["sober_logprobs"] for row in shared])
    assert np.abs(moved[:, 3] - moved[:, 0]).max() > 1e-3 and np.abs(moved[:, 2] - moved[:, 0]).max() > 1e-3
    for subject, ids in sharing.shared.items():
        assert sharing.lm.tokenizer.decode(ids, skip_special_tokens=True).startswith(
            few_shot_prefix(subject, pool.examples[subject][:2]).rstrip()
        )


def test_examples_change_the_answer_and_the_letters_are_scored(examinee, lm):
    """One row by hand: the letters' logits after the whole prompt."""
    subject = examinee()
    row, ids = answers(subject)[3], subject.prompts[3]
    logits = np.asarray(nmjax.forward(lm, [ids]).logits, np.float64)[0, -1]
    letters = lm.tokenizer.convert_tokens_to_ids(["\u0120A", "\u0120B", "\u0120C", "\u0120D"])
    np.testing.assert_allclose(row["sober_logprobs"][0], log_softmax(logits)[letters], atol=1e-4)
    alone = np.asarray(nmjax.forward(lm, [lm.encode(format_mmlu(subject.questions[3]))]).logits, np.float64)[0, -1]
    assert np.abs(log_softmax(alone)[letters] - row["sober_logprobs"][0]).max() > 1e-2


def test_slopes_are_finite_differences(examinee):
    subject = examinee(share=False, arms=conditions.from_packs(["none", "cocaine_50", "cocaine"], None))
    assert subject.points == [("cocaine", 0.0), ("cocaine", 0.5), ("cocaine", 1.0)]
    asked, width = [0, 3, 5], max(map(len, subject.prompts))
    rows = subject.slopes(asked, width)
    base, step = nmjax.load_pack("cocaine"), 0.02
    doses = [dose for _, dose in subject.points]
    ends = [max(dose - step, 0) for dose in doses] + [dose + step for dose in doses]
    packs = [base.at(dose) for dose in ends] * len(asked)
    prompts = [subject.prompts[i] for i in asked for _ in ends]
    scores = nmjax.score(subject.lm, prompts, subject.choices[:4], packs, width=width)
    low, high = np.moveaxis(np.asarray(scores).reshape(3, 2, 3, 4), 1, 0)
    widths = np.array([2 * step if dose > 0 else step for dose in doses])
    seen = np.array([row["slopes"] for row in rows])
    assert np.abs(seen).max() > 0.5
    np.testing.assert_allclose(seen, (high - low) / widths[:, None], atol=0.02 * np.abs(seen).max())


def test_rows_of_a_batch_reach_their_question(examinee, monkeypatch):
    """A scorer that knows the answers: arm k puts 0.4 + 0.1 k on the right one; the last batch is filled up."""
    subject = examinee(share=False)
    owner = {tuple(ids): q for ids, q in zip(subject.prompts, subject.questions, strict=True)}

    def score(lm, prompts, choices, packs, **options):
        assert len(prompts) == 2 * len(PACKS), "the last batch must be as large as the others"
        rows = []
        for ids, pack in zip(prompts, packs, strict=True):
            k = PACKS.index(pack.name)
            row = np.full(8, 1e-3)
            row[:4] = (0.6 - 0.1 * k) / 3
            row[owner[tuple(ids)].answer] = 0.4 + 0.1 * k
            rows.append(row)
        probs = np.array(rows, np.float32)
        return nmjax.scoring._summarise(np.log(probs), np.log(probs), np.ones(probs.shape, bool))

    monkeypatch.setattr(nmjax, "score_choices", score)
    for row, question in zip(answers(subject), subject.questions, strict=True):
        np.testing.assert_allclose(row["probs"][:, question.answer], [0.4, 0.5, 0.6, 0.7], atol=1e-6)
        np.testing.assert_allclose(row["other_mass"], 4e-3, atol=1e-6)


def test_batches_hold_every_question_once_at_a_width_that_fits():
    lengths = [7, 100, 9, 8, 30, 52, 51, 8, 99, 13, 12, 9]
    groups = list("aababbaabbab")
    for own in (None, groups):
        batches = make_batches(lengths, own, 2, 3)
        assert sorted(i for batch, _ in batches for i in batch) == list(range(12))
        assert all(len(batch) <= 2 and max(lengths[i] for i in batch) <= width for batch, width in batches)
        if own:
            assert all(len({own[i] for i in batch}) == 1 for batch, _ in batches)


def test_widths_are_few():
    assert padded_widths([20, 21, 24], 128) == [24] * 3
    assert padded_widths([100, 1000], 128) == [500, 1000]  # 64,000 tokens saved by halving once, 32,000 by twice
    assert padded_widths([100, 100, 1000], 128) == [250, 250, 1000]
    assert padded_widths([100, 1000], 64) == [1000] * 2  # too little to compile for


def test_common_beginning_leaves_a_token_of_each():
    assert common_beginning([[1, 2, 3, 4], [1, 2, 5]]) == 2
    assert common_beginning([[1, 2], [1, 2, 3]]) == 1
    assert common_beginning([[9, 2], [1, 2]]) == 0


def test_chat_prompts_are_the_templates(lm, pool):
    (ids,) = encode_prompts(lm, pool.questions[:1], {}, chat=True)
    message = [{"role": "user", "content": format_mmlu(pool.questions[0])}]
    assert ids == lm.tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)


def test_what_is_written_is_scored_drugged_and_sober(lm):
    prompts = load_prompts(per_category=1)
    arms = conditions.from_packs(["none", "lsd"], None)
    twice = [*arms, dataclasses.replace(arms[0], label="again")]
    writer = Writer(lm, twice, prompts, encode_ood(lm, prompts, False), Style(6, 0.7, 2), 2, 0)
    assert [len(batch) for batch, _ in writer.batches] == [2, 1]
    rows = {}
    for batch, width in writer.batches:
        rows.update(zip(batch, writer.write(batch, width), strict=True))
    moved = []
    for i, row in rows.items():
        assert row["prompt"] == prompts[i].id and len(row["seeds"]) == 2
        for sober, drugged, again in row["seeds"]:
            assert sober["text"] == again["text"], "arms of a prompt must draw the same random numbers"
            assert sober["nll"] == pytest.approx(sober["sober_nll"], abs=1e-3)
            assert 1 <= sober["tokens"] <= 6
            moved.append((drugged["text"] != sober["text"], abs(drugged["nll"] - drugged["sober_nll"]) > 0.1))
    assert np.array(moved).any(0).all()
    assert rows[0]["seeds"][0][0]["text"] != rows[0]["seeds"][1][0]["text"], "seeds must differ"


@pytest.mark.parametrize("arm", [None, ("temperature", "placebo")])
def test_who_writes(arm):
    settings = Settings(compare_model="none", max_questions=5, ood_per_category=1, arms=arm, doses=("0.5", "1"))
    study = prepare(settings)
    wanted = ["none", "cocaine_10", "cocaine_50", "cocaine_100", "lsd"]
    if arm:
        wanted = ["none", "temperature@0.5", "temperature@1", "placebo@1", "lsd"]
    assert [written.label for written in study.writers[0].arms] == wanted
    assert {task.kind for task in study.tasks} == {"ask", "slopes", "write"}
