"""adapter_config.json of a LoRA adapter as PEFT writes it: what we honour, and what we refuse rather than ignore."""

import dataclasses
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from models.files import CheckpointError, read_json

# Fields that say nothing about the numbers of a trained adapter, whatever they hold.
_IRRELEVANT = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "fan_in_fan_out",  # how the base stores its kernels; lora_A and lora_B lie one way
    "init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config",  # the start; but see below
    "megatron_config", "megatron_core", "runtime_config", "qalora_group_size", "ensure_weight_tying",
}  # fmt: skip
# Ways to start that change the base, too, which is then not the one that was published.
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
_READ = {
    "peft_type", "r", "lora_alpha", "target_modules", "exclude_modules", "use_rslora", "lora_dropout", "bias",
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """Where a LoRA adapter acts and how it is scaled, in the names of the Hugging Face model."""

    r: int
    alpha: float
    target_modules: Sequence[str] | str  # ends of names, or one regular expression for whole names
    rslora: bool = False
    dropout: float = 0.0
    layers: Sequence[int] | None = None  # with ends of names: in these layers only
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)  # regular expression -> r
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    exclude_modules: Sequence[str] | str = ()

    def targets(self, name: str) -> bool:
        """Whether a linear layer gets an adapter, by PEFT's rules."""
        if self.exclude_modules and _matches(self.exclude_modules, name):
            return False
        if self.target_modules == "all-linear":
            return name != "lm_head"
        if not _matches(self.target_modules, name):
            return False
        listed = not isinstance(self.target_modules, str) and name not in self.target_modules
        return self.layers is None or not listed or layer_of(name.split(".")) in self.layers

    def rank(self, name: str) -> int:
        return _by_pattern(self.rank_pattern, name, self.r)

    def scale(self, name: str) -> float:
        r = self.rank(name)
        return _by_pattern(self.alpha_pattern, name, self.alpha) / (math.sqrt(r) if self.rslora else r)


def _matches(targets: Sequence[str] | str, name: str) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _by_pattern(patterns: Mapping[str, Any], name: str, default):
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def layer_of(path: Sequence[str]) -> int | None:
    """The layer that a path (`layers_3`, `attn`, `q` or `model`, `layers`, `3`, ...) lies in."""
    numbers = (re.fullmatch(r"(?:layers_)?(\d+)", part) for part in path)
    return next((int(match[1]) for match in numbers if match), None)


def select(
    chosen: Collection[tuple[str, ...]], known: Sequence[tuple[str, ...]]
) -> tuple[list[str] | list[tuple[str, ...]], tuple[int, ...] | None]:
    """How to say which of all known paths are chosen: by their last words, if need be in some layers, else one by one.

    Returns:
      The last words and the layers (None = all), or the chosen paths and None.
    """
    wanted = set(chosen)
    kinds = list(dict.fromkeys(path[-1] for path in known if path in wanted))
    alike = [path for path in known if path[-1] in kinds]
    if wanted == set(alike):
        return kinds, None
    layers = [layer_of(path) for path in wanted]
    inside = {layer for layer in layers if layer is not None}
    if None not in layers and wanted == {path for path in alike if layer_of(path) in inside}:
        return kinds, tuple(sorted(inside))
    return [path for path in known if path in wanted], None


def read_config(path: Path) -> PeftConfig:
    """Reads adapter_config.json.

    Raises:
      CheckpointError: it is missing or damaged, or a field would make another kind of adapter of it.
    """
    fields = read_json(path)

    def refuse(name, wanted):
        raise CheckpointError(f"{path}: {name}={fields.get(name)!r} is not supported, wanted {wanted}")

    if fields.get("peft_type") != "LORA":
        refuse("peft_type", "'LORA'")
    if fields.get("bias", "none") != "none":
        refuse("bias", "'none'")
    start = fields.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_BASE_CHANGING):
        refuse("init_lora_weights", "one that leaves the base as it was published")
    for name, value in fields.items():
        # Variants come as fields which are off by default: DoRA, aLoRA, saved embeddings, and whatever comes next.
        if name not in _IRRELEVANT | _READ and value:
            refuse(name, "no such field, or none of it")
    if fields.get("layers_pattern") not in (None, "", [], "layers", ["layers"], "h", ["h"]):
        refuse("layers_pattern", "None")

    def number(name, kind, legal, wanted, default=None):
        value = default if fields.get(name) is None else fields[name]
        if not isinstance(value, kind) or isinstance(value, bool) or not legal(value):
            raise CheckpointError(f"{path}: {name}={value!r}, wanted {wanted}")
        return value

    def names(name, default):
        value = fields.get(name) or default
        listed = isinstance(value, list) and all(isinstance(item, str) and item for item in value)
        if not isinstance(value, str) and not listed:
            raise CheckpointError(f"{path}: {name}={value!r}, wanted a list of names or one regular expression")
        return value

    def patterns(name, kind, wanted):
        value = fields.get(name) or {}
        if not isinstance(value, dict) or not all(isinstance(v, kind) and v for v in value.values()):
            raise CheckpointError(f"{path}: {name}={value!r}, wanted regular expressions and {wanted}")
        return value

    layers = fields.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    if layers is not None and not (isinstance(layers, list) and all(isinstance(i, int) for i in layers)):
        raise CheckpointError(f"{path}: layers_to_transform={layers!r}, wanted indices of layers")
    config = PeftConfig(
        r=number("r", int, lambda r: r >= 1, "an integer >= 1"),
        alpha=number("lora_alpha", int | float, lambda a: a and math.isfinite(a), "a finite number other than 0"),
        target_modules=names("target_modules", None),
        rslora=bool(fields.get("use_rslora")),
        dropout=number("lora_dropout", int | float, lambda p: 0 <= p < 1, "at least 0 and below 1", 0.0),
        layers=layers or None,
        rank_pattern=patterns("rank_pattern", int, "ranks"),
        alpha_pattern=patterns("alpha_pattern", int | float, "numbers other than 0"),
        exclude_modules=names("exclude_modules", []),
    )
    for pattern in (config.target_modules, config.exclude_modules, *config.rank_pattern, *config.alpha_pattern):
        if isinstance(pattern, str):
            try:
                re.compile(pattern)
            except re.error as error:
                raise CheckpointError(f"{path}: {pattern!r} is not a regular expression: {error}") from error
    return config


def write_config(config: PeftConfig, path: Path, base: str, packed: bool) -> None:
    """Writes what `read_config` reads back to an equal config, and PEFT to the same adapter.

    packed: whether the base's linear layers are of the kind (GPT-2's) that stores its kernels input axis first.
    """
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": list(config.target_modules),
        "layers_to_transform": None if config.layers is None else list(config.layers),
        "layers_pattern": None,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "use_rslora": config.rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": packed,
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
        "revision": None,
    }
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
