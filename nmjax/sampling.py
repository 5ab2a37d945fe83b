"""Drawing the next token: cuts without sorting, one uniform number a row.

A sort of the vocabulary costs several decode steps. The nucleus and top-k are sets of the form `logit >= threshold`, so
a bisection on the threshold finds them exactly, in one pass over the logits a step. It ends when a single token is left
between the bounds, after a dozen steps for most texts; tokens of equal logit are told apart from no others only when no
float is left between.
"""

import flax.struct
import jax
import jax.numpy as jnp


class Sampling(flax.struct.PyTreeNode):
    """The caller's sampling parameters, one value a row."""

    temperature: jax.Array  # float32 [B]; 0 = greedy
    top_p: jax.Array  # float32 [B]; 1 = off
    top_k: jax.Array  # int32 [B]; 0 = off


def choose(logits, sampling: Sampling, keys):
    """The next token of every row.

    Args:
      logits: float32 [B, V], after every effect.
      keys: PRNG keys [B] for this step.
    Returns:
      tokens int32 [B], and their log-probability under the distribution they were drawn from [B] (0 where greedy).
    """
    best = argmax(logits)

    def sampled(_):
        # Denormal numbers count as 0 in a division.
        smallest = jnp.finfo(jnp.float32).tiny
        temperature = jnp.where(sampling.temperature > 0, jnp.maximum(sampling.temperature, smallest), 1.0)
        # Shifted first, so that a tiny temperature sends the others to -inf and never the likeliest to infinity.
        cut = keep_top_k((logits - logits.max(-1, keepdims=True)) / temperature[:, None], sampling.top_k)
        cut = keep_top_p(cut, sampling.top_p)
        uniform = jax.vmap(lambda key: jax.random.uniform(key))(keys)
        drawn = draw(cut, uniform)
        drawn = jnp.where(sampling.temperature > 0, drawn, best)
        return drawn, jnp.where(sampling.temperature > 0, token_logprob(cut, drawn), 0.0)

    def greedy(_):
        return best, jnp.zeros(best.shape, jnp.float32)

    return jax.lax.cond((sampling.temperature > 0).any(), sampled, greedy, None)


def argmax(logits):
    """int32 [B]: the first largest entry of [B, V]. Two plain reductions vectorise where `jnp.argmax` does not."""
    V = logits.shape[-1]
    largest = logits.max(-1, keepdims=True)
    index = jnp.where(logits == largest, jnp.arange(V, dtype=jnp.int32), V)
    return jnp.minimum(index.min(-1), V - 1).astype(jnp.int32)


def token_logprob(logits, tokens):
    """float32 [B]: log-softmax of [B, V] at one token a row."""
    picked = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return picked - jax.nn.logsumexp(logits, axis=-1)


def keep_top_p(logits, p):
    """Masks all but the smallest set of likeliest tokens whose mass reaches p (ties with the last one stay).

    Args:
      logits: float32 [B, V].
      p: float32 [B]; 1 or more leaves the row exactly as it is.
    """
    return _keep_heaviest(logits, jnp.exp, lambda total: p * total, bypass=p >= 1)


def keep_top_k(logits, k):
    """Masks all but the k likeliest tokens of [B, V] (ties with the last one stay); k [B], 0 leaves a row as it is."""
    count = k.astype(jnp.float32)
    return _keep_heaviest(logits, jnp.ones_like, lambda total: count, bypass=(k <= 0) | (k >= logits.shape[-1]))


def _keep_heaviest(logits, weigh, target_of, bypass):
    """Masks tokens below the highest threshold at which the weight of what is kept still reaches the target [B].

    Args:
      weigh: what a token weighs, a function of its logit below the row's largest which doesn't fall.
      target_of: the target, a function of the row's total weight.
    """
    largest = logits.max(-1)
    alive = jnp.isfinite(logits)

    def weight(x):  # [B] or [B, V]
        return weigh(x - largest.reshape(largest.shape + (1,) * (x.ndim - 1)))

    weights = jnp.where(alive, weight(logits), 0)
    total = weights.sum(-1)
    target = target_of(total)

    def mass(threshold):
        return jnp.where(logits >= threshold[:, None], weights, 0).sum(-1)

    def between(low, high):
        return low / 2 + high / 2  # a sum could overflow

    def unsettled(bounds):
        """Whether more than one token may lie from `low` to `high`: each of them weighs at least what `low` does."""
        low, high, mass_low, mass_high = bounds
        middle = between(low, high)
        several = mass_low - mass_high > 1.5 * weight(low)
        return ~bypass & several & (low < middle) & (middle < high)

    def halve(bounds):
        low, high, mass_low, mass_high = bounds  # mass(low) >= target > mass(high)
        middle = between(low, high)
        held = mass(middle)
        enough = held >= target
        return (
            jnp.where(enough, middle, low),
            jnp.where(enough, high, middle),
            jnp.where(enough, held, mass_low),
            jnp.where(enough, mass_high, held),
        )

    top = mass(largest)
    low = jnp.where(top >= target, largest, jnp.where(alive, logits, largest[:, None]).min(-1))
    bounds = (low, largest, total, top)
    threshold, *_ = jax.lax.while_loop(lambda bounds: unsettled(bounds).any(), halve, bounds)
    return jnp.where(bypass[:, None] | (logits >= threshold[:, None]), logits, -jnp.inf)


def draw(logits, uniform):
    """Samples softmax(logits) [B, V] by inverse CDF at `uniform` [B] in [0, 1).

    A cumulative sum in two levels: over blocks of the vocabulary, then inside the block that holds the target.
    """
    B, V = logits.shape
    block = 1 << (max(V - 1, 1).bit_length() + 1) // 2  # about sqrt(V)
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    weights = jnp.pad(weights, ((0, 0), (0, -V % block))).reshape(B, -1, block)
    mass = weights.sum(-1)
    target = uniform * mass.sum(-1)
    chosen, below = _first_beyond(mass, target)
    inside = jnp.take_along_axis(weights, chosen[:, None, None], axis=1)[:, 0]
    token, _ = _first_beyond(inside, target - below)
    return (chosen * block + token).astype(jnp.int32)


def _first_beyond(weights, target):
    """The first entry of [B, C] at which the cumulative sum exceeds `target` [B], and the sum before it.

    An entry without weight is never picked, though rounding may let the sum rise there; where it leaves no entry beyond
    the target, the last one with weight is.
    """
    cumulative = jnp.cumsum(weights, axis=-1)
    beyond = (cumulative > target[:, None]) & (weights > 0)
    last = weights.shape[-1] - 1 - argmax((weights > 0)[:, ::-1].astype(jnp.float32))
    first = jnp.where(beyond.any(-1), argmax(beyond.astype(jnp.float32)), last)
    return first, jnp.take_along_axis(cumulative - weights, first[:, None], axis=-1)[:, 0]
