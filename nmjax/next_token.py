"""What a model would say next: the whole distribution at the end of every prompt, and logits nowhere else."""

from __future__ import annotations

import functools

import jax
import numpy as np

from nmjax.interventions.compose import as_rows
from nmjax.lm import LanguageModel
from nmjax.rows import Rows, check_context, chunks, encode_all, make_rows, prefaced, prompt_width, row_keys


def next_logprobs(
    lm: LanguageModel, prompts, packs=None, *, width: int | None = None, batch_size: int | None = None, seed=0,
    row_ids=None,
) -> np.ndarray:  # fmt: skip
    """Log-probabilities of every token of the vocabulary as the next one, float32 [B, V].

    At temperature 1 and before the `logits` site, as the `logprobs` of `generate`.

    Args:
      prompts: a list of texts or of token id lists.
      packs: one intervention for all rows, or a list with one (or None) a row.
      width: padded prompt length; None = a bucket that holds the longest. Fix it over a data set to compile once.
      batch_size: rows run together; None = as many as fit in memory.
      seed, row_ids: which random stream a row draws from, see `rows.row_keys`.
    Raises:
      ValueError: bad input, before any compute; the message names the argument, the value seen and the value wanted.
    """
    ids = encode_all(lm, prompts)
    interventions = as_rows(packs, len(ids))
    keys = row_keys(seed, row_ids, len(ids))
    whole, spans = prefaced(lm, ids, interventions)
    check_context(lm, [len(row) for row in whole], [0] * len(whole), "more")
    width = prompt_width(width, max(map(len, whole)))
    batches = [
        (make_rows(lm, [whole[i] for i in take], [spans[i] for i in take], [interventions[i] for i in take], width,
                   keys[np.asarray(take)]), real)
        for take, real in chunks(lm, interventions, width, batch_size)
    ]  # fmt: skip
    return np.concatenate([np.asarray(_next(lm.module, lm.variables, rows))[:real] for rows, real in batches])


@functools.partial(jax.jit, static_argnums=0)
def _next(module, variables, rows: Rows):
    """float32 [B, V]: log-probabilities behind the last position."""
    variables = rows.adapted(variables)
    hidden = module.apply(variables, rows.tokens, ctx=rows.context(), effects=rows.effects)
    return jax.nn.log_softmax(module.apply(variables, hidden[:, -1:], method="unembed")[:, 0])
