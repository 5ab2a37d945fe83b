"""Model families as Flax Linen modules, and their Hugging Face checkpoints."""

from models.adapter_card import AdapterCard, Result
from models.checkpoint import load, save
from models.config import LlamaConfig
from models.llama import Llama, ScannedLlama, stack_layers, unstack_layers
from models.minigpt import ConfidenceAwareGPT, MiniGPT
from models.minigpt_config import ConfidenceConfig, MiniGPTConfig
from models.peft import load_adapter, read_adapter, save_adapter

__all__ = [
    "AdapterCard",
    "ConfidenceAwareGPT",
    "ConfidenceConfig",
    "Llama",
    "LlamaConfig",
    "MiniGPT",
    "MiniGPTConfig",
    "Result",
    "ScannedLlama",
    "load",
    "load_adapter",
    "read_adapter",
    "save",
    "save_adapter",
    "stack_layers",
    "unstack_layers",
]
