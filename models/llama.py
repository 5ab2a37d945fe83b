"""Llama 2/3, Qwen2/2.5, Qwen3 and SmolLM2: one pre-norm decoder, read top to bottom.

Axis letters: B rows, T query tokens, S key slots, N heads, K key/value heads, G = N/K, H head size, D embed, F ffw,
V vocabulary, L layers. Parameters keep the checkpoint's dtype; norms, softmax, RoPE and logits are float32.

Positions come from the `Context`, never from the slot a token sits in: masks and RoPE read `q_pos` and `k_pos`, so left
padding, a cache and shared prefixes are one mechanism.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from models.config import LlamaConfig
from models.rope import rotate
from nmjax.adapters import LORA, SETTINGS, adapt
from nmjax.interventions.effect import Context, Effect, plain_context
from nmjax.interventions.sites import ACTIVATIONS, visit
from nmjax.row_sum import row_sum
from nmjax.training.sharding import look_up, pin, spread

Cache = list[dict[str, jax.Array]]  # one {"k", "v"} of [B, K, S, H] a layer; with stacked layers one of [L, B, K, S, H]
Effects = tuple[Effect, ...]

_normal = nn.initializers.normal(0.02)


class RMSNorm(nn.Module):
    eps: float

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(row_sum(wide * wide) / x.shape[-1] + self.eps)
        return wide.astype(x.dtype) * scale


class Projection(nn.Module):
    """`einsum(equation, x, kernel)`, plus a bias over the output axes when asked for, plus an adapter if any."""

    equation: str
    shape: tuple[int, ...]
    bias: tuple[int, ...] | None = None
    kernel_init: nn.initializers.Initializer = _normal

    @nn.compact
    def __call__(self, x):
        y = jnp.einsum(self.equation, x, self.param("kernel", self.kernel_init, self.shape))
        y = y if self.bias is None else y + self.param("bias", nn.initializers.zeros, self.bias)
        return adapt(self, x, y)


class Attention(nn.Module):
    config: LlamaConfig

    @nn.compact
    def __call__(self, x, ctx: Context, effects: Effects, cache):
        """x [B, T, D] -> what this sublayer adds [B, T, D], and the cache with this chunk's keys and values in it."""
        c = self.config
        D, N, K, H = c.embed, c.heads, c.kv_heads, c.head_dim

        def heads(name, count):
            return Projection("btd,dnh->btnh", (D, count, H), (count, H) if c.qkv_bias else None, name=name)(x)

        q, k, v = heads("q", N), heads("k", K), heads("v", K)
        if c.qk_norm:
            q, k = RMSNorm(c.norm_eps, name="q_norm")(q), RMSNorm(c.norm_eps, name="k_norm")(k)
        q, k = rotate(q, ctx.q_pos, c.rope), rotate(k, ctx.q_pos, c.rope)
        q = visit(self, "query", q, ctx, effects)

        out, cache = attend(self, q, k, v, ctx, effects, cache, c.windows)
        return Projection("btnh,nhd->btd", (N, H, D), (D,) if c.out_bias else None, name="o")(out), cache


def attend(
    module: nn.Module, q, k, v, ctx: Context, effects: Effects, cache, windows=None, drop: Callable = lambda x: x
):
    """Head outputs [B, T, N, H] of queries [B, T, N, H], keys and values [B, T, K, H], and the cache that holds these.

    Args:
      module: whose sites `scores`, `pattern` and `head_out` are.
      cache: {"k", "v"} of [B, K, S, H], or None to attend to this chunk only.
      windows: see `visible`.
      drop: what dropout does to the pattern.
    """
    H = q.shape[-1]
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [B, K, T, H]: a cache of this layout is updated in place
    if ctx.detached is not None:
        k, v = (jnp.where(ctx.detached[:, None, :, None], jax.lax.stop_gradient(x), x) for x in (k, v))
    if cache is not None:
        cache = {
            "k": jax.lax.dynamic_update_slice_in_dim(cache["k"], k, ctx.slot, axis=2),
            "v": jax.lax.dynamic_update_slice_in_dim(cache["v"], v, ctx.slot, axis=2),
        }
        S = ctx.k_pos.shape[1]
        k, v = cache["k"][:, :, :S], cache["v"][:, :, :S]

    (B, T, N), (K, S) = q.shape[:3], k.shape[1:3]
    grouped = q.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("btkgh,bksh->bkgts", grouped, k, preferred_element_type=jnp.float32) * H**-0.5
    scores = visit(module, "scores", scores.reshape(B, N, T, S), ctx, effects)
    scores = jnp.where(visible(ctx, windows)[:, None], scores, jnp.finfo(jnp.float32).min)
    pattern = visit(module, "pattern", jax.nn.softmax(scores, axis=-1), ctx, effects)
    pattern = drop(pattern).reshape(B, K, N // K, T, S).astype(v.dtype)
    # Heads stay in front of tokens here: a batched matmul in this order is 7 times faster on a CPU at T = 1.
    out = jnp.einsum("bkgts,bksh->bkgth", pattern, v).reshape(B, N, T, H).swapaxes(1, 2)
    return visit(module, "head_out", out, ctx, effects), cache


def visible(ctx: Context, windows: tuple[int, ...] | None) -> jax.Array:
    """bool [B, T, S]: the slots a query may attend to: filled, not later than itself, inside the layer's window."""
    q_pos, k_pos = ctx.q_pos[:, :, None], ctx.k_pos[:, None, :]
    seen = (k_pos >= 0) & (k_pos <= q_pos)
    if windows is None:
        return seen
    width = jnp.asarray([w or jnp.iinfo(jnp.int32).max for w in windows], jnp.int32)[ctx.layer]
    return seen & (q_pos - k_pos < width)


class MLP(nn.Module):
    config: LlamaConfig

    @nn.compact
    def __call__(self, x):
        D, F = self.config.embed, self.config.ffw
        gate = Projection("btd,df->btf", (D, F), name="gate")(x)
        up = Projection("btd,df->btf", (D, F), name="up")(x)
        return Projection("btf,fd->btd", (F, D), name="down")(nn.silu(gate) * up)


class Block(nn.Module):
    config: LlamaConfig

    @nn.compact
    def __call__(self, x, ctx: Context, effects: Effects, cache):
        eps = self.config.norm_eps
        x = visit(self, "resid_pre", x, ctx, effects)
        added, cache = Attention(self.config, name="attn")(RMSNorm(eps, name="attn_norm")(x), ctx, effects, cache)
        x = x + visit(self, "attn_out", added, ctx, effects)
        x = visit(self, "resid_mid", x, ctx, effects)
        added = MLP(self.config, name="mlp")(RMSNorm(eps, name="mlp_norm")(x))
        x = x + visit(self, "mlp_out", added, ctx, effects)
        return visit(self, "resid_post", x, ctx, effects), cache


class Llama(nn.Module):
    """The decoder with one parameter subtree a layer (`layers_0`, `layers_1`, ...): for generation and scoring."""

    config: LlamaConfig

    def setup(self):
        c = self.config
        self.embed = nn.Embed(c.vocab, c.embed, embedding_init=_normal)
        self.final_norm = RMSNorm(c.norm_eps)
        if not c.tied:
            self.lm_head = Projection("btd,dv->btv", (c.embed, c.vocab))
        self.make_layers()

    def make_layers(self):
        self.layers = [Block(self.config) for _ in range(self.config.layers)]

    def run_layers(self, x, ctx: Context, effects: Effects, cache: Cache | None):
        new = []
        for i, block in enumerate(self.layers):
            x, layer_cache = block(x, ctx.replace(layer=jnp.int32(i)), effects, cache and cache[i])
            x = pin(x)
            new.append(layer_cache)
        return x, (new if cache else None)

    def __call__(
        self, tokens, mask=None, *, ctx: Context | None = None, effects: Effects = (), cache: Cache | None = None
    ):
        """Hidden states after the final norm.

        Args:
          tokens: int32 [B, T].
          mask: bool [B, T], True at real tokens; None = all real. Ignored when `ctx` is given.
          ctx: where the tokens sit; built from `mask` if None.
          effects: bound effects, applied at every site in order.
          cache: `init_cache(...)`, written at `ctx.slot`; the first `ctx.k_pos.shape[1]` slots are attended to.
        Returns:
          [B, T, D]; with a cache, the pair ([B, T, D], new cache).
        """
        ctx = plain_context(tokens, mask) if ctx is None else ctx
        x = pin(visit(self, "embed", look_up(self.embed.embedding, tokens), ctx, effects))
        x, new_cache = self.run_layers(x, ctx, effects, cache)
        hidden = self.final_norm(x)
        if self.is_initializing():
            self.unembed(hidden)
        return hidden if cache is None else (hidden, new_cache)

    def unembed(self, hidden):
        """float32 logits [B, T, V] of hidden states [B, T, D]."""
        if self.config.tied:
            table = self.embed.embedding
            return jnp.einsum("btd,vd->btv", hidden, table, preferred_element_type=jnp.float32)
        return self.lm_head(hidden).astype(jnp.float32)

    def init_cache(self, rows: int, slots: int, dtype) -> Cache:
        """An empty cache: per layer, keys and values [B, K, S, H]."""
        c = self.config
        shape = (rows, c.kv_heads, slots, c.head_dim)
        return [{"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)} for _ in range(c.layers)]


class ScannedLlama(Llama):
    """The same decoder with layers stacked on a leading L axis (`layers`), run by a rematerialised scan: for training.

    One block is compiled whatever the depth, and only block inputs are kept for the backward pass.
    """

    def make_layers(self):
        def step(block, x, layer, cache, ctx, effects):
            x, cache = block(x, ctx.replace(layer=layer), effects, cache)
            return pin(x), cache

        self.layers = Block(self.config)
        self.scan = nn.scan(
            nn.remat(step, prevent_cse=False),
            variable_axes={"params": 0, LORA: 0, SETTINGS: 0, ACTIVATIONS: 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, 0, nn.broadcast, nn.broadcast),
            length=self.config.layers,
        )

    def run_layers(self, x, ctx: Context, effects: Effects, cache):
        return self.scan(self.layers, x, jnp.arange(self.config.layers), cache, ctx, effects)

    def init_cache(self, rows: int, slots: int, dtype):
        """An empty cache: keys and values [L, B, K, S, H]."""
        c = self.config
        shape = (c.layers, rows, c.kv_heads, slots, c.head_dim)
        return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}


def stack_layers(params: dict, places: Any = None) -> dict:
    """Parameters of `Llama` -> parameters of `ScannedLlama`.

    NumPy arrays are stacked in the host's memory, and each goes to its device before the next: none holds more than the
    result.

    Args:
      places: shardings, in a tree like the result; None is the default device.
    """
    layers = sum(name.startswith("layers_") for name in params)
    blocks = [params[f"layers_{i}"] for i in range(layers)]
    rest = {name: tree for name, tree in params.items() if not name.startswith("layers_")}

    def stack(*leaves):
        return (np if isinstance(leaves[0], np.ndarray) else jnp).stack(leaves)

    if places is None:
        return jax.device_put(rest) | {"layers": jax.tree.map(lambda *leaves: jax.device_put(stack(*leaves)), *blocks)}
    stacked = jax.tree.map(lambda place, *leaves: spread(stack(*leaves), place), places["layers"], *blocks)
    return spread(rest, {name: places[name] for name in rest}) | {"layers": stacked}


def unstack_layers(params: dict) -> dict:
    """Parameters of `ScannedLlama` -> parameters of `Llama`."""
    rest = {k: v for k, v in params.items() if k != "layers"}
    layers = len(jax.tree.leaves(params["layers"])[0])
    return rest | {f"layers_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]) for i in range(layers)}
