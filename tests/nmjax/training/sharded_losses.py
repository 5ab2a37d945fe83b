"""A program for the tests of sharding: trains small models on meshes of forced CPU devices and prints what came out.

    python sharded_losses.py '{"models": ["confidence"], "meshes": ["", "data=2,fsdp=4"], "devices": 8}'

Process 0 prints, as JSON by mesh: losses, sums of squares of the parameters that `watch` saw, the whole and a device's
piece of each leaf of the state, and how often the step was traced. `devices` is how many each process has, `config`
goes to `TrainConfig`, `vmap` trains the seeds side by side as on a GPU, `own` gives each process rows of its own. With
`adapter`, the fields of an `IntrospectionLoss`, an adapter to a frozen Llama is trained on introspection records
instead, with one seed, and its weights are printed too.
"""

import json
import os
import sys

TASK = {"models": [], "meshes": [], "devices": 1, "config": {}, "vmap": False, "own": False, "adapter": None}
TASK |= json.loads(sys.argv[1])
# What makes XLA's programs fast makes its compiler slow, and these are run a few times only.
FLAGS = (
    f"--xla_force_host_platform_device_count={TASK['devices']} --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"
)
os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"}

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from models.config import LlamaConfig  # noqa: E402
from models.llama import ScannedLlama  # noqa: E402
from models.minigpt import ConfidenceAwareGPT, ConfidenceConfig, MiniGPT, MiniGPTConfig  # noqa: E402
from nmjax.data.introspection_batches import Examples, training_batches  # noqa: E402
from nmjax.data.introspection_chat import Segments  # noqa: E402
from nmjax.data.introspection_records import Record, unit_vectors  # noqa: E402
from nmjax.paths import enable_compilation_cache  # noqa: E402
from nmjax.training import distributed, loop, lora  # noqa: E402
from nmjax.training.introspection import IntrospectionLoss, introspection_loss  # noqa: E402
from nmjax.training.lookahead import feedback_signal, lookahead_loss  # noqa: E402
from nmjax.training.sharding import make_mesh  # noqa: E402

SEEDS = [1, 2]
OTHER = ("step", "loss", "grad_norm", "squares")  # what a record holds beside the losses of the models
B, L, V = 16, 6, 61
SIZES = dict(vocab=V, embed=16, heads=4, max_positions=L + 2)
LLAMA = LlamaConfig.from_hf(dict(
    architectures=["Qwen2ForCausalLM"], model_type="qwen2", vocab_size=64, hidden_size=16, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=32, max_position_embeddings=64,
    rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=False, hidden_act="silu"))  # fmt: skip
MODULES = {
    "confidence": ConfidenceAwareGPT(ConfidenceConfig(**SIZES, layers=1, feedback=0)),
    "plain": MiniGPT(MiniGPTConfig(**SIZES, layers=1)),
    "feedback": ConfidenceAwareGPT(ConfidenceConfig(**SIZES, layers=2, feedback=1, dropout=0.1)),
    "standard": MiniGPT(MiniGPTConfig(**SIZES, layers=2, dropout=0.1)),
    "llama": ScannedLlama(LLAMA),
}


class Rows:
    """Rows of tokens by step, [R, B, L + 2]."""

    def __getitem__(self, step):
        own = jax.process_index() if TASK["own"] else 0
        rngs = [np.random.default_rng([int(step), seed, own]) for seed in SEEDS]
        return np.stack([rng.integers(0, V, (B, L + 2), np.int32) for rng in rngs])


def losses_of(name, params, tokens, key):
    module = MODULES[name]
    if isinstance(module, ConfidenceAwareGPT):
        signal = feedback_signal(module, params, tokens[:, :L], key)
        found = lookahead_loss(module, params, signal, tokens, 1.0, key)
        return found["total_loss"], {f"{name} {part}": found[part] for part in ("loss_lm", "loss_confidence")}
    hidden = module.apply({"params": params}, tokens[:, :L], rngs={"dropout": key})
    logits = module.apply({"params": params}, hidden, method="unembed")
    loss = loop.next_token_loss(logits, tokens[:, 1 : L + 1], jnp.ones(tokens[:, :L].shape))
    return loss, {name: loss}


traces = []


def loss_fn(params, tokens, key):
    """The sum over all models, and each one's own."""
    traces.append(key)
    found = [losses_of(name, params[name]["params"], tokens, key) for name in TASK["models"]]
    return sum(loss for loss, _ in found), {k: v for _, metrics in found for k, v in metrics.items()}


def initial(seed):
    """Random parameters; drawn here, because compiling the modules' own initializers takes longer."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(
        lambda: {name: MODULES[name].init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32)) for name in TASK["models"]}
    )
    return jax.tree.map(lambda leaf: rng.normal(0.1, 0.1, leaf.shape).astype(np.float32), shapes)


def pieces(tree):
    """path -> (shape, shape of what a device holds)."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    name = jax.tree_util.keystr
    return {name(path): (leaf.shape, leaf.addressable_shards[0].data.shape) for path, leaf in leaves}


def run(spec):
    traces.clear()

    def watch(record, params):
        assert all(len(leaf.sharding.device_set) == 1 for leaf in jax.tree.leaves(params)), "they are to be whole"
        leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(params)]
        return {"squares": [float(np.square(leaf).sum()) for leaf in leaves]}

    state, history = loop.train(
        loss_fn,
        jax.tree.map(lambda *leaves: np.stack(leaves), *map(initial, SEEDS)),
        Rows(),
        loop.TrainConfig(**{"steps": 4, "warmup": 2, "log_every": 1, "watch_every": 4} | TASK["config"]),
        seeds=SEEDS,
        progress=False,
        watch=watch,
        mesh=make_mesh(spec) if spec else None,
    )
    return {
        "losses": [[record[name] for name in record if name not in OTHER] for record in history],
        "squares": history[-1]["squares"],
        "pieces": pieces(state),
        "traces": len(traces),
    }


def records():
    """32 records with three answers of one and two tokens: steered, with noise, and clean."""
    rng, kinds = np.random.default_rng(0), []
    for k in range(32):
        layers = {"layers": (k % 2, k % 2 + 1), "magnitude": 1.0 + k % 3}
        kinds.append([{"vector": k % 5} | layers, {"noise_seed": k} | layers, {}][k % 3])
    names = ["steered", "noise", "clean"]
    made = [
        Record(id=str(k), kind=names[k % 3], system="", context="", reply="", question="", answers=("a", "b", "c"),
               answer=int(rng.integers(3)), **kind)
        for k, kind in enumerate(kinds)
    ]  # fmt: skip

    def segments():
        prefix, question = (tuple(rng.integers(0, V, n).tolist()) for n in rng.integers(3, 8, 2))
        return Segments(prefix, question, (True,) * len(prefix), ((61,), (62, 3), (62, 4)))

    return Examples(made, [segments() for _ in made], unit_vectors(5, LLAMA.embed, 0), LLAMA.layers)


def run_adapter(spec):
    module = MODULES["llama"]
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    adapter = lora.init(module, lora.LoraConfig(r=2, dropout=0.1), jax.random.key(0))
    rng = np.random.default_rng(1)
    params, weights = (
        jax.tree.map(lambda leaf: rng.normal(0.0, 0.3, leaf.shape).astype(np.float32), tree)
        for tree in (shapes, adapter.weights)
    )
    saw = {}
    state, history = loop.train(
        introspection_loss(module, IntrospectionLoss(**TASK["adapter"])),
        weights,
        training_batches(records(), B, seed=0),
        loop.TrainConfig(**{"steps": 5, "warmup": 2, "log_every": 1, "watch_every": 5} | TASK["config"]),
        progress=False,
        watch=lambda record, params: saw.update(params) or {},
        mesh=make_mesh(spec) if spec else None,
        frozen=lora.frozen(params, adapter),
    )
    names = ("loss", "grad_norm", "pair_mass")
    return {
        "losses": [[record[name] for name in names] for record in history],
        "weights": {
            jax.tree_util.keystr(path): leaf.tolist() for path, leaf in jax.tree_util.tree_leaves_with_path(saw)
        },
        "pieces": pieces(state),
    }


enable_compilation_cache()
distributed.initialize()
if TASK["vmap"]:
    loop.over_seeds = jax.vmap
found = {spec: (run if TASK["adapter"] is None else run_adapter)(spec) for spec in TASK["meshes"]}
if jax.process_index() == 0:
    print("RESULT" + json.dumps(found))
