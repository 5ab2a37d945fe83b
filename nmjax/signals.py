"""What a monitor sees of a model while it writes: flat predictions, layers that disagree, surprising choices.

At every step, from the logits at temperature 1 before the sampler's effects (p, their softmax), the residual stream
after each of the L blocks at the last position (h_l, with u_l its direction) and the chosen token y:

    I_cat         1 - sum_v p_v^2                                   Gini impurity of the prediction
    delta_mu      (I_cat + 0.01)^(-1/2)                             high where the prediction is peaked
    delta_sigma   sqrt(mean_l |u_l - mean_k u_k|^2)                 how far the layers' directions spread
    hbar_s        sqrt(delta_mu delta_sigma)                        at most sqrt(10); high for peaked predictions
    pfail         1 / (1 + exp(-lambda (hbar_s - tau)))
    surprise      -ln p_y                                           nats, at most -ln 1e-10
    delta_h       1 - cos(h_L now, h_L at the step before)          0 at the first step
    pri           surprise (1 + alpha delta_h)
    entropy, max_prob                                               of p, nats and a share

The signals are those of the published monitor, whose claim was that a threshold on hbar_s tells hallucinations. Which
signal, if any, and in which direction is for `experiments.calibrate_thresholds` to find out; it can be followed here.

All of it happens inside the compiled decode loop; full arrays come back with the text, and a row may be halted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from nmjax.interventions.effect import check_number, static
from nmjax.rows import per_row
from nmjax.sampling import argmax

EPS_MU, EPS_UNIT, LEAST_P = 1e-2, 1e-8, 1e-10
STEEPEST = 50.0  # the exponent of pfail is kept within this
STRATA = ("early", "middle", "final")
"""Quarters of the depth: [0, L//4), [L//4, 3L//4), [3L//4, L)."""
SIGNALS = (
    "I_cat", "delta_mu", "delta_sigma", *(f"delta_sigma_{s}" for s in STRATA), "hbar_s",
    *(f"hbar_s_{s}" for s in STRATA), "pfail", "surprise", "delta_h", "pri", "entropy", "max_prob",
)  # fmt: skip


class Rule(flax.struct.PyTreeNode):
    """A calibrated statistic: intercept + sum of weights x (mean of a signal's k largest values so far) against tau.

    A row is flagged where the statistic is at or above tau (`sign` 1), or at or below it (-1).
    """

    weights: Any  # [F], these are float64 on the host and float32 in the loop
    intercept: Any  # []
    tau: Any  # []
    sign: Any  # []
    signals: tuple[str, ...] = static(default=("hbar_s",))  # [F]

    def flags(self, means: dict[str, jax.Array]) -> jax.Array:
        """bool [B] from the signals' top-k means [B]."""
        score = self.intercept + sum(w * means[name] for w, name in zip(self.weights, self.signals, strict=True))
        return self.sign * score >= self.sign * self.tau


class Monitor(flax.struct.PyTreeNode):
    """What is watched for. Numbers are arrays, so nothing that is swept recompiles."""

    tau: Any  # float32 [B]
    lambda_: Any  # float32 [B]
    pfail_cutoff: Any  # float32 [B]; above 1 no row is halted
    alpha: Any  # float32 []
    every: Any  # int32 []: steps from one check to the next
    yes: Any  # int32 [E], tokens that say yes, -1 pads
    no: Any  # int32 [E]
    rule: Rule | None = None  # in place of pfail
    k_top: int = static(default=5)  # of the rule

    def take(self, rows: np.ndarray) -> Monitor:
        """The monitor of the given rows, in their order."""
        return self.replace(tau=self.tau[rows], lambda_=self.lambda_[rows], pfail_cutoff=self.pfail_cutoff[rows])

    def start(self, rows: int, steps: int, width: int) -> Seen:
        """Nothing seen yet, with room for `steps` steps of `rows` rows of a model of this width."""
        watched = self.rule.signals if self.rule is not None else ()
        return Seen(
            signals={name: jnp.full((rows, steps), jnp.nan, jnp.float32) for name in SIGNALS},
            direction=jnp.zeros((rows, width), jnp.float32),
            checks=jnp.zeros(rows, jnp.int32),
            largest={name: jnp.full((rows, self.k_top), -jnp.inf, jnp.float32) for name in watched},
            p_yes=jnp.zeros(rows, jnp.float32),
            p_no=jnp.zeros(rows, jnp.float32),
            halted=jnp.zeros(rows, bool),
        )

    def observe(self, seen: Seen, logits, states, token, step, alive) -> tuple[Seen, jax.Array]:
        """Looks at one step.

        Args:
          logits [B, V], states [L, B, D] after each block at the last position, token [B] chosen.
          step: int32 [], from 0.
          alive: bool [B], rows that have not ended.
        Returns:
          What has been seen by now, and which rows are to be halted [B] before the token is accepted.
        """
        p = jax.nn.softmax(logits.astype(jnp.float32))
        now = signals(p, states.astype(jnp.float32))
        direction = _unit(states[-1].astype(jnp.float32))
        chosen = jnp.take_along_axis(p, token[:, None], axis=1)[:, 0]
        now["surprise"] = -jnp.log(jnp.clip(chosen, LEAST_P, 1.0))
        turned = 1 - jnp.clip((direction * seen.direction).sum(-1), -1.0, 1.0)
        now["delta_h"] = jnp.where(seen.checks > 0, turned, 0.0)
        now["pri"] = now["surprise"] * (1 + self.alpha * now["delta_h"])
        now["pfail"] = jax.nn.sigmoid(jnp.clip(self.lambda_ * (now["hbar_s"] - self.tau), -STEEPEST, STEEPEST))
        checked = alive & ((step + 1) % self.every == 0)

        def put(name, buffer):
            value = jnp.where(checked, now[name], jnp.nan)[:, None]
            return jax.lax.dynamic_update_slice_in_dim(buffer, value, step, axis=1)

        largest = {}
        for name, before in seen.largest.items():  # ascending; the smallest gives way
            after = jnp.sort(before.at[:, 0].max(now[name]), axis=1)
            largest[name] = jnp.where(checked[:, None], after, before)
        checks = seen.checks + checked
        if self.rule is None:
            halts = now["pfail"] > self.pfail_cutoff
        else:  # the statistic was calibrated as a mean of k
            halts = self.rule.flags({name: kept.mean(1) for name, kept in largest.items()}) & (checks >= self.k_top)
            halts &= self.pfail_cutoff <= 1
        halts &= checked
        first = (step == 0) & alive
        return seen.replace(
            signals={name: put(name, buffer) for name, buffer in seen.signals.items()},
            direction=jnp.where(checked[:, None], direction, seen.direction),
            checks=checks,
            largest=largest,
            p_yes=jnp.where(first, _mass(p, self.yes), seen.p_yes),
            p_no=jnp.where(first, _mass(p, self.no), seen.p_no),
            halted=seen.halted | halts,
        ), halts


class Seen(flax.struct.PyTreeNode):
    """What the monitor has seen of B rows in up to M steps."""

    signals: dict[str, jax.Array]  # float32 [B, M] by name, NaN at steps that were not checked
    direction: jax.Array  # float32 [B, D]: of the final block at the last check
    checks: jax.Array  # int32 [B]
    largest: dict[str, jax.Array]  # float32 [B, k], ascending, of the rule's signals
    p_yes: jax.Array  # float32 [B], at the first step
    p_no: jax.Array  # float32 [B]
    halted: jax.Array  # bool [B]

    def of_row(self, row: int, steps: int) -> dict:
        """A row's signals by name, float32 [steps], with p_yes and p_no; for what is on the host."""
        found: dict = {name: values[row, :steps] for name, values in self.signals.items()}
        return found | {"p_yes": float(self.p_yes[row]), "p_no": float(self.p_no[row])}


def signals(p, states) -> dict[str, jax.Array]:
    """The signals that need no choice: from predictions p [B, V] and states [L, B, D], each [B]."""
    L = states.shape[0]
    # 1 - sum p^2, but 1 less a p near 1 is the sum of the others: delta_mu magnifies the rounding by 500.
    others = jnp.where(jnp.arange(p.shape[-1]) == argmax(p)[:, None], 0, p)
    rest = others.sum(-1)
    gini = rest * (1 - rest) + (others * (1 - others)).sum(-1)
    u = _unit(states)
    precision = (gini + EPS_MU) ** -0.5
    found = {
        "I_cat": gini,
        "delta_mu": precision,
        "entropy": -(p * jnp.log(jnp.maximum(p, jnp.finfo(jnp.float32).tiny))).sum(-1),
        "max_prob": p.max(-1),
    }
    strata = {"": (0, L)} | dict(
        zip((f"_{s}" for s in STRATA), ((0, L // 4), (L // 4, 3 * L // 4), (3 * L // 4, L)), strict=True)
    )
    for name, (start, stop) in strata.items():
        found[f"delta_sigma{name}"] = _spread(u[start:stop])
        found[f"hbar_s{name}"] = jnp.sqrt(precision * found[f"delta_sigma{name}"])
    return found


def _unit(x):
    return x / jnp.sqrt((x * x).sum(-1, keepdims=True) + EPS_UNIT)


def _spread(u):
    """[B] from directions [L, B, D]; 0 for no layer."""
    if u.shape[0] == 0:
        return jnp.zeros(u.shape[1], jnp.float32)
    return jnp.sqrt(((u - u.mean(0)) ** 2).sum(-1).mean(0))


def _mass(p, tokens):
    """What the tokens [E] hold of p [B, V] together."""
    return jnp.where(tokens >= 0, p[:, jnp.maximum(tokens, 0)], 0).sum(-1)


def make_monitor(
    rows: int, *, tau=2.0, lambda_=5.0, pfail_cutoff=0.85, alpha: float = 0.1, every: int = 1,
    yes: Sequence[int] = (), no: Sequence[int] = (), rule: Rule | None = None, k_top: int = 5,
) -> Monitor:  # fmt: skip
    """A monitor of `rows` rows from numbers, one for all or one a row. Raises ValueError for bad ones."""
    for name, value in (("check_every_k_tokens", every), ("k_top", k_top)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"{name}={value!r}, wanted an integer >= 1")
    return Monitor(
        tau=per_row("tau", tau, rows, np.float32),
        lambda_=per_row("lambda_", lambda_, rows, np.float32),
        pfail_cutoff=per_row("pfail_cutoff", pfail_cutoff, rows, np.float32),
        alpha=np.float32(check_number("alpha_pri", alpha, "a finite number")),
        every=np.int32(every),
        yes=_padded(yes),
        no=_padded(no),
        rule=rule,
        k_top=int(k_top) if rule is not None else 0,  # which nothing else reads, and which would be another program
    )


def _padded(tokens: Sequence[int]) -> np.ndarray:
    """int32 [E], a multiple of 4, so that one token more is the same program."""
    ids = [*tokens, -1]
    return np.asarray(ids + [-1] * (-len(ids) % 4), np.int32)
