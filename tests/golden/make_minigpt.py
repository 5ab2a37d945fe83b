"""Makes tests/golden/minigpt: tiny random GPT-2s with logits and greedy tokens that transformers computes in float32.

    python tests/golden/make_minigpt.py

Needs torch, so the results are committed. Each row of tokens goes through transformers alone and unpadded.
"""

from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "minigpt"
LENGTHS = (40, 17, 1)
PROMPT, NEW = 5, 30  # of the first row so many tokens, and how many follow them
# GELU -> its name there, and a seed whose model writes more than one word over and over.
VARIANTS = {"exact": ("gelu", 3), "tanh": ("gelu_new", 29)}
SIZES = {
    "vocab_size": 61,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 48,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build(seed: int = 0, **fields):
    """A transformers model in float32 with random weights: large enough that attention is uneven and biases matter."""
    import torch
    import transformers

    config = transformers.GPT2Config(**SIZES | fields)
    torch.manual_seed(seed)
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            noise = torch.randn_like(weight)
            weight.copy_(1 + 0.3 * noise if "ln_" in path and path.endswith("weight") else 0.4 * noise)
    return model.eval()


def rows(seed: int = 0) -> list[np.ndarray]:
    """Token rows int32 [T], one of each length."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, SIZES["vocab_size"], length, np.int32) for length in LENGTHS]


def reference(model, row: np.ndarray) -> np.ndarray:
    """float32 logits [T, V] of one unpadded row."""
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(row.astype(np.int64))[None], use_cache=False).logits[0].numpy()


def greedy(model, prompt: np.ndarray, count: int) -> np.ndarray:
    """int32 [count]: what transformers' own `generate` writes after the prompt, past any end of sequence."""
    import torch

    start = torch.from_numpy(prompt.astype(np.int64))[None]
    model.generation_config.eos_token_id = None
    out = model.generate(start, attention_mask=torch.ones_like(start), do_sample=False, max_new_tokens=count)
    return out[0, len(prompt) :].numpy().astype(np.int32)


def main() -> None:
    for name, (activation, seed) in VARIANTS.items():
        model = build(seed, activation_function=activation)
        model.save_pretrained(GOLDEN / name)
        kept = {f"tokens_{i}": row for i, row in enumerate(rows())}
        kept |= {f"logits_{i}": reference(model, row) for i, row in enumerate(rows())}
        kept["greedy"] = greedy(model, rows()[0][:PROMPT], NEW)
        np.savez_compressed(GOLDEN / name / "reference.npz", **kept)
        print(name, sum(p.stat().st_size for p in (GOLDEN / name).iterdir()), "bytes")


if __name__ == "__main__":
    main()
