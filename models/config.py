"""`config.json` of the Llama and Qwen families, read and written by us.

Reading it ourselves keeps one meaning across transformers versions (`rope_theta` and `rope_scaling` became
`rope_parameters` in version 5) and lets us refuse what would silently change the numbers.
"""

import dataclasses
from typing import Any

from models.rope import Rope

FAMILIES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}

# Fields which would change the computation if they held anything else.
_REQUIRED_VALUES = {
    "hidden_act": ("silu", "swish"),
    "mlp_bias": (False,),
    "rope_interleaved": (False,),
    "pretraining_tp": (1,),
    "partial_rotary_factor": (1.0,),
    "residual_multiplier": (1.0,),
    "embedding_multiplier": (1.0,),
    "logits_scaling": (1.0,),
    "attention_multiplier": (),
    "final_logit_softcapping": (),
    "attn_logit_softcapping": (),
    "quantization_config": (),
    "no_rope_layers": (),
    "num_local_experts": (),
    "num_experts": (),
}


class ConfigError(ValueError):
    """A `config.json` that this code can't honour exactly; the message names the field."""


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """One decoder-only transformer. Sizes carry the axis letters used everywhere else."""

    family: str  # "llama", "qwen2" or "qwen3": the architecture name written back to config.json
    vocab: int  # V
    embed: int  # D
    layers: int  # L
    heads: int  # N
    kv_heads: int  # K
    head_dim: int  # H
    ffw: int  # F
    max_positions: int
    norm_eps: float
    rope: Rope
    tied: bool = False  # the output head is the embedding table
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False  # RMS norm of every query and key head before RoPE
    windows: tuple[int, ...] | None = None  # one per layer, 0 = full attention; None = full everywhere
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    dtype: str = "float32"  # what the checkpoint was written in

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ConfigError(
                f"num_attention_heads={self.heads} must be a multiple of num_key_value_heads={self.kv_heads}"
            )

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "LlamaConfig":
        """Reads a parsed `config.json`; both RoPE spellings, both dtype spellings.

        Raises:
          ConfigError: a missing size, an unknown architecture, or a field whose value would change the numbers.
        """
        family = _family(hf)
        for name, allowed in _REQUIRED_VALUES.items():
            value = hf.get(name)
            if value is not None and value not in allowed:
                wanted = " or ".join(map(repr, allowed)) if allowed else "no such field"
                raise ConfigError(f"config.json: {name}={value!r} is not supported, wanted {wanted}")

        def size(name: str) -> int:
            value = hf.get(name)
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
                raise ConfigError(f"config.json: {name}={value!r}, wanted a positive integer")
            return value

        embed, heads = size("hidden_size"), size("num_attention_heads")
        default_head_dim = 128 if family == "qwen3" else embed // heads
        eos = hf.get("eos_token_id")
        bias = bool(hf.get("attention_bias", False))
        return cls(
            family=family,
            vocab=size("vocab_size"),
            embed=embed,
            layers=size("num_hidden_layers"),
            heads=heads,
            kv_heads=hf.get("num_key_value_heads") or heads,
            head_dim=hf.get("head_dim") or default_head_dim,
            ffw=size("intermediate_size"),
            max_positions=size("max_position_embeddings"),
            norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
            rope=Rope.from_hf(hf),
            tied=bool(hf.get("tie_word_embeddings", False)),
            qkv_bias=family == "qwen2" or bias,
            out_bias=family != "qwen2" and bias,
            qk_norm=family == "qwen3",
            windows=_windows(hf, family),
            bos_id=hf.get("bos_token_id"),
            eos_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
            pad_id=hf.get("pad_token_id"),
            dtype=str(hf.get("dtype") or hf.get("torch_dtype") or "float32").removeprefix("torch."),
        )

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` which `from_hf` reads back to an equal config, and which transformers 4 and 5 both read."""
        architecture = next(name for name, family in FAMILIES.items() if family == self.family)
        hf: dict[str, Any] = {
            "architectures": [architecture],
            "model_type": self.family,
            "vocab_size": self.vocab,
            "hidden_size": self.embed,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.ffw,
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": self.norm_eps,
            "hidden_act": "silu",
            "tie_word_embeddings": self.tied,
            "attention_dropout": 0.0,
            "bos_token_id": self.bos_id,
            "eos_token_id": list(self.eos_ids) if len(self.eos_ids) > 1 else next(iter(self.eos_ids), None),
            "torch_dtype": self.dtype,
            **self.rope.to_hf(),
        }
        if self.pad_id is not None:
            hf["pad_token_id"] = self.pad_id
        if self.family != "qwen2":
            hf["attention_bias"] = self.qkv_bias
        if self.family == "llama":
            hf["mlp_bias"] = False
        if self.windows is not None:
            hf["use_sliding_window"] = True
            hf["sliding_window"] = max(self.windows)
            hf["layer_types"] = ["sliding_attention" if w else "full_attention" for w in self.windows]
        return hf


def _family(hf: dict[str, Any]) -> str:
    architecture = (hf.get("architectures") or [None])[0]
    family = FAMILIES.get(architecture) if architecture else hf.get("model_type")
    if family is None or family not in FAMILIES.values():
        raise ConfigError(
            f"config.json: architecture {architecture or hf.get('model_type')!r} is unknown, "
            f"wanted one of {sorted(FAMILIES)}"
        )
    return family


def _windows(hf: dict[str, Any], family: str) -> tuple[int, ...] | None:
    """Sliding windows by layer: explicit `layer_types`, or Qwen's rule (full below `max_window_layers`)."""
    window = hf.get("sliding_window", 4096)
    # Llama has no windows; Qwen carries a `sliding_window` which means nothing unless `use_sliding_window` is set.
    if family == "llama" or not hf.get("use_sliding_window", False) or window is None:
        return None
    layers = hf["num_hidden_layers"]
    kinds = hf.get("layer_types")
    if kinds is None:
        first = hf.get("max_window_layers", 28)
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    unknown = set(kinds) - {"sliding_attention", "full_attention"}
    if unknown or len(kinds) != layers:
        raise ConfigError(
            f"config.json: layer_types={kinds!r}, wanted {layers} of 'full_attention' or 'sliding_attention'"
        )
    windows = tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    return windows if any(windows) else None
