"""How questions are put: alone, after examples, as a chat; and the bundled corpus in the same format."""

import random
from pathlib import Path

import jinja2
import pytest

from nmjax.data.corpus import exam_document
from nmjax.data.question_prompts import chat_prompt, few_shot_prefix, prompt_of
from nmjax.data.questions import Question, format_mmlu, read_pool
from nmjax.data.tokenizer import build_tokenizer
from nmjax.data.world import bundled_world

SUM = Question("What is two plus two?", ("1", "2", "3", "4"), 3, "simple_sums", "1")
SIGN = Question("Which sign adds?", ("+", "-", "*", "/"), 0, "simple_sums", "2")


def test_examples_stand_solved_before_the_question():
    assert prompt_of(SUM) == format_mmlu(SUM)
    assert prompt_of(SUM, [SIGN, SUM]) == (
        "The following are multiple choice questions (with answers) about simple sums.\n\n"
        "Which sign adds?\nA. +\nB. -\nC. *\nD. /\n\nAnswer: A\n\n"
        "What is two plus two?\nA. 1\nB. 2\nC. 3\nD. 4\n\nAnswer: D\n\n"
        "What is two plus two?\nA. 1\nB. 2\nC. 3\nD. 4\n\nAnswer:"
    )


def test_the_corpus_shows_exams_in_the_format_they_are_asked_in(monkeypatch):
    world = bundled_world()
    asked: list[Question] = []
    draw = world.question
    monkeypatch.setattr(world, "question", lambda rng: asked.append(draw(rng)) or asked[-1])
    rng, lengths = random.Random(0), set()
    for _ in range(30):
        asked.clear()
        text = "".join(text for text, _ in exam_document(world, rng))
        assert text + "\n\n" == few_shot_prefix(asked[0].subject, asked)
        lengths.add(len(asked))
    assert lengths == {1, 2, 3}


def test_five_bundled_examples_fit_the_bundled_context():
    tokenizer = build_tokenizer(bundled_world())
    pool = read_pool("bundled", 0, at_least=20)
    lengths = [len(tokenizer(prompt_of(q, pool.examples[q.subject]))["input_ids"]) for q in pool.questions]
    assert 5 * min(len(tokenizer(format_mmlu(q))["input_ids"]) for q in pool.questions) < max(lengths) < 512


def test_a_chat_is_one_message_of_the_user():
    tokenizer = build_tokenizer(bundled_world())
    text = chat_prompt(tokenizer, format_mmlu(SUM))
    assert text == f"<|bos|>User: {format_mmlu(SUM)}\nAssistant:"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    tokenizer.chat_template = None
    for none in (tokenizer, None):
        with pytest.raises(ValueError, match="no chat template"):
            chat_prompt(none, "?")


def test_a_model_that_thinks_is_asked_to_answer_at_once(shared_data):
    path = Path(shared_data) / "chat-templates" / "Qwen-Qwen3-0.6B.jinja"
    if not path.exists():
        pytest.skip(f"no {path}")
    tokenizer = build_tokenizer(bundled_world())
    tokenizer.chat_template = path.read_text(encoding="utf-8")
    left_to_think = jinja2.Template(tokenizer.chat_template).render(
        messages=[{"role": "user", "content": "?"}], add_generation_prompt=True
    )
    assert left_to_think.endswith("<|im_start|>assistant\n")
    assert chat_prompt(tokenizer, "?") == f"{left_to_think}<think>\n\n</think>\n\n"
