"""MiniGPT and ConfidenceAwareGPT: one pre-norm decoder with learned positions, read top to bottom.

ConfidenceAwareGPT predicts, beside the next token, the loss it will have one token later, given its own choice, and is
told at every position what it predicted at the one before: that number scales and shifts both norms of every block.
Where it is told nothing (zeros) and has learnt nothing, it is MiniGPT in bits: they share the block, its parameters and
their initial values.

Axis letters: B rows, T query tokens, S key slots, N heads, H head size, D embed, F ffw, V vocabulary, M branches a
position. Dropout acts where an rng called `dropout` is given, and nowhere else.
"""

import functools
import math
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from models.llama import Cache, Effects, Projection, attend, visible
from models.minigpt_config import ConfidenceConfig, MiniGPTConfig
from nmjax.adapters import LORA, SETTINGS
from nmjax.interventions.effect import Context, plain_context
from nmjax.interventions.sites import visit
from nmjax.row_sum import row_sum
from nmjax.training.sharding import look_up, pin

_normal = nn.initializers.normal(0.02)


def _normalise(x, eps: float):
    """float32 [B, T, D] of mean 0 and variance 1 along D."""
    wide = x.astype(jnp.float32)
    wide = wide - row_sum(wide) / x.shape[-1]
    return wide * jax.lax.rsqrt(row_sum(wide * wide) / x.shape[-1] + eps)


class Dropout(nn.Dropout):
    """Drops where an rng called `dropout` is given."""

    def __call__(self, x):
        return super().__call__(x, deterministic=not self.has_rng("dropout"))


class LayerNorm(nn.Module):
    """`N(x) * scale + bias`; takes the signal that its sibling reads, and leaves it."""

    eps: float

    @nn.compact
    def __call__(self, x, signal=None):
        del signal
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return (_normalise(x, self.eps) * scale + bias).astype(x.dtype)


class AdaptiveLayer(nn.Module):
    """`N(x) * (1 + s) + b`, with (s, b) an affine function of the signal [B, T, 1] that starts at zero."""

    eps: float

    @nn.compact
    def __call__(self, x, signal):
        D = x.shape[-1]
        kernel = self.param("kernel", nn.initializers.zeros, (1, 2, D))
        bias = self.param("bias", nn.initializers.zeros, (2, D))
        change = jnp.einsum("btc,csd->bstd", signal, kernel.astype(jnp.float32)) + bias[:, None]
        return (_normalise(x, self.eps) * (1 + change[:, 0]) + change[:, 1]).astype(x.dtype)


class Attention(nn.Module):
    config: MiniGPTConfig

    def setup(self):
        c = self.config
        D, N, H = c.embed, c.heads, c.head_dim
        # Xavier-uniform as for one matrix [D, 3 D] of queries, keys and values together.
        xavier = functools.partial(_uniform, math.sqrt(6 / (D + 3 * D)))

        def heads():
            return Projection("btd,dnh->btnh", (D, N, H), (N, H), xavier)

        self.q, self.k, self.v = heads(), heads(), heads()
        self.o = Projection("btnh,nhd->btd", (N, H, D), (D,))
        self.dropout = Dropout(c.dropout)

    def __call__(self, x, ctx: Context, effects: Effects, cache):
        """x [B, T, D] -> what this sublayer adds [B, T, D], and the cache with this chunk's keys and values in it."""
        q = visit(self, "query", self.q(x), ctx, effects)
        out, cache = attend(self, q, self.k(x), self.v(x), ctx, effects, cache, drop=self.dropout)
        return self.o(out), cache

    def branch(self, x, ctx: Context, cache):
        """What attention adds to tokens [B, T, D] that each stand behind a row's tokens before `ctx.q_pos`, alone.

        A branch attends to the cached keys of earlier positions and to its own key, never to another branch.
        """
        q, own_k, own_v = self.q(x), self.k(x), self.v(x)
        scale, S = self.config.head_dim**-0.5, ctx.k_pos.shape[1]
        k, v = cache["k"][:, :, :S], cache["v"][:, :, :S]
        scores = jnp.einsum("btnh,bnsh->bnts", q, k, preferred_element_type=jnp.float32) * scale
        earlier = visible(ctx, None) & (ctx.k_pos[:, None] < ctx.q_pos[:, :, None])
        scores = jnp.where(earlier[:, None], scores, jnp.finfo(jnp.float32).min)
        own = jnp.einsum("btnh,btnh->bnt", q, own_k, preferred_element_type=jnp.float32)[..., None] * scale
        pattern = jax.nn.softmax(jnp.concatenate([scores, own], axis=-1), axis=-1)
        pattern = self.dropout(pattern).astype(v.dtype)
        out = jnp.einsum("bnts,bnsh->btnh", pattern[..., :-1], v)
        return self.o(out + pattern[..., -1].swapaxes(1, 2)[..., None] * own_v)


class MLP(nn.Module):
    config: MiniGPTConfig

    @nn.compact
    def __call__(self, x):
        D, F = self.config.embed, self.config.ffw
        hidden = Projection("btd,df->btf", (D, F), (F,), name="up")(x)
        hidden = jax.nn.gelu(hidden, approximate=self.config.gelu == "tanh")
        hidden = Dropout(self.config.dropout)(hidden)
        return Projection("btf,fd->btd", (F, D), (D,), name="down")(hidden)


class Block(nn.Module):
    """A pre-norm block; `norm` makes its two norms, which get the signal [B, T, 1] (None where nobody reads it)."""

    config: MiniGPTConfig
    norm: type[nn.Module]

    def setup(self):
        eps = self.config.norm_eps
        self.attn_norm, self.mlp_norm = self.norm(eps), self.norm(eps)
        self.attn, self.mlp = Attention(self.config), MLP(self.config)
        self.dropout = Dropout(self.config.dropout)

    def __call__(self, x, signal, ctx: Context, effects: Effects, cache):
        x = visit(self, "resid_pre", x, ctx, effects)
        added, cache = self.attn(self.attn_norm(x, signal), ctx, effects, cache)
        x = x + visit(self, "attn_out", self.dropout(added), ctx, effects)
        x = visit(self, "resid_mid", x, ctx, effects)
        x = x + visit(self, "mlp_out", self.dropout(self.mlp(self.mlp_norm(x, signal))), ctx, effects)
        return visit(self, "resid_post", x, ctx, effects), cache

    def branch(self, x, signal, ctx: Context, cache):
        x = x + self.dropout(self.attn.branch(self.attn_norm(x, signal), ctx, cache))
        return x + self.dropout(self.mlp(self.mlp_norm(x, signal)))


class MiniGPT(nn.Module):
    """The baseline, and GPT-2 itself: learned positions, GELU, the output head is the embedding table."""

    config: MiniGPTConfig
    norm: ClassVar[type[nn.Module]] = LayerNorm

    def setup(self):
        c = self.config
        self.embed = nn.Embed(c.vocab, c.embed, embedding_init=_normal)
        self.positions = nn.Embed(c.max_positions, c.embed, embedding_init=_normal)
        self.layers = [Block(c, self.norm) for _ in range(c.layers)]
        self.final_norm = LayerNorm(c.norm_eps)
        self.dropout = Dropout(c.dropout)
        self.set_up_heads()

    def set_up_heads(self):
        """What a variant has besides the tied head."""

    def whole_rows(self, tokens, mask) -> Context:
        """The context of tokens [B, T] that are given whole. Raises ValueError if they exceed the model's context."""
        if mask is None and tokens.shape[1] > self.config.max_positions:
            raise ValueError(f"tokens: {tokens.shape[1]} of a row exceed max_positions={self.config.max_positions}")
        return plain_context(tokens, mask)

    def enter(self, tokens, ctx: Context, effects: Effects):
        """The residual stream [B, T, D] before the first block."""
        x = visit(self, "embed", look_up(self.embed.embedding, tokens), ctx, effects)
        position = jnp.maximum(ctx.q_pos, 0)  # padding has none; what it computes is never read
        x = x + look_up(self.positions.embedding, position)
        return pin(self.dropout(x))

    def run(self, tokens, signal, ctx: Context, effects: Effects, cache: Cache | None):
        """Hidden states [B, T, D] after the final norm under a given signal [B, T, 1], and the layers' new cache."""
        x = self.enter(tokens, ctx, effects)
        new = []
        for i, block in enumerate(self.layers):
            x, layer_cache = block(x, signal, ctx.replace(layer=jnp.int32(i)), effects, cache and cache[i])
            x = pin(x)
            new.append(layer_cache)
        return self.final_norm(x), (new if cache else None)

    def __call__(
        self, tokens, mask=None, *, ctx: Context | None = None, effects: Effects = (), cache: Cache | None = None
    ):
        """Hidden states [B, T, D] after the final norm; with a cache the pair (hidden, new cache). As `Llama`'s."""
        ctx = self.whole_rows(tokens, mask) if ctx is None else ctx
        hidden, new_cache = self.run(tokens, None, ctx, effects, cache)
        return hidden if cache is None else (hidden, new_cache)

    def unembed(self, hidden):
        """float32 logits [B, T, V] of hidden states [B, T, D]."""
        return jnp.einsum("btd,vd->btv", hidden, self.embed.embedding, preferred_element_type=jnp.float32)

    def init_cache(self, rows: int, slots: int, dtype) -> Cache:
        """An empty cache: per layer, keys and values [B, N, S, H]."""
        c = self.config
        shape = (rows, c.heads, slots, c.head_dim)
        return [{"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)} for _ in range(c.layers)]


class ConfidenceAwareGPT(MiniGPT):
    """MiniGPT that predicts its coming loss and is told at each position what it predicted at the one before.

    As a model of this toolkit (`generate`, `score`, `forward`) it feeds its predictions back by itself, as
    `config.feedback` says; the cache then holds them, too. `__call__` with `confidence_scalars` is told them instead.
    """

    config: ConfidenceConfig
    norm: ClassVar[type[nn.Module]] = AdaptiveLayer

    def set_up_heads(self):
        c = self.config
        start = nn.initializers.constant(c.initial_confidence)
        bound = functools.partial(_uniform, 1 / math.sqrt(c.embed))
        self.confidence_predictor = nn.Dense(1, kernel_init=bound, bias_init=start)

    def __call__(
        self,
        tokens,
        mask=None,
        *,
        confidence_scalars=None,
        ctx: Context | None = None,
        effects: Effects = (),
        cache: Cache | None = None,
    ):
        """Hidden states as `MiniGPT`'s; or, told its confidences, what it says.

        Args:
          confidence_scalars: float [B, T, 1], what was predicted at the token before each (0 at the first).
        Returns:
          With `confidence_scalars` {"logits": float32 [B, T, V], "confidence_pred": float32 [B, T, 1]}, else hidden
          states, with a cache as the pair (hidden, new cache).
        """
        ctx = self.whole_rows(tokens, mask) if ctx is None else ctx
        if self.is_initializing():
            self.told(tokens, jnp.zeros((*tokens.shape, 1)), ctx)
            return None
        if confidence_scalars is not None:
            if cache is not None:
                raise ValueError("cache: with confidence_scalars wanted None; use `told` to get the cache as well")
            if confidence_scalars.shape != (*tokens.shape, 1):
                seen = confidence_scalars.shape
                raise ValueError(f"confidence_scalars has shape {seen}, wanted {(*tokens.shape, 1)}")
            hidden, confidence, _ = self.told(tokens, confidence_scalars, ctx, effects)
            return {"logits": self.unembed(hidden), "confidence_pred": confidence}
        signal = self.feed_back(tokens, ctx, effects, cache)
        hidden, _, new_cache = self.told(tokens, signal, ctx, effects, cache)
        return hidden if cache is None else (hidden, new_cache)

    def told(self, tokens, signal, ctx: Context, effects: Effects = (), cache: Cache | None = None):
        """A pass under a given signal [B, T, 1]: hidden states [B, T, D], predictions [B, T, 1], the new cache."""
        hidden, new = self.run(tokens, signal, ctx, effects, cache)
        confidence = self.predict(hidden)
        if cache is not None:
            kept, now = cache[-1]["confidence"], confidence[:, None].astype(cache[-1]["confidence"].dtype)
            new.append({"confidence": jax.lax.dynamic_update_slice_in_dim(kept, now, ctx.slot, axis=2)})
        return hidden, confidence, new

    def predict(self, hidden):
        """float32 [B, T, 1]: the coming loss, in nats, that hidden states [B, T, D] promise."""
        return self.confidence_predictor(hidden).astype(jnp.float32)

    def feed_back(self, tokens, ctx: Context, effects: Effects = (), cache: Cache | None = None):
        """The signal [B, T, 1] of a chunk: what the model predicts at the position before each, told its own signal."""
        B, T = tokens.shape
        if cache is None:
            ctx = ctx.replace(slot=0)
            cache = self.init_cache(B, T, self.embed.embedding.dtype)
        signal = jnp.zeros((B, T, 1), jnp.float32)
        if self.config.feedback == 0:
            return signal
        if T == 1:
            return preceding(cache, ctx)
        if self.config.feedback is None:
            return self._one_by_one(tokens, ctx, effects, cache)
        for _ in range(self.config.feedback):
            _, _, new = self.told(tokens, signal, ctx, effects, cache)
            signal = preceding(new, ctx)
        return signal

    def _one_by_one(self, tokens, ctx: Context, effects: Effects, cache: Cache):
        """The exact signal: every position read on its own, with the keys and the prediction of those before it."""

        def column(self, cache, t):
            here = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=t, slice_size=1, axis=1)
            at = ctx.replace(q_pos=here(ctx.q_pos), tokens=here(ctx.tokens), slot=ctx.slot + t)
            signal = preceding(cache, at)
            _, _, cache = self.told(here(tokens), signal, at, effects, cache)
            return cache, signal[:, 0]

        scan = nn.scan(
            column,
            variable_broadcast=["params", LORA, SETTINGS],
            split_rngs={"params": False, "dropout": True},
            out_axes=1,
        )
        _, signal = scan(self, cache, jnp.arange(tokens.shape[1]))
        return signal

    def branch(self, tokens, signal, ctx: Context, cache: Cache):
        """Hidden states [B, T, D] of tokens that each follow the row's tokens before `ctx.q_pos`, alone.

        Args:
          tokens: int32 [B, T], in any number and order; `ctx.q_pos` [B, T] says where each stands.
          signal: float32 [B, T, 1], what was predicted at the position before.
          ctx: `k_pos` [B, S] are the positions of the cached tokens.
          cache: of a pass over the row.
        """
        x = self.enter(tokens, ctx, ())
        for i, block in enumerate(self.layers):
            x = pin(block.branch(x, signal, ctx, cache[i]))
        return self.final_norm(x)

    def init_cache(self, rows: int, slots: int, dtype) -> Cache:
        """An empty cache: `MiniGPT`'s, and behind its layers the predictions [B, 1, S, 1]."""
        return [*super().init_cache(rows, slots, dtype), {"confidence": jnp.zeros((rows, 1, slots, 1), jnp.float32)}]


def preceding(cache: Cache, ctx: Context):
    """float32 [B, T, 1]: the prediction kept for the position before each query; 0 where there is none."""
    kept = cache[-1]["confidence"][:, 0, : ctx.k_pos.shape[1], 0]
    before = (ctx.k_pos[:, None] == ctx.q_pos[:, :, None] - 1) & ctx.valid[:, None]
    return jnp.where(before, kept[:, None], 0).sum(-1, keepdims=True)


def _uniform(bound: float, key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -bound, bound)
