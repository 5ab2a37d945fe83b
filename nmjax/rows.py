"""From prompts and packs to the arrays of one batch: left-padded tokens, bound effects, one random stream a row."""

import os
from collections.abc import Sequence

import flax.struct
import jax
import numpy as np

from nmjax.adapter_stack import choose
from nmjax.interventions.adapter import UseAdapter, adapter_doses
from nmjax.interventions.compose import Intervention, batch
from nmjax.interventions.effect import Context, Effect, plain_context
from nmjax.interventions.inputs import Preface, preface_ids, with_preface
from nmjax.interventions.sampler import Contrast
from nmjax.lm import LanguageModel


class Rows(flax.struct.PyTreeNode):
    """One batch. Left padding puts every row's next token into the same cache slot.

    Behind the rows that were asked for stand hidden ones, if a `contrast` wants them: copies of its row under another
    intervention, which are given the tokens that their row chooses.
    """

    tokens: np.ndarray  # int32 [B, T]
    mask: np.ndarray  # bool [B, T], True at real tokens
    prompt_len: np.ndarray  # int32 [B], a hidden preface included
    effects: tuple[Effect, ...]
    keys: jax.Array  # PRNG keys [B]
    preface: np.ndarray | None = None  # int32 [B, 2]: first position and length of a hidden preface
    owner: np.ndarray | None = None  # int32 [B]: the row whose tokens a row follows, mostly itself
    rival: np.ndarray | None = None  # int32 [B]: the row that a row is contrasted with, mostly itself
    adapters: np.ndarray | None = None  # float32 [B, M]: each row's dose of each adapter, of a model with named ones

    def context(self) -> Context:
        """Where the tokens of a pass over all of `tokens` sit."""
        return plain_context(self.tokens, self.mask, self.prompt_len, self.preface).replace(keys=self.keys)

    def adapted(self, variables: dict) -> dict:
        """The model's variables under the adapters that each row chose."""
        return variables if self.adapters is None else choose(variables, self.adapters)

    def follow(self, values):
        """`values` [asked-for rows, ...] for all rows: hidden ones get those of their owner."""
        return values if self.owner is None else values[self.owner]

    def visible(self, row: int) -> np.ndarray:
        """A row's prompt without its hidden preface."""
        ids = self.tokens[row][self.mask[row]]
        start, length = (0, 0) if self.preface is None else self.preface[row]
        return np.delete(ids, slice(start, start + length))

    def rivals(self, logits) -> jax.Array:
        """The logits [B, V] that each row is contrasted with."""
        return logits if self.rival is None else logits[self.rival]


def bucket(length: int) -> int:
    """The padded length for `length` tokens: a multiple of 16 up to 128, of 32 up to 512, of 64 beyond."""
    step = 16 if length <= 128 else 32 if length <= 512 else 64
    return -(-length // step) * step


def prompt_width(width: int | None, longest: int) -> int:
    """The padded length that was asked for, or else the bucket of the longest prompt.

    Raises ValueError for a `width` that is no integer or does not hold that one.
    """
    if width is None:
        return bucket(longest)
    if isinstance(width, bool) or not isinstance(width, int) or width < longest:
        raise ValueError(f"width={width!r}, wanted an integer of at least {longest}, the longest prompt")
    return width


def encode_all(lm: LanguageModel, prompts, argument: str = "prompts") -> list[list[int]]:
    """Token ids of every prompt. Raises ValueError if `prompts` is one text or empty, or a prompt is not encodable."""
    if isinstance(prompts, str) or not isinstance(prompts, Sequence | np.ndarray):
        raise ValueError(f"{argument}={prompts!r}, wanted a list of prompts")
    if len(prompts) == 0:
        raise ValueError(f"{argument} is empty, wanted at least one prompt")
    done: dict[int, list[int]] = {}  # the same text under many packs is encoded once
    held = list(prompts)  # an array makes its rows anew each time, under numbers that it uses again
    for i, prompt in enumerate(held):
        if id(prompt) not in done:
            done[id(prompt)] = lm.encode(prompt, f"{argument}[{i}]")
    return [done[id(prompt)] for prompt in held]


def prefaced(
    lm: LanguageModel, ids: list[list[int]], interventions: Sequence[Intervention]
) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """Every row's ids with its hidden preface, and that one's first position and length (0 where there is none)."""
    hidden = {id(iv): preface_ids(lm, iv.effects) for iv in interventions}
    both = [with_preface(row, hidden[id(iv)], lm.config.bos_id) for row, iv in zip(ids, interventions, strict=True)]
    return [row for row, _ in both], [span for _, span in both]


def make_rows(
    lm: LanguageModel, ids: list[list[int]], spans: list[tuple[int, int]], interventions: Sequence[Intervention],
    width: int, keys, prompt_len=None,
) -> Rows:  # fmt: skip
    """Pads `ids` on the left to `width`, adds hidden rows and binds one intervention a row.

    Args:
      ids, spans: what `prefaced` returned.
      prompt_len: how many of each row's ids are preface and prompt [B]; None = all.
    Raises:
      ValueError: a where-selection that holds none of its row's prompt, several contrasts in one row, or an adapter
        that the model doesn't carry.
    """
    lengths = [len(row) for row in ids] if prompt_len is None else list(prompt_len)
    owner = list(range(len(ids)))
    rival = list(owner)
    interventions = list(interventions)
    for i, iv in enumerate(interventions[:]):
        contrasts = [effect for effect in iv.effects if isinstance(effect, Contrast)]
        if len(contrasts) > 1:
            raise ValueError(f"packs[{i}] holds {len(contrasts)} contrasts, wanted at most one in a row")
        for contrast in contrasts:
            if not isinstance(contrast.dose, jax.core.Tracer) and contrast.dose == 0:
                continue  # without a row more, the others are the same in bits as without the contrast
            rival[i] = len(owner)
            rival.append(len(owner))
            owner.append(i)
            interventions.append(contrast.against)
    contrasted = len(owner) > len(ids)
    ids, spans, lengths = [ids[i] for i in owner], [spans[i] for i in owner], [lengths[i] for i in owner]
    for i, iv, length, (_, hidden) in zip(owner, interventions, lengths, spans, strict=True):
        for effect in iv.effects:
            if effect.where is not None:
                effect.where.check(length - hidden, f"packs[{i}] {type(effect).__name__}")
    tokens, mask = left_padded(ids, width)
    return Rows(
        tokens=tokens,
        mask=mask,
        prompt_len=np.asarray(lengths, np.int32),
        effects=batch([_inside_the_network(iv) for iv in interventions], lm),
        keys=keys[np.asarray(owner)] if contrasted else keys,
        preface=np.asarray(spans, np.int32) if any(length for _, length in spans) else None,
        owner=np.asarray(owner, np.int32) if contrasted else None,
        rival=np.asarray(rival, np.int32) if contrasted else None,
        adapters=adapter_doses(lm, [iv.effects for iv in interventions]),
    )


def left_padded(ids: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32 [B, T] with zeros in front of the shorter rows, and bool [B, T], True at real tokens."""
    tokens = np.zeros((len(ids), width), np.int32)
    mask = np.zeros((len(ids), width), bool)
    for i, row in enumerate(ids):
        tokens[i, width - len(row) :] = row
        mask[i, width - len(row) :] = True
    return tokens, mask


def _inside_the_network(iv: Intervention) -> Intervention:
    """Without what acts on a row's tokens or on its weights."""
    outside = Preface | UseAdapter
    if not any(isinstance(effect, outside) for effect in iv.effects):
        return iv
    return iv.replace(effects=tuple(effect for effect in iv.effects if not isinstance(effect, outside)))


def row_keys(seed, row_ids, rows: int, copies: int = 1) -> jax.Array:
    """PRNG keys [B * copies], each a function of its row's seed and row id and of the copy's number only.

    A scalar seed: the row id is the row's index. A list of seeds: the row id is 0. `row_ids` overrides both, so
    `seed=[7, 7, 7]` gives all rows the same noise whatever their packs.
    """
    several = isinstance(seed, list | tuple | np.ndarray)
    seeds = per_row("seed", seed, rows, np.uint32)
    ids = np.zeros(rows, np.uint32) if several else np.arange(rows, dtype=np.uint32)
    if row_ids is not None:
        ids = per_row("row_ids", row_ids, rows, np.uint32)
    return _keys(np.repeat(seeds, copies), np.repeat(ids, copies), np.tile(np.arange(copies, dtype=np.uint32), rows))


@jax.jit
@jax.vmap
def _keys(seed, row_id, copy):
    key = jax.random.fold_in(jax.random.key(seed), row_id)
    # The first copy is the row itself, so asking for more copies doesn't change it.
    return jax.lax.select(copy > 0, jax.random.fold_in(key, copy), key)


def per_row(argument: str, value, rows: int, dtype, low=None, high=None) -> np.ndarray:
    """One value a row [B] from a scalar or a list of exactly B.

    Raises:
      ValueError: another length, not numbers of this kind, not finite, or outside [low, high].
    """
    values = list(value) if isinstance(value, list | tuple | np.ndarray) else [value] * rows
    if len(values) != rows:
        raise ValueError(f"{argument} has {len(values)} values, wanted one for all {rows} rows or one a row")
    whole = np.issubdtype(dtype, np.integer)
    if whole and dtype is not np.uint32:
        high = np.iinfo(dtype).max if high is None else high
    for v in values:
        number = isinstance(v, int | np.integer)
        number = number or (not whole and isinstance(v, float | np.floating) and np.isfinite(v))
        if isinstance(v, bool) or not number:
            raise ValueError(f"{argument}={v!r}, wanted {'an integer' if whole else 'a finite number'}")
        if (low is not None and v < low) or (high is not None and v > high):
            raise ValueError(
                f"{argument}={v!r}, wanted {low} to {high}"
                if high is not None
                else f"{argument}={v!r}, wanted at least {low}"
            )
    if whole:
        values = [int(v) % (1 << 32) if dtype is np.uint32 else v for v in values]
    return np.asarray(values, dtype)


def check_context(lm: LanguageModel, lengths: Sequence[int], extra: Sequence[int] | np.ndarray, what: str) -> None:
    """Raises ValueError, before any compute, where a prompt and what is added to it exceed the model's context."""
    limit = lm.config.max_positions
    for i, (length, more) in enumerate(zip(lengths, extra, strict=True)):
        if length + more > limit:
            raise ValueError(f"prompts[{i}]: {length} tokens + {more} {what} exceed the model's context of {limit}")


def rows_that_fit(lm: LanguageModel, slots: int) -> int:
    """How many rows of `slots` tokens a batch may have: cache, attention scores and logits in half of free memory."""
    cache = jax.eval_shape(lambda: lm.module.init_cache(1, slots, lm.dtype))
    stored = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    c = lm.config
    # float32: two copies of one layer's scores, a few of the residual stream, a few of the logits at one position.
    working = 4 * (2 * c.heads * slots**2 + 8 * slots * c.embed + 6 * c.vocab)
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        free = stats["bytes_limit"] - stats["bytes_in_use"]
    else:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return max(1, int(free // 2 // (stored + working)))


def chunks(
    lm: LanguageModel, interventions: Sequence[Intervention], slots: int, batch_size: int | None
) -> list[tuple[list[int], int]]:
    """Row indices of each batch, and how many of them count: the last is filled up with its first row.

    `batch_size` rows together; None = as many rows of `slots` tokens as fit in memory.
    """
    rows = len(interventions)
    if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"batch_size={batch_size!r}, wanted an integer >= 1")
    hidden = any(isinstance(effect, Contrast) for iv in interventions for effect in iv.effects)
    size = min(rows, batch_size or max(1, rows_that_fit(lm, slots) // (1 + hidden)))
    parts = [list(range(start, min(start + size, rows))) for start in range(0, rows, size)]
    return [(part + part[:1] * (size - len(part)), len(part)) for part in parts]


def notes(interventions: list[Intervention]) -> list[str]:
    """What the interventions of a batch have to say about extrapolated doses and clamped values, each once a row."""
    return [f"row {i}: {note}" for i, iv in enumerate(interventions) for note in iv.notes()]
