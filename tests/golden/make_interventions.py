"""Makes tests/golden/interventions: a tiny random Llama and its float64 logits under every transform, by plain torch.

    python tests/golden/make_interventions.py

The reference knows nothing of nmjax: one row at a time, no padding, no cache, one head after the other, and every
effect written from its formula at the point which the table of sites names. `CASES` says what is compared; the tests
read it from `cases.json`.
"""

import json
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parent / "interventions"
V, D, L, N, K, H, F = 97, 32, 3, 4, 2, 8, 48
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": L,
    "num_attention_heads": N,
    "num_key_value_heads": K,
    "head_dim": H,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "float32",
}
PROMPT_LENGTHS = (7, 16)
NEW_TOKENS = 8
KEPT_BEFORE = 4  # logits are kept from this many tokens before the prompt's end

# name -> effects in order, each (transform, arguments, dose, where). A "vector" names an array of vectors.npz.
CASES = {
    "none": [],
    "scale_qk_up": [("scale_qk", {"factor": 1.9}, 1.0, None)],
    "scale_qk_up_some": [("scale_qk", {"factor": 3.0, "layers": [0, 2], "heads": [0, 3]}, 0.7, None)],
    "scale_qk_down": [("scale_qk", {"factor": 0.4}, 0.5, None)],
    "scale_qk_down_some": [("scale_qk", {"factor": 0.2, "layers": [1], "heads": [1, 2]}, 1.0, None)],
    "decay_score": [("decay_kv", {"rate": 0.2, "mode": "score"}, 0.8, None)],
    "decay_score_some": [("decay_kv", {"rate": 0.3, "mode": "score", "layers": [2]}, 1.0, None)],
    "decay_logit": [("decay_kv", {"rate": 0.3, "mode": "logit"}, 0.6, None)],
    "decay_logit_some": [("decay_kv", {"rate": 0.25, "mode": "logit", "layers": [0, 1]}, 1.0, None)],
    "steer_absolute": [("steer", {"vector": "wide", "scale": 2.0, "layers": [1]}, 1.0, None)],
    "steer_absolute_by_layer": [("steer", {"vector": "by_layer", "scale": -1.5}, 0.8, None)],
    "steer_relative": [("steer", {"vector": "wide", "scale": 0.6, "coef": "relative"}, 0.5, None)],
    "steer_relative_by_layer": [
        ("steer", {"vector": "by_layer", "scale": -0.7, "coef": "relative", "layers": [0, 2]}, 1.0, None)
    ],
    "ablate": [("ablate", {"direction": "other"}, 1.0, None)],
    "ablate_partly": [("ablate", {"direction": "wide", "layers": [1]}, 0.5, None)],
    "mask_heads": [("mask_heads", {"heads": [1, 2], "layers": [0, 1]}, 1.0, None)],
    "mask_heads_partly": [("mask_heads", {"heads": [0]}, 0.6, None)],
    "temperature_down": [("temperature", {"value": 0.6}, 1.0, None)],
    "temperature_up": [("temperature", {"value": 2.4}, 0.5, None)],
    "top_p": [("top_p", {"value": 0.7}, 1.0, None)],
    "top_p_half": [("top_p", {"value": 0.3}, 0.5, None)],
    "top_k": [("top_k", {"value": 5}, 1.0, None)],
    "top_k_half": [("top_k", {"value": 6}, 0.5, None)],
    "frequency_penalty": [("frequency_penalty", {"value": 1.5}, 1.0, None)],
    "frequency_bonus": [("frequency_penalty", {"value": -3.0}, 0.5, None)],
    "steer_then_ablate": [
        ("steer", {"vector": "other", "scale": 2.0}, 1.0, None),
        ("ablate", {"direction": "other"}, 1.0, None),
    ],
    "ablate_then_steer": [
        ("ablate", {"direction": "other"}, 1.0, None),
        ("steer", {"vector": "other", "scale": 2.0}, 1.0, None),
    ],
    "many": [
        ("scale_qk", {"factor": 1.5, "layers": [1, 2]}, 1.0, None),
        ("decay_kv", {"rate": 0.1, "mode": "score"}, 1.0, None),
        ("steer", {"vector": "wide", "scale": 0.3, "coef": "relative", "layers": [1]}, 1.0, None),
        ("frequency_penalty", {"value": 1.0}, 1.0, None),
        ("temperature", {"value": 0.8}, 1.0, None),
        ("top_p", {"value": 0.9}, 1.0, None),
    ],
    "steer_here_and_there": [
        (
            "steer",
            {"vector": "other", "scale": 3.0, "layers": [0]},
            1.0,
            {"prompt_window": [2, -1], "generation_positions": [1, 4]},
        )
    ],
}


def make_weights(seed: int) -> dict[str, np.ndarray]:
    """Random weights under Hugging Face names, large enough that attention is uneven and greedy has no near ties."""
    rng = np.random.default_rng(seed)

    def matrix(rows, columns, gain=1.0):
        return (gain * rng.standard_normal((rows, columns)) / columns**0.5).astype(np.float32)

    def norm():
        return (1 + 0.2 * rng.standard_normal(D)).astype(np.float32)

    weights = {"model.embed_tokens.weight": matrix(V, D, D**0.5), "model.norm.weight": norm()}
    weights["lm_head.weight"] = matrix(V, D, 2.0)
    for i in range(L):
        p = f"model.layers.{i}."
        weights |= {
            p + "input_layernorm.weight": norm(),
            p + "post_attention_layernorm.weight": norm(),
            p + "self_attn.q_proj.weight": matrix(N * H, D, 1.3),
            p + "self_attn.k_proj.weight": matrix(K * H, D, 1.3),
            p + "self_attn.v_proj.weight": matrix(K * H, D, 1.5),
            p + "self_attn.o_proj.weight": matrix(D, N * H, 1.5),
            p + "mlp.gate_proj.weight": matrix(F, D, 1.0),
            p + "mlp.up_proj.weight": matrix(F, D, 1.0),
            p + "mlp.down_proj.weight": matrix(D, F, 1.5),
        }
    return weights


def make_vectors(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"wide": (D,), "other": (D,), "by_layer": (L, D)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


class Reference:
    """The model and the effects, in float64."""

    def __init__(self, weights: dict[str, np.ndarray], vectors: dict[str, np.ndarray]):
        self.weights = {name: torch.from_numpy(value.copy()).double() for name, value in weights.items()}
        self.vectors = {name: torch.from_numpy(value.copy()).double() for name, value in vectors.items()}

    def logits(self, tokens: list[int], prompt_len: int, effects: list) -> torch.Tensor:
        """[T, V] of one row, before the `logits` site; the tokens from `prompt_len` on count as generated."""
        w, T = self.weights, len(tokens)
        x = w["model.embed_tokens.weight"][tokens]
        for layer in range(L):
            p = f"model.layers.{layer}."
            h = rms_norm(x, w[p + "input_layernorm.weight"])
            q, k, v = (h @ w[f"{p}self_attn.{name}_proj.weight"].T for name in "qkv")
            heads = []
            for n in range(N):
                shared = slice(n // (N // K) * H, (n // (N // K) + 1) * H)
                query, key = rotate(q[:, n * H : (n + 1) * H]), rotate(k[:, shared])
                pattern = self.attention(query @ key.T / H**0.5, layer, n, effects)
                heads.append(self.head_gain(layer, n, effects) * (pattern @ v[:, shared]))
            x = x + torch.cat(heads, 1) @ w[p + "self_attn.o_proj.weight"].T
            h = rms_norm(x, w[p + "post_attention_layernorm.weight"])
            gate, up = h @ w[p + "mlp.gate_proj.weight"].T, h @ w[p + "mlp.up_proj.weight"].T
            x = x + (gate * torch.sigmoid(gate) * up) @ w[p + "mlp.down_proj.weight"].T
            for name, arguments, dose, where in effects:
                chosen = torch.tensor([selected(where, t, prompt_len) for t in range(T)])[:, None]
                x = torch.where(chosen, self.residual(x, layer, name, arguments, dose), x)
        return rms_norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T

    def attention(self, scores, layer, head, effects):
        """Raw scores [T, T] of one head -> weights [T, T]."""
        for name, arguments, dose, _ in effects:  # the query site comes first
            if name == "scale_qk" and on_layer(arguments, layer) and head in arguments.get("heads", range(N)):
                factor = arguments["factor"]
                scores = scores * (1 + dose * (factor - 1) if factor > 1 else 1 / (1 + dose * (1 / factor - 1)))
        T = len(scores)
        age = torch.arange(T)[:, None] - torch.arange(T)[None]
        for name, arguments, dose, _ in effects:
            if name == "decay_kv" and on_layer(arguments, layer):
                rate = dose * arguments["rate"]
                if arguments["mode"] == "score":
                    scores = scores * torch.exp(-rate * age.double())
                else:
                    scores = scores - rate * age
        return torch.softmax(scores.masked_fill(age < 0, -torch.inf), 1)

    def head_gain(self, layer, head, effects) -> float:
        gain = 1.0
        for name, arguments, dose, _ in effects:
            if name == "mask_heads" and on_layer(arguments, layer) and head in arguments["heads"]:
                gain *= 1 - dose
        return gain

    def residual(self, x, layer, name, arguments, dose):
        """`resid_post` [T, D] after one effect."""
        if name == "steer" and on_layer(arguments, layer):
            vector = self.vectors[arguments["vector"]]
            vector = vector[layer] if vector.ndim == 2 else vector
            if arguments.get("coef") == "relative":
                vector = vector / vector.norm() * x.norm(dim=1, keepdim=True)
            return x + dose * arguments["scale"] * vector
        if name == "ablate" and on_layer(arguments, layer):
            direction = self.vectors[arguments["direction"]]
            direction = direction / direction.norm()
            return x - dose * (x @ direction)[:, None] * direction
        return x

    def final(self, logits, generated: list[int], effects: list) -> torch.Tensor:
        """[V] after the `logits` site, from [V] before it and the tokens generated so far."""
        for name, arguments, dose, _ in effects:
            if name == "temperature":
                logits = logits / (1 + dose * (arguments["value"] - 1))
            elif name == "frequency_penalty":
                counts = torch.bincount(torch.tensor(generated, dtype=torch.long), minlength=V)
                logits = logits - dose * arguments["value"] * counts
            elif name == "top_k":
                smallest = torch.sort(logits, descending=True).values[round(arguments["value"] / dose) - 1]
                logits = logits.masked_fill(logits < smallest, -torch.inf)
            elif name == "top_p":
                p = 1 - dose * (1 - arguments["value"])
                ordered, order = torch.sort(logits, descending=True)
                before = torch.softmax(ordered, 0).cumsum(0) - torch.softmax(ordered, 0)
                logits = logits.clone()
                logits[order[before >= p]] = -torch.inf
        return logits

    def greedy(self, prompt: list[int], count: int, effects: list) -> list[int]:
        """The continuation; refuses a choice that rounding could turn."""
        generated: list[int] = []
        for _ in range(count):
            last = self.logits(prompt + generated, len(prompt), effects)[-1]
            best = torch.sort(self.final(last, generated, effects), descending=True)
            if best.values[0] - best.values[1] < 1e-3:
                raise ValueError(f"near tie after {prompt + generated}: try another seed")
            generated.append(int(best.indices[0]))
        return generated


def rms_norm(x, scale):
    return x / torch.sqrt((x**2).mean(1, keepdim=True) + CONFIG["rms_norm_eps"]) * scale


def rotate(x):
    """Rotary embedding of one head [T, H]: the pair (i, i + H/2) turns by position * theta^(-2i/H)."""
    half = H // 2
    turned = torch.empty_like(x)
    for i in range(half):
        angle = torch.arange(len(x), dtype=torch.float64) * CONFIG["rope_theta"] ** (-2 * i / H)
        cos, sin = torch.cos(angle), torch.sin(angle)
        turned[:, i] = x[:, i] * cos - x[:, i + half] * sin
        turned[:, i + half] = x[:, i + half] * cos + x[:, i] * sin
    return turned


def on_layer(arguments, layer) -> bool:
    return layer in arguments.get("layers", range(L))


def selected(where, position: int, prompt_len: int) -> bool:
    """The two selectors that the cases use."""
    if where is None:
        return True
    start, stop = where["prompt_window"]
    if position < prompt_len:
        return start <= position < (stop + prompt_len if stop < 0 else stop)
    return position - prompt_len in where["generation_positions"]


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [rng.integers(3, V, length).tolist() for length in PROMPT_LENGTHS]


def main() -> None:
    from safetensors.numpy import save_file

    weights, vectors = make_weights(1), make_vectors(2)
    (GOLDEN / "model").mkdir(parents=True, exist_ok=True)
    (GOLDEN / "model" / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n", encoding="utf-8")
    save_file(weights, GOLDEN / "model" / "model.safetensors", metadata={"format": "pt"})
    np.savez(GOLDEN / "vectors.npz", **vectors)
    spec = {"prompts": prompts(), "cases": CASES}
    (GOLDEN / "cases.json").write_text(json.dumps(spec, indent=1) + "\n", encoding="utf-8")

    reference, kept = Reference(weights, vectors), {}
    for name, effects in CASES.items():
        for i, prompt in enumerate(prompts()):
            tokens = reference.greedy(prompt, NEW_TOKENS, effects)
            logits = reference.logits(prompt + tokens, len(prompt), effects)
            last = [reference.final(logits[len(prompt) - 1 + t], tokens[:t], effects) for t in range(NEW_TOKENS)]
            kept[f"{name}.{i}.tokens"] = np.asarray(tokens, np.int32)
            kept[f"{name}.{i}.logits"] = logits[len(prompt) - KEPT_BEFORE :].numpy().astype(np.float32)
            if not torch.equal(torch.stack(last), logits[len(prompt) - 1 : -1]):
                kept[f"{name}.{i}.final"] = torch.stack(last).numpy().astype(np.float32)
        print(name, tokens, float(logits.abs().max()))
    np.savez_compressed(GOLDEN / "logits.npz", **kept)
    print(sum(p.stat().st_size for p in GOLDEN.rglob("*") if p.is_file()), "bytes")


if __name__ == "__main__":
    main()
