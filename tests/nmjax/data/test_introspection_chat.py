"""Records as tokens: published ids and lengths, segments, sentences found by decoding, answers."""

import dataclasses
import itertools

import numpy as np
import pytest
from transformers import AutoTokenizer

from nmjax.data.introspection import read_lists
from nmjax.data.introspection_chat import encode, encode_all
from nmjax.data.introspection_records import Record
from nmjax.data.introspection_split import SplitConfig, generate
from nmjax.paths import checkpoint_dir

YES_NO = (" yes", " no")


def record_of(context="C", reply="R", question="Q", system="S", answers=YES_NO, **more):
    return Record("x", "clean", system, context, reply, question, answers, 0, **more)


@pytest.fixture(scope="module")
def tiny():
    return AutoTokenizer.from_pretrained(checkpoint_dir("tiny_instruct"), local_files_only=True)


@pytest.fixture(scope="module")
def qwen(shared_data):
    if not (folder := shared_data / "tok-qwen2.5").is_dir():
        pytest.skip(f"no tokenizer {folder}")
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def published(shared_data):
    if not (folder := shared_data / "introspection").is_dir():
        pytest.skip(f"no published lists at {folder}")
    return read_lists(folder)


def test_ids_and_lengths_published_for_qwen(qwen, shared_data):
    """As measured on the published data: prefixes of 37 to 42 tokens, on average 39.45, and so on."""
    lists = published(shared_data)
    wanted = {"original": [36, 29, 31, 33], "vague_prompt": [30, 28, 29, 28], "food_control": [28, 28, 31, 31]}
    pairs = list(itertools.product(lists.contexts, lists.replies))
    for name, lengths in wanted.items():
        questions = lists.questions[name]
        asked = zip(pairs, itertools.cycle(questions), strict=False)
        segments = encode_all([record_of(*pair, question, lists.system) for pair, question in asked], qwen)
        prefixes = [len(s.prefix) for s in segments]
        assert (min(prefixes), max(prefixes), round(float(np.mean(prefixes)), 2)) == (37, 42, 39.45)
        for s, length in zip(segments, itertools.cycle(lengths), strict=False):
            assert len(s.question) == length and s.question[-3:] == (785, 4226, 374)
            assert s.answers == ((9834,), (902,)) and all(s.perturbed)
    food = lists.food
    pairs = [
        *itertools.product(food.contexts, food.replies),
        *itertools.product(food.other_contexts, food.other_replies),
    ]
    question = lists.questions["food_control"][0]
    lengths = [len(encode(record_of(c, r, question, lists.system), qwen).prefix) for c, r in pairs]
    assert (min(lengths), max(lengths), round(float(np.mean(lengths)), 1)) == (45, 61, 53.8)


def test_segments_are_the_template_cut_behind_the_reply(qwen, tiny):
    record = record_of("Tell me about the owl.", "I know some things about it.", "Is it strange, yes or no?", "I help.")
    segments = encode(record, qwen)
    assert qwen.decode(segments.prefix) == (
        "<|im_start|>system\nI help.<|im_end|>\n<|im_start|>user\nTell me about the owl.<|im_end|>\n"
        "<|im_start|>assistant\nI know some things about it.<|im_end|>\n"
    )
    assert qwen.decode(segments.question) == (
        "<|im_start|>user\nIs it strange, yes or no?<|im_end|>\n<|im_start|>assistant\nThe answer is"
    )
    segments = encode(record, tiny)
    assert tiny.decode(segments.prefix) == (
        "<|bos|>System: I help.\nUser: Tell me about the owl.\nAssistant: I know some things about it.<|eos|>"
    )
    assert tiny.decode(segments.question) == "\nUser: Is it strange, yes or no?\nAssistant: The answer is"
    assert tiny.decode(encode(record, tiny, "I say").question).endswith("\nAssistant: I say")


@pytest.mark.parametrize("name", ["Qwen-Qwen3-0.6B", "HuggingFaceTB-SmolLM3-3B"])
def test_other_templates(qwen, shared_data, name):
    """That of Qwen3 shows empty thoughts before the last answer only; they are no part of the conversation."""
    file = shared_data / "chat-templates" / f"{name}.jinja"
    if not file.is_file():
        pytest.skip(f"no template {file}")
    before = qwen.chat_template
    qwen.chat_template = file.read_text(encoding="utf-8")
    try:
        segments = encode(record_of("What is that?", "An owl.", "Is it?", "Be kind."), qwen)
    finally:
        qwen.chat_template = before
    prefix, question = qwen.decode(segments.prefix), qwen.decode(segments.question)
    assert prefix.endswith("An owl.<|im_end|>\n") and "Is it?" not in prefix and "<think>" not in prefix
    assert question.count("Is it?") == 1 and question.endswith("The answer is") and "owl" not in question
    assert ("<think>\n\n</think>" in question) == ("Qwen3" in name)


def test_sentences_are_found_as_tokens(qwen, tiny):
    """What is perturbed decodes to the sentence, whatever the template puts before it."""
    for tokenizer, source in ((qwen, "bundled"), (tiny, "tiny")):
        lists = read_lists(source)
        for record in generate(SplitConfig("localization_sentence", n=40), lists)["train"]:
            segments = encode(record, tokenizer)
            ids = [token for token, perturbed in zip(segments.prefix, segments.perturbed, strict=True) if perturbed]
            start, end = record.spans[record.sentence]
            assert tokenizer.decode(ids).strip() == record.context[start:end]
            assert len(segments.answers) == 10 and 0 < len(ids) < len(segments.prefix) / 5


def test_tiny_lists_are_short_and_in_words_of_the_world(tiny):
    lists = read_lists("tiny")
    contexts = lists.contexts + lists.spare_contexts
    pairs = [
        *itertools.product(contexts, lists.replies),
        *itertools.product(lists.food.contexts, lists.food.replies),
        *itertools.product(lists.food.other_contexts, lists.food.other_replies),
    ]
    questions = [q for group in (lists.questions, lists.spare_questions) for texts in group.values() for q in texts]
    asked = [q.format(options="5, 10 or 20", first=0, last=9) for q in questions]
    asked += [probe.prompt for probe in lists.behavior + lists.identity]
    records = [record_of(c, r, asked[0], lists.system) for c, r in pairs]
    records += [
        record_of(*pairs[0], q, system) for q, system in zip(asked, itertools.cycle(lists.other_systems), strict=False)
    ]
    for segments in encode_all(records, tiny):
        assert len(segments.prefix) < 40 and len(segments.question) < 40
        spelled = tiny.convert_ids_to_tokens(segments.prefix + segments.question)
        assert "Ġ" not in spelled  # a word that is spelled out in bytes begins with a space of its own
    assert encode(records[0], tiny).answers == (
        (tiny.convert_tokens_to_ids("Ġyes"),),
        (tiny.convert_tokens_to_ids("Ġno"),),
    )
    thirds = record_of(*pairs[0], asked[0], answers=tuple(f" {name}" for name in lists.thirds))
    assert [len(ids) for ids in encode(thirds, tiny).answers] == [1, 1, 1]


def test_answers_of_several_tokens(qwen, tiny):
    record = record_of(answers=(" 5", " 10", " 20", " 30"))
    assert encode(record, qwen).answers == ((220, 20), (220, 16, 15), (220, 17, 15), (220, 18, 15))
    assert [tiny.decode(ids) for ids in encode(record, tiny).answers] == [" 5", " 10", " 20", " 30"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": (" affirmative", " no")}, r"record 'x': the answer ' affirmative' is \['Ġ', 'a', .*single token"),
        ({"answers": (" 1", " 10", " 2")}, "the tokens of answer ' 10' begin with those of answer ' 1'"),
        ({"answers": ("s", " no")}, "record 'x': the answer 's' changes the tokens of"),
        ({"system": "C", "spans": ((0, 1),), "sentence": 0}, "its context is 2 times in the conversation"),
        ({"context": "Call it.", "spans": ((8, 8),), "sentence": 0}, "sentence 0 has no token"),
    ],
)
def test_records_that_can_not_be_tokens(tiny, change, message):
    with pytest.raises(ValueError, match=message):
        encode(dataclasses.replace(record_of(), **change), tiny)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "wanted a fast one with a chat template"),
        (
            "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
            "{{ m['content'] }}{% endfor %}",
            "record 'x': the chat template refuses its conversation: no system",
        ),
        ("{{ messages | length }}: {{ messages[-1]['content'] }}", "changes its conversation when a question follows"),
        # The question goes on with the reply's last word.
        (
            "{% for m in messages %}{{ m['content'] }}{{ '.' if m['role'] == 'user' }}{% endfor %}",
            "record 'x': its question changes the tokens .*, from .*'Ġ', 'f', 'o'.* to .*'Ġforest'",
        ),
    ],
)
def test_templates_that_will_not_do(tiny, template, message):
    before = tiny.chat_template
    tiny.chat_template = template
    try:
        with pytest.raises(ValueError, match=message):
            encode(record_of("a", " fo", "rest", "the"), tiny)
    finally:
        tiny.chat_template = before


def test_equal_texts_are_encoded_once(tiny):
    a, b = record_of(), dataclasses.replace(record_of(), id="y", answer=1)
    first, second, other = encode_all([a, b, dataclasses.replace(a, context="D")], tiny)
    assert first is second and other.prefix != first.prefix


def test_an_answer_that_has_not_begun(tiny):
    begun, bare = (encode(record_of(), tiny, prefix) for prefix in ("The answer is", None))
    assert bare.prefix == begun.prefix and bare.answers == () and all(bare.perturbed)
    assert tiny.decode(bare.prefix + bare.question).endswith("User: Q\nAssistant:")
    assert tiny.decode(begun.question[len(bare.question) :]) == " The answer is"
