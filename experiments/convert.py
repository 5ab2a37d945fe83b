"""Brings a model from the hub, or from a folder, into a checkpoint folder of this project.

    python -m experiments.convert --model=HuggingFaceTB/SmolLM2-135M-Instruct --output=checkpoints/smollm2

Both sides are in Hugging Face format, so the result loads in transformers as well. What is gained: everything is
checked, the weights have the dtype asked for, and the model needs no network any more.
"""

import math
import shutil
import sys
from pathlib import Path

import jax
from absl import flags
from tqdm import tqdm

import models
from models.checkpoint import DTYPES
from models.files import CheckpointError, find
from nmjax import flags as nm_flags

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("model", None, "Checkpoint folder, or owner/name on the hub.", required=True)
    flags.DEFINE_string("output", None, "Folder to write, such as checkpoints/smollm2.", required=True)
    flags.DEFINE_enum("dtype", None, list(DTYPES), "What to convert the weights to; by default they stay as is.")


def main(_) -> None:
    try:
        convert(FLAGS.model, Path(FLAGS.output), FLAGS.dtype)
    except CheckpointError as error:
        sys.exit(f"FATAL {error}")


def convert(model: str, output: Path, dtype: str | None) -> None:
    """Loads a folder or hub id and saves it as a folder. Raises CheckpointError if it can't be done faithfully."""
    folder = find(model)
    lm = models.load(folder, dtype, progress=lambda table: tqdm(table, "reading", unit="tensor"))
    models.save(lm, output, progress=lambda table: tqdm(table, "writing", unit="tensor"))
    # It also holds sampling defaults that the toolkit has no use for but transformers does.
    defaults = folder / "generation_config.json"
    if defaults.exists() and not (output / defaults.name).samefile(defaults):
        shutil.copyfile(defaults, output / defaults.name)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(lm.params))
    print(f"{output}: {lm.config.family}, {count:,} parameters, {lm.dtype}, {lm.config.layers} layers")


if __name__ == "__main__":
    define_flags()
    nm_flags.run(main)
