"""Sizes of MiniGPT and ConfidenceAwareGPT, and their `config.json`: GPT-2's, for the latter with two fields more.

MiniGPT is GPT-2, so it is read and written as transformers does it; ConfidenceAwareGPT has no class there.
"""

import dataclasses
import math
from typing import Any, ClassVar, Self

from models.hf_config import family_of, integer, number, read_shared, refuse, write_shared

# By GPT-2's name of it, the first of a kind being what is written back.
_GELU = {"gelu": "exact", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}

# Fields which would change the computation if they held anything else.
_REQUIRED_VALUES = {
    "activation_function": tuple(_GELU),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "tie_word_embeddings": (True,),
    "pruned_heads": ({},),
    "quantization_config": (),
}


@dataclasses.dataclass(frozen=True)
class MiniGPTConfig:
    """Sizes of a MiniGPT. V D + P D + L (12 D^2 + 13 D) + 2 D parameters, P = max_positions.

    Raises:
      ValueError: a size below 1, heads that don't divide embed, a dropout outside [0, 1), or an unknown gelu.
    """

    architecture: ClassVar[str] = "GPT2LMHeadModel"
    family: ClassVar[str] = "gpt2"
    tied: ClassVar[bool] = True  # the output head is the embedding table

    vocab: int  # V
    embed: int  # D
    layers: int  # L
    heads: int  # N
    max_positions: int
    dropout: float = 0.0
    norm_eps: float = 1e-5
    gelu: str = "exact"  # or "tanh", the approximation that GPT-2 was trained with
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    dtype: str = "float32"  # what the checkpoint was written in

    def __post_init__(self):
        for name in ("vocab", "embed", "layers", "heads", "max_positions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.embed % self.heads:
            raise ValueError(f"heads must divide embed={self.embed}, got {self.heads}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.gelu not in _GELU.values():
            raise ValueError(f"gelu must be 'exact' or 'tanh', got {self.gelu!r}")

    @property
    def head_dim(self) -> int:
        return self.embed // self.heads

    @property
    def kv_heads(self) -> int:
        return self.heads

    @property
    def ffw(self) -> int:
        return 4 * self.embed

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> Self:
        """Reads a parsed `config.json` of this architecture.

        GPT-2 has three rates of dropout, which matter to training only; ours is that of what the sublayers add.

        Raises:
          ConfigError: a missing size, another architecture, or a field whose value would change the numbers.
          ValueError: sizes that don't go together.
        """
        family_of(hf, {cls.architecture: cls.family})
        embed = integer(hf, "n_embd")
        refuse(hf, _REQUIRED_VALUES | {"n_inner": (4 * embed,)})
        return cls(
            vocab=integer(hf, "vocab_size"),
            embed=embed,
            layers=integer(hf, "n_layer"),
            heads=integer(hf, "n_head"),
            max_positions=integer(hf, "n_positions"),
            dropout=number(hf, "resid_pdrop", 0.1),
            norm_eps=number(hf, "layer_norm_epsilon", 1e-5),
            gelu=_GELU[hf.get("activation_function") or "gelu_new"],
            **read_shared(hf),
        )

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` which `from_hf` reads back to an equal config, and, of a MiniGPT, transformers as well."""
        return {
            "architectures": [self.architecture],
            "model_type": self.family,
            "vocab_size": self.vocab,
            "n_embd": self.embed,
            "n_layer": self.layers,
            "n_head": self.heads,
            "n_positions": self.max_positions,
            "activation_function": next(name for name, kind in _GELU.items() if kind == self.gelu),
            "layer_norm_epsilon": self.norm_eps,
            "embd_pdrop": self.dropout,
            "attn_pdrop": self.dropout,
            "resid_pdrop": self.dropout,
            "tie_word_embeddings": True,
            **write_shared(self),
        }


@dataclasses.dataclass(frozen=True)
class ConfidenceConfig(MiniGPTConfig):
    """Sizes of a ConfidenceAwareGPT: 4 D more parameters a layer than MiniGPT, and D + 1 of the predictor.

    Attributes:
      confidence_init_bias: what the predictor says before it has learnt anything, in nats; None is ln V, the loss of a
        uniform guess, which is where training starts.
      feedback: how the signal of a whole row is found where none is given. None: exactly, position by position. A
        number: so many parallel (Jacobi) passes; the signals of the first `feedback` positions after the first are
        exact, and 0 is a model that is told nothing. One token behind a cache is told what the cache holds, so with a
        few passes what is generated differs from a pass over the whole row as far as these have not settled.
    """

    architecture: ClassVar[str] = "ConfidenceAwareGPT"
    family: ClassVar[str] = "confidence_aware_gpt"

    confidence_init_bias: float | None = 2.0
    feedback: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.feedback is not None and self.feedback < 0:
            raise ValueError(f"feedback must be None or 0 or more passes, got {self.feedback}")

    @property
    def initial_confidence(self) -> float:
        return math.log(self.vocab) if self.confidence_init_bias is None else self.confidence_init_bias

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> Self:
        """As `MiniGPTConfig.from_hf`; a null means None."""
        bias, feedback = hf.get("confidence_init_bias"), hf.get("feedback")
        return dataclasses.replace(
            super().from_hf(hf),
            confidence_init_bias=None if bias is None else number(hf, "confidence_init_bias"),
            feedback=None if feedback is None else integer(hf, "feedback", least=0),
        )

    def to_hf(self) -> dict[str, Any]:
        return super().to_hf() | {"confidence_init_bias": self.confidence_init_bias, "feedback": self.feedback}
