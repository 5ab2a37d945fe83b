"""A study without a model: real arms, questions and settings, and answers and texts that a test makes up."""

import dataclasses
import functools
import types

import numpy as np
import pytest

from experiments.calibration import arms as conditions
from experiments.calibration.analysis import analyse
from experiments.calibration.study import Settings, Study
from nmjax.data.questions import Question

DOSES = ("none", "cocaine_10", "cocaine_50", "cocaine_100")
POINTS = [("cocaine", 0.0), ("cocaine", 0.1), ("cocaine", 0.5), ("cocaine", 1.0)]


@dataclasses.dataclass
class Made:
    """A study and the records of its runs, a list a model."""

    study: Study
    asked: list
    slopes: list
    written: list

    @functools.cached_property
    def findings(self):
        return analyse(self.study, self.asked, self.slopes, self.written)


def make(answers, packs=DOSES, arms=None, texts=None, slopes=((), ()), left_out=None, **settings):
    """A study of one or two models.

    answers: a model's (probs [P, N, 4], labels [N]) or (probs, labels, probs before the sampler); a list of them.
    packs, arms: names of packs, or arms; the same for all models.
    texts: the responses of each model, {arm: [text of each prompt]}.
    slopes: (logprobs, slopes), [Q, G, 4] each, of the first model.
    """
    answers = answers if isinstance(answers, list) else [answers]
    arms = conditions.from_packs(packs, None) if arms is None else arms
    names = ["base", "instruct"][: len(answers)]
    questions = [
        Question(f"Question {i}?", ("1", "2", "3", "4"), int(y), f"subject {i % 3}", f"q{i}")
        for i, y in enumerate(answers[0][1])
    ]
    examinees = [
        types.SimpleNamespace(
            name=name, arms=arms, questions=questions, points=POINTS, letters=types.SimpleNamespace(form=form)
        )
        for name, form in zip(names, ("space", "plain"), strict=False)
    ]
    written = [[] for _ in answers]
    teams = []
    if texts is not None:
        teams = [
            types.SimpleNamespace(
                arms=conditions.from_packs(list(texts), None),
                prompts=list(next(iter(texts.values()))),
                style=types.SimpleNamespace(seeds=1, tokens=64, temperature=0.7),
            )
            for _ in answers
        ]
        written = [written_by(texts) for _ in answers]
    study = Study(
        settings=Settings(**{"bootstrap_draws": 100, **settings}),
        names=names,
        hashes=["0" * 64] * len(answers),
        questions=questions,
        left_out=left_out or {},
        examinees=examinees,
        writers=teams,
        ood_left_out=[],
        provided=[{} for _ in answers],
        description={"experiment": "made up"},
        tasks=[],
    )
    derived = [{"logprobs": p, "slopes": s} for p, s in zip(*slopes, strict=True)]
    return Made(study, [records(*given) for given in answers], [derived, *[[] for _ in answers[1:]]], written)


def records(probs, labels, sober=None, mass=0.8):
    """What `Examinee.ask` hands back: the letters hold `mass` of the vocabulary's probability."""
    probs = np.asarray(probs, float)
    sober = probs if sober is None else np.asarray(sober, float)
    with np.errstate(divide="ignore"):
        columns = {
            "probs": probs,
            "logprobs": np.log(mass * probs),
            "sober_logprobs": np.log(mass * sober),
            "removed": np.zeros(probs.shape[:2]),
            "other_mass": np.full(probs.shape[:2], 0.1),
        }
    return [
        {"id": f"q{i}", "answer": int(y), **{name: x[:, i] for name, x in columns.items()}}
        for i, y in enumerate(labels)
    ]


def written_by(texts):
    """What `Writer.write` hands back: one response a prompt and arm, each word a token that costs 1 nat (2, sober)."""

    def response(text):
        tokens = max(1, len(text.split()))
        reason = "length" if len(text.split()) > 12 else "eos"
        return {"text": text, "tokens": tokens, "finish_reason": reason, "nll": 1.0 * tokens, "sober_nll": 2.0 * tokens}

    prompts = range(len(next(iter(texts.values()))))
    return [{"prompt": f"p{i}", "seed": 0, "responses": [response(own[i]) for own in texts.values()]} for i in prompts]


def held(confidences, accuracy, n, seed=0, jitter=0.0):
    """(probs [P, n, 4], labels [n]): condition p is held at `confidences[p]` everywhere, up to `jitter`, and right in
    a share `accuracy[p]` of the questions: the first ones, in a random order that all conditions share.
    """
    rng = np.random.default_rng(seed)
    labels, order = rng.integers(4, size=n), rng.permutation(n)
    probs = []
    for confidence, share in zip(confidences, accuracy, strict=True):
        c = np.clip(confidence + jitter * rng.standard_normal(n), 0.3, 0.999)
        said = np.where(order < round(share * n), labels, (labels + 1) % 4)
        p = np.repeat((1 - c[:, None]) / 3, 4, axis=1)
        p[np.arange(n), said] = c
        probs.append(p)
    return np.array(probs), labels


def sharpened(powers, n=120, seed=0):
    """(probs [P, n, 4], labels [n]): powers of calibrated answers, renormalised, which is what colder samplers do."""
    rng = np.random.default_rng(seed)
    p = rng.dirichlet([0.6] * 4, size=n) * 0.98 + 0.005
    labels = np.minimum((rng.random((n, 1)) > p.cumsum(axis=1)).sum(axis=1), 3)
    powered = p[None] ** np.reshape(powers, (len(powers), -1, 1))
    return powered / powered.sum(axis=-1, keepdims=True), labels


@pytest.fixture(scope="session")
def lab():
    return types.SimpleNamespace(make=make, records=records, held=held, sharpened=sharpened, DOSES=DOSES, POINTS=POINTS)
