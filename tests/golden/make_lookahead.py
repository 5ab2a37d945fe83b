"""Makes tests/golden/lookahead.npz: a tiny MiniGPT and ConfidenceAwareGPT, and what plain PyTorch computes of them.

    PYTHONPATH=. python tests/golden/make_lookahead.py

The reference appends a token and runs the row again, without a cache; it computes in float64. The parameters are large
and every one is random, so that each term of the model matters; those which the two models share are equal.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from experiments import torch_minigpt
from models.minigpt_config import ConfidenceConfig, MiniGPTConfig

GOLDEN = Path(__file__).parent / "lookahead.npz"
B, L, M = 3, 9, 2
ALPHA = 0.7
SIZES = MiniGPTConfig(vocab=29, embed=12, layers=2, heads=2, max_positions=L + 1)
CONFIDENCE = ConfidenceConfig(**dataclasses.asdict(SIZES))


def leaves(tree: dict, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """("/layers_0/attn/q/kernel", leaf) of every leaf, names in order as JAX flattens a tree."""
    for name, value in sorted(tree.items()):
        if isinstance(value, dict):
            yield from leaves(value, f"{path}/{name}")
        else:
            yield f"{path}/{name}", value


def vector(tree: dict) -> torch.Tensor:
    return torch.cat([leaf.flatten() for _, leaf in leaves(tree)])


def randomise(model: torch_minigpt.MiniGPT, rng: np.random.Generator) -> None:
    for path, leaf in leaves(torch_minigpt.as_tree(model)):
        if path.endswith(("bias", "norm/kernel")):  # of an adaptive norm, the kernel meets signals of about 2
            values = 0.3 * rng.normal(size=leaf.shape)
        elif path.endswith("scale"):
            values = 1 + 0.3 * rng.normal(size=leaf.shape)
        elif path.endswith("embedding"):
            values = 0.5 * rng.normal(size=leaf.shape)
        else:
            inputs = np.prod(leaf.shape[:-1]) if path.endswith("o/kernel") else leaf.shape[0]
            values = 1.4 * rng.normal(size=leaf.shape) / inputs**0.5
        leaf.copy_(torch.from_numpy(values.astype(np.float32)))  # float32 numbers, whatever the model's dtype


def share(model: torch_minigpt.MiniGPT, other: torch_minigpt.MiniGPT) -> None:
    """Gives `other` the parameters of `model` which both have."""
    mine = dict(leaves(torch_minigpt.as_tree(model)))
    for path, leaf in leaves(torch_minigpt.as_tree(other)):
        if path in mine and mine[path].shape == leaf.shape:
            leaf.copy_(mine[path])


def gradient(model: torch_minigpt.MiniGPT, loss: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return vector(torch_minigpt.as_tree(model, lambda parameter: parameter.grad))


def make() -> dict[str, np.ndarray]:
    """Arrays by name, floats in float32; all parameters, and gradients with respect to them, are one vector.

    tokens [B, L + 2], signal [B, L, 1], draw [B, L, M]; `plain` is MiniGPT, `told` is ConfidenceAwareGPT under
    `signal`, `fed` under its own predictions. `last_...` and `all_...` are results of the two steps, those with draw
    [..., 0]; `future_of_word` [B, L, V] is the future loss behind each word.
    """
    rng = np.random.default_rng(3)
    plain = torch_minigpt.MiniGPT(SIZES).double().eval()
    model = torch_minigpt.ConfidenceAwareGPT(CONFIDENCE).double().eval()
    randomise(model, rng)
    randomise(plain, rng)
    share(model, plain)
    tokens = torch.from_numpy(rng.integers(0, SIZES.vocab, (B, L + 2)))
    draw = torch.from_numpy(rng.integers(0, SIZES.vocab, (B, L, M)))
    signal = torch.from_numpy(rng.uniform(0, 4, (B, L, 1)).astype(np.float32)).double()
    found = {"tokens": tokens, "signal": signal, "draw": draw, "alpha": torch.tensor(ALPHA)}
    found["plain_params"] = vector(torch_minigpt.as_tree(plain))
    found["params"] = vector(torch_minigpt.as_tree(model))

    x = tokens[:, :L]
    found["plain_logits"] = plain(x)
    found["plain_loss"] = torch_minigpt.standard_step(plain, tokens[:, :-1])
    found["plain_gradient"] = gradient(plain, found["plain_loss"])
    found["told_logits"], found["told_confidence"] = model(x, signal)
    found["fed_signal"] = torch_minigpt.feed_back(model, x)
    found["fed_logits"], found["fed_confidence"] = model(x, found["fed_signal"])

    last = torch_minigpt.two_pass_step(model, signal, x, tokens[:, L], tokens[:, L + 1], ALPHA, draw[:, -1, 0])
    found |= {f"last_{name}": value for name, value in last.items()}
    found["last_gradient"] = gradient(model, last["total_loss"])
    everywhere = torch_minigpt.lookahead_step(model, signal, tokens, ALPHA, draw[..., 0])
    found |= {f"all_{name}": value for name, value in everywhere.items()}
    found["all_gradient"] = gradient(model, everywhere["total_loss"])

    words = torch.arange(SIZES.vocab)[:, None, None].expand(-1, B, L)
    each = [torch_minigpt.lookahead_step(model, signal, tokens, ALPHA, word)["future_loss"] for word in words]
    found["future_of_word"] = torch.stack(each, dim=-1)
    arrays = {name: value.detach().numpy() for name, value in found.items()}
    return {name: a.astype(np.float32 if a.dtype.kind == "f" else np.int32) for name, a in arrays.items()}


if __name__ == "__main__":
    np.savez_compressed(GOLDEN, **make())
    print(GOLDEN.stat().st_size, "bytes")
