"""Generation under a monitor, with the names of the published one.

The signals, their formulas and the constants are in `nmjax.signals`. Whatever the temperature, they are of the
prediction at temperature 1.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nmjax.generation import generate
from nmjax.interventions.effect import check_number
from nmjax.lm import LanguageModel
from nmjax.report.results import load_json
from nmjax.signals import SIGNALS, Monitor, Rule, make_monitor

YES, NO = (" Yes", " yes", "Yes", "yes"), (" No", " no", "No", "no")
NEVER = 2.0  # a cutoff that no probability passes
ALPHA = 0.1
HALT_REASONS = {
    "halted": "P_fail above cutoff",
    "flagged": "statistic beyond its threshold",
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
    yes: str | Sequence[str] = YES,
    no: str | Sequence[str] = NO,
    **options,
) -> list[dict[str, Any]]:
    """Continues every prompt, watching every k-th step, and ends a row whose P_fail passes the cutoff.

    Args:
      prompts, packs, seed, options: as for `generate`.
      tau, lambda_, pfail_cutoff: one for all prompts or one a prompt.
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
    says_yes, says_no = verdict_tokens(lm, yes, no)
    watch = make_monitor(
        len(prompts),
        tau=tau,
        lambda_=lambda_,
        pfail_cutoff=NEVER if compute_score_only else pfail_cutoff,
        alpha=alpha_pri,
        every=1 if compute_score_only else check_every_k_tokens,
        yes=says_yes,
        no=says_no,
        rule=rule,
        k_top=k_top,
    )
    out = generate(
        lm, prompts, packs, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, monitor=watch, **options
    )
    assert out.seen is not None
    copies = len(out.seen) // len(prompts)
    results = []
    for i, seen in enumerate(out.seen):
        halted = out.finish_reason[i] == "halted"
        row: dict[str, Any] = {
            "halted": halted,
            "halt_reason": HALT_REASONS["flagged" if halted and rule is not None else out.finish_reason[i]],
            "p_yes": seen["p_yes"],
            "p_no": seen["p_no"],
        }
        if rule is not None:
            row["statistic"] = statistic(rule, seen, k_top)
            row["flagged"] = halted or bool(rule.sign * row["statistic"] >= rule.sign * rule.tau)
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
                "prompt": prompts[i // copies],
                "trajectory": [{"step": int(t)} | {name: float(seen[name][t]) for name in SIGNALS} for t in steps],
            }
        )
    return results


def verdict_tokens(
    lm: LanguageModel, yes: str | Sequence[str] = YES, no: str | Sequence[str] = NO
) -> tuple[list[int], list[int]]:
    """The tokens that begin a yes and those that begin a no, each once; none without a tokenizer.

    One that begins both, as a lone space does for some tokenizers, is neither.
    """
    if lm.tokenizer is None:
        return [], []
    says_yes, says_no = (
        [lm.encode(text, "yes, no", special=False)[0] for text in ([texts] if isinstance(texts, str) else texts)]
        for texts in (yes, no)
    )
    both = {*says_yes} & {*says_no}
    return [t for t in dict.fromkeys(says_yes) if t not in both], [t for t in dict.fromkeys(says_no) if t not in both]


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
    content, where = load_json(path), f"thresholds={os.fspath(path)!r}"
    found = content.get("monitor") if isinstance(content, dict) else None
    wanted = {"weights", "intercept", "tau", "direction"}
    if not isinstance(found, dict) or not wanted <= found.keys():
        raise ValueError(f"{where} has no key 'monitor' with {sorted(wanted)}")
    weights = found["weights"]
    if not isinstance(weights, dict) or not weights or not weights.keys() <= set(SIGNALS):
        raise ValueError(f"{where}: weights={weights!r}, wanted a number for some of {list(SIGNALS)}")
    if found["direction"] not in ("high", "low"):
        raise ValueError(f"{where}: direction={found['direction']!r}, wanted 'high' or 'low'")

    def number(name, value):
        return check_number(f"{where}: {name}", value, "a finite number")

    # In float64, so that a threshold that is some text's score flags that text.
    return Rule(
        weights=np.asarray([number(f"weights[{name!r}]", weight) for name, weight in weights.items()]),
        intercept=np.float64(number("intercept", found["intercept"])),
        tau=np.float64(number("tau", found["tau"])),
        sign=np.float64(1 if found["direction"] == "high" else -1),
        signals=tuple(weights),
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
      ValueError: lengths that differ, or a token that the logits lack.
    """
    logits, states, tokens = jnp.asarray(logits), jnp.asarray(states), jnp.asarray(tokens, jnp.int32)
    together = logits.shape[:1] == states.shape[:1] == tokens.shape
    if logits.ndim != 2 or states.ndim != 3 or not together or 0 in (*logits.shape, *states.shape):
        raise ValueError(
            f"logits has shape {logits.shape}, states {states.shape}, tokens {tokens.shape}; wanted [T, V], [T, L, D] "
            "and [T]"
        )
    if int(tokens.min()) < 0 or int(tokens.max()) >= logits.shape[1]:
        raise ValueError(f"tokens are {int(tokens.min())} to {int(tokens.max())}, wanted 0 to {logits.shape[1] - 1}")
    watch = make_monitor(1, tau=tau, lambda_=lambda_, pfail_cutoff=NEVER, alpha=alpha, every=every)
    seen = _observe_all(watch, logits, states, tokens)
    return {name: np.asarray(seen[name][0]) for name in SIGNALS}


@jax.jit
def _observe_all(watch: Monitor, logits, states, tokens) -> dict[str, jax.Array]:
    """The signals [1, T] of one trajectory."""
    T, _, D = states.shape

    def step(seen, now):
        logits, states, token, t = now
        seen, _ = watch.observe(seen, logits[None], states[:, None], token[None], t, jnp.ones(1, bool))
        return seen, None

    return jax.lax.scan(step, watch.start(1, T, D), (logits, states, tokens, jnp.arange(T)))[0].signals
