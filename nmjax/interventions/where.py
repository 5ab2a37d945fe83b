"""Where an effect acts: which layers, which heads, which token positions.

Positions are a row's own (0 = its first real token), never chunk offsets, so a cache or padding can't move them.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

THIRDS = ("shallow", "mid", "deep")


def layer_mask(layers: Any, count: int) -> np.ndarray:
    """bool [L] from a selection of layers.

    Args:
      layers: "all", "last", "shallow" | "mid" | "deep" (thirds: [0, L//3), [L//3, 2L//3), [2L//3, L)), an index
        (negatives count from the end), a fraction of depth in [0, 1], or a sequence of indices and fractions.
      count: L.
    Raises:
      ValueError: an unknown name, an index out of range, or a selection that holds no layer.
    """
    mask = np.zeros(count, bool)
    if isinstance(layers, str):
        if layers in THIRDS:
            third = THIRDS.index(layers)
            mask[third * count // 3 : (third + 1) * count // 3] = True
        elif layers == "all":
            mask[:] = True
        elif layers == "last":
            mask[-1:] = True
        else:
            raise ValueError(f"layers={layers!r}, wanted all, last, shallow, mid, deep, indices or fractions of depth")
    else:
        for layer in _as_sequence(layers):
            mask[_index("layers", layer, count)] = True
    if not mask.any():
        raise ValueError(f"layers={layers!r} selects none of the {count} layers")
    return mask


def head_mask(heads: Any, count: int) -> np.ndarray:
    """bool [N] from head indices (negatives count from the end); None = all."""
    if heads is None:
        return np.ones(count, bool)
    mask = np.zeros(count, bool)
    for head in _as_sequence(heads):
        if isinstance(head, float | np.floating):
            raise ValueError(f"heads={heads!r}, wanted indices")
        mask[_index("heads", head, count)] = True
    if not mask.any():
        raise ValueError(f"heads={heads!r} selects none of the {count} heads")
    return mask


def hashable(selection: Any) -> Any:
    """A copy of a selection that can be a static field."""
    return tuple(selection) if isinstance(selection, list | range | set | np.ndarray) else selection


def _as_sequence(value: Any) -> Sequence:
    return list(value) if isinstance(value, Iterable) else [value]


def _index(name: str, value: Any, count: int) -> int:
    if isinstance(value, float | np.floating):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: fraction of depth {value!r}, wanted 0 to 1")
        return min(int(value * count), count - 1)
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not -count <= value < count:
        raise ValueError(f"{name}: {value!r}, wanted an index from {-count} to {count - 1}")
    return int(value) % count


_NO_POSITION = np.iinfo(np.int32).min  # pads `positions`; no row ever gets there
_END = np.iinfo(np.int32).max  # an open window end


class Selection(flax.struct.PyTreeNode):
    """Tokens of one region (the prompt, or what was generated). Row-less: P positions, W windows, K token ids."""

    everything: Any  # bool []
    positions: Any  # int32 [P]; negatives count from the region's end
    windows: Any  # int32 [W, 2], half open
    tokens: Any  # int32 [K]; -1 pads

    def hits(self, place, length, tokens):
        """bool [B, T]: is the token at `place` [B, T] of a region of `length` [B] selected? Fields have a row axis."""

        def from_end(values):  # [B, P] -> [B, 1, P]
            negative = (values < 0) & (values != _NO_POSITION)
            return jnp.where(negative, values + length[:, None], values)[:, None]

        at = (place[..., None] == from_end(self.positions)).any(-1)
        start, stop = from_end(self.windows[..., 0]), from_end(self.windows[..., 1])
        inside = ((place[..., None] >= start) & (place[..., None] < stop)).any(-1)
        named = (tokens[..., None] == self.tokens[:, None]).any(-1)
        return self.everything[:, None] | at | inside | named


class Where(flax.struct.PyTreeNode):
    """Includes unite, excludes subtract."""

    prompt: Selection
    generation: Selection
    no_prompt: Selection
    no_generation: Selection

    def mask(self, position, tokens, prompt_len):
        """bool [B, T]: may the effect act on these tokens?"""
        end = prompt_len[:, None]
        written = position - end

        def pick(prompt, generation):
            in_prompt = prompt.hits(position, prompt_len, tokens)
            return jnp.where(position < end, in_prompt, generation.hits(written, jnp.zeros_like(prompt_len), tokens))

        return pick(self.prompt, self.generation) & ~pick(self.no_prompt, self.no_generation)

    def check(self, prompt_len: int, argument: str) -> None:
        """Raises ValueError where a position or window of the prompt lies outside a prompt of this length."""
        for place in np.asarray(self.prompt.positions):
            if not -prompt_len <= place < prompt_len:
                raise ValueError(f"{argument}: prompt_positions holds {place}, but the prompt has {prompt_len} tokens")
        for start, stop in np.asarray(self.prompt.windows):
            start, stop = (p + prompt_len if p < 0 else p for p in (int(start), int(stop)))
            if start >= prompt_len or stop <= max(start, 0):
                raise ValueError(
                    f"{argument}: prompt_window ({start}, {stop}) holds none of the prompt's {prompt_len} tokens"
                )


def everywhere() -> Where:
    """A `Where` that selects every token."""
    every, nothing = _selection("", everything=True), _selection("")
    return Where(every, every, nothing, nothing)


def where(
    *,
    prompt: str | None = None,
    generation: str | None = None,
    prompt_positions=None,
    prompt_window=None,
    prompt_tokens=None,
    generation_positions=None,
    generation_window=None,
    generation_tokens=None,
    exclude_prompt_positions=None,
    exclude_prompt_window=None,
    exclude_prompt_tokens=None,
    exclude_generation_positions=None,
    exclude_generation_window=None,
    exclude_generation_tokens=None,
) -> Where:
    """Selects token positions: the union of what is included, less what is excluded.

    Args:
      prompt, generation: "all" or "none". Both default to "all" if nothing is included by position, window or token,
        and to "none" otherwise.
      *_positions: indices into the prompt (negatives count from its end) or into the generated tokens (from 0).
      *_window: (start, stop), half open; None leaves an end open.
      *_tokens: token ids.
    Raises:
      ValueError: a selection that can hold nothing, or a negative generated position.
    """
    included = (
        prompt_positions,
        prompt_window,
        prompt_tokens,
        generation_positions,
        generation_window,
        generation_tokens,
    )
    default = "all" if all(value is None for value in included) else "none"
    if prompt is None and generation is None:
        prompt = generation = default
    region = {"prompt": prompt or "none", "generation": generation or "none"}
    for name, value in region.items():
        if value not in ("all", "none"):
            raise ValueError(f"where: {name}={value!r}, wanted 'all' or 'none'")
    if set(region.values()) == {"none"} and default == "all":
        raise ValueError("where: the selection is empty: prompt and generation are 'none' and nothing else is included")
    return Where(
        _selection("prompt", region["prompt"] == "all", prompt_positions, prompt_window, prompt_tokens),
        _selection(
            "generation", region["generation"] == "all", generation_positions, generation_window, generation_tokens
        ),
        _selection("exclude_prompt", False, exclude_prompt_positions, exclude_prompt_window, exclude_prompt_tokens),
        _selection(
            "exclude_generation",
            False,
            exclude_generation_positions,
            exclude_generation_window,
            exclude_generation_tokens,
        ),
    )


def _selection(name: str, everything: bool = False, positions=None, window=None, tokens=None) -> Selection:
    for kind, value in (("positions", positions), ("tokens", tokens)):
        if value is not None and len(_as_sequence(value)) == 0:
            raise ValueError(f"where: {name}_{kind} is empty")
    positions = np.asarray(_as_sequence(positions) if positions is not None else [], np.int32)
    windows = np.zeros((0, 2), np.int32)
    if window is not None:
        if len(window) != 2:
            raise ValueError(f"where: {name}_window={window!r}, wanted (start, stop)")
        start, stop = 0 if window[0] is None else window[0], _END if window[1] is None else window[1]
        if stop <= start and (start < 0) == (stop < 0):
            raise ValueError(f"where: {name}_window={window!r} is empty")
        windows = np.asarray([(start, stop)], np.int32)
    if name.endswith("generation") and ((positions < 0).any() or (windows < 0).any()):
        raise ValueError(f"where: {name} positions count from 0, their end is not known beforehand")
    tokens = np.asarray(_as_sequence(tokens) if tokens is not None else [], np.int32)
    return Selection(np.asarray(everything), positions, windows, tokens)


def stack_where(rows: Sequence[Where | None]) -> Where | None:
    """One `Where` with a row axis; None (everywhere) only if all rows are None."""
    if all(row is None for row in rows):
        return None
    rows = [everywhere() if row is None else row for row in rows]

    def stack(*leaves):
        size = max(leaf.shape[0] for leaf in leaves) if leaves[0].ndim else 0

        def padded(leaf):
            # Pads select nothing: a position nobody is at, an empty window, no token.
            filler = 0 if leaf.ndim == 2 else _NO_POSITION
            return np.pad(leaf, [(0, size - len(leaf))] + [(0, 0)] * (leaf.ndim - 1), constant_values=filler)

        return np.stack([padded(leaf) if leaf.ndim else leaf for leaf in leaves])

    return jax.tree.map(stack, *rows)
