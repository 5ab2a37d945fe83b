"""Directions in the residual stream from pairs of contrasting texts, and placebos for them.

A pair is a text that shows a quality and one that lacks it. Its difference at layer l is `positive - negative` of
`resid_post` there; a type's direction at l is made from the differences of all its pairs, each layer by itself.
"""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from nmjax.forward_pass import gather
from nmjax.interventions.effect import plain_context
from nmjax.interventions.sites import ACTIVATIONS
from nmjax.interventions.steering import PLACEBOS
from nmjax.lm import LanguageModel
from nmjax.rows import bucket, check_context, encode_all, left_padded, rows_that_fit

PROMPTS = Path(__file__).resolve().parent.parent / "data" / "steering_prompts.jsonl"
KEYS = ("steering_type", "positive", "negative")
TOKENS = ("last", "mean")
METHODS = ("mean_diff", "pca", "pca_centered")

Pairs = list[tuple[str, str]]  # (positive, negative)


# --- Texts ------------------------------------------------------------------------------------------------------------


def read_pairs(path: str | Path = PROMPTS) -> dict[str, Pairs]:
    """The pairs of every steering type in a JSONL file, one `{"steering_type", "positive", "negative"}` a line.

    Types and pairs keep the file's order; empty lines are skipped.

    Raises:
      ValueError: a line that is not such an object or has an empty text; the message names file and line.
      FileNotFoundError: no such file.
    """
    found: dict[str, Pairs] = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where} is not JSON: {error}") from error
        if not isinstance(entry, dict) or set(entry) != set(KEYS):
            seen = f"the keys {sorted(entry)}" if isinstance(entry, dict) else f"a {type(entry).__name__}"
            raise ValueError(f"{where} holds {seen}, wanted an object with the keys {list(KEYS)}")
        for key in KEYS:
            if not isinstance(entry[key], str) or not entry[key].strip():
                raise ValueError(f"{where}: {key}={entry[key]!r}, wanted a text")
        if entry["positive"].strip() == entry["negative"].strip():
            raise ValueError(f"{where}: positive and negative are the same text, {entry['positive']!r}")
        found.setdefault(entry["steering_type"], []).append((entry["positive"], entry["negative"]))
    if not found:
        raise ValueError(f"{path} holds no pair")
    return found


# --- Activations ------------------------------------------------------------------------------------------------------


def activations(
    lm: LanguageModel,
    texts: Sequence[str] | Sequence[list[int]],
    token: str = "last",
    batch_size: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """`resid_post` of every block for every text, float32 [n, L, D].

    Texts of one padded length share batches, which are always filled up to `batch_size`, so that there is one compiled
    program a length, whatever the number of texts. Only the token asked for leaves the device.

    Args:
      token: "last", or "mean" over all tokens of the text, special ones included.
      batch_size: texts run together; None = up to 32, fewer if they don't fit in memory.
      progress: called after each batch with the number of texts in it.
    Raises:
      ValueError: bad input; the message names the argument, the value seen and the value wanted.
    """
    if token not in TOKENS:
        raise ValueError(f"token={token!r}, wanted one of {TOKENS}")
    ids = encode_all(lm, texts, "texts")
    check_context(lm, [len(row) for row in ids], [0] * len(ids), "more")
    if batch_size is None:
        batch_size = min(32, rows_that_fit(lm, bucket(max(map(len, ids)))))
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r}, wanted an integer >= 1")
    by_width: dict[int, list[int]] = {}
    for i, row in enumerate(ids):
        by_width.setdefault(bucket(len(row)), []).append(i)
    found = np.empty((len(ids), lm.config.layers, lm.config.embed), np.float32)
    for width, members in sorted(by_width.items()):
        for start in range(0, len(members), batch_size):
            part = members[start : start + batch_size]
            filled = part + part[:1] * (batch_size - len(part))
            tokens, mask = left_padded([ids[i] for i in filled], width)
            found[part] = np.asarray(_read(lm.module, token, lm.variables, tokens, mask))[: len(part)]
            if progress is not None:
                progress(len(part))
    return found


@functools.partial(jax.jit, static_argnums=(0, 1))
def _read(module, token: str, variables, tokens, mask) -> jax.Array:
    """float32 [B, L, D] of left-padded rows; the logits are never computed."""
    ctx = plain_context(tokens, mask)
    _, state = module.apply(variables, tokens, ctx=ctx, effects=(), mutable=[ACTIVATIONS])
    stream = gather(state[ACTIVATIONS], "resid_post")  # [L, B, T, D]
    if token == "last":
        chosen = stream[:, :, -1].astype(jnp.float32)
    else:
        weights = mask / mask.sum(axis=1, keepdims=True)
        # Padded positions hold whatever the arithmetic of an empty row gives; 0 times that need not be 0.
        real = jnp.where(mask[..., None], stream.astype(jnp.float32), 0)
        chosen = jnp.einsum("bt,lbtd->lbd", weights, real, precision=jax.lax.Precision.HIGHEST)
    return chosen.swapaxes(0, 1)


# --- Directions -------------------------------------------------------------------------------------------------------


def direction(positive: np.ndarray, negative: np.ndarray, method: str = "mean_diff") -> tuple[np.ndarray, np.ndarray]:
    """The direction from negative to positive in every layer, and how much of the pairs' difference it explains.

    Methods, of the differences d_i [D] of n pairs in one layer:
      mean_diff: their mean.
      pca: the first principal component about 0, which maximises the sum of (d_i . v)^2.
      pca_centered: the first principal component about their mean. Centring takes the contrast itself away: what is
        left is the axis along which pairs disagree. It is kept because published vectors were made this way.
    Both components are turned so that the mean difference points along them.

    Args:
      positive, negative: float [n, L, D], row i of both is one pair.
    Returns:
      Unit vectors float32 [L, D], and float64 [L], the share of `sum |d_i|^2` along each. A layer in which the
      differences have no direction (all 0) is 0 in both.
    Raises:
      ValueError: shapes differ, fewer than 2 pairs, values that are not finite, or an unknown method.
    """
    d = differences(positive, negative)
    weights = combination(gram(d), method)  # [L, n]
    vectors = np.einsum("ln,nld->ld", weights, d)
    norm = np.linalg.norm(vectors, axis=-1, keepdims=True)
    vectors = np.divide(vectors, norm, out=np.zeros_like(vectors), where=norm > 0)
    return vectors.astype(np.float32), explained_share(d, vectors)


def differences(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """float64 [n, L, D] from two [n, L, D]; ValueError as in `direction`."""
    a, b = np.asarray(positive, np.float64), np.asarray(negative, np.float64)
    if a.ndim != 3 or a.shape != b.shape:
        raise ValueError(f"positive has shape {a.shape} and negative {b.shape}, wanted two equal shapes [n, L, D]")
    if len(a) < 2:
        raise ValueError(f"positive holds {len(a)} pairs, wanted at least 2")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("positive and negative hold NaN or infinity, wanted finite activations")
    return a - b


def gram(d: np.ndarray) -> np.ndarray:
    """Inner products of the differences [n, L, D] in every layer: [L, n, n]. Every method needs only these."""
    by_layer = d.swapaxes(0, 1)
    return by_layer @ by_layer.swapaxes(1, 2)


def combination(products: np.ndarray, method: str) -> np.ndarray:
    """How `method` combines differences: weights [..., n], such that the direction is `sum_i weights_i d_i`.

    products: [..., n, n], as `gram` gives them.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r}, wanted one of {METHODS}")
    n = products.shape[-1]
    if method == "mean_diff":
        return np.full(products.shape[:-1], 1 / n)
    centering = np.eye(n) - (1 / n if method == "pca_centered" else 0)
    # The component of D-vectors from the leading eigenvector of their n x n products (as in kernel PCA).
    leading = np.linalg.eigh(centering @ products @ centering)[1][..., -1]
    weights = leading @ centering
    along_mean = np.einsum("...n,...nm->...", weights, products)
    return weights * np.where(along_mean < 0, -1.0, 1.0)[..., None]


def explained_share(d: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """The share of `sum |d_i|^2` that lies along unit vectors [L, D], for differences [n, L, D]: float64 [L]."""
    along = (project(d, vectors) ** 2).sum(axis=0)
    total = (d**2).sum(axis=(0, 2))
    return np.divide(along, total, out=np.zeros_like(along), where=total > 0)


def project(d: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Components of [n, L, D] along [L, D]: float64 [n, L]."""
    return np.einsum("nld,ld->nl", d, np.asarray(vectors, np.float64))


# --- Placebos ---------------------------------------------------------------------------------------------------------


def placebo(reference, kind: str = "random", seed: int = 0) -> np.ndarray:
    """A direction that means nothing, as long as the real one: what steering does merely by pushing.

    Args:
      reference: [D] or [L, D], or a list of such (a [D] counts for every layer).
      kind: "random", a Gaussian direction; "orthogonal", one that is moreover orthogonal to every reference.
      seed: equal seeds give equal directions; layers are independent.
    Returns:
      float32 of the first reference's shape; every row has that reference's norm, and is 0 where that is 0.
    Raises:
      ValueError: an unknown kind, shapes that don't fit, values that are not finite, or references that leave no
        direction orthogonal to all of them.
    """
    if kind not in PLACEBOS:
        raise ValueError(f"kind={kind!r}, wanted one of {PLACEBOS}")
    several = isinstance(reference, list | tuple) and len(reference) > 0 and np.ndim(reference[0]) > 0
    references = [np.asarray(r, np.float64) for r in (reference if several else [reference])]
    shape = references[0].shape
    for k, r in enumerate(references):
        if r.ndim not in (1, 2) or r.shape[-1] != shape[-1] or (r.ndim == 2 and len(shape) == 2 and r.shape != shape):
            raise ValueError(f"reference[{k}] has shape {r.shape}, wanted [D] or [L, D] like the first, {shape}")
        if r.ndim > len(shape):
            raise ValueError(f"reference[{k}] has shape {r.shape} but the first {shape}, wanted the [L, D] first")
        if not np.isfinite(r).all():
            raise ValueError(f"reference[{k}] holds NaN or infinity, wanted finite numbers")
    rows = np.atleast_2d(references[0])
    L, D = rows.shape
    drawn = np.random.default_rng(seed).standard_normal((L, D))
    if kind == "orthogonal":
        stacked = np.stack([np.broadcast_to(r, (L, D)) for r in references], axis=1)  # [L, R, D]
        drawn = np.stack([_orthogonal_to(drawn[layer], stacked[layer]) for layer in range(L)])
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    return (drawn / np.linalg.norm(drawn, axis=-1, keepdims=True) * norms).astype(np.float32).reshape(shape)


def _orthogonal_to(vector: np.ndarray, references: np.ndarray) -> np.ndarray:
    """`vector` [D] less its part in the span of `references` [R, D]."""
    lengths = np.linalg.norm(references, axis=-1, keepdims=True)
    units = np.divide(references, lengths, out=np.zeros_like(references), where=lengths > 0)
    _, sizes, axes = np.linalg.svd(units, full_matrices=False)
    basis = axes[sizes > 1e-10]
    if len(basis) >= len(vector):
        raise ValueError(f"the references span all {len(vector)} dimensions, so nothing is orthogonal to them")
    for _ in range(2):  # once leaves rounding errors as large as the part removed
        vector = vector - basis.T @ (basis @ vector)
    return vector
