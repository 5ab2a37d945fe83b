"""`config.json` of the Llama and Qwen families, read and written by us.

Reading it ourselves keeps one meaning across transformers versions (`rope_theta` and `rope_scaling` became
`rope_parameters` in version 5) and lets us refuse what would silently change the numbers.
"""

import dataclasses
from typing import Any

from models.hf_config import ConfigError, family_of, integer, number, read_shared, refuse, write_shared
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
        kind = family_of(hf, FAMILIES)
        refuse(hf, _REQUIRED_VALUES)
        embed, heads = integer(hf, "hidden_size"), integer(hf, "num_attention_heads")
        default_head_dim = 128 if kind == "qwen3" else embed // heads
        bias = bool(hf.get("attention_bias", False))
        return cls(
            family=kind,
            vocab=integer(hf, "vocab_size"),
            embed=embed,
            layers=integer(hf, "num_hidden_layers"),
            heads=heads,
            kv_heads=hf.get("num_key_value_heads") or heads,
            head_dim=hf.get("head_dim") or default_head_dim,
            ffw=integer(hf, "intermediate_size"),
            max_positions=integer(hf, "max_position_embeddings"),
            norm_eps=number(hf, "rms_norm_eps", 1e-6),
            rope=Rope.from_hf(hf),
            tied=bool(hf.get("tie_word_embeddings", False)),
            qkv_bias=kind == "qwen2" or bias,
            out_bias=kind != "qwen2" and bias,
            qk_norm=kind == "qwen3",
            windows=_windows(hf, kind),
            **read_shared(hf),
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
            **write_shared(self),
            **self.rope.to_hf(),
        }
        if self.family != "qwen2":
            hf["attention_bias"] = self.qkv_bias
        if self.family == "llama":
            hf["mlp_bias"] = False
        if self.windows is not None:
            hf["use_sliding_window"] = True
            hf["sliding_window"] = max(self.windows)
            hf["layer_types"] = ["sliding_attention" if w else "full_attention" for w in self.windows]
        return hf


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
