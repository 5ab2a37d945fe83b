"""Makes tests/golden/lora: adapters that PEFT writes, with the logits that it computes under them in float32.

    python tests/golden/make_lora.py

Needs torch and peft, so the results are committed. The base is `models/qwen2-gqa2-tied`, which is there already; each
row of tokens goes through it alone and unpadded.
"""

import json
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "lora"
BASE = Path(__file__).parent / "models" / "qwen2-gqa2-tied"
LENGTHS = (40, 9, 1)

# Fields of peft.LoraConfig. Between them: lists and a regular expression, one rank and several, both scalings.
VARIANTS = {
    "attention": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "patterns": {
        "r": 2,
        "lora_alpha": 3,
        "target_modules": r".*\.(q_proj|o_proj|down_proj|up_proj)",
        "rank_pattern": {"o_proj": 5, r"model.layers.1.mlp.down_proj": 3},
        "alpha_pattern": {"q_proj": 7},
        "use_rslora": True,
        "lora_dropout": 0.1,
    },
    "last-layer": {"r": 1, "lora_alpha": 2, "target_modules": ["v_proj", "gate_proj"], "layers_to_transform": [1]},
}


def rows(seed: int = 0) -> list[np.ndarray]:
    """Token rows int32 [T], one of each length."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 97, length, np.int32) for length in LENGTHS]


def adapted(base, seed: int, **fields):
    """A transformers model under a random adapter which is as loud as the base."""
    import peft
    import torch

    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **fields))
    torch.manual_seed(seed)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if "lora_" in path:
                weight.copy_(0.5 * torch.randn_like(weight) / weight.shape[1] ** 0.5)
    return model.eval()


def logits(model, row: np.ndarray) -> np.ndarray:
    """float32 [T, V] of one unpadded row."""
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(row.astype(np.int64))[None], use_cache=False).logits[0].numpy()


def read_base(folder: Path = BASE):
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def main() -> None:
    for seed, (name, fields) in enumerate(VARIANTS.items()):
        model = adapted(read_base(), seed, **fields)
        model.save_pretrained(GOLDEN / name)
        (GOLDEN / name / "README.md").unlink()
        config = GOLDEN / name / "adapter_config.json"
        # Lists are sets to PEFT, and are written in another order every time.
        said = json.loads(config.read_text()) | {"base_model_name_or_path": BASE.name}
        said |= {"target_modules": fields["target_modules"]}
        config.write_text(json.dumps(said, indent=2) + "\n")
        kept = {f"tokens_{i}": row for i, row in enumerate(rows())}
        kept |= {f"logits_{i}": logits(model, row) for i, row in enumerate(rows())}
        np.savez_compressed(GOLDEN / name / "reference.npz", **kept)
        print(name, sum(p.stat().st_size for p in (GOLDEN / name).iterdir()), "bytes")


if __name__ == "__main__":
    main()
