"""Rotary position embedding (Su et al. 2021) and the frequency scalings found in Llama and Qwen checkpoints."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

KINDS = ("default", "linear", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class Rope:
    """How position becomes angle. Only the fields of its `kind` matter."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    original_max_positions: int = 0  # llama3, yarn
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn: scales cos and sin; None = 0.1 ln(factor) + 1

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "Rope":
        """Accepts `rope_theta` + `rope_scaling` (transformers 4) and `rope_parameters` (transformers 5).

        Raises:
          ValueError: an unknown kind, a missing parameter, or one that is not understood.
        """
        fields = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
        kind = fields.pop("rope_type", None) or fields.pop("type", None) or "default"
        fields.pop("type", None)
        theta = fields.pop("rope_theta", None) or hf.get("rope_theta") or 10000.0
        if kind not in KINDS:
            raise ValueError(f"config.json: rope_type={kind!r} is not supported, wanted one of {KINDS}")
        if fields.pop("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError("config.json: partial_rotary_factor is not supported, wanted 1.0")
        names = {"original_max_position_embeddings": "original_max_positions"}
        needed = {
            "default": (),
            "linear": ("factor",),
            "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
            "yarn": ("factor", "original_max_position_embeddings"),
        }[kind]
        optional = {"yarn": ("beta_fast", "beta_slow", "attention_factor")}.get(kind, ())
        if kind == "yarn" and "original_max_position_embeddings" not in fields:
            fields["original_max_position_embeddings"] = hf.get("max_position_embeddings")
        missing = [name for name in needed if fields.get(name) is None]
        unknown = [name for name, value in fields.items() if name not in (*needed, *optional) and value is not None]
        if missing or (unknown and kind != "default"):
            raise ValueError(f"config.json: rope_type={kind!r} lacks {missing} and can't honour {unknown}")
        values = {names.get(n, n): fields[n] for n in (*needed, *optional) if fields.get(n) is not None}
        return cls(theta=float(theta), kind=kind, **values)

    def to_hf(self) -> dict[str, Any]:
        """Both spellings, so that transformers 4 and 5 read the same numbers."""
        scaling: dict[str, Any] = {"rope_type": self.kind}
        if self.kind != "default":
            scaling["factor"] = self.factor
        if self.kind in ("llama3", "yarn"):
            scaling["original_max_position_embeddings"] = self.original_max_positions
        if self.kind == "llama3":
            scaling |= {"low_freq_factor": self.low_freq_factor, "high_freq_factor": self.high_freq_factor}
        if self.kind == "yarn":
            scaling |= {"beta_fast": self.beta_fast, "beta_slow": self.beta_slow}
            if self.attention_factor is not None:
                scaling["attention_factor"] = self.attention_factor
        return {
            "rope_theta": self.theta,
            "rope_scaling": None if self.kind == "default" else scaling,
            "rope_parameters": {"rope_theta": self.theta, **scaling},
        }

    def frequencies(self, head_dim: int) -> tuple[np.ndarray, float]:
        """Angle per position [H/2] in radians, and the factor on cos and sin; in float32, as transformers does."""
        exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        # numpy's own float32 power is off by one unit in the last place at every sixth value, and differs between
        # machines. 300 positions make that visible; rounding the exact power gives torch's values.
        plain = np.float32(1) / (self.theta ** exponent.astype(np.float64)).astype(np.float32)
        if self.kind == "linear":
            return plain / np.float32(self.factor), 1.0
        if self.kind == "llama3":
            return self._llama3(plain), 1.0
        if self.kind == "yarn":
            return self._yarn(plain, head_dim)
        return plain, 1.0

    def _llama3(self, plain: np.ndarray) -> np.ndarray:
        """Long wavelengths are stretched by `factor`, short ones kept, those between interpolated (Llama 3.1)."""
        wavelength = 2 * math.pi / plain
        share = (self.original_max_positions / wavelength - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        share = np.clip(share, 0, 1)
        return ((1 - share) * plain / self.factor + share * plain).astype(np.float32)

    def _yarn(self, plain: np.ndarray, head_dim: int) -> tuple[np.ndarray, float]:
        """YaRN (Peng et al. 2023, eq. 14-22): a ramp over dimensions from kept to stretched frequencies."""

        def dimension(rotations: float) -> float:
            turns = math.log(self.original_max_positions / (rotations * 2 * math.pi))
            return head_dim * turns / (2 * math.log(self.theta))

        low = max(math.floor(dimension(self.beta_fast)), 0)
        high = min(math.ceil(dimension(self.beta_slow)), head_dim - 1)
        width = high - low or 0.001
        ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / width, 0, 1)
        frequencies = plain / np.float32(self.factor) * ramp + plain * (1 - ramp)
        attention = 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0
        return frequencies.astype(np.float32), self.attention_factor or attention


def rotate(x, positions, rope: Rope):
    """Turns the halves of each head by the angle of its position.

    Args:
      x: [B, T, N, H] queries or keys.
      positions: int32 [B, T].
    Returns:
      [B, T, N, H] in x's dtype; the arithmetic is float32.
    """
    frequencies, factor = rope.frequencies(x.shape[-1])
    angle = positions[..., None].astype(jnp.float32) * frequencies
    cos, sin = factor * jnp.cos(angle)[:, :, None], factor * jnp.sin(angle)[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
