"""How unsure a model is of its answers: from the answer's own probabilities, from other samples, by asking it.

For each prompt there is a greedy answer, which is judged, and K sampled ones. All sums over tokens include the token
that ended the answer (or the text that completed a stop string). Entropies and log-probabilities are in nats.

    nll                       -ln p of the greedy answer
    perplexity                exp(nll / tokens)
    self_certainty            mean over its tokens of KL(uniform || p)                        Kang et al. 2025
    predictive_entropy        -mean ln p of the samples                      Kadavath et al. 2022, Kuhn et al. 2023
    length_normalised_entropy -mean (ln p / tokens)                              Malinin and Gales 2021
    lexical_similarity        mean ROUGE-L F1 of two samples                     Kuhn et al. 2023
    semantic_entropy          of the shares of the samples' clusters             Farquhar et al. 2024 ("discrete")
    weighted_semantic_entropy of the clusters' probabilities, from p of the distinct samples      the same
    num_clusters              how many there are                                 Lin et al. 2024 (NumSet)
    p_true                    the model's own verdict on the greedy answer       Kadavath et al. 2022
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import ArrayLike

from nmjax.generation import generate
from nmjax.lm import LanguageModel
from nmjax.metrics.semantic import Clusterer, by_overlap, lexical_similarity, semantic_entropy
from nmjax.scoring import mean_logprobs, score_choices

DETECTORS = {
    "nll": 1, "perplexity": 1, "self_certainty": -1, "predictive_entropy": 1, "length_normalised_entropy": 1,
    "lexical_similarity": -1, "semantic_entropy": 1, "weighted_semantic_entropy": 1, "num_clusters": 1, "p_true": -1,
}  # fmt: skip
"""The measures, and by what each is multiplied so that high means unsure. Fixed by what they mean, not by any data."""

SHOWN = 5  # samples that the model sees when it judges its answer, as in Kadavath et al.


# --- From log-probabilities -------------------------------------------------------------------------------------------


def predictive_entropy(logprobs: ArrayLike, lengths: ArrayLike | None = None) -> np.ndarray:
    """Monte-Carlo estimate of the entropy of the answers: the mean of -ln p over samples, [..., K] -> [...].

    With `lengths` [..., K], each ln p is divided by the tokens of its answer: not an entropy any more, but not larger
    for longer answers either. Without bias where ln p is of the distribution that was sampled.
    """
    lp = np.asarray(logprobs, dtype=np.float64)
    return -np.mean(lp if lengths is None else lp / np.asarray(lengths), axis=-1)


def self_certainty(mean_logprobs: ArrayLike, vocab: int) -> float:
    """Mean over tokens of KL(uniform || p), 0 for a uniform p, from the means of ln p over the vocabulary, [T]."""
    return float(-np.mean(np.asarray(mean_logprobs, dtype=np.float64)) - math.log(vocab))


# --- By asking --------------------------------------------------------------------------------------------------------


def true_or_false(prompt: str, answer: str, ideas: Sequence[str]) -> str:
    """Asks whether an answer is true, after other answers that the model gave: the scheme of Kadavath et al. 2022."""
    listed = "".join(f"- {idea}\n" for idea in ideas)
    return f"{prompt}\n\nAnswers that came to mind:\n{listed}\nProposed answer: {answer}\nTrue or False:"


@dataclasses.dataclass(frozen=True)
class SelfCheck:
    """How a model is asked about its own answer, and the texts that say it is true and that it is false."""

    ask: Callable[[str, str, Sequence[str]], str] = true_or_false
    verdicts: tuple[str, str] = (" True", " False")


def p_true(
    lm: LanguageModel, prompts: Sequence[str], answers: Sequence[str], ideas: Sequence[Sequence[str]],
    check: SelfCheck = SelfCheck(), packs=None, **options,
) -> np.ndarray:  # fmt: skip
    """Probability of "true" against "false" as the model's verdict on each of its answers, [B].

    Args:
      ideas: other answers to each prompt; the first `SHOWN` are shown.
      packs, options: as for `score_choices`.
    """
    asked = [check.ask(*row[:2], row[2][:SHOWN]) for row in zip(prompts, answers, ideas, strict=True)]
    return np.asarray(score_choices(lm, asked, list(check.verdicts), packs, **options).probs)[:, 0]


# --- All of them ------------------------------------------------------------------------------------------------------


def sample_uncertainty(
    lm: LanguageModel,
    prompts: Sequence,
    *,
    samples: int = 10,
    max_new_tokens: int = 32,
    temperature: float = 1.0,
    packs=None,
    seed=0,
    stop: str | Sequence[str] = (),
    clusterer: Clusterer = by_overlap,
    check: SelfCheck | None = SelfCheck(),
    row_ids=None,
    width: int | None = None,
    batch_size: int | None = None,
) -> list[dict[str, Any]]:
    """Answers every prompt greedily and `samples` times at a temperature, and measures how unsure the model is.

    The answer is judged, and the judge asked, under the same packs. ln p of samples is of the distribution they were
    drawn from, temperature and packs included; that of the greedy answer is at temperature 1 before the sampler's
    effects.

    Args:
      prompts: a list of texts or of token id lists.
      samples: K, at least 2.
      packs, seed, row_ids, stop, width, batch_size: as for `generate`. Seed and row id alone decide a row's samples.
      clusterer: which of the samples mean the same. A model of entailment goes in as
        `lambda prompt, answers: cluster(answers, lambda a, b: entails(f"{prompt} {a}", f"{prompt} {b}"))`.
      check: how the model is asked for `p_true`; None does not ask.
    Returns:
      A dictionary a prompt: `prompt` (text), `answer`, its `tokens`, their `logprobs` and `mean_logprobs` (over the
      vocabulary), all [T]; `samples` (K texts), their `sample_logprobs`, `sample_tokens` (how many) and `clusters`, all
      [K]; and the measures by name (see above).
    Raises:
      ValueError: bad input; the message names the argument, the value seen and the value wanted.
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 2:
        raise ValueError(f"samples={samples!r}, wanted an integer >= 2")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature!r}, wanted above 0: samples that are all greedy say nothing")
    if lm.tokenizer is None:
        raise ValueError("this model has no tokenizer, wanted one: answers are compared as texts")
    rows: dict[str, Any] = dict(seed=seed, row_ids=row_ids, batch_size=batch_size)
    writing = dict(packs=packs, max_new_tokens=max_new_tokens, stop=stop, width=width, **rows)
    greedy = generate(lm, prompts, **writing)
    drawn = generate(lm, prompts, temperature=temperature, num_return_sequences=samples, **writing)
    padded = {} if width is None else dict(width=width + max_new_tokens, room=max_new_tokens)
    means = mean_logprobs(lm, greedy.prompt_tokens, greedy.tokens, packs, **padded, **rows)

    results: list[dict[str, Any]] = []
    for i, prompt in enumerate(prompts):
        copies = range(i * samples, (i + 1) * samples)
        text = prompt if isinstance(prompt, str) else lm.tokenizer.decode(prompt, skip_special_tokens=True)
        answers = [drawn.text[k].strip() for k in copies]
        logprobs = np.array([drawn.sample_logprobs[k].sum(dtype=np.float64) for k in copies])
        lengths = np.array([len(drawn.tokens[k]) for k in copies])
        clusters = np.asarray(clusterer(text, answers))
        if clusters.shape != (samples,):
            raise ValueError(f"clusterer returned {clusters.tolist()}, wanted {samples} numbers, one an answer")
        distinct = [k - copies[0] for k in copies if drawn.tokens[k] not in drawn.tokens[copies[0] : k]]
        nll = -greedy.logprobs[i].sum(dtype=np.float64)
        results.append(
            {
                "prompt": text,
                "answer": greedy.text[i].strip(),
                "tokens": greedy.tokens[i],
                "logprobs": greedy.logprobs[i],
                "mean_logprobs": means[i],
                "samples": answers,
                "sample_logprobs": logprobs,
                "sample_tokens": lengths,
                "clusters": clusters,
                "nll": float(nll),
                "perplexity": float(np.exp(nll / len(greedy.tokens[i]))),
                "self_certainty": self_certainty(means[i], lm.config.vocab),
                "predictive_entropy": float(predictive_entropy(logprobs)),
                "length_normalised_entropy": float(predictive_entropy(logprobs, lengths)),
                "lexical_similarity": lexical_similarity(answers),
                "semantic_entropy": semantic_entropy(clusters),
                "weighted_semantic_entropy": semantic_entropy(clusters[distinct], logprobs[distinct]),
                "num_clusters": len(np.unique(clusters)),
            }
        )
    if check is not None:
        texts, answers, ideas = ([row[name] for row in results] for name in ("prompt", "answer", "samples"))
        for row, p in zip(results, p_true(lm, texts, answers, ideas, check, packs, **rows), strict=True):
            row["p_true"] = float(p)
    return results
