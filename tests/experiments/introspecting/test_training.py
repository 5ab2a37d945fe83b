"""Training a variant: its files, going on after a kill, and settings that can't work."""

import dataclasses

import jax
import numpy as np
import pytest

import models
from experiments import introspection_data
from experiments.introspecting import training as module
from experiments.introspecting.training import Training, records_of, validation
from experiments.introspecting.training_settings import TrainingSettings, make_settings
from nmjax.report import results

CHANGES = {
    "n": 120,
    "steps": 6,
    "warmup": 1,
    "batch_size": 4,
    "eval_every": 2,
    "eval_records": 8,
    "save_every": 4,
    "steps_per_call": 2,
    "lora_r": 2,
    "lora_targets": ("q_proj",),
    "magnitudes": (800.0,),
    "lr": 1e-2,
}


@pytest.fixture(scope="module")
def lm(instruct_lm):
    return instruct_lm


@pytest.fixture(scope="module")
def trained(lm, tmp_path_factory):
    settings = make_settings("tiny", CHANGES | {"output": str(tmp_path_factory.mktemp("trained"))})
    training = Training(settings, lm)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "curves", lambda history: b"drawn in the slow tests")
        return training, training.run(progress=False)


def test_what_a_training_leaves(lm, trained):
    training, found = trained
    there = {path.name for path in training.folder.iterdir()}
    assert there == {"final", "best", "step_4", "curves.png", "training.json"}
    steps = [record["step"] for record in found["history"] if "val_accuracy" in record]
    assert steps == [2, 4, 6] and found["best"]["val_accuracy"] == max(
        r["val_accuracy"] for r in found["history"] if "val_accuracy" in r
    )
    final, step_4 = (models.read_adapter(lm, training.folder / name) for name in ("final", "step_4"))
    leaf = ("layers_1", "attn", "q", "b")
    moved = [np.asarray(_at(adapter.weights, leaf)) for adapter in (final, step_4)]
    assert np.abs(moved[0]).max() > 1e-4 and np.abs(moved[0] - moved[1]).max() > 1e-5
    assert results.load_json(training.folder / "training.json") == found
    card = (training.folder / "final" / "README.md").read_text()
    assert training.hashes["records"][:16] in card and lm.fingerprint in card and "AUROC on held-out records" in card
    assert found["counts"]["test"]["seen before"]["contexts"] == 0


def _at(tree, path):
    for name in path:
        tree = tree[name]
    return tree


def test_a_training_that_is_done_is_read(lm, trained):
    training, found = trained
    again = Training(training.settings, lm)
    again.start = None  # what a training needs first
    assert again.run(progress=False) == found


@pytest.mark.slow
def test_a_training_that_was_killed_goes_on(lm, trained, tmp_path, monkeypatch):
    whole, found = trained
    training = Training(dataclasses.replace(whole.settings, output=str(tmp_path)), lm)
    export, exported = Training._export, []

    def killed(self, name, *rest):
        export(self, name, *rest)
        exported.append(name)
        if name == "final":
            raise KeyboardInterrupt

    monkeypatch.setattr(Training, "_export", killed)
    with pytest.raises(KeyboardInterrupt):
        training.run(progress=False)
    assert not (tmp_path / "training.json").exists()
    monkeypatch.setattr(Training, "_export", export)
    went_on = Training(training.settings, lm).run(progress=False)
    assert went_on["history"] == found["history"] and went_on["test"] == found["test"]
    for name in ("final", "best", "step_4"):
        file = f"{name}/adapter_model.safetensors"
        assert (tmp_path / file).read_bytes() == (whole.folder / file).read_bytes()


def test_another_training_in_the_folder_is_an_error(lm, trained):
    training, _ = trained
    with pytest.raises(ValueError, match="holds another training"):
        Training(dataclasses.replace(training.settings, seed=5), lm)


def test_a_folder_belongs_to_one_training_from_its_first_step_on(lm, trained, tmp_path, monkeypatch):
    settings = dataclasses.replace(trained[0].settings, output=str(tmp_path))
    training = Training(settings, lm)

    def killed(self, progress):
        with pytest.raises(OSError, match="being written by another run"):
            Training(settings, lm).run(progress=False)
        raise KeyboardInterrupt

    monkeypatch.setattr(Training, "_train", killed)
    with pytest.raises(KeyboardInterrupt):
        training.run(progress=False)
    with pytest.raises(ValueError, match="holds another training"):
        Training(dataclasses.replace(settings, seed=5), lm)
    Training(settings, lm)


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[]", "no result"), ('{"plan": 1}', "no result")])
def test_a_result_that_is_none_is_named(lm, trained, tmp_path, text, message):
    path = tmp_path / "training.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{path}.* {message}"):
        Training(dataclasses.replace(trained[0].settings, output=str(tmp_path)), lm)


def test_variants_differ_in_what_they_are_about_and_in_nothing_else(lm):
    original = make_settings("tiny", {"n": 400})
    base = records_of(original, 4)["train"]
    for variant in ("vague_prompt", "flipped_labels", "r1_minimal"):
        other = records_of(dataclasses.replace(original, variant=variant), 4)["train"]
        same = [(r.kind, r.vector, r.layers, r.magnitude, r.context, r.reply, r.system) for r in other]
        assert same == [(r.kind, r.vector, r.layers, r.magnitude, r.context, r.reply, r.system) for r in base]
    recipes = {make_settings("tiny", {"variant": v}).recipe(8000) for v in ("original", "food_control", "r1_minimal")}
    assert len(recipes) == 1


def test_published_settings_are_the_defaults():
    settings = TrainingSettings()
    recipe = settings.recipe(9000)
    assert (recipe.steps, recipe.peak_lr, recipe.warmup, recipe.decay) == (3375, 2e-4, 100, 3275)
    assert (recipe.b2, recipe.weight_decay, recipe.clip, settings.batch_size) == (0.999, 0.01, 1.0, 8)
    assert (settings.lora.r, settings.lora.alpha, settings.lora.dropout, settings.loss) == (16, 32, 0.05, "pair")
    minimal = dataclasses.replace(settings, variant="r1_minimal").lora
    assert (minimal.r, minimal.alpha) == (1, 2)


def test_validation_by_hand():
    class Part:
        records = [type("R", (), {"answer": a}) for a in (0, 0, 1, 1)]

    logprobs = np.log([[0.4, 0.1], [0.1, 0.3], [0.05, 0.05], [0.2, 0.7]])
    found = validation(Part, logprobs)
    assert found["val_accuracy"] == 0.5  # a tie goes to the first answer, which here is the wrong one
    np.testing.assert_allclose(found["val_pair_mass"], (0.5 + 0.4 + 0.1 + 0.9) / 4)
    np.testing.assert_allclose(found["val_loss"], -np.log([0.8, 0.25, 0.5, 7 / 9]).mean())
    np.testing.assert_allclose(found["val_auroc"], 0.75)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variant": "yes"}, "variant='yes'"),
        ({"schedule": "step"}, "schedule='step'"),
        ({"accumulate": 3}, "accumulate=3"),
        ({"eval_every": 3}, "eval_every=3, wanted a multiple of steps_per_call=2"),
        ({"lora_r": 0}, "r=0"),
        ({"loss": "sum"}, "loss='sum'"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"epochs": float("nan")}, "epochs=nan"),
        ({"warmup": -1}, "warmup=-1"),
        ({"seed": 2**32}, "seed=4294967296"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        make_settings("tiny", CHANGES | change)


def test_what_does_not_fit_the_model_is_said_before_training(lm, tmp_path):
    for change, message in [
        ({"lora_targets": ("w_proj",)}, r"targets \['w_proj'\] are no projections"),
        ({"steps": 1}, "steps=0 .* more than warmup"),
        ({"batch_size": 200}, "batch_size=200"),
        ({"vectors": 6, "data": str(tmp_path / "none")}, "none"),
    ]:
        with pytest.raises((ValueError, OSError), match=message):
            Training(make_settings("tiny", CHANGES | change | {"output": str(tmp_path / "x")}), lm)
    narrow = dataclasses.replace(lm, module=models.Llama(dataclasses.replace(lm.config, max_positions=20)))
    with pytest.raises(ValueError, match="train has a record of .* tokens, wanted at most 20"):
        Training(make_settings("tiny", CHANGES | {"output": str(tmp_path / "x")}), narrow)
    mesh = jax.sharding.AbstractMesh((2, 1, 1), ("data", "fsdp", "tensor"))
    with pytest.raises(ValueError, match="rows must be a multiple of data=2"):
        Training(make_settings("tiny", CHANGES | {"batch_size": 5, "output": str(tmp_path / "x")}), lm, mesh)


def test_data_for_something_else_are_refused(lm, tmp_path):
    drawn = {"n": 40, "lists": "tiny", "magnitudes": (800.0,), "output": str(tmp_path)}
    introspection_data.run(introspection_data.Settings(layers=lm.config.layers, **drawn))
    changes = CHANGES | {"data": str(tmp_path), "vectors": 200}
    for variant in ("original", "r1_minimal"):
        assert len(records_of(make_settings("tiny", changes | {"variant": variant}), 4)["train"]) == 32
    with pytest.raises(ValueError, match="has variant='original', wanted food_control"):
        records_of(make_settings("tiny", changes | {"variant": "food_control"}), 4)
    with pytest.raises(ValueError, match="has layers=4, wanted 8"):
        records_of(make_settings("tiny", changes), 8)
