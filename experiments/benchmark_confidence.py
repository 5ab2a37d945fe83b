"""What a step of two-pass lookahead training costs, against a standard step and against torch where it is installed.

    python -m experiments.benchmark_confidence

One machine, one run, the published sizes. The cases take turns, so that a slow minute of the machine hits all of them;
a figure is the median over the turns of the ratio of two cases in the same turn. Only ratios carry over.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

from experiments.lookahead.arms import Arm, confidence_arm, optimizer, standard_arm
from experiments.lookahead.config import PRESETS, make_config
from nmjax import flags as nm_flags
from nmjax.interventions.effect import plain_context
from nmjax.report import results
from nmjax.report.tables import Table
from nmjax.training.loop import LossFn, init_state, make_step, over_seeds, token_losses

VOCAB = 50257
BUCKET = 32  # tokens; the naive lookahead reruns prefixes at lengths rounded up to a multiple


@dataclasses.dataclass(frozen=True)
class Claim:
    """`slower` takes at most `limit` times as long as `faster`."""

    slower: str
    faster: str
    limit: float


CLAIMS = (
    Claim("two-pass, all positions", "standard", 1.7),
    Claim("two-pass, last position", "standard", 0.7),
    Claim("two-pass, all positions", "append and rerun", 1 / 4),
    Claim("standard, three seeds", "standard", 3.5),
    Claim("two-pass, three seeds", "two-pass, all positions", 3.5),
    Claim("standard", "torch: standard", 1.0),
    Claim("two-pass, last position", "torch: two-pass, last position", 1.0),
    Claim("two-pass, all positions", "torch: append and rerun", 1.0),
)


@dataclasses.dataclass
class Case:
    """A step that changes its own state; `first` are the seconds of the first, compilation included."""

    name: str
    run: Callable[[], None]
    first: float = 0.0
    seconds: list[float] = dataclasses.field(default_factory=list)

    def time(self) -> float:
        start = time.perf_counter()
        self.run()
        return time.perf_counter() - start


def rerun_loss(arm: Arm, L: int) -> LossFn:
    """The lookahead loss of `arm` at all positions as it is without branches: each prefix is run anew with its choice.

    Prefixes of a bucket are padded to one length; only the logits that are read are computed.
    """
    module = arm.module

    def loss(params, batch, key):
        tokens = batch["tokens"]
        ctx_tokens, zeros = tokens[:, :L], jnp.zeros((len(tokens), L, 1))
        pass_key, draw_key = jax.random.split(key)
        told = module.apply({"params": params}, ctx_tokens, confidence_scalars=zeros, rngs={"dropout": pass_key})
        logits, confidence = told["logits"], told["confidence_pred"]
        frozen, now, fixed = jax.lax.stop_gradient((params, confidence, logits))
        choice = jax.random.categorical(draw_key, fixed)

        def future(t, length):
            """CE at x_{t+2} of x_0..x_t with the choice behind, as a row of `length` tokens."""
            here = jnp.arange(length) == t + 1
            row = jnp.where(here, jnp.take(choice, t, axis=1)[:, None], tokens[:, :length])
            signal = jnp.where(here[:, None], jnp.take(now, t, axis=1)[:, None], 0.0)
            hidden, _, _ = module.apply({"params": frozen}, row, signal, plain_context(row), method="told")
            last = jax.lax.dynamic_slice_in_dim(hidden, t + 1, 1, axis=1)
            after = module.apply({"params": frozen}, last, method="unembed")[:, 0]
            return token_losses(after, jnp.take(tokens, t + 2, axis=1))

        parts = [
            jax.lax.map(
                lambda t, length=start + BUCKET + 1: future(t, length), jnp.arange(start, min(start + BUCKET, L))
            )
            for start in range(0, L, BUCKET)
        ]
        target = jnp.concatenate(parts).swapaxes(0, 1)
        loss_lm = jnp.mean(token_losses(logits, tokens[:, 1 : L + 1]))
        return loss_lm + jnp.mean((confidence[..., 0] - target) ** 2), {"future_loss": jnp.mean(target)}

    return loss


def our_case(name: str, arm: Arm, loss: LossFn, config, tokens, seeds: int | None = None) -> Case:
    """A compiled step of one replica, or of several together."""
    adamw = optimizer(config, config.training_steps)
    params = arm.initial_params(range(seeds or 1))
    step = make_step(loss, adamw)
    if seeds is None:
        state: Any = init_state(jax.tree.map(lambda leaf: leaf[0], params), adamw)
    else:
        state = jax.vmap(lambda p, s: init_state(p, adamw, s))(params, jnp.arange(seeds))
        step, tokens = over_seeds(step), np.stack([tokens] * seeds)
    compiled = jax.jit(step, donate_argnums=0)

    def run():
        nonlocal state
        state, _ = jax.block_until_ready(compiled(state, {"tokens": tokens}, None))

    return Case(name, run)


def our_cases(config, tokens) -> list[Case]:
    L = config.max_seq_len

    def confidence(**changes):
        return confidence_arm(dataclasses.replace(config, **changes), VOCAB, None)

    standard, told_nothing = standard_arm(config, VOCAB, None), confidence(feedback="zeros")
    jacobi, last = confidence(feedback="jacobi"), confidence(feedback="zeros", lookahead="last")
    return [
        our_case("standard", standard, standard.loss, config, tokens),
        our_case("two-pass, all positions", told_nothing, told_nothing.loss, config, tokens),
        our_case("two-pass, all positions, Jacobi feedback", jacobi, jacobi.loss, config, tokens),
        our_case("two-pass, last position", last, last.loss, config, tokens),
        our_case("append and rerun", told_nothing, rerun_loss(told_nothing, L), config, tokens),
        our_case("standard, three seeds", standard, standard.loss, config, tokens, seeds=3),
        our_case("two-pass, three seeds", told_nothing, told_nothing.loss, config, tokens, seeds=3),
    ]


def torch_cases(config, tokens) -> list[Case]:
    """The same steps as a PyTorch user would write them, from the same initial values."""
    import torch

    from experiments import torch_minigpt as reference

    rows, L = torch.tensor(tokens).long(), config.max_seq_len
    zeros = torch.zeros(len(rows), L, 1)

    def case(name, arm: Arm, loss):
        first = jax.tree.map(lambda leaf: np.asarray(leaf[0]), arm.initial_params([0]))
        model = reference.from_params(arm.module.config, first).train()
        optimizer = reference.make_optimizer(model, config.learning_rate, config.weight_decay)
        return Case(name, lambda: reference.update(optimizer, loss(model), config.max_grad_norm))

    standard, confident = standard_arm(config, VOCAB, None), confidence_arm(config, VOCAB, None)
    return [
        case("torch: standard", standard, lambda model: reference.standard_step(model, rows[:, :-1])),
        case(
            "torch: two-pass, last position",
            confident,
            lambda model: reference.two_pass_step(model, zeros, rows[:, :L], rows[:, L], rows[:, L + 1])["total_loss"],
        ),
        case(
            "torch: append and rerun",
            confident,
            lambda model: reference.lookahead_step(model, zeros, rows)["total_loss"],
        ),
    ]


def measure(cases: list[Case], repeats: int) -> None:
    """Runs every case once to compile it, then all in turns."""
    for case in tqdm(cases, desc="compile", leave=False):
        case.first = case.time()
    for _ in tqdm(range(repeats), desc="measure", leave=False):
        for case in cases:
            case.seconds.append(case.time())


def ratios(cases: list[Case]) -> list[dict[str, Any]]:
    """Every claim whose cases were measured: the median ratio, its range over the turns, and whether it holds."""
    seconds = {case.name: np.array(case.seconds) for case in cases}
    found = []
    for claim in CLAIMS:
        if claim.slower in seconds and claim.faster in seconds:
            by_turn = seconds[claim.slower] / seconds[claim.faster]
            ratio = float(np.median(by_turn))
            measured = {"ratio": ratio, "least": float(by_turn.min()), "most": float(by_turn.max())}
            found.append(dataclasses.asdict(claim) | measured | {"holds": ratio <= claim.limit})
    return found


def tables(cases: list[Case], found: list[dict[str, Any]]) -> str:
    times = [
        [c.name, f"{np.median(c.seconds):.3f}", f"{min(c.seconds):.3f}", f"{c.first - min(c.seconds):.1f}"]
        for c in cases
    ]
    claims = [
        [
            f"{r['slower']} / {r['faster']}",
            f"{r['ratio']:.2f} [{r['least']:.2f}, {r['most']:.2f}]",
            f"{r['limit']:.2f}",
            "yes" if r["holds"] else "NO",
        ]
        for r in found
    ]
    return (
        Table(["step", "median s", "least s", "compile s"], times).text()
        + "\n\n"
        + Table(["ratio", "median [range]", "at most", "holds"], claims).text()
    )


def define_flags() -> None:
    flags.DEFINE_integer("repeats", 7, "Turns of every case.", lower_bound=1)
    flags.DEFINE_bool("torch", True, "Measure torch too, if it is installed.")
    flags.DEFINE_string("output_dir", "results/benchmark", "Folder of the JSON result.")


def main(_):
    jax.config.update("jax_enable_compilation_cache", False)  # compile time is one of the figures
    config = make_config("published", {})
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (config.batch_size, config.max_seq_len + 2)).astype(np.int32)
    cases = our_cases(config, tokens)
    with_torch = flags.FLAGS.torch and importlib.util.find_spec("torch") is not None
    if with_torch:
        cases += torch_cases(config, tokens)
    measure(cases, flags.FLAGS.repeats)
    found = ratios(cases)
    print(tables(cases, found))
    settings = PRESETS["published"] | {"repeats": flags.FLAGS.repeats, "torch": with_torch}
    path = pathlib.Path(flags.FLAGS.output_dir) / f"benchmark_confidence_{results.timestamp()}.json"
    identity = results.run_identity("benchmark_confidence", settings, {"tokens": 0}, {})
    seconds = {case.name: {"first": case.first, "turns": case.seconds} for case in cases}
    results.write_json(path, {"identity": identity, "seconds": seconds, "ratios": found})
    print(f"wrote {path}")


if __name__ == "__main__":
    define_flags()
    nm_flags.run(main)
