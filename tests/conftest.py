"""Settings and fixtures of every test. The environment is set before the first import of JAX."""

import os
from pathlib import Path

import pytest

PROJECT_ROOT = Path(__file__).resolve().parent.parent

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("NMJAX_CACHE", str(PROJECT_ROOT / ".pytest_cache" / "jax"))
os.environ["XDG_CACHE_HOME"] = str(PROJECT_ROOT / ".pytest_cache" / "caches")  # a user's own stay as they are
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

from nmjax.paths import enable_compilation_cache  # noqa: E402

enable_compilation_cache()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real inputs that are not part of the project: `$NMJAX_TEST_DATA`, else `../shared/data`."""
    chosen = os.environ.get("NMJAX_TEST_DATA")
    folder = Path(chosen) if chosen else PROJECT_ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}; set NMJAX_TEST_DATA to the folder that holds it")
    return folder


@pytest.fixture(scope="session")
def copying_lm():
    """A model whose attention is known: head (1, 2) copies what followed the last occurrence of a token, and it alone
    decides the next token; head (0, 0) attends to the previous token, (0, 1) to the last occurrence itself, the other
    three to everything alike. L 2, N 3, V 60, BOS 1, PAD 0, EOS 2, context 128, no tokenizer.
    """
    import dataclasses

    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    from nmjax.interventions.effect import plain_context
    from nmjax.interventions.sites import visit
    from nmjax.lm import LanguageModel

    @dataclasses.dataclass(frozen=True)
    class Config:
        vocab: int = 60
        embed: int = 60
        layers: int = 2
        heads: int = 3
        max_positions: int = 128
        bos_id: int = 1
        eos_ids: tuple[int, ...] = (2,)
        pad_id: int = 0
        family: str = "known"

    class Layer(nn.Module):
        number: int

        @nn.compact
        def __call__(self, x, words, ctx, effects):
            T = words.shape[1]
            seen = (ctx.k_pos[:, None] >= 0) & (ctx.k_pos[:, None] <= ctx.q_pos[..., None])  # [B, T, S]
            uniform = seen / jnp.maximum(seen.sum(-1, keepdims=True), 1)
            slots = jnp.arange(T)
            same = (ctx.tokens[..., None] == ctx.tokens[:, None]) & seen & (slots[:, None] > slots)
            found = same.any(-1)
            last = jnp.where(same, slots, -1).max(-1)

            def attend(slot, when):
                return jnp.where(when[..., None], jax.nn.one_hot(slot, T), uniform)

            follow = attend(last + 1, found)
            previous = attend(slots[None] - 1, ctx.q_pos > 0)
            kinds = [(previous, attend(last, found), uniform), (uniform, uniform, follow)][self.number]
            pattern = visit(self, "pattern", jnp.stack(kinds, axis=1), ctx, effects)
            out = jnp.einsum("bnts,bsd->btnd", pattern, words)
            out = visit(self, "head_out", out, ctx, effects)
            return x + (out[:, :, 2] if self.number else 0)

    class Known(nn.Module):
        config: Config

        @nn.compact
        def __call__(self, tokens, *, ctx=None, effects=(), cache=None):
            ctx = plain_context(tokens) if ctx is None else ctx
            words = jax.nn.one_hot(tokens, self.config.vocab) * self.param("scale", nn.initializers.ones, ())
            x = jnp.zeros_like(words)
            for number in range(self.config.layers):
                layer_ctx = ctx.replace(layer=jnp.int32(number))
                x = Layer(number, name=f"layers_{number}")(x, words, layer_ctx, effects)
            return x

        def unembed(self, hidden):
            return hidden

        def init_cache(self, rows, slots, dtype):
            return [{"k": jnp.zeros((rows, 1, slots, 1), dtype)} for _ in range(self.config.layers)]

    module = Known(Config())
    params = module.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    return LanguageModel(module, params)


@pytest.fixture(scope="session")
def minigpt():
    """`tests/golden/lookahead.npz` by name, and as `plain` and `aware` its MiniGPT and ConfidenceAwareGPT.

    L 2, N 2, D 12, V 29, 10 positions; rows of 9 tokens and two targets; parameters are random, far from their start.
    """
    import dataclasses
    from types import SimpleNamespace

    import jax
    import numpy as np

    from models import ConfidenceAwareGPT, ConfidenceConfig, MiniGPT, MiniGPTConfig
    from nmjax.lm import LanguageModel

    arrays = dict(np.load(PROJECT_ROOT / "tests" / "golden" / "lookahead.npz"))
    sizes = MiniGPTConfig(vocab=29, embed=12, layers=2, heads=2, max_positions=10)

    def read(module, vector):
        tokens = np.zeros((1, 1), np.int32)
        shapes, tree = jax.tree.flatten(jax.eval_shape(lambda: module.init(jax.random.key(0), tokens)["params"]))
        parts = np.split(vector, np.cumsum([leaf.size for leaf in shapes])[:-1])
        leaves = [part.reshape(leaf.shape) for part, leaf in zip(parts, shapes, strict=True)]
        return LanguageModel(module, jax.tree.unflatten(tree, leaves))

    aware = ConfidenceAwareGPT(ConfidenceConfig(**dataclasses.asdict(sizes)))
    models = {"plain": read(MiniGPT(sizes), arrays["plain_params"]), "aware": read(aware, arrays["params"])}
    return SimpleNamespace(**arrays, **models)
