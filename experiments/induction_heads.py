"""Finds a model's induction heads, and tests by ablation whether they do the copying.

Method. Rows of random tokens are followed by themselves. A head's score is its mean attention, from the second copy, to
the token that followed the previous occurrence of the same token (Olsson et al. 2022); it is selected if that is above
a threshold and above what a random pairing of queries and targets gives. Then the selected heads are silenced, and as
many random other heads, on the same rows: the share of exactly predicted tokens says what the heads are for.

    python -m experiments.induction_heads --model=checkpoints/tiny --block=16
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Callable, Sequence

import numpy as np
from absl import flags
from tqdm import tqdm

import nmjax
from models import checkpoint
from nmjax import flags as nm_flags
from nmjax import induction, paths
from nmjax.metrics import stats
from nmjax.report import results
from nmjax.report.induction import Ablation, InductionPage, heat_map

NAME = "induction_heads"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the flags say; see `define_flags`."""

    model: str = "checkpoints/tiny"
    dtype: str | None = None
    method: str = "repeat"
    block: int | None = None
    samples: int = 32
    threshold: float = 0.4
    on_empty: str = "none"
    random_draws: int = 8
    batch_size: int = 8
    seed: int = 0
    output_dir: str = f"results/{NAME}"


def define_flags() -> None:
    d = Settings()
    flags.DEFINE_string("model", d.model, "Checkpoint: a folder, or a hub id.")
    flags.DEFINE_enum("dtype", d.dtype, list(checkpoint.DTYPES), "Converts the weights; default: as stored.")
    flags.DEFINE_enum(
        "method", d.method, list(induction.METHODS),
        "'repeat' scores heads on repeated random blocks; 'prompt' is the published probe of seven letters, which "
        "takes the best fifth of every layer's heads in any model.",
    )  # fmt: skip
    flags.DEFINE_integer("block", d.block, "Tokens of a block; default: what the checkpoint says, else 50.")
    flags.DEFINE_integer("samples", d.samples, "Rows of random tokens, at least 16.")
    flags.DEFINE_float("threshold", d.threshold, "Selected heads score above it.", 0.0, 1.0)
    flags.DEFINE_enum("on_empty", d.on_empty, list(induction.ON_EMPTY), "What to do where no head passes.")
    flags.DEFINE_integer("random_draws", d.random_draws, "Draws of as many other heads; 0: none.", lower_bound=0)
    flags.DEFINE_integer("batch_size", d.batch_size, "Rows a batch of the ablation.", lower_bound=1)
    flags.DEFINE_integer("seed", d.seed, "Of tokens, permutations, draws and bootstrap.", lower_bound=0)
    flags.DEFINE_string("output_dir", d.output_dir, "Folder of the results.")


def without(mask: np.ndarray) -> nmjax.Intervention:
    """Silences the heads of a mask [L, N].

    Every layer gets an effect, at dose 0 where it loses no head, so that all masks are one compiled program.
    """
    return nmjax.compose(
        *(
            nmjax.mask_heads(np.flatnonzero(row).tolist() if row.any() else [0], layers=[layer]).at(float(row.any()))
            for layer, row in enumerate(mask)
        )
    )


def copying(
    lm: nmjax.LanguageModel,
    rows: np.ndarray,
    block: int,
    silent: np.ndarray,
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Copy accuracy of every row, float [R], with the heads of `silent` [L, N] silenced.

    rows: int32 [R, T], a block and its repetition at the end of each.
    """
    found = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        filled = np.concatenate([part, np.repeat(part[:1], batch_size - len(part), axis=0)])
        logits = np.asarray(nmjax.forward(lm, filled.tolist(), packs=without(silent)).logits)
        found += [induction.copy_accuracy(logits[k : k + 1], part[k : k + 1], block) for k in range(len(part))]
        if progress is not None:
            progress(len(part))
    return np.asarray(found)


def random_others(mask: np.ndarray, draws: int, seed: int) -> list[np.ndarray]:
    """Masks of as many heads as `mask` has, or as are left, none of them in it; no masks where none is left."""
    others = np.flatnonzero(~mask)
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(draws if len(others) else 0):
        drawn = np.zeros(mask.size, bool)
        drawn[rng.choice(others, min(int(mask.sum()), len(others)), replace=False)] = True
        found.append(drawn.reshape(mask.shape))
    return found


def ablate(
    lm: nmjax.LanguageModel, found: induction.InductionHeads, block: int, samples: int, draws: int, batch_size: int,
    seed: int,
) -> Ablation:  # fmt: skip
    """Copy accuracy with the found heads silenced, against the unmodified model and random other heads."""
    rows = induction.random_rows(lm, samples, block, seed)
    masks = [np.zeros_like(found.mask), found.mask, *random_others(found.mask, draws, seed)]
    with tqdm(total=len(masks) * samples, unit="row", desc="ablation") as bar:
        unmodified, selected, *others = (copying(lm, rows, block, m, batch_size, bar.update) for m in masks)
    drawn = np.reshape(others, (len(others), samples))

    def interval(values: np.ndarray) -> tuple[float, float]:
        low, high = stats.mean_interval(values, seed=seed)
        return float(low), float(high)

    intervals = {
        "unmodified": interval(unmodified),
        "selected": interval(selected),
        "selected_loss": interval(unmodified - selected),
    }
    if len(drawn) > 1:
        # Which heads are drawn matters far more than which rows: some of the others feed the selected ones.
        by_draw = drawn.mean(axis=1)
        intervals |= {"random": interval(by_draw), "random_loss": interval(unmodified.mean() - by_draw)}
    return Ablation(unmodified, selected, drawn, intervals)


def run(settings: Settings, lm: nmjax.LanguageModel) -> list[pathlib.Path]:
    """Find, ablate, report; returns the paths written. Raises ValueError for bad input."""
    block = induction.default_block(lm) if settings.block is None else settings.block
    with tqdm(total=settings.samples, unit="row", desc="scores") as bar:
        found = induction.find_heads(
            lm, block, settings.samples, settings.threshold, settings.seed, settings.method, settings.on_empty,
            progress=bar.update,
        )  # fmt: skip
    ablation = None
    if found.mask.any():
        ablation = ablate(lm, found, block, settings.samples, settings.random_draws, settings.batch_size, settings.seed)
    report = InductionPage(settings.model, found, ablation)
    print("\n" + report.text())
    stamp, folder = results.timestamp(), pathlib.Path(settings.output_dir)
    identity = results.run_identity(
        NAME, dataclasses.asdict(settings), {"seed": settings.seed}, {"model": lm.fingerprint}
    )
    picture = heat_map(found)
    losses = {"losses": ablation.losses()} if ablation else {}
    record = {**identity, "found": found, "heads": found.heads, "ablation": ablation, **losses}
    written = [
        results.write_atomic(folder / f"induction_summary_{stamp}.txt", report.text()),
        results.write_atomic(folder / f"induction_heads_{stamp}.png", picture),
        results.write_atomic(folder / f"induction_heads_{stamp}.html", report.html(identity, picture)),
        results.write_json(folder / f"induction_heads_{stamp}.json", record),
    ]
    print("Written:\n" + "\n".join(f"  {path}" for path in written))
    return written


def main(_: Sequence[str]) -> None:
    paths.enable_compilation_cache()
    settings = nm_flags.filled(Settings)
    try:
        run(settings, checkpoint.load(checkpoint.find(settings.model), dtype=settings.dtype))
    except (ValueError, OSError) as error:
        sys.exit(f"{NAME}: {error}")


if __name__ == "__main__":
    define_flags()
    nm_flags.run(main)
