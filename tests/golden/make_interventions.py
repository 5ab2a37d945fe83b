"""Makes tests/golden/interventions: a tiny random Llama and its float64 logits under every transform, by plain torch.

    python tests/golden/make_interventions.py

The reference knows nothing of nmjax: one row at a time, no padding, no cache, one head after the other, and every
effect written from its formula at the point which the table of sites names. `CASES` says what is compared; the tests
read it from `cases.json`.
"""

import json
import math
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

# The rest of the vocabulary, run as a batch of its own.
MORE = {
    "scale_heads": [("scale_heads", {"factor": 2.5, "heads": [0, 3], "layers": [0, 2]}, 0.7, None)],
    "scale_heads_down": [("scale_heads", {"factor": 0.2}, 0.5, None)],
    "oscillate_sine": [("oscillate_attention", {"amplitude": 0.8, "rate": 0.7}, 0.9, None)],
    "oscillate_square": [
        ("oscillate_attention", {"amplitude": 0.9, "wave": "square", "period": 6, "layers": [1]}, 1.0, None)
    ],
    "anchor": [("anchor_attention", {"bias": 2.0, "first": 3}, 0.8, None)],
    "anchor_down": [("anchor_attention", {"bias": -3.0, "first": 1, "layers": [1, 2]}, 1.0, None)],
    "recency": [("bias_positions", {"bias": 3.0, "shape": "recency"}, 0.9, None)],
    "history": [("bias_positions", {"bias": 3.0, "shape": "history", "layers": [0, 1]}, 1.0, None)],
    "middle": [("bias_positions", {"bias": -4.0, "shape": "middle"}, 0.5, None)],
    "decay_value": [("decay_kv", {"rate": 0.2, "mode": "value"}, 0.7, None)],
    "decay_value_some": [("decay_kv", {"rate": 0.4, "mode": "value", "layers": [2]}, 1.0, None)],
    "window": [("window_kv", {"n": 5}, 1.0, None)],
    "window_half": [("window_kv", {"n": 3, "layers": [0, 2]}, 0.5, None)],
    "window_soft": [("window_kv", {"n": 4, "edge": "soft"}, 0.8, None)],
    "stride": [("stride_kv", {"stride": 3, "newest": 2, "first": 1}, 1.0, None)],
    "stride_partly": [("stride_kv", {"stride": 2, "newest": 4, "first": 0, "layers": [1]}, 0.3, None)],
    "segment_age": [("segment_kv", {"recent": 1.5, "old": -1.0, "split": 4}, 0.8, None)],
    "segment_origin": [("segment_kv", {"recent": 2.0, "old": -0.5, "by": "origin"}, 1.0, None)],
    "segment_rates": [("decay_segments", {"recent": 0.05, "old": 0.4, "split": 5}, 1.0, None)],
    "segment_rates_origin": [("decay_segments", {"recent": 0.0, "old": 0.3, "by": "origin"}, 0.7, None)],
    "clamp": [("clamp_projection", {"direction": "other", "value": 3.0}, 1.0, None)],
    "clamp_partly": [("clamp_projection", {"direction": "wide", "value": -2.0, "layers": [1]}, 0.6, None)],
    "soft_projection": [("soft_projection", {"share": 0.6, "basis": "plane", "layers": [0, 1]}, 0.8, None)],
    "gain_layers": [("gain_layers", {"gain": 0.7}, 1.0, None)],
    "gain_layers_down": [("gain_layers", {"gain": -0.5, "layers": [0, 2]}, 0.8, None)],
    "min_p": [("min_p", {"value": 0.2}, 1.0, None)],
    "min_p_half": [("min_p", {"value": 0.3}, 0.5, None)],
    "presence": [("presence_penalty", {"value": 2.5}, 0.8, None)],
    "repetition": [("repetition_penalty", {"beta": 1.15}, 1.0, None)],
    "pulse": [("pulse_temperature", {"delta": 0.6, "period": 4, "width": 2}, 0.9, None)],
    "pulse_from_a_base": [("pulse_temperature", {"delta": 0.8, "period": 3, "width": 1, "base": 1.4}, 1.0, None)],
    "one_of_each_site": [
        ("stride_kv", {"stride": 2, "newest": 3, "first": 1}, 0.5, None),
        ("decay_kv", {"rate": 0.1, "mode": "value"}, 1.0, None),
        ("oscillate_attention", {"amplitude": 0.5, "rate": 0.4}, 1.0, None),
        ("gain_layers", {"gain": 0.4}, 1.0, None),
        ("clamp_projection", {"direction": "other", "value": 2.0, "layers": [2]}, 0.5, None),
        ("presence_penalty", {"value": 1.0}, 1.0, None),
        ("pulse_temperature", {"delta": 0.5, "period": 4, "width": 2}, 1.0, None),
        ("min_p", {"value": 0.05}, 1.0, None),
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
    shapes = {"wide": (D,), "other": (D,), "by_layer": (L, D), "plane": (5, D)}
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
                pattern = self.attention(query @ key.T / H**0.5, layer, n, prompt_len, effects)
                gains = [self.head_gain(layer, n, t, effects) for t in range(T)]
                heads.append(torch.tensor(gains, dtype=torch.float64)[:, None] * (pattern @ v[:, shared]))
            x = x + torch.cat(heads, 1) @ w[p + "self_attn.o_proj.weight"].T
            h = rms_norm(x, w[p + "post_attention_layernorm.weight"])
            gate, up = h @ w[p + "mlp.gate_proj.weight"].T, h @ w[p + "mlp.up_proj.weight"].T
            x = x + (gate * torch.sigmoid(gate) * up) @ w[p + "mlp.down_proj.weight"].T
            for name, arguments, dose, where in effects:
                chosen = torch.tensor([selected(where, t, prompt_len) for t in range(T)])[:, None]
                x = torch.where(chosen, self.residual(x, layer, name, arguments, dose), x)
        return rms_norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T

    def attention(self, scores, layer, head, prompt_len, effects):
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
                elif arguments["mode"] == "logit":
                    scores = scores - rate * age
            elif on_layer(arguments, layer):
                for query in range(T):
                    for key in range(query + 1):
                        scores[query, key] += score_bias(name, arguments, dose, query, key, prompt_len)
        pattern = torch.softmax(scores.masked_fill(age < 0, -torch.inf), 1)
        for name, arguments, dose, _ in effects:
            if name == "decay_kv" and arguments["mode"] == "value" and on_layer(arguments, layer):
                pattern = pattern * torch.exp(-dose * arguments["rate"] * age.double())
        return pattern

    def head_gain(self, layer, head, position, effects) -> float:
        gain = 1.0
        for name, arguments, dose, _ in effects:
            if not on_layer(arguments, layer) or head not in arguments.get("heads", range(N)):
                continue
            if name == "mask_heads":
                gain *= 1 - dose
            elif name == "scale_heads":
                gain *= 1 + dose * (arguments["factor"] - 1)
            elif name == "oscillate_attention" and arguments.get("wave") == "square":
                gain *= 1 + dose * arguments["amplitude"] * (position % arguments["period"] < arguments["period"] / 2)
            elif name == "oscillate_attention":
                gain *= 1 + dose * arguments["amplitude"] * math.sin(arguments["rate"] * position)
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
        if name == "clamp_projection" and on_layer(arguments, layer):
            direction = self.vectors[arguments["direction"]]
            direction = direction / direction.norm()
            return x + dose * (arguments["value"] - x @ direction)[:, None] * direction
        if name == "soft_projection" and on_layer(arguments, layer):
            basis = torch.linalg.qr(self.vectors[arguments["basis"]].T).Q
            return x + dose * arguments["share"] * (x @ basis @ basis.T - x)
        if name == "gain_layers" and on_layer(arguments, layer):
            return x * (1 + dose * arguments["gain"] / len(arguments.get("layers", range(L))))
        return x

    def final(self, logits, generated: list[int], effects: list) -> torch.Tensor:
        """[V] after the `logits` site, from [V] before it and the tokens generated so far."""
        for name, arguments, dose, _ in effects:
            if name == "temperature":
                logits = logits / (1 + dose * (arguments["value"] - 1))
            elif name == "pulse_temperature":
                value = 1 + dose * (arguments.get("base", 1) - 1)
                value -= dose * arguments["delta"] * (len(generated) % arguments["period"] < arguments["width"])
                logits = logits / max(0.05, value)
            elif name in ("frequency_penalty", "repetition_penalty", "presence_penalty"):
                counts = torch.bincount(torch.tensor(generated, dtype=torch.long), minlength=V)
                counts = counts.clamp(max=1) if name == "presence_penalty" else counts
                logits = logits - dose * arguments.get("value", arguments.get("beta")) * counts
            elif name == "min_p":
                shares = torch.softmax(logits, 0)
                logits = logits.masked_fill(shares < dose * arguments["value"] * shares.max(), -torch.inf)
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


def score_bias(name, arguments, dose, query, key, prompt_len) -> float:
    """What an effect adds to one score in nats."""
    age = query - key
    if name == "anchor_attention":
        return dose * arguments["bias"] * (key < arguments["first"])
    if name == "bias_positions":
        place = key / max(query, 1)
        height = {"recency": place, "history": 1 - place, "middle": min(2 * place, 2 - 2 * place)}
        return dose * arguments["bias"] * height[arguments["shape"]]
    if name == "window_kv":
        width = arguments["n"] / dose
        if arguments.get("edge") == "soft":
            return -8 * max(0.0, age / width - 1)
        return -math.inf if age >= round(width) else 0.0
    if name == "stride_kv":
        kept = key % arguments["stride"] == 0 or key < arguments["first"] or age < arguments["newest"]
        return 0.0 if kept else -8 * dose
    if name in ("segment_kv", "decay_segments"):
        recent = key >= prompt_len if arguments.get("by") == "origin" else age < arguments.get("split", 20)
        value = arguments["recent" if recent else "old"]
        return dose * value if name == "segment_kv" else -dose * value * age
    return 0.0


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


def results(reference: Reference, cases: dict) -> dict[str, np.ndarray]:
    """Greedy tokens and logits of every case after every prompt."""
    kept = {}
    for name, effects in cases.items():
        for i, prompt in enumerate(prompts()):
            tokens = reference.greedy(prompt, NEW_TOKENS, effects)
            logits = reference.logits(prompt + tokens, len(prompt), effects)
            last = [reference.final(logits[len(prompt) - 1 + t], tokens[:t], effects) for t in range(NEW_TOKENS)]
            kept[f"{name}.{i}.tokens"] = np.asarray(tokens, np.int32)
            kept[f"{name}.{i}.logits"] = logits[len(prompt) - KEPT_BEFORE :].numpy().astype(np.float32)
            if not torch.equal(torch.stack(last), logits[len(prompt) - 1 : -1]):
                kept[f"{name}.{i}.final"] = torch.stack(last).numpy().astype(np.float32)
        print(name, tokens, float(logits.abs().max()))
    return kept


def main() -> None:
    from safetensors.numpy import save_file

    weights, vectors = make_weights(1), make_vectors(2)
    (GOLDEN / "model").mkdir(parents=True, exist_ok=True)
    (GOLDEN / "model" / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n", encoding="utf-8")
    save_file(weights, GOLDEN / "model" / "model.safetensors", metadata={"format": "pt"})
    np.savez(GOLDEN / "vectors.npz", **vectors)
    spec = {"prompts": prompts(), "cases": CASES, "more": MORE}
    (GOLDEN / "cases.json").write_text(json.dumps(spec, indent=1) + "\n", encoding="utf-8")
    reference = Reference(weights, vectors)
    np.savez_compressed(GOLDEN / "logits.npz", **results(reference, CASES))
    np.savez_compressed(GOLDEN / "more.npz", **results(reference, MORE))
    print(sum(p.stat().st_size for p in GOLDEN.rglob("*") if p.is_file()), "bytes")


if __name__ == "__main__":
    main()
