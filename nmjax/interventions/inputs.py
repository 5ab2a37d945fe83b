"""Effects on what the model reads: noisy or missing token embeddings, a hidden text in front of the prompt."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nmjax.interventions.draws import Drawing, normal, uniform
from nmjax.interventions.effect import Effect, check_number, static


class JitterEmbeddings(Drawing):
    """Adds Gaussian noise of `dose * scale` times the RMS of the embedding table to every token's embedding."""

    scale: Any
    size: Any = None  # bound: the table's RMS
    blends = False

    def bind(self, lm):
        table = lm.params["embed"]["embedding"]
        return self.replace(size=jnp.sqrt(jnp.mean(jnp.square(table.astype(jnp.float32)))))

    def embed(self, x, ctx):
        noise = self.draw(ctx, normal, x.shape[2:])
        return x + ((self.dose * self.scale * self.size)[:, None, None] * noise).astype(x.dtype)


def jitter_embeddings(scale: float) -> JitterEmbeddings:
    """Blurs the tokens: noise of `d scale` times the RMS of the embedding table on every embedding.

    Args:
      scale: >= 0.
    """
    scale = check_number("jitter_embeddings: scale", scale, "a finite number >= 0", lambda value: value >= 0)
    return JitterEmbeddings(scale=np.float32(scale))


class DropTokens(Drawing):
    """Sets the embedding of a token to 0 with probability `min(1, dose * probability)`."""

    probability: Any
    blends = False

    def embed(self, x, ctx):
        kept = self.draw(ctx, uniform, ()) >= (self.dose * self.probability)[:, None]  # [B, T]
        return x * kept[..., None].astype(x.dtype)

    def clamps(self):
        value = self.dose * self.probability
        return [f"drop_tokens: p {value:g} lowered to 1"] if value > 1 else []


def drop_tokens(p: float) -> DropTokens:
    """Blanks the embedding of each token with probability `min(1, d p)`; the token keeps its position.

    Args:
      p: in [0, 1].
    """
    p = check_number("drop_tokens: p", p, "a probability from 0 to 1", lambda value: 0 <= value <= 1)
    return DropTokens(probability=np.float32(p))


class Preface(Effect):
    """A hidden text before the prompt, there if the dose is above 0. It acts at no site but on the row's tokens."""

    text: str = static(default="")


def preface(text: str) -> Preface:
    """Puts a text in front of the prompt that attention sees and no output shows.

    It is prefilled into the row's own cache after the beginning-of-sequence token: the prompt's positions shift by its
    length. Any dose above 0 is all of it; several prefaces follow one another. Selections by position keep counting
    from the prompt as given.
    """
    if not isinstance(text, str) or not text:
        raise ValueError(f"preface: text={text!r}, wanted a non-empty text")
    return Preface(text=text)


def preface_ids(lm, effects: Sequence[Effect]) -> list[int]:
    """Token ids of all prefaces of a row. Raises ValueError for a model without tokenizer, or a dose being traced."""
    ids: list[int] = []
    for effect in effects:
        if not isinstance(effect, Preface):
            continue
        if isinstance(effect.dose, jax.core.Tracer):
            raise ValueError("preface: its dose decides which tokens there are, so it can't be differentiated")
        if effect.where is not None:
            raise ValueError("preface: it has no selection of tokens, it is all before the prompt")
        if effect.dose > 0:
            ids += lm.encode(effect.text, "preface: text", special=False)
    return ids


def with_preface(prompt: list[int], preface: list[int], bos: int | None) -> tuple[list[int], tuple[int, int]]:
    """The prompt with the preface behind its beginning-of-sequence token; the preface's first position and length."""
    start = 1 if prompt and prompt[0] == bos else 0
    return prompt[:start] + preface + prompt[start:], (start, len(preface))
