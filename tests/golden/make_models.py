"""Makes tests/golden/models: tiny random checkpoints with logits that transformers computes from them in float32.

    python tests/golden/make_models.py [--stories=<folder of stories260K in Hugging Face format>]

Needs torch, so the results are committed. Each row of tokens goes through transformers alone and unpadded: the
reference shall not depend on anybody's treatment of padding.
"""

import argparse
import json
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "models"
LENGTHS = (310, 200, 57, 1)
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
# Scalings start at 64 positions, so that the 310 of the longest row see them.
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 64
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "factor": 3.0}


def _llama(kv_heads, tied, rope=None, **more):
    return ("llama", {"num_key_value_heads": kv_heads, "tie_word_embeddings": tied, **_rope(rope, 10000.0), **more})


def _qwen(kind, kv_heads, tied, rope=None, **more):
    fields = {"num_key_value_heads": kv_heads, "tie_word_embeddings": tied, **_rope(rope, 1000000.0), **more}
    return (kind, fields)


def _rope(scaling, theta):
    return {"rope_parameters": {"rope_theta": theta, **(scaling or {"rope_type": "default"})}}


# The committed ones: every kind of RoPE, 1, 2 and 4 query heads a key head, tied and untied, and each family's own.
VARIANTS = {
    "llama-mha-untied": _llama(4, False),
    "llama-mha-tied-llama3": _llama(4, True, LLAMA3),
    "llama-gqa2-tied-linear": _llama(2, True, LINEAR),
    "llama-gqa2-untied-yarn": _llama(2, False, YARN),
    "llama-gqa4-untied-llama3": _llama(1, False, LLAMA3),
    "llama-gqa4-tied-bias": _llama(1, True, attention_bias=True),
    "qwen2-gqa2-tied": _qwen("qwen2", 2, True),
    "qwen2-gqa4-untied-sliding": _qwen(
        "qwen2", 1, False, use_sliding_window=True, sliding_window=40, max_window_layers=1
    ),
    "qwen3-gqa2-tied": _qwen("qwen3", 2, True, head_dim=16),
    "qwen3-gqa4-untied-yarn": _qwen("qwen3", 1, False, YARN, head_dim=8),
}

# RoPE of published checkpoints: (family, head size, theta, scaling).
_LLAMA31 = {**LLAMA3, "original_max_position_embeddings": 8192}
PUBLISHED_ROPE = {
    "llama-2": ("llama", 128, 10000.0, None),
    "llama-3.1": ("llama", 128, 500000.0, _LLAMA31),
    "llama-3.2": ("llama", 64, 500000.0, {**_LLAMA31, "factor": 32.0}),
    "qwen2.5": ("qwen2", 64, 1000000.0, None),
    "qwen3": ("qwen3", 128, 1000000.0, None),
    "qwen3-yarn": ("qwen3", 128, 1000000.0, {**YARN, "original_max_position_embeddings": 32768}),
    "smollm2": ("llama", 64, 100000.0, None),
}

# The live comparison adds these.
MORE_VARIANTS = {
    "llama-mha-tied": _llama(4, True),
    "llama-gqa2-tied": _llama(2, True),
    "llama-gqa2-untied": _llama(2, False),
    "llama-gqa4-tied": _llama(1, True),
    "llama-gqa4-untied": _llama(1, False),
    "llama-mha-untied-llama3": _llama(4, False, LLAMA3),
    "llama-gqa2-tied-llama3": _llama(2, True, LLAMA3),
    "llama-gqa2-untied-bias": _llama(2, False, attention_bias=True),
    "llama-gqa2-head-dim": _llama(2, False, head_dim=24),
    "llama-yarn-all-fields": _llama(2, True, {**YARN, "attention_factor": 0.8, "beta_fast": 16.0, "beta_slow": 2.0}),
    "qwen2-mha-untied": _qwen("qwen2", 4, False),
    "qwen2-gqa2-sliding-all": _qwen("qwen2", 2, True, use_sliding_window=True, sliding_window=8, max_window_layers=0),
    "qwen2-window-unused": _qwen("qwen2", 2, True, use_sliding_window=False, sliding_window=8, max_window_layers=0),
    "qwen3-mha-tied": _qwen("qwen3", 4, True, head_dim=16),
    "qwen3-gqa2-untied-bias": _qwen("qwen3", 2, False, head_dim=8, attention_bias=True),
    "qwen3-gqa2-sliding": _qwen(
        "qwen3", 2, False, head_dim=16, use_sliding_window=True, sliding_window=40, max_window_layers=1
    ),
}


def build(name: str):
    """A transformers model in float32 with random weights: large enough that attention is uneven and biases matter."""
    import torch
    import transformers

    kind, fields = (VARIANTS | MORE_VARIANTS)[name]
    config = transformers.AutoConfig.for_model(kind, **SIZES, **fields, dtype="float32")
    torch.manual_seed(sum(map(ord, name)))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if "norm" in path:
                weight.copy_(1 + 0.3 * torch.randn_like(weight))
            elif weight.ndim == 1:
                weight.copy_(0.5 * torch.randn_like(weight))
            else:
                gain = 1.4 if "q_proj" in path or "k_proj" in path else 1.0
                weight.copy_(gain * torch.randn_like(weight) / weight.shape[1] ** 0.5)
    return model.eval()


def published_frequencies(name: str) -> np.ndarray:
    """float32 [H/2], from the family's own rotary embedding."""
    import transformers
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding  # the same code in the three families

    family, head_dim, theta, scaling = PUBLISHED_ROPE[name]
    config = transformers.AutoConfig.for_model(
        family, hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim, max_position_embeddings=131072,
        **_rope(scaling, theta),
    )  # fmt: skip
    return LlamaRotaryEmbedding(config).inv_freq.numpy()


def rows(seed: int = 0) -> list[np.ndarray]:
    """Token rows int32 [T], one of each length."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, SIZES["vocab_size"], length, np.int32) for length in LENGTHS]


def reference(model, row: np.ndarray) -> np.ndarray:
    """float32 logits [T, V] of one unpadded row."""
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(row.astype(np.int64))[None], use_cache=False).logits[0].numpy()


def positions(length: int) -> np.ndarray:
    """Which positions of a row are kept: its ends, and some between."""
    return np.unique(np.linspace(0, length - 1, 9).astype(int))


def greedy(folder: Path, count: int) -> list[int]:
    """The `count` tokens which transformers' own `generate` writes after the beginning-of-sequence token."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None  # at the end of a story the model goes on, so that all tokens compare
    start = torch.tensor([[model.config.bos_token_id]])
    out = model.generate(start, attention_mask=torch.ones_like(start), do_sample=False, max_new_tokens=count)
    return out[0, 1:].tolist()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--stories", type=Path, help="also remake the greedy continuation of this checkpoint")
    arguments = parser.parse_args()
    for name in VARIANTS:
        model = build(name)
        model.save_pretrained(GOLDEN / name)
        rope = model.model.rotary_emb
        kept = {"frequencies": rope.inv_freq.numpy(), "rope_scale": rope.attention_scaling}
        for i, row in enumerate(rows()):
            kept[f"tokens_{i}"], kept[f"positions_{i}"] = row, positions(len(row))
            kept[f"logits_{i}"] = reference(model, row)[positions(len(row))]
        np.savez_compressed(GOLDEN / name / "reference.npz", **kept)
        print(name, sum(p.stat().st_size for p in (GOLDEN / name).iterdir()), "bytes")
    np.savez(GOLDEN / "rope.npz", **{name: published_frequencies(name) for name in PUBLISHED_ROPE})
    if arguments.stories:
        tokens = greedy(arguments.stories, 200)
        (GOLDEN / "stories260K_greedy.json").write_text(json.dumps(tokens) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
