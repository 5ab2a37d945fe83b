"""The named places where a model lets interventions in.

A model calls `visit` at each site, in this order, once per block (`embed` and `logits` once per pass). The residual
identity holds in every family: `resid_pre + attn_out = resid_mid` and `resid_mid + mlp_out = resid_post`.
"""

import flax.linen as nn
import jax

# site -> (shape in axis letters, TransformerLens name, meaning)
SITES = {
    "embed": ("B T D", "hook_embed", "after the token embedding"),
    "resid_pre": ("B T D", "blocks.{l}.hook_resid_pre", "input of block l"),
    "query": ("B T N H", "blocks.{l}.attn.hook_rot_q", "queries after RoPE and QK norm"),
    "scores": ("B N T S", "blocks.{l}.attn.hook_attn_scores", "scaled scores before mask and softmax"),
    "pattern": ("B N T S", "blocks.{l}.attn.hook_pattern", "attention weights after softmax"),
    "head_out": ("B T N H", "blocks.{l}.attn.hook_z", "head outputs before the output projection"),
    "attn_out": ("B T D", "blocks.{l}.hook_attn_out", "what the attention sublayer adds"),
    "resid_mid": ("B T D", "blocks.{l}.hook_resid_mid", "resid_pre + attn_out"),
    "mlp_out": ("B T D", "blocks.{l}.hook_mlp_out", "what the MLP sublayer adds"),
    "resid_post": ("B T D", "blocks.{l}.hook_resid_post", "resid_mid + mlp_out"),
    "logits": ("B V", "logits", "next-token logits at the last position, before sampling"),
}

# Where the query positions lie in a site's shape; `logits` has none: it belongs to one position a row.
QUERY_AXIS = {site: shape.split().index("T") for site, (shape, _, _) in SITES.items() if "T" in shape.split()}

ACTIVATIONS = "intermediates"  # Flax's own collection for sown values: `init` leaves it out


def visit(module: nn.Module, site: str, x: jax.Array, ctx, effects) -> jax.Array:
    """Lets every effect act on `x` at `site`, in order, and offers the result for capture.

    Sowing costs nothing unless the caller made the collection mutable; what it then doesn't return, XLA removes.
    """
    x = act(site, x, ctx, effects)
    module.sow(ACTIVATIONS, f"at_{site}", x, reduce_fn=lambda _, new: new, init_fn=lambda: None)
    return x


def act(site: str, x: jax.Array, ctx, effects) -> jax.Array:
    """What the effects make of `x`; the part of `visit` that needs no module."""
    for effect in effects:
        if effect.touches(site):
            x = effect.act(site, x, ctx)
    return x
