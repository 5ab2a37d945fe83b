"""How much memory loading a checkpoint takes.

Writes a random sharded checkpoint of about `--gigabytes`, none of whose tensors is larger than 5% of it, loads it in a
fresh process, and prints that process's anonymous memory (RssAnon in /proc, so Linux only) just before and at its peak.
File pages which the system may drop at any time are not counted.

    python -m experiments.benchmark_load --gigabytes=1
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags

import models
from models.checkpoint import DTYPES
from models.rope import Rope
from nmjax import flags as nm_flags
from nmjax.lm import LanguageModel

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_float("gigabytes", 1.0, "Size of the checkpoint, in 1e9 bytes.", lower_bound=0.01)
    flags.DEFINE_enum("stored_dtype", "float32", list(DTYPES), "What the checkpoint is written in.")
    flags.DEFINE_enum("dtype", None, list(DTYPES), "What it is loaded as; by default as it is stored.")
    flags.DEFINE_integer("shards", 4, "Files to split it into.", lower_bound=1)
    flags.DEFINE_string("output", None, "A JSON file for the result as well.")


# What the fresh process runs: everything is imported and the device is up before the first reading.
_CHILD = """
import sys, jax, models
jax.device_put(0.0).block_until_ready()
print("ready", flush=True)
sys.stdin.readline()
lm = models.load(sys.argv[1], dtype=sys.argv[2] or None)
jax.block_until_ready(lm.params)
print("loaded", flush=True)
sys.stdin.readline()
"""


def main(_) -> None:
    with tempfile.TemporaryDirectory(prefix="benchmark-load-") as temporary:
        folder = Path(temporary)
        config = _config(FLAGS.gigabytes * 1e9 / np.dtype(DTYPES[FLAGS.stored_dtype]).itemsize)
        largest, written = write_random_checkpoint(config, folder, FLAGS.stored_dtype, FLAGS.shards)
        before, peak, seconds = measure(folder, FLAGS.dtype)
    wanted = written * np.dtype(DTYPES[FLAGS.dtype or FLAGS.stored_dtype]).itemsize
    wanted //= np.dtype(DTYPES[FLAGS.stored_dtype]).itemsize
    result = {
        "checkpoint_bytes": written,
        "parameter_bytes": wanted,
        "largest_leaf_share": largest / written,
        "rss_anon_before": before,
        "rss_anon_peak": peak,
        "growth_over_checkpoint_bytes": (peak - before) / written,
        "growth_over_parameter_bytes": (peak - before) / wanted,
        "load_seconds": seconds,
    }
    for name, value in result.items():
        print(f"{name:30} {value:,.3f}" if isinstance(value, float) else f"{name:30} {value:,}")
    if FLAGS.output:
        Path(FLAGS.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _config(parameters: float) -> models.LlamaConfig:
    """A Llama of about so many parameters whose embedding, its largest leaf, is just under 5% of them."""
    layers = 16
    # A layer has 4 D^2 in attention and 3 D F = 7.5 D^2 in the MLP; embedding and head, V D each, are the last tenth.
    embed = max(1, round((0.9 * parameters / (11.5 * layers)) ** 0.5 / 64)) * 64
    vocab = int(11.5 * layers * embed * 0.05 / 0.9)
    return models.LlamaConfig(
        family="llama", vocab=vocab, embed=embed, layers=layers, heads=embed // 64, kv_heads=embed // 64, head_dim=64,
        ffw=embed * 5 // 2, max_positions=2048, norm_eps=1e-5, rope=Rope(),
    )  # fmt: skip


def write_random_checkpoint(config: models.LlamaConfig, folder: Path, dtype: str, shards: int) -> tuple[int, int]:
    """Writes normal noise as a checkpoint; returns the bytes of its largest leaf and of all leaves."""
    module = models.Llama(config)
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    rng = np.random.default_rng(0)

    def noise(leaf):
        return (0.02 * rng.standard_normal(leaf.shape, np.float32)).astype(DTYPES[dtype])

    params = jax.tree.map(noise, shapes)
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(params)]
    models.save(LanguageModel(module, params), folder, max_shard_size=sum(sizes) // shards + max(sizes))
    return max(sizes), sum(sizes)


def measure(folder: Path, dtype: str | None) -> tuple[int, int, float]:
    """RssAnon in bytes just before the load and at its peak, and the seconds it took, of a fresh process."""
    command = [sys.executable, "-c", _CHILD, str(folder), dtype or ""]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:

        def wait_for(word: str) -> None:
            assert child.stdout is not None
            line = child.stdout.readline().strip()
            if line != word:
                raise RuntimeError(f"the loading process said {line!r}, wanted {word!r}; it exited with {child.wait()}")

        wait_for("ready")
        readings = [_rss_anon(child.pid)]
        loaded = threading.Event()

        def watch() -> None:
            while not loaded.wait(0.001):
                readings.append(_rss_anon(child.pid))

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        start = time.perf_counter()
        print(file=child.stdin, flush=True)
        wait_for("loaded")
        seconds = time.perf_counter() - start
        loaded.set()
        watcher.join()
        readings.append(_rss_anon(child.pid))
        print(file=child.stdin, flush=True)
    return readings[0], max(readings), seconds


def _rss_anon(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/{pid}/status has no RssAnon")


if __name__ == "__main__":
    define_flags()
    nm_flags.run(main)
