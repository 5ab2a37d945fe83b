"""Generation under a monitor, with the names of the published one.

The signals, their formulas and the constants are in `nmjax.signals`. Whatever the temperature, they are of the
prediction at temperature 1.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nmjax.generation import generate
from nmjax.lm import LanguageModel
from nmjax.report.results import load_json
from nmjax.signals import SIGNALS, Rule, make_monitor

NEVER = 2.0  # a cutoff that no probability passes
ALPHA = 0.1
HALT_REASONS = {
    "halted": "P_fail above cutoff",
    "eos": "end of text",
    "stop": "stop string",
    "length": "max tokens",
}


def generate_with_monitoring(
    lm: LanguageModel,
    prompts: Sequence,
    *,
    tau=2.0,
    lambda_=5.0,
    pfail_cutoff=0.85,
    max_new_tokens: int = 512,
    check_every_k_tokens: int = 1,
    temperature: float = 0.0,
    compute_score_only: bool = False,
    k_top: int = 5,
    alpha_pri: float = ALPHA,
    packs=None,
    seed=0,
    thresholds: str | os.PathLike | None = None,
    yes: str | Sequence[str] = (" Yes", " yes", "Yes", "yes"),
    no: str | Sequence[str] = (" No", " no", "No", "no"),
    **options,
) -> list[dict[str, Any]]:
    """Continues every prompt, watching every k-th step, and ends a row whose P_fail passes the cutoff.

    Args:
      prompts, packs, seed, options: as for `generate`.
      tau, lambda_, pfail_cutoff: one for all rows or one a row.
      check_every_k_tokens: k; `delta_h` then spans k tokens.
      compute_score_only: checks every token, never halts, and returns scores in place of trajectories: means of the
        `k_top` largest values of a signal, of fewer in a shorter text.
      thresholds: a file that `experiments.calibrate_thresholds` wrote. Its statistic and direction take P_fail's place:
        a row is ended once the statistic, of the k_top largest values so far, is on the risky side of its threshold,
        and `flagged` says whether it was in the end.
      yes, no: texts whose first tokens count as yes and no in the first step's `p_yes` and `p_no`.
    Returns:
      A dictionary a row: `halted, halt_reason, halt_step, tokens, text, prompt, p_yes, p_no`, and `trajectory`, a list
      with the signals of each checked step; or, scores only, `score` (that of hbar_s), `hbar_s_score`, `pri_score`,
      `hbar_s_early_score` ..., and one such for every other signal. With `thresholds` also `flagged` and `statistic`.
    Raises:
      ValueError: bad input; the message names the argument, the value seen and the value wanted.
    """
    rule = None if thresholds is None else load_rule(thresholds)
    watch = make_monitor(
        len(prompts),
        tau=tau,
        lambda_=lambda_,
        pfail_cutoff=NEVER if compute_score_only else pfail_cutoff,
        alpha=alpha_pri,
        every=1 if compute_score_only else check_every_k_tokens,
        yes=first_tokens(lm, yes),
        no=first_tokens(lm, no),
        rule=rule,
        k_top=k_top,
    )
    out = generate(
        lm, prompts, packs, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, monitor=watch, **options
    )
    assert out.seen is not None
    results = []
    for i, seen in enumerate(out.seen):
        halted = out.finish_reason[i] == "halted"
        row: dict[str, Any] = {
            "halted": halted,
            "halt_reason": HALT_REASONS[out.finish_reason[i]],
            "p_yes": seen["p_yes"],
            "p_no": seen["p_no"],
        }
        if rule is not None:
            row["statistic"] = statistic(rule, seen, k_top)
            row["flagged"] = bool(rule.sign * row["statistic"] >= rule.sign * rule.tau)
        if compute_score_only:
            scores = {f"{name}_score": top_mean(seen[name], k_top) for name in SIGNALS}
            results.append(row | {"score": scores["hbar_s_score"]} | scores)
            continue
        steps = np.flatnonzero(~np.isnan(seen["hbar_s"]))
        results.append(
            row
            | {
                "halt_step": len(out.tokens[i]) if halted else None,
                "tokens": out.tokens[i],
                "text": out.text[i],
                "prompt": prompts[i],
                "trajectory": [{"step": int(t)} | {name: float(seen[name][t]) for name in SIGNALS} for t in steps],
            }
        )
    return results


def first_tokens(lm: LanguageModel, texts: str | Sequence[str]) -> list[int]:
    """The first token of each text, each once; none without a tokenizer."""
    if lm.tokenizer is None:
        return []
    given = [texts] if isinstance(texts, str) else list(texts)
    return list(dict.fromkeys(lm.encode(text, "yes, no", special=False)[0] for text in given))


def top_mean(values: np.ndarray, k: int = 5) -> float:
    """Mean of the k largest of the values that were checked, of fewer if there are fewer, 0 if there is none."""
    checked = np.sort(np.asarray(values, np.float64)[~np.isnan(values)])[-k:]
    return float(checked.mean()) if len(checked) else 0.0


def statistic(rule: Rule, seen: dict, k: int) -> float:
    """The calibrated statistic of a whole text."""
    means = [top_mean(seen[name], k) for name in rule.signals]
    return float(rule.intercept + np.dot(rule.weights, means))


def load_rule(path: str | os.PathLike) -> Rule:
    """The rule that a calibration file chose (its key "monitor"). Raises ValueError for a file without a legal one."""
    found = load_json(path).get("monitor")
    wanted = {"weights", "intercept", "tau", "direction"}
    if not isinstance(found, dict) or not wanted <= found.keys():
        raise ValueError(f"thresholds={os.fspath(path)!r} has no key 'monitor' with {sorted(wanted)}")
    names, weights = tuple(found["weights"]), list(found["weights"].values())
    unknown = [name for name in names if name not in SIGNALS]
    numbers = [*weights, found["intercept"], found["tau"]]
    if unknown or not names or found["direction"] not in ("high", "low"):
        raise ValueError(
            f"thresholds={os.fspath(path)!r}: signals {list(names)}, direction {found['direction']!r}; wanted some of "
            f"{list(SIGNALS)} and 'high' or 'low'"
        )
    if not all(isinstance(x, int | float) and math.isfinite(x) for x in numbers):
        raise ValueError(f"thresholds={os.fspath(path)!r}: weights, intercept and tau are {numbers}; wanted numbers")
    return Rule(
        weights=np.asarray(weights, np.float32),
        intercept=np.float32(found["intercept"]),
        tau=np.float32(found["tau"]),
        sign=np.float32(1 if found["direction"] == "high" else -1),
        signals=names,
    )


def monitor(
    logits, states, tokens, *, tau: float = 2.0, lambda_: float = 5.0, alpha: float = 0.1, every: int = 1
) -> dict[str, np.ndarray]:
    """The signals of one stored trajectory, without a model.

    Args:
      logits [T, V]: at temperature 1, before the sampler's effects.
      states [T, L, D]: the residual stream after each block.
      tokens [T]: that were chosen.
    Returns:
      float32 [T] by name (`SIGNALS`), NaN at steps that are not checked.
    Raises:
      ValueError: lengths that differ.
    """
    logits, states, tokens = jnp.asarray(logits), jnp.asarray(states), jnp.asarray(tokens, jnp.int32)
    T = len(tokens)
    if logits.ndim != 2 or states.ndim != 3 or not len(logits) == len(states) == T or T == 0:
        raise ValueError(
            f"logits has shape {logits.shape}, states {states.shape}, tokens {tokens.shape}; wanted [T, V], [T, L, D] "
            "and [T]"
        )
    watch = make_monitor(1, tau=tau, lambda_=lambda_, pfail_cutoff=2.0, alpha=alpha, every=every)

    def step(seen, now):
        logits, states, token, t = now
        seen, _ = watch.observe(seen, logits[None], states[:, None], token[None], t, jnp.ones(1, bool))
        return seen, None

    seen, _ = jax.lax.scan(step, watch.start(1, T, states.shape[2]), (logits, states, tokens, jnp.arange(T)))
    return {name: np.asarray(values[0]) for name, values in seen.signals.items()}
