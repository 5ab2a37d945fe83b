"""What a model of the bundled world can do, for the cards of the bundled models.

Questions are asked plainly, as MMLU's prompts, or with `chat` as the user's message in the model's chat template.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

import nmjax
from nmjax.data.demonstrations import with_article
from nmjax.data.questions import LETTERS, Question, format_mmlu
from nmjax.data.tokenizer import SPECIALS
from nmjax.data.words import POOLS
from nmjax.data.world import bundled_world, held_out_statements
from nmjax.generation import Generation
from nmjax.induction import copy_accuracy, induction_scores, repeated_blocks
from nmjax.lm import LanguageModel
from nmjax.metrics import calibration

GRADES = (0, 25, 50, 100, 200, 400, 800)  # first ranks of the facts that are scored together


def prompts_of(lm: LanguageModel, requests: Sequence[str], chat: bool) -> list[list[int]]:
    """Token ids of each request, up to where its answer begins."""
    if not chat:
        return [lm.encode(request) for request in requests]
    texts = [
        lm.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        for message in messages_of(requests)
    ]
    return [lm.encode(text, special=False) for text in texts]  # the template writes the special tokens itself


def messages_of(requests: Sequence[str]) -> list[list[dict[str, str]]]:
    """Each request as a chat of its own."""
    return [[{"role": "user", "content": request}] for request in requests]


def measure_questions(lm: LanguageModel, questions: Sequence[Question], chat: bool = False, cue: bool = True) -> dict:
    """Letter probabilities, renormalised over the four letters: accuracy, confidence, ECE (10 bins), Brier score and
    NLL, the letters' share of all probability, and accuracy and confidence by how often a fact was seen.

    cue: whether the prompt ends in "Answer:", as MMLU's does.
    """
    requests = [format_mmlu(question) for question in questions]
    if not cue:
        requests = [request.removesuffix("Answer:").rstrip() for request in requests]
    prompts = prompts_of(lm, requests, chat)
    scores = nmjax.score_choices(lm, prompts, [f" {letter}" for letter in LETTERS], batch_size=250)
    probs, labels = np.asarray(scores.probs), np.array([question.answer for question in questions])
    right = probs.argmax(axis=1) == labels
    facts = bundled_world().facts
    ranks = np.array([facts[int(question.id.split("-")[1])].rank for question in questions])
    grades = []
    for low, high in zip(GRADES, (*GRADES[1:], len(facts)), strict=True):
        inside = (ranks >= low) & (ranks < high)
        grade = {"first_rank": low, "last_rank": high - 1, "questions": int(inside.sum())}
        grades.append(
            grade | {"accuracy": float(right[inside].mean()), "confidence": float(probs[inside].max(1).mean())}
        )
    return {
        "questions": len(labels),
        "accuracy": float(calibration.accuracy(probs, labels)),
        "confidence": float(calibration.mean_confidence(probs, labels)),
        "ece": float(calibration.ece(probs, labels, n_bins=10)),
        "brier": float(calibration.brier_multiclass(probs, labels)),
        "nll": float(calibration.nll(probs, labels)),
        "letter_mass": float(np.mean(scores.mass)),
        "by_exposure": grades,
    }


def measure_judgements(lm: LanguageModel, n: int, chat: bool = False) -> dict:
    """Accuracy of ' yes' against ' no' on statements."""
    statements = held_out_statements(n)
    prompts = prompts_of(lm, [statement.prompt for statement in statements], chat)
    said_yes = np.asarray(nmjax.score(lm, prompts, choices=[" yes", " no"])).argmax(axis=1) == 0
    return {"statements": n, "accuracy": float((said_yes == [statement.true for statement in statements]).mean())}


def measure_chats(lm: LanguageModel, questions: Sequence[Question]) -> dict:
    """How far chats do as they are asked: the share of greedy answers to questions that are one letter and EOS, and of
    stories about each animal, drawn at temperature 1, that name the animal and that end within 150 tokens."""
    asked = nmjax.generate(lm, messages=messages_of([format_mmlu(q) for q in questions]), max_new_tokens=4)
    letters = np.array([text.strip() in LETTERS for text in asked.text])
    animals = POOLS["animal"]
    requests = [f"Tell me a story about {with_article(animal)}." for animal in animals]
    told = nmjax.generate(lm, messages=messages_of(requests), max_new_tokens=150, temperature=1.0, seed=0)
    return {
        "questions": len(letters),
        "letter_and_end": float((letters & _ended(asked)).mean()),
        "stories": len(animals),
        "stories_name_it": float(
            np.mean([animal in re.findall(r"\w+", text) for animal, text in zip(animals, told.text, strict=True)])
        ),
        "stories_end": float(_ended(told).mean()),
    }


def _ended(generation: Generation) -> np.ndarray:
    return np.array([reason == "eos" for reason in generation.finish_reason])


def measure_induction(lm: LanguageModel, block: int, samples: int = 64) -> dict:
    """The best head's induction score, and copy accuracy, on random blocks repeated once."""
    rows = repeated_blocks(samples, block, np.arange(len(SPECIALS), lm.config.vocab), first=lm.config.bos_id)
    result = nmjax.forward(lm, [row.tolist() for row in rows], capture=("pattern",))
    width = rows.shape[1]
    pattern = np.asarray(result.activations["pattern"])[..., -width:, -width:]
    scores = induction_scores(pattern, block)
    layer, head = np.unravel_index(scores.argmax(), scores.shape)
    return {
        "block": block,
        "best_score": float(scores.max()),
        "best_head": f"layer {layer}, head {head}",
        "copy_accuracy": copy_accuracy(np.asarray(result.logits)[:, -width:], rows, block),
    }


def training_seconds(history: list[dict]) -> float:
    """Seconds spent in training, over all the runs that a killed and restarted training took."""
    total, last = 0.0, 0.0
    for record in history:
        total += record["seconds"] - last if record["seconds"] > last else record["seconds"]
        last = record["seconds"]
    return round(total, 1)
