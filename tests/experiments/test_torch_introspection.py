"""The published scheme in torch against ours: the same loss, gradients of the adapter, training and answers."""

import dataclasses
import pathlib

import jax
import numpy as np
import optax
import pytest

pytestmark = pytest.mark.parity

TINY = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48)
N = 16


@pytest.fixture(scope="module")
def benchmark():
    pytest.importorskip("peft", reason="peft is not installed (requirements-parity.txt)")
    import torch

    from experiments import benchmark_introspection

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more only wait for each other on arrays so small
    yield benchmark_introspection
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=["bundled", "qwen"])
def setting(request, benchmark, tmp_path_factory):
    """(what is compared, the study in torch): of the bundled Llama, and of a random Qwen with biases."""
    folder = pathlib.Path(__file__).parents[2] / "checkpoints" / "tiny_instruct"
    if request.param == "qwen":
        folder = tmp_path_factory.mktemp("qwen")
        benchmark.save_random(benchmark.RANDOM | TINY | {"vocab_size": 1400}, folder, seed=1)
    setting = benchmark.make_setting(folder, N, r=3, seed=0)
    return setting, benchmark.make_rival(setting, folder)


def test_loss_gradient_and_grid_are_equal(benchmark, setting):
    setting, study = setting
    for segments in (1, 2):
        apart = benchmark.disagreements(setting, study, benchmark.Ours(setting, segments))
        assert apart["loss"] < 1e-5 and apart["gradient"] < 1e-4 and apart["grid"] < 2e-5, apart


def test_every_part_of_the_scheme_matters(benchmark, setting):
    """What is compared moves with the perturbation, the adapter and where the gradient stops."""
    setting, study = setting
    steered = [record for record in setting.grid if record.layers is not None]
    clean = [dataclasses.replace(record, **benchmark.NOTHING) for record in steered]
    scores = study.evaluate(steered)
    moved = np.abs(np.diff(scores) - np.diff(study.evaluate(clean)))
    assert moved.max() > 0.02 and (moved > 1e-4).mean() > 0.7
    with study.model.disable_adapter():
        assert np.abs(np.diff(scores) - np.diff(study.evaluate(steered))).min() > 1e-3
    assert all(not block._forward_hooks for block in study.blocks), "hooks are removed again"
    study.model.zero_grad()
    study.accumulate(setting.examples.records)
    largest = {name: leaf.grad.abs().max() for name, leaf in study.trained.items()}
    assert len(largest) == 4 * 4 * 2 and min(largest.values()) > 1e-5


def test_training_goes_the_same_way(benchmark, setting):
    import torch

    from nmjax.training.loop import init_state, make_step

    setting, study = setting
    ours = benchmark.Ours(setting)
    adamw = optax.chain(optax.clip_by_global_norm(0.05), optax.adamw(3e-3, eps=1e-4, weight_decay=0.01))
    state, step = init_state(ours.adapter.weights, adamw), jax.jit(make_step(ours.loss, adamw))
    before = {name: leaf.detach().clone() for name, leaf in study.trained.items()}
    optimizer = study.optimizer(lr=3e-3, eps=1e-4, weight_decay=0.01)  # an eps that rounding does not outgrow
    try:
        losses = []
        for _ in range(4):
            state, metrics = step(state, setting.examples.batch(range(N)), ours.frozen)
            losses.append((float(metrics["loss"]), study.step(optimizer, setting.examples.records, clip=0.05)))
            assert metrics["grad_norm"] > 0.06, "the clip must act"
        found, wanted = np.transpose(losses)
        assert np.abs(np.diff(wanted)).min() > 1e-3
        np.testing.assert_allclose(found, wanted, atol=1e-4)
    finally:
        with torch.no_grad():
            for name, leaf in study.trained.items():
                leaf.copy_(before[name])


def test_other_kinds_of_records_are_refused(benchmark, setting):
    setting, study = setting
    record = dataclasses.replace(setting.grid[-1], kind="noise", noise_seed=1, layers=(0, 1), magnitude=1.0)
    with pytest.raises(ValueError, match="kind is 'noise'; the published scheme has steered or clean"):
        study.answer_logits(record)
