"""MiniGPT, ConfidenceAwareGPT and their training steps in plain PyTorch: what ours are compared with.

It shares nothing with `models/minigpt.py` but the sizes: tests compare the numbers, a benchmark the speed. So it is
written as PyTorch is at its best without tricks: fused attention and optimizer, logits only where a loss reads them, no
graph where no gradient is wanted. The lookahead is the published one, which appends a token and runs the row again.

Needs torch, which nothing else here does. Axis letters: B rows, L tokens of context, D embed, N heads, H head size,
V vocabulary. Models begin in training mode, as usual there: call `eval()` to switch dropout off.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.minigpt_config import ConfidenceConfig, MiniGPTConfig


class PlainLayer(nn.LayerNorm):
    def forward(self, x: Tensor, signal: Tensor | None = None) -> Tensor:
        return super().forward(x)


class AdaptiveLayer(nn.Module):
    """A norm whose scale and shift are affine in the signal [B, L, 1]."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.norm = nn.LayerNorm(size, eps, elementwise_affine=False)
        self.change = nn.Linear(1, 2 * size)

    def forward(self, x: Tensor, signal: Tensor) -> Tensor:
        scale, shift = self.change(signal).chunk(2, dim=-1)
        return self.norm(x) * (1 + scale) + shift


class Attention(nn.Module):
    def __init__(self, config: MiniGPTConfig):
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.qkv = nn.Linear(config.embed, 3 * config.embed)
        self.out = nn.Linear(config.embed, config.embed)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        return self.out(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, config: MiniGPTConfig, norm: Callable[[int, float], nn.Module]):
        super().__init__()
        D = config.embed
        self.attn_norm, self.mlp_norm = norm(D, config.norm_eps), norm(D, config.norm_eps)
        self.attn = Attention(config)
        gelu = nn.GELU("tanh" if config.gelu == "tanh" else "none")
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), gelu, nn.Dropout(config.dropout), nn.Linear(4 * D, D))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, signal: Tensor | None) -> Tensor:
        x = x + self.dropout(self.attn(self.attn_norm(x, signal)))
        return x + self.dropout(self.mlp(self.mlp_norm(x, signal)))


class MiniGPT(nn.Module):
    norm: Callable[[int, float], nn.Module] = PlainLayer

    def __init__(self, config: MiniGPTConfig):
        super().__init__()
        self.embed = nn.Embedding(config.vocab, config.embed)
        self.positions = nn.Embedding(config.max_positions, config.embed)
        self.blocks = nn.ModuleList(Block(config, type(self).norm) for _ in range(config.layers))
        self.final_norm = nn.LayerNorm(config.embed, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def hidden(self, tokens: Tensor, signal: Tensor | None = None) -> Tensor:
        """[B, L, D] after the final norm."""
        x = self.dropout(self.embed(tokens) + self.positions.weight[: tokens.shape[1]])
        for block in self.blocks:
            x = block(x, signal)
        return self.final_norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embed.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, L, V] of tokens [B, L]."""
        return self.logits(self.hidden(tokens))


class ConfidenceAwareGPT(MiniGPT):
    norm = AdaptiveLayer

    def __init__(self, config: ConfidenceConfig):
        super().__init__(config)
        self.predictor = nn.Linear(config.embed, 1)

    def forward(self, tokens: Tensor, signal: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Logits [B, L, V] and confidences [B, L, 1] of tokens [B, L], told a signal [B, L, 1]."""
        hidden = self.hidden(tokens, signal)
        return self.logits(hidden), self.predictor(hidden)


def from_params(config: MiniGPTConfig, params: dict) -> MiniGPT:
    """The model of these sizes with parameters of `models.minigpt`, float32."""
    model = ConfidenceAwareGPT(config) if isinstance(config, ConfidenceConfig) else MiniGPT(config)
    _copy(params, as_tree(model))
    return model


def _copy(source: dict, target: dict) -> None:
    if source.keys() != target.keys():
        raise ValueError(f"params holds {sorted(source)}, wanted {sorted(target)}")
    for name, value in source.items():
        if isinstance(value, dict):
            _copy(value, target[name])
        else:
            target[name].copy_(torch.from_numpy(np.array(value)))


def as_tree(model: MiniGPT, read: Callable[[Tensor], Tensor] = Tensor.detach) -> dict:
    """The tree of parameters as `models.minigpt` shapes it: views, so what is written into them is the model's.

    `read` makes something else of each parameter, say its gradient.
    """

    def linear(layer):
        return {"kernel": read(layer.weight).T, "bias": read(layer.bias)}

    def norm(layer):
        if isinstance(layer, nn.LayerNorm):
            return {"scale": read(layer.weight), "bias": read(layer.bias)}
        return {name: leaf.unflatten(-1, (2, -1)) for name, leaf in linear(layer.change).items()}

    def attention(layer):
        three = {name: leaf.unflatten(-1, (3, layer.heads, -1)) for name, leaf in linear(layer.qkv).items()}
        split = {q: {name: leaf.select(-3, i) for name, leaf in three.items()} for i, q in enumerate("qkv")}
        out = linear(layer.out)
        return {**split, "o": {**out, "kernel": out["kernel"].unflatten(0, (layer.heads, -1))}}

    def block(layer):
        return {
            "attn_norm": norm(layer.attn_norm),
            "attn": attention(layer.attn),
            "mlp_norm": norm(layer.mlp_norm),
            "mlp": {"up": linear(layer.mlp[0]), "down": linear(layer.mlp[3])},
        }

    tree = {
        "embed": {"embedding": read(model.embed.weight)},
        "positions": {"embedding": read(model.positions.weight)},
        "final_norm": norm(model.final_norm),
        **{f"layers_{i}": block(layer) for i, layer in enumerate(model.blocks)},
    }
    if isinstance(model, ConfidenceAwareGPT):
        tree["confidence_predictor"] = linear(model.predictor)
    return tree


def standard_step(model: MiniGPT, tokens: Tensor) -> Tensor:
    """Mean next-token cross-entropy [] over all positions of rows [B, L + 1]."""
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def two_pass_step(
    model: ConfidenceAwareGPT, prev_conf: Tensor, tokens_t: Tensor, tokens_t_plus_1: Tensor, tokens_t_plus_2: Tensor,
    alpha: float = 1.0, draw: Tensor | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """The published step, at the last position of each row: arguments and results as `two_pass_training_step`'s."""
    hidden = model.hidden(tokens_t, prev_conf)[:, -1]
    logits, confidence = model.logits(hidden), model.predictor(hidden)
    loss_lm = F.cross_entropy(logits, tokens_t_plus_1)
    choice = _sample(logits) if draw is None else draw
    future = _append_and_rerun(model, tokens_t, prev_conf, choice, confidence, tokens_t_plus_2)
    loss_confidence = F.mse_loss(confidence[:, 0], future)
    return {
        "pred_conf_t": confidence,
        "total_loss": loss_lm + alpha * loss_confidence,
        "loss_lm": loss_lm,
        "loss_confidence": loss_confidence,
        "future_loss": future,
    }


def lookahead_step(
    model: ConfidenceAwareGPT, signal: Tensor, tokens: Tensor, alpha: float = 1.0, draw: Tensor | None = None
) -> dict[str, Tensor]:
    """The same at every position, one after the other: arguments and results as `lookahead_loss`'s, draw [B, L]."""
    L = tokens.shape[1] - 2
    logits, confidence = model(tokens[:, :L], signal)
    loss_lm = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:-1].flatten())
    choice = _sample(logits) if draw is None else draw

    def future_at(t: int) -> Tensor:
        past = tokens[:, : t + 1], signal[:, : t + 1]
        return _append_and_rerun(model, *past, choice[:, t], confidence[:, t], tokens[:, t + 2])

    future = torch.stack([future_at(t) for t in range(L)], dim=1)
    loss_confidence = F.mse_loss(confidence[..., 0], future)
    return {
        "pred_conf": confidence[..., 0],
        "total_loss": loss_lm + alpha * loss_confidence,
        "loss_lm": loss_lm,
        "loss_confidence": loss_confidence,
        "future_loss": future,
    }


@torch.no_grad()
def _sample(logits: Tensor) -> Tensor:
    return torch.distributions.Categorical(logits=logits).sample()


@torch.no_grad()
def _append_and_rerun(
    model: ConfidenceAwareGPT, tokens: Tensor, signal: Tensor, choice: Tensor, confidence: Tensor, target: Tensor
) -> Tensor:
    """Cross-entropy [B] of targets behind tokens [B, L] and choices [B], which stand beside a confidence [B, 1]."""
    tokens = torch.cat([tokens, choice[:, None]], dim=1)
    signal = torch.cat([signal, confidence[:, None]], dim=1)
    hidden = model.hidden(tokens, signal)[:, -1]
    return F.cross_entropy(model.logits(hidden), target, reduction="none")


@torch.no_grad()
def feed_back(model: ConfidenceAwareGPT, tokens: Tensor) -> Tensor:
    """The signal [B, L, 1] of a model that is told at each token what it predicted at the one before."""
    signal = torch.zeros(len(tokens), 1, 1, dtype=model.embed.weight.dtype, device=tokens.device)
    for t in range(1, tokens.shape[1]):
        signal = torch.cat([signal, model(tokens[:, :t], signal)[1][:, -1:]], dim=1)
    return signal


def make_optimizer(model: MiniGPT, lr: float = 3e-4, weight_decay: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, fused=True)


def update(optimizer: torch.optim.Optimizer, loss: Tensor, clip: float = 1.0) -> None:
    """One step down a loss, its gradient clipped to a global norm."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
    optimizer.step()
