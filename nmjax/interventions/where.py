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
LAYER_NAMES = ("all", "last", *THIRDS)
INDUCTION = "induction"  # a selection of heads by what they do
ON_EMPTY = ("error", "middle", "none")


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
    layers = checked_layers(layers)
    if layers in THIRDS:
        third = THIRDS.index(layers)
        mask[third * count // 3 : (third + 1) * count // 3] = True
    elif layers == "all":
        mask[:] = True
    elif layers == "last":
        mask[-1:] = True
    else:
        for layer in layers:
            mask[_index("layers", layer, count)] = True
    if not mask.any():
        raise ValueError(f"layers={layers!r} selects none of the {count} layers")
    return mask


def head_mask(heads: Any, count: int) -> np.ndarray:
    """bool [N] from head indices (negatives count from the end); None = all."""
    if heads is None:
        return np.ones(count, bool)
    mask = np.zeros(count, bool)
    for head in checked_heads(heads):
        mask[_index("heads", head, count)] = True
    return mask


def chosen_heads(lm, layers: Any, heads: Any, on_empty: str | None = None) -> np.ndarray:
    """float32 [L, N], 1 at the heads that `heads` selects in the layers that `layers` selects.

    Raises:
      ValueError: as `layer_mask` and `head_mask` do; no induction head in these layers where `on_empty="error"`.
    """
    L, N = lm.config.layers, lm.config.heads
    inside = layer_mask(layers, L)[:, None]
    if heads != INDUCTION:
        return (inside & head_mask(heads, N)).astype(np.float32)
    from nmjax.induction import induction_heads  # it runs the model, so it stands above this module

    chosen = inside & induction_heads(lm, on_empty="none")
    if not chosen.any() and on_empty == "error":
        raise ValueError(
            f"heads='induction': this model has no induction heads in layers={layers!r} (see python -m "
            "experiments.induction_heads); wanted other layers, head indices, or on_empty='middle' or 'none'"
        )
    if not chosen.any() and on_empty == "middle":
        chosen = inside & head_mask([(N - 1) // 2, N // 2], N)
    return chosen.astype(np.float32)


def checked_layers(layers: Any) -> Any:
    """A hashable copy of a selection of layers. Raises ValueError for what no number of layers would make legal."""
    if isinstance(layers, str):
        if layers not in LAYER_NAMES:
            raise ValueError(f"layers={layers!r}, wanted {', '.join(LAYER_NAMES)}, indices or fractions of depth")
        return layers
    return _checked_items("layers", layers, fractions=True)


def checked_heads(heads: Any, on_empty: str | None = None) -> Any:
    """A hashable copy of a selection of heads, None = all. Raises ValueError as `checked_layers` does.

    With `on_empty` (one of ON_EMPTY), "induction" is a selection, too.
    """
    if on_empty is not None and on_empty not in ON_EMPTY:
        raise ValueError(f"on_empty={on_empty!r}, wanted one of {ON_EMPTY}")
    if heads is None or (on_empty is not None and isinstance(heads, str) and heads == INDUCTION):
        return heads
    return _checked_items("heads", heads, fractions=False)


def _checked_items(name: str, selection: Any, fractions: bool) -> Any:
    items = tuple(_as_sequence(selection))
    for item in items:
        fraction = fractions and isinstance(item, float | np.floating) and 0 <= item <= 1
        if not _whole(item) and not fraction:
            wanted = "indices or fractions of depth, 0 to 1" if fractions else "indices"
            raise ValueError(f"{name}={selection!r}, wanted {wanted}")
    if not items:
        raise ValueError(f"{name}={selection!r} selects nothing, wanted at least one index")
    return items


def _as_sequence(value: Any) -> Sequence:
    return list(value) if isinstance(value, Iterable) else [value]


def _index(name: str, value: Any, count: int) -> int:
    if isinstance(value, float | np.floating):
        return min(int(value * count), count - 1)
    if not -count <= value < count:
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

    def mask(self, position, tokens, prompt_len, preface=None):
        """bool [B, T]: may the effect act on these tokens? A hidden preface belongs to `prompt="all"` and nothing else.

        Args:
          position: int32 [B, T].
          tokens: int32 [B, T].
          prompt_len: int32 [B], the preface included.
          preface: int32 [B, 2], its first position and its length; None: there is none.
        """
        end = prompt_len[:, None]
        written = position - end
        hidden, place = place_in_prompt(position, preface)
        visible_len = prompt_len if preface is None else prompt_len - preface[:, 1]

        def pick(prompt, generation):
            in_prompt = jnp.where(hidden, prompt.everything[:, None], prompt.hits(place, visible_len, tokens))
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


def place_in_prompt(position, preface=None):
    """bool [B, T]: is a token of the hidden preface? int32 [B, T]: its place in the prompt as its author wrote it.

    position: int32 [B, T]; preface: int32 [B, 2], its first position and its length; None: there is none.
    """
    if preface is None:
        return jnp.zeros(position.shape, bool), position
    start, length = preface[:, :1], preface[:, 1:]
    hidden = (position >= start) & (position < start + length)
    return hidden, jnp.where(position < start, position, position - length)


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
    chosen = Where(
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
    if _empty(chosen.prompt, chosen.no_prompt) and _empty(chosen.generation, chosen.no_generation):
        raise ValueError("where: the selection is empty: nothing of prompt or generation is included and not excluded")
    return chosen


def _empty(included: Selection, excluded: Selection) -> bool:
    """Whether nothing can be left whatever the text."""
    if any(start == 0 and stop == _END for start, stop in excluded.windows):
        return True
    if included.everything or len(included.windows):
        return False
    pairs = ((included.tokens, excluded.tokens), (included.positions, excluded.positions))
    return all(set(inside.tolist()) <= set(outside.tolist()) for inside, outside in pairs)


def _selection(name: str, everything: bool = False, positions=None, window=None, tokens=None) -> Selection:
    positions, tokens = _integers(f"{name}_positions", positions), _integers(f"{name}_tokens", tokens)
    windows = np.zeros((0, 2), np.int32)
    if window is not None:
        if not isinstance(window, list | tuple) or len(window) != 2 or not all(w is None or _whole(w) for w in window):
            raise ValueError(f"where: {name}_window={window!r}, wanted (start, stop), integers or None")
        start, stop = 0 if window[0] is None else window[0], _END if window[1] is None else window[1]
        if stop <= start and (start < 0) == (stop < 0):
            raise ValueError(f"where: {name}_window={window!r} is empty")
        windows = np.asarray([(start, stop)], np.int32)
    if name.endswith("generation") and ((positions < 0).any() or (windows < 0).any()):
        raise ValueError(f"where: {name} positions count from 0, their end is not known beforehand")
    if (tokens < 0).any():
        raise ValueError(f"where: {name}_tokens holds {tokens.min()}, wanted token ids")
    return Selection(np.asarray(everything), positions, windows, tokens)


def _integers(argument: str, value: Any) -> np.ndarray:
    """int32 [P] from None, an integer or several. Raises ValueError for an empty selection or other kinds."""
    if value is None:
        return np.zeros(0, np.int32)
    items = _as_sequence(value)
    if not items:
        raise ValueError(f"where: {argument} is empty")
    if not all(map(_whole, items)):
        raise ValueError(f"where: {argument}={value!r}, wanted an integer or a list of them")
    return np.asarray(items, np.int32)


def _whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and -_END < int(value) < _END


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
