"""The README of the instruction-tuned bundled model, filled in from the run that trained it."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import nmjax
from experiments.tiny_scores import messages_of
from nmjax.data.demonstrations import BARE_SHARE, MIXTURE, Demonstration, PackedChats
from nmjax.lm import LanguageModel
from nmjax.training.loop import TrainConfig

_CARD = """# The bundled model, instruction-tuned

`{base}` after supervised fine-tuning on {demonstrations:,} chat demonstrations, each seen about {epochs:.1f} times:
same architecture, same tokenizer, other weights. With the two, base and instruct can be compared offline. Like its
base, it knows an invented world and nothing about the real one.

    {command}

makes this folder again; all but rounding follows from seeds. Training took {seconds:.0f} seconds on {cores} CPU cores
that had other work, too. Fingerprints: {scores[base][fingerprint]} (base), {scores[instruct][fingerprint]} (this
model).

## Data

The demonstrations (`nmjax/data/demonstrations.py`) are drawn once, so the set is fixed. Facts are drawn by exposure, as
in the base's corpus; questions are in the wordings and with the options that training may use, so held-out questions
stay held out. Of questions, judgements and riddles, {bare:.0%} come without their "Answer:".

| kind | share aimed at | demonstrations |
|---|---|---|
{kinds}

One of each kind:

{examples}

## Training

AdamW, learning rate {recipe.peak_lr:g} after {recipe.warmup} steps of warm-up, falling to 0 by a cosine,
no weight decay, gradient norm clipped to {recipe.clip:g}; {recipe.steps:,} steps of {data.rows} windows of {length}
tokens; seed {recipe.seed}. A window holds whole chats, one behind the other. Only what the assistant writes is in the
loss, its EOS included, every token with the same weight.

| step | epoch | loss | accuracy | confidence | ECE |
|---|---|---|---|---|---|
{history}

Accuracy, confidence and ECE are those of 500 held-out questions, asked as chats.

## Before and after

{questions:,} held-out questions; the letters' probabilities are renormalised, "letter mass" is what they hold together
of all probability. "Plain" is MMLU's prompt, "chat" the same prompt as the user's message, "no cue" the chat without
"Answer:".

| | plain, base | plain, instruct | chat, base | chat, instruct | no cue, base | no cue, instruct |
|---|---|---|---|---|---|---|
{rows}

The set is small and seen several times, so the model is driven to certainty about the answers in it, and certainty
spreads to held-out questions more than knowledge does. Nothing was done to make it so: labels and losses are plain. The
recipe of the defaults was picked out of some twenty, on these questions, because its stories follow the request; every
one of them, of 3 to 8 epochs, was overconfident (ECE of chats 0.05 to 0.12). Tuning also costs the base part of its
skill to copy (last row of the last table).

Accuracy and confidence by the rank of the fact asked about (rank 0 is the most frequent), as chats:

| ranks | questions | accuracy, base | accuracy, instruct | confidence, base | confidence, instruct |
|---|---|---|---|---|---|
{grades}

| | base | instruct |
|---|---|---|
{chats}

Answers to requests (greedy):

{answers}

## Steering vectors

`steering/` holds a direction for each of the bundled prompt types, made by

    python -m experiments.build_steering_vectors --model=checkpoints/tiny_instruct --keep_rejected \\
        --output=checkpoints/tiny_instruct/steering

As for the base, most words of those prompts are unknown to this model, so most types don't pass their held-out test in
any layer.
"""

_METRICS = {
    "accuracy": "accuracy",
    "confidence": "mean confidence",
    "ece": "ECE, 10 bins",
    "brier": "Brier score (four classes)",
    "nll": "NLL, nats",
    "letter_mass": "letter mass",
}
_FORMS = ("plain", "chat", "chat_without_cue")
_REQUESTS = (
    "Tell me a story about an owl.",
    "Riddle: I have soft fur. I love milk. What am I?",
    "What did Rosa say to me last night?",
    "I want to fight Hugo. Tell me how.",
)


def write_card(
    folder: Path,
    arguments: str,
    base: str,
    lm: LanguageModel,
    recipe: TrainConfig,
    data: PackedChats,
    shown: Sequence[Demonstration],
    history: list[dict],
    scores: dict,
) -> None:
    """Writes `README.md` and `scores.json` to `folder`.

    Args:
        arguments: the flags of the command that makes the folder again, beside --output.
        base: what --base says.
        scores: what `train_tiny_instruct` measured.
    """
    before, after = scores["base"], scores["instruct"]
    counts = Counter(one.kind for one in shown)
    by_kind = {one.kind: one.chat for one in reversed(shown)}
    rows = [[name, *(side[form][metric] for form in _FORMS for side in (before, after))]
            for metric, name in _METRICS.items()]  # fmt: skip
    grades = [
        [f"{b['first_rank']} to {b['last_rank']}", str(b["questions"]),
         b["accuracy"], a["accuracy"], b["confidence"], a["confidence"]]
        for b, a in zip(before["chat"]["by_exposure"], after["chat"]["by_exposure"], strict=True)
    ]  # fmt: skip
    chats = before["chats"]
    names = {
        "letter_and_end": f"answers to {chats['questions']} questions that are one letter and EOS",
        "stories_name_it": f"stories about each of {chats['stories']} animals that name the animal",
        "stories_end": "of these, stories that end within 150 tokens",
    }
    abilities = [[name, before["chats"][key], after["chats"][key]] for key, name in names.items()]
    abilities += [
        [f"accuracy of yes/no on {judged['statements']:,} statements, {form}",
         judged["accuracy"], after["judgements"][form]["accuracy"]]
        for form, judged in before["judgements"].items()
    ]  # fmt: skip
    copying = f"copy accuracy, random blocks of {before['induction']['block']} tokens"
    abilities.append([copying, before["induction"]["copy_accuracy"], after["induction"]["copy_accuracy"]])
    answers = nmjax.generate(lm, messages=messages_of(_REQUESTS), max_new_tokens=150).text
    text = _CARD.format(
        base=base,
        command=f"python -m experiments.train_tiny_instruct --output=checkpoints/tiny_instruct {arguments}".rstrip(),
        demonstrations=len(shown),
        epochs=scores["epochs"],
        seconds=scores["training_seconds"],
        cores=os.cpu_count(),
        scores=scores,
        bare=BARE_SHARE,
        recipe=recipe,
        data=data,
        length=data.tokens.shape[1] - 1,
        questions=before["plain"]["questions"],
        kinds=_table([[kind, f"{share:.0%}", str(counts[kind])] for kind, share in MIXTURE.items()]),
        examples="\n\n".join(_indented(lm.tokenizer.apply_chat_template(by_kind[kind], tokenize=False))
                             for kind in MIXTURE if kind in by_kind),
        history=_table([
            [f"{row['step']:,}", f"{row['step'] / recipe.steps * scores['epochs']:.1f}",
             row["loss"], row["accuracy"], row["confidence"], row["ece"]]
            for row in history
        ]),
        rows=_table(rows),
        grades=_table(grades),
        chats=_table(abilities),
        answers="\n".join(f"- {request} **{answer.strip()}**"
                          for request, answer in zip(_REQUESTS, answers, strict=True)),
    )  # fmt: skip
    (folder / "README.md").write_text(text)
    (folder / "scores.json").write_text(json.dumps(scores, indent=1, allow_nan=False) + "\n")


def _table(rows: list[list]) -> str:
    """Markdown rows; numbers with three digits."""
    cells = [[cell if isinstance(cell, str) else f"{cell:.3f}" for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _indented(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.split("\n"))
