"""Model families as Flax Linen modules, and their Hugging Face checkpoints."""

from models.checkpoint import load, save
from models.config import LlamaConfig
from models.llama import Llama, ScannedLlama, stack_layers, unstack_layers

__all__ = ["Llama", "LlamaConfig", "ScannedLlama", "load", "save", "stack_layers", "unstack_layers"]
