"""The families of models: which config reads a `config.json`, and which module runs what it describes."""

from typing import Any

import flax.linen as nn

from models.config import FAMILIES, LlamaConfig
from models.hf_config import family_of
from models.llama import Llama
from models.minigpt import ConfidenceAwareGPT, MiniGPT
from models.minigpt_config import ConfidenceConfig, MiniGPTConfig

ModelConfig = LlamaConfig | MiniGPTConfig

_CONFIGS: dict[str, type[ModelConfig]] = {
    **dict.fromkeys(FAMILIES.values(), LlamaConfig),
    MiniGPTConfig.family: MiniGPTConfig,
    ConfidenceConfig.family: ConfidenceConfig,
}
_MODULES = {LlamaConfig: Llama, MiniGPTConfig: MiniGPT, ConfidenceConfig: ConfidenceAwareGPT}
_ARCHITECTURES = FAMILIES | {config.architecture: config.family for config in (MiniGPTConfig, ConfidenceConfig)}


def read_config(hf: dict[str, Any]) -> ModelConfig:
    """The config that a parsed `config.json` describes; raises ConfigError if none does so exactly."""
    return _CONFIGS[family_of(hf, _ARCHITECTURES)].from_hf(hf)


def build(config: ModelConfig) -> nn.Module:
    """The decoder of these sizes, its layers unrolled."""
    return _MODULES[type(config)](config)
