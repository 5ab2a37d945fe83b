"""Model families as Flax Linen modules, and their Hugging Face checkpoints."""

from models.checkpoint import load, save
from models.config import LlamaConfig
from models.llama import Llama, ScannedLlama, stack_layers, unstack_layers
from models.minigpt import ConfidenceAwareGPT, MiniGPT
from models.minigpt_config import ConfidenceConfig, MiniGPTConfig

__all__ = [
    "ConfidenceAwareGPT",
    "ConfidenceConfig",
    "Llama",
    "LlamaConfig",
    "MiniGPT",
    "MiniGPTConfig",
    "ScannedLlama",
    "load",
    "save",
    "stack_layers",
    "unstack_layers",
]
