"""Live comparisons with transformers in torch: more variants, checkpoints that cross over, a trained model's text."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

import models

pytestmark = pytest.mark.parity


def _make_models():
    """The script beside the golden arrays, which builds the random models."""
    path = Path(__file__).parents[1] / "golden" / "make_models.py"
    spec = importlib.util.spec_from_file_location("make_models", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_models = _make_models()
ALL = make_models.VARIANTS | make_models.MORE_VARIANTS


@pytest.mark.parametrize("name", ALL)
def test_logits_equal_transformers(name, tmp_path, left_padded, logits):
    """All positions of a ragged left-padded batch; transformers runs each row alone."""
    reference = make_models.build(name)
    reference.save_pretrained(tmp_path)
    lm = models.load(tmp_path)
    rows = make_models.rows(seed=1)
    tokens, mask = left_padded(rows)
    out = logits(lm.module, lm.params, tokens, mask)
    for i, row in enumerate(rows):
        wanted = make_models.reference(reference, row)
        tolerance = 1e-5 * max(1.0, np.abs(wanted).max())
        np.testing.assert_allclose(out[i, tokens.shape[1] - len(row) :], wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", make_models.VARIANTS)
def test_frequencies_equal_torch(name):
    reference = make_models.build(name)
    config = models.LlamaConfig.from_hf(reference.config.to_dict() | {"architectures": [type(reference).__name__]})
    frequencies, scale = config.rope.frequencies(config.head_dim)
    np.testing.assert_allclose(frequencies, reference.model.rotary_emb.inv_freq.numpy(), rtol=1.2e-7)
    np.testing.assert_allclose(scale, reference.model.rotary_emb.attention_scaling, rtol=1e-12)


@pytest.mark.parametrize("shard", [None, 30_000], ids=["one-file", "sharded"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama-gqa2-untied-yarn", "llama-gqa4-tied-bias", "qwen2-gqa4-untied-sliding",
                                  "qwen3-gqa2-tied", "llama-mha-tied-llama3"])  # fmt: skip
def test_what_we_save_transformers_reads_with_identical_logits(name, dtype, shard, golden_folder, tmp_path):
    import torch
    import transformers

    def read(folder, dtype="auto"):
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
        )
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
        return model.eval()

    models.save(
        models.load(golden_folder / name, dtype=dtype), tmp_path, **({"max_shard_size": shard} if shard else {})
    )
    original = read(golden_folder / name, getattr(torch, dtype))
    crossed = read(tmp_path)
    assert crossed.dtype == getattr(torch, dtype)
    row = torch.from_numpy(make_models.rows()[1].astype(np.int64))[None]
    with torch.no_grad():
        assert torch.equal(original(row).logits, crossed(row).logits)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(crossed.config, key) == getattr(original.config, key)
        assert getattr(crossed.generation_config, key) == getattr(original.generation_config, key)


def test_stories_greedy_equals_transformers_live(shared_data, golden_folder):
    """The committed continuation is what the installed transformers writes."""
    wanted = json.loads((golden_folder / "stories260K_greedy.json").read_text())
    assert make_models.greedy(shared_data / "stories260K-hf", 200) == wanted


def test_stories_logits_equal_transformers(shared_data, logits):
    """A trained model over 300 positions of its own text, some of it beyond what it was trained on."""
    import torch
    import transformers

    folder = shared_data / "stories260K-hf"
    lm = models.load(folder)
    tokens = make_models.greedy(folder, 330)
    row = np.asarray([[lm.config.bos_id, *tokens]], np.int32)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        wanted = reference(torch.from_numpy(row.astype(np.int64))).logits[0].numpy()
    seen = logits(lm.module, lm.params, row, np.ones_like(row, bool))[0]
    np.testing.assert_allclose(seen, wanted, rtol=0, atol=1e-5 * max(1.0, np.abs(wanted).max()))
