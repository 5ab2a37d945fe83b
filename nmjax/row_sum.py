"""Sums along the last axis that come out the same, to the bit, whatever is compiled around them."""

import jax
import jax.numpy as jnp


def row_sum(x):
    """float32 [..., 1]: the sum of x [..., D] along D.

    A product with ones, not a sum: XLA fuses a sum with whatever made its terms, and then the order of adding, so the
    last bit, depends on which effects are compiled in. An effect at dose 0 shall change no bit.
    """
    ones = jnp.ones((x.shape[-1], 1), jnp.float32)
    return jnp.dot(x, ones, precision=jax.lax.Precision.HIGHEST)
