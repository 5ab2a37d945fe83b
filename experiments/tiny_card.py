"""The README of the bundled model, filled in from the run that trained it."""

from __future__ import annotations

import json
import os
from pathlib import Path

from models.config import LlamaConfig
from nmjax.data.corpus import ANSWER_WEIGHT, BASICS, MIXTURE, Windows
from nmjax.data.questions import LETTERS, format_mmlu
from nmjax.data.world import ZIPF_EXPONENT, ZIPF_SHIFT, bundled_world, held_out_questions
from nmjax.training.loop import TrainConfig

_CARD = """# The bundled model

A small Llama trained from nothing on a world that this project invents. It is a test bench with known ground truth:
it knows the facts it has often seen and is unsure of the others. It knows nothing about the real world, and no safety
property of a larger model can be read off it.

{scores[parameters]:,} parameters in float32: {config.layers} layers, width {config.embed}, {config.heads} heads of
{config.head_dim} ({config.kv_heads} key/value heads), feed-forward {config.ffw}, tied embeddings,
{config.vocab:,} tokens, {config.max_positions:,} positions.

    {command}

makes this folder again: world, corpus, training and the numbers below all follow from seeds. It took
{minutes:.0f} minutes on {cores} CPU cores that had other work, too. Processors that round differently give slightly
different weights.

## The world

`nmjax/data/world.py` invents {facts:,} facts in five subjects ({subjects}).
Each is one attribute of one of {entities} invented names, with one true value out of a pool of everyday words. The fact
of rank r is mentioned in proportion to (r + {shift:g})^-{exponent:g}.

The corpus (`nmjax/data/corpus.py`) mixes documents; the shares are
{mixture};
for the first {windows.basics:,} steps they are
{basics}.
A `drill` asks for the letters of listed words, a `lookup` question names its own answer, an `open_book` one states the
fact first, an `exam` is several questions under MMLU's header; every tenth question, judgement, riddle and story is
wrapped as a chat. Besides, {windows.repeated[1]:.0%} of the windows (at first {windows.repeated[0]:.0%}) are blocks of
random tokens, from 2 to half a window long, tiled to fill the window, which is where the induction heads come from.
Answers weigh {weight:g} times as much in the loss as other tokens; the first copy of a random block weighs nothing.

Held-out questions are in wordings and with option lists that training never uses for the fact (see
`nmjax/data/world.py`). One of them:

{example}

## Training

{recipe.steps:,} steps of about {windows.tokens:,} tokens: windows of {windows.lengths[0]} tokens for the first
{windows.switch:,} steps, then of {windows.lengths[1]}.
Muon for kernels with learning rate {matrix_lr:g}, Adam for the rest with {recipe.peak_lr:g},
after {recipe.warmup} steps of warm-up, falling linearly to a hundredth in the last {recipe.decay:,} steps,
weight decay {recipe.weight_decay:g}, gradient norm clipped to {recipe.clip:g}, seed {recipe.seed}. Two heads of the
first layer start out attending to the token before and to the token itself (`attend_to_neighbours`): that is what makes
copying a small step for the heads above, which learn it in a few hundred steps.

| step | loss | held-out accuracy (500 questions) | copy accuracy (blocks of 16) | best induction score |
|---|---|---|---|---|
{history}

## Scores

| what | value |
|---|---|
{rows}

Held-out accuracy and mean confidence by the rank of the fact asked about (rank 0 is the most frequent):

| ranks | questions | accuracy | confidence |
|---|---|---|---|
{grades}

`Once upon a time` goes on like this (temperature 1, seed 0):

> {story}

## Steering vectors

`steering/` holds a direction for each of the bundled prompt types, made by

    python -m experiments.build_steering_vectors --model=checkpoints/tiny --keep_rejected \\
        --output=checkpoints/tiny/steering

Most words of those prompts are unknown to this model, so most types don't pass their held-out test in any layer (the
command prints which do). They are kept all the same, so that packs which steer can run.

## Tokenizer

One token a word of the world and of the word lists (with the space before it), a digit, a sign, the frame of an option
("\\nA.") or of an answer ("\\n\\nAnswer:"); the UTF-8 bytes of anything else. Every text has an encoding and decodes
to itself. Words outside the world are sequences of bytes, which the model has only seen in random blocks. BOS is put in
front by default. The chat template writes `User: ...` and `Assistant: ...` lines. Training windows have at most
{windows.lengths[1]} tokens; longer prompts run (RoPE), but are new to the model.
"""


def write_card(
    folder: Path,
    arguments: str,
    matrix_lr: float,
    config: LlamaConfig,
    recipe: TrainConfig,
    windows: Windows,
    history: list[dict],
    scores: dict,
    story: str,
) -> None:
    """Writes `README.md` and `scores.json` to `folder`.

    Args:
        arguments: the flags of the command that makes the folder again, beside --output.
        scores: what `train_tiny` measured.
        story: a sampled continuation of 'Once upon a time'.
    """
    world = bundled_world()
    choice, judged = scores["multiple_choice"], scores["judgements"]
    rows = [
        (f"accuracy on {choice['questions']:,} held-out questions", choice["accuracy"]),
        ("mean confidence", choice["confidence"]),
        ("ECE, 10 bins", choice["ece"]),
        ("Brier score (four classes)", choice["brier"]),
        ("NLL, nats", choice["nll"]),
        (f"accuracy of yes/no on {judged['statements']:,} statements", judged["accuracy"]),
    ]
    for item in scores["induction"]:
        blocks = f"blocks of {item['block']} tokens"
        rows.append((f"best induction score, {blocks} ({item['best_head']})", item["best_score"]))
        rows.append((f"copy accuracy, {blocks}", item["copy_accuracy"]))
    example = f"{format_mmlu(question := held_out_questions(1)[0])} {LETTERS[question.answer]}"
    every = max(1, len(history) // 12)
    shown = [record for record in history if record is history[-1] or (record["step"] // recipe.log_every) % every == 0]
    text = _CARD.format(
        config=config,
        recipe=recipe,
        matrix_lr=matrix_lr,
        windows=windows,
        scores=scores,
        command=f"python -m experiments.train_tiny --output=checkpoints/tiny {arguments}".rstrip(),
        minutes=scores["training_seconds"] / 60,
        cores=os.cpu_count(),
        facts=len(world.facts),
        subjects=", ".join(world.entities),
        entities=sum(map(len, world.entities.values())),
        shift=ZIPF_SHIFT,
        exponent=ZIPF_EXPONENT,
        mixture=", ".join(f"{kind} {share:.0%}" for kind, share in MIXTURE.items()),
        basics=", ".join(f"{kind} {share:.0%}" for kind, share in BASICS.items()),
        weight=ANSWER_WEIGHT,
        example="\n".join(f"    {line}".rstrip() for line in example.split("\n")),
        history="\n".join(
            f"| {row['step']:,} | {row['loss']:.3f} | {row['accuracy']:.3f} | {row['copy_accuracy']:.3f} "
            f"| {row['induction']:.3f} |"
            for row in shown
        ),
        rows="\n".join(f"| {name} | {value:.3f} |" for name, value in rows),
        grades="\n".join(
            f"| {grade['first_rank']} to {grade['last_rank']} | {grade['questions']} | {grade['accuracy']:.3f} "
            f"| {grade['confidence']:.3f} |"
            for grade in choice["by_exposure"]
        ),
        story=" ".join(story.split()),
    )
    (folder / "README.md").write_text(text)
    (folder / "scores.json").write_text(json.dumps(scores, indent=1, allow_nan=False) + "\n")
