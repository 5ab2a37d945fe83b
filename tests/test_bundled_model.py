"""What the bundled model must be able to do, measured on the committed files."""

import importlib.util
import json

import numpy as np
import pytest

import models
import nmjax
from nmjax import paths
from nmjax.data.questions import LETTERS, format_mmlu
from nmjax.data.tokenizer import build_tokenizer
from nmjax.data.world import bundled_world, held_out_questions
from nmjax.induction import copy_accuracy, find_heads, induction_heads, random_rows
from nmjax.metrics import calibration
from nmjax.steering.vectors import read_pairs

FOLDER = paths.checkpoint_dir("tiny")
QUESTIONS = 1000


@pytest.fixture(scope="module")
def lm():
    return models.load(FOLDER)


@pytest.fixture(scope="module")
def answered(lm):
    """Probabilities of the letters [questions, 4], and the right ones, for questions of a seed of their own."""
    questions = held_out_questions(QUESTIONS, seed=2024)
    probs = []
    for start in range(0, QUESTIONS, 250):
        prompts = [format_mmlu(question) for question in questions[start : start + 250]]
        probs.append(np.asarray(nmjax.score_choices(lm, prompts, [f" {letter}" for letter in LETTERS]).probs))
    return np.concatenate(probs), np.array([question.answer for question in questions]), questions


def test_folder_is_small_and_complete():
    files = {path.name: path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()}
    assert sum(files.values()) < 12_000_000
    wanted = {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "README.md",
        *(f"{name}.safetensors" for name in read_pairs()),
    }
    assert wanted <= files.keys()
    assert json.loads((FOLDER / "config.json").read_text())["max_position_embeddings"] >= 1024


def test_it_knows_some_facts_and_not_others_and_says_so(answered):
    probs, answers, questions = answered
    accuracy, ece = float(calibration.accuracy(probs, answers)), float(calibration.ece(probs, answers, n_bins=10))
    assert 0.45 <= accuracy <= 0.85
    assert ece < 0.06
    ranks = np.array([bundled_world().facts[int(question.id.split("-")[1])].rank for question in questions])
    right = probs.argmax(axis=1) == answers
    assert right[ranks < 50].mean() > right[ranks >= 800].mean() + 0.2


def test_reading_the_letter_depends_on_the_options(answered, lm):
    """The same questions with the options reversed: the answer moves with its option."""
    probs, answers, questions = answered
    sure = np.flatnonzero(probs.max(axis=1) > 0.95)[:100]
    prompts = []
    for index in sure:
        lines = format_mmlu(questions[index]).split("\n")
        options = [line[3:] for line in lines[1:5]]
        lines[1:5] = [f"{letter}. {option}" for letter, option in zip(LETTERS, reversed(options), strict=True)]
        prompts.append("\n".join(lines))
    turned = np.asarray(nmjax.score_choices(lm, prompts, [f" {letter}" for letter in LETTERS]).probs)
    assert len(sure) == 100
    assert (turned.argmax(axis=1) == 3 - probs[sure].argmax(axis=1)).mean() > 0.9


@pytest.mark.parametrize("block", [16, 50])
def test_induction_heads_are_there(lm, block):
    found = find_heads(lm, block=block, seed=99)
    assert found.induction.max() > 0.8 and found.copy_accuracy > 0.9
    assert all(layer > 0 for layer, _ in found.heads)  # they match tokens, which takes a layer below


def test_without_its_induction_heads_it_does_not_copy(lm):
    rows = random_rows(lm, 16, 16, seed=5)
    found = induction_heads(lm)
    cut = nmjax.compose(*(nmjax.mask_heads(np.flatnonzero(row).tolist(), layers=[i])
                          for i, row in enumerate(found) if row.any()))  # fmt: skip

    def copying(pack):
        logits = nmjax.forward(lm, [row.tolist() for row in rows], packs=pack).logits
        return copy_accuracy(np.asarray(logits), rows, 16)

    assert copying(None) > 0.9 and copying(cut) < 0.1


def test_a_story_goes_on_as_a_story(lm):
    out = nmjax.generate(lm, ["Once upon a time"] * 4, max_new_tokens=40, temperature=0.7, seed=1)
    known = {token.replace("Ġ", " ").strip() for token in lm.tokenizer.get_vocab()}
    for text in out.text:
        words = [word.strip(".,!?") for word in text.split()]
        assert len(words) > 15 and "." in text
        assert np.mean([word in known for word in words]) > 0.95
        assert "Answer" not in text


def test_the_tokenizer_is_the_one_the_code_builds(lm):
    built = build_tokenizer(bundled_world())
    assert lm.tokenizer.get_vocab() == built.get_vocab()
    text = "What is 17 + 4?\n\tnaïve 日本 Zorldrop"
    assert lm.tokenizer.encode(text) == built.encode(text)
    assert lm.tokenizer.decode(lm.tokenizer.encode(text), skip_special_tokens=True) == text
    assert len(lm.tokenizer) == lm.config.vocab


def test_the_readme_has_the_scores_of_this_model(answered):
    scores = json.loads((FOLDER / "scores.json").read_text())
    probs, answers, _ = answered
    assert scores["multiple_choice"]["questions"] >= 2000
    assert scores["multiple_choice"]["accuracy"] == pytest.approx(float((probs.argmax(1) == answers).mean()), abs=0.04)
    text = (FOLDER / "README.md").read_text()
    assert f"| {scores['multiple_choice']['accuracy']:.3f} |" in text
    assert "python -m experiments.train_tiny" in text


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")
def test_transformers_loads_it_with_equal_logits(lm):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(FOLDER, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)
    prompt = format_mmlu(held_out_questions(1)[0])
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = theirs(ids).logits[0].numpy()
    ours = np.asarray(nmjax.forward(lm, [prompt]).logits[0])
    np.testing.assert_allclose(ours, expected, atol=1e-5 * max(1.0, np.abs(expected).max()))
