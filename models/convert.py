"""Hugging Face tensors <-> our parameters: one table a family, read in both directions.

A row says what a tensor is called on either side and how its axes correspond. In a layout such as `NH D -> D N H` each
word is one axis and each letter a size of the model: N heads, K key/value heads, H head size, D embed, F ffw,
V vocabulary, P positions; a digit is a size of its own. `NH` is N times H flattened, heads outermost. Shapes on both
sides follow from the layout, so a checkpoint is checked before any of it is read.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from models.families import ModelConfig
from models.files import CheckpointError, Stored


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor, or with `{i}` in its names one tensor a layer.

    With `q|k|v` in our path it holds several of our parameters: one each, in this order, along our first axis.
    """

    hf: str
    ours: str  # path in the parameter tree
    layout: str  # "axes there -> axes here"
    needs: str = ""  # the config field that must be true (or, after `!`, false) for the tensor to exist


_BLOCK, _ATTN = "model.layers.{i}.", "model.layers.{i}.self_attn."

DECODER = (
    Row("model.embed_tokens.weight", "embed/embedding", "V D -> V D"),
    Row(_BLOCK + "input_layernorm.weight", "layers_{i}/attn_norm/scale", "D -> D"),
    Row(_ATTN + "q_proj.weight", "layers_{i}/attn/q/kernel", "NH D -> D N H"),
    Row(_ATTN + "q_proj.bias", "layers_{i}/attn/q/bias", "NH -> N H", "qkv_bias"),
    Row(_ATTN + "k_proj.weight", "layers_{i}/attn/k/kernel", "KH D -> D K H"),
    Row(_ATTN + "k_proj.bias", "layers_{i}/attn/k/bias", "KH -> K H", "qkv_bias"),
    Row(_ATTN + "v_proj.weight", "layers_{i}/attn/v/kernel", "KH D -> D K H"),
    Row(_ATTN + "v_proj.bias", "layers_{i}/attn/v/bias", "KH -> K H", "qkv_bias"),
    Row(_ATTN + "q_norm.weight", "layers_{i}/attn/q_norm/scale", "H -> H", "qk_norm"),
    Row(_ATTN + "k_norm.weight", "layers_{i}/attn/k_norm/scale", "H -> H", "qk_norm"),
    Row(_ATTN + "o_proj.weight", "layers_{i}/attn/o/kernel", "D NH -> N H D"),
    Row(_ATTN + "o_proj.bias", "layers_{i}/attn/o/bias", "D -> D", "out_bias"),
    Row(_BLOCK + "post_attention_layernorm.weight", "layers_{i}/mlp_norm/scale", "D -> D"),
    Row(_BLOCK + "mlp.gate_proj.weight", "layers_{i}/mlp/gate/kernel", "F D -> D F"),
    Row(_BLOCK + "mlp.up_proj.weight", "layers_{i}/mlp/up/kernel", "F D -> D F"),
    Row(_BLOCK + "mlp.down_proj.weight", "layers_{i}/mlp/down/kernel", "D F -> F D"),
    Row("model.norm.weight", "final_norm/scale", "D -> D"),
    Row("lm_head.weight", "lm_head/kernel", "V D -> D V", "!tied"),
)

_GPT_BLOCK, _GPT_ATTN, _GPT_MLP = "transformer.h.{i}.", "transformer.h.{i}.attn.", "transformer.h.{i}.mlp."

_GPT = (
    Row("transformer.wte.weight", "embed/embedding", "V D -> V D"),
    Row("transformer.wpe.weight", "positions/embedding", "P D -> P D"),
    Row(_GPT_ATTN + "c_attn.weight", "layers_{i}/attn/q|k|v/kernel", "D 3NH -> 3 D N H"),
    Row(_GPT_ATTN + "c_attn.bias", "layers_{i}/attn/q|k|v/bias", "3NH -> 3 N H"),
    Row(_GPT_ATTN + "c_proj.weight", "layers_{i}/attn/o/kernel", "NH D -> N H D"),
    Row(_GPT_ATTN + "c_proj.bias", "layers_{i}/attn/o/bias", "D -> D"),
    Row(_GPT_MLP + "c_fc.weight", "layers_{i}/mlp/up/kernel", "D F -> D F"),
    Row(_GPT_MLP + "c_fc.bias", "layers_{i}/mlp/up/bias", "F -> F"),
    Row(_GPT_MLP + "c_proj.weight", "layers_{i}/mlp/down/kernel", "F D -> F D"),
    Row(_GPT_MLP + "c_proj.bias", "layers_{i}/mlp/down/bias", "D -> D"),
    Row("transformer.ln_f.weight", "final_norm/scale", "D -> D"),
    Row("transformer.ln_f.bias", "final_norm/bias", "D -> D"),
)

GPT2 = (
    *_GPT,
    Row(_GPT_BLOCK + "ln_1.weight", "layers_{i}/attn_norm/scale", "D -> D"),
    Row(_GPT_BLOCK + "ln_1.bias", "layers_{i}/attn_norm/bias", "D -> D"),
    Row(_GPT_BLOCK + "ln_2.weight", "layers_{i}/mlp_norm/scale", "D -> D"),
    Row(_GPT_BLOCK + "ln_2.bias", "layers_{i}/mlp_norm/bias", "D -> D"),
)

# What is not in GPT-2 is written as torch's Linear has it, output axis first; `2D` is the scale and then the shift.
CONFIDENCE_AWARE_GPT = (
    *_GPT,
    Row(_GPT_BLOCK + "adaptive_1.weight", "layers_{i}/attn_norm/kernel", "2D 1 -> 1 2 D"),
    Row(_GPT_BLOCK + "adaptive_1.bias", "layers_{i}/attn_norm/bias", "2D -> 2 D"),
    Row(_GPT_BLOCK + "adaptive_2.weight", "layers_{i}/mlp_norm/kernel", "2D 1 -> 1 2 D"),
    Row(_GPT_BLOCK + "adaptive_2.bias", "layers_{i}/mlp_norm/bias", "2D -> 2 D"),
    Row("confidence_predictor.weight", "confidence_predictor/kernel", "1 D -> D 1"),
    Row("confidence_predictor.bias", "confidence_predictor/bias", "1 -> 1"),
)

# Llama and the two Qwens differ in config fields only, which `needs` reads.
TABLES = {
    "llama": DECODER,
    "qwen2": DECODER,
    "qwen3": DECODER,
    "gpt2": GPT2,
    "confidence_aware_gpt": CONFIDENCE_AWARE_GPT,
}

# What a tied checkpoint may hold in spite of being tied: a copy of the embedding, compared when it is loaded.
TIED_HEAD = "lm_head.weight"

# Buffers which old checkpoints carry and which follow from the config: RoPE's frequencies, GPT-2's causal mask.
IGNORED = re.compile(
    r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq|transformer\.h\.\d+\.attn\.(masked_)?bias"
)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A row made concrete for one model and layer."""

    hf: str
    ours: tuple[tuple[str, ...], ...]  # keys into the parameter tree, of each parameter that it holds
    layer: int | None
    hf_shape: tuple[int, ...]
    shape: tuple[int, ...]  # of each parameter
    _split: tuple[int, ...]  # the shape there with flattened axes taken apart
    _order: tuple[int, ...]  # the axes of `_split`, in our order

    def from_hf(self, array: np.ndarray) -> list[np.ndarray]:
        """A view of `hf_shape` -> a view of `shape` for each of `ours`."""
        array = array.reshape(self._split).transpose(self._order)
        return list(array) if len(self.ours) > 1 else [array]

    def to_hf(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """An array of `shape` for each of `ours` -> an array of `hf_shape`, in bits what `from_hf` was given."""
        array = np.stack(arrays) if len(self.ours) > 1 else arrays[0]
        return array.transpose(np.argsort(self._order)).reshape(self.hf_shape)


def tensors(config: ModelConfig) -> Iterator[Tensor]:
    """Every tensor of a checkpoint of this model: the embedding, what each layer has, the rest."""
    sizes = {
        "N": config.heads,
        "K": config.kv_heads,
        "H": config.head_dim,
        "D": config.embed,
        "F": config.ffw,
        "V": config.vocab,
        "P": config.max_positions,
        **{digit: int(digit) for digit in "123"},
    }
    rows = [r for r in TABLES[config.family] if _exists(r, config)]
    once = [r for r in rows if "{i}" not in r.hf]
    yield from (_tensor(r, None, sizes) for r in once[:1])
    yield from (_tensor(r, i, sizes) for i in range(config.layers) for r in rows if "{i}" in r.hf)
    yield from (_tensor(r, None, sizes) for r in once[1:])


def _exists(row: Row, config: ModelConfig) -> bool:
    return not row.needs or bool(getattr(config, row.needs.lstrip("!"))) != row.needs.startswith("!")


def _tensor(row: Row, layer: int | None, sizes: Mapping[str, int]) -> Tensor:
    there, here = (side.split() for side in row.layout.split(" -> "))
    letters = "".join(there)
    ours = tuple(itertools.product(*(key.split("|") for key in row.ours.format(i=layer).split("/"))))
    return Tensor(
        hf=row.hf.format(i=layer),
        ours=ours,
        layer=layer,
        hf_shape=tuple(math.prod(sizes[letter] for letter in axis) for axis in there),
        shape=tuple(sizes[axis] for axis in (here[1:] if len(ours) > 1 else here)),
        _split=tuple(sizes[letter] for letter in letters),
        _order=tuple(letters.index(axis) for axis in here),
    )


def full_names(config: ModelConfig, stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """What a checkpoint holds, by the names of the table.

    A decoder that was saved without its head lacks the first word of its names: `wte.weight` of GPT-2 as published is
    `transformer.wte.weight`.
    """
    word, embedding = TABLES[config.family][0].hf.split(".", 1)
    if f"{word}.{embedding}" in stored or embedding not in stored:
        return dict(stored)
    whole = {TIED_HEAD} | {t.hf for t in tensors(config)}
    return {name if name in whole else f"{word}.{name}": tensor for name, tensor in stored.items()}


def check(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], where: str) -> list[Tensor]:
    """The tensors of this model, after comparing them with what a checkpoint holds.

    Args:
      config: the model.
      shapes: name -> shape of every tensor in the checkpoint.
      where: the checkpoint, for the message.
    Raises:
      CheckpointError: one message with all tensors that are missing, unknown, or of the wrong shape.
    """
    wanted = {t.hf: t for t in tensors(config)}
    missing = [name for name in wanted if name not in shapes]
    unknown = [name for name in sorted(shapes) if name not in wanted and not IGNORED.fullmatch(name)]
    if config.tied and TIED_HEAD in unknown:
        unknown.remove(TIED_HEAD)
    wrong = [
        f"{name} has shape {tuple(shapes[name])}, wanted {t.hf_shape}"
        for name, t in wanted.items()
        if name in shapes and tuple(shapes[name]) != t.hf_shape
    ]
    problems = [f"missing: {', '.join(missing)}"] * bool(missing)
    problems += [f"unknown: {', '.join(unknown)}"] * bool(unknown)
    problems += [f"wrong shape: {'; '.join(wrong)}"] * bool(wrong)
    if problems:
        raise CheckpointError(f"{where}: its tensors are not those of its config.json; {'; '.join(problems)}")
    return list(wanted.values())
