"""The arms: what series and dose a pack is, what each cause keeps of a pack, and a placebo without aim."""

import json

import numpy as np
import pytest

import models
import nmjax
from experiments.calibration import arms as conditions
from experiments.calibration.arms import Arm
from nmjax import paths
from nmjax.interventions.sampler import Temperature
from nmjax.interventions.steering import steer
from nmjax.interventions.where import chosen_heads


@pytest.fixture(scope="module")
def lm():
    return models.load(paths.checkpoint_dir("tiny"))


def spec(name):
    return json.loads(paths.find_pack_file(name).read_text())


def kinds(pack):
    return [type(effect).__name__ for effect in pack.effects]


def error(call, *arguments):
    with pytest.raises(ValueError) as raised:
        call(*arguments)
    return str(raised.value)


# --- Packs ------------------------------------------------------------------------------------------------------------


def test_cocaine_50_is_cocaine_at_half_dose():
    named = conditions.from_packs(["none", "cocaine_10", "cocaine_50", "cocaine_100"], None)
    by_dose = conditions.from_packs(["none", *["cocaine"] * 3], ["1", "0.1", "0.5", "1"])
    assert [arm.label for arm in named] == ["none", "cocaine_10", "cocaine_50", "cocaine_100"]
    assert [arm.label for arm in by_dose] == ["none", "cocaine@0.1", "cocaine@0.5", "cocaine"]
    for a, b in zip(named, by_dose, strict=True):
        assert (a.series, a.dose) == (b.series, b.dose)
        assert a.base.content_hash() == b.base.content_hash()
        for left, right in zip(a.base.at(a.dose).effects, b.pack.effects, strict=True):
            assert type(left) is type(right) and left.dose == right.dose
    assert [(arm.series, arm.dose) for arm in named] == [
        ("none", 0.0), ("cocaine", 0.1), ("cocaine", 0.5), ("cocaine", 1.0)
    ]  # fmt: skip
    assert [arm.intensity for arm in by_dose] == [1, 0.1, 0.5, 1]
    (halved,) = conditions.from_packs(["cocaine_50"], ["0.5"])
    assert (halved.label, halved.series, halved.dose) == ("cocaine_50@0.5", "cocaine", 0.25)


@pytest.mark.parametrize(
    ("change", "series"),
    [
        (lambda effects: effects, "cocaine"),
        (lambda effects: effects[0].update(weight=0.3), "cocaine_50"),
        (lambda effects: effects[0]["parameters"].update(layers="deep"), "cocaine_50"),
        (lambda effects: effects.pop(), "cocaine_50"),
    ],
    ids=["same", "weight", "parameter", "fewer"],
)
def test_a_pack_that_only_has_the_name_of_a_dose_is_a_series_of_its_own(tmp_path, change, series):
    own = spec("cocaine_50")
    change(own["effects"])
    file = tmp_path / "cocaine_50.json"
    file.write_text(json.dumps(own))
    (arm,) = conditions.from_packs([str(file)], None)
    assert (arm.series, arm.dose) == (series, 0.5 if series == "cocaine" else 1.0)
    assert arm.base.at(arm.dose).effects[0].dose * arm.base.effects[0].gain == pytest.approx(
        float(arm.pack.effects[0].gain)
    )


def test_a_pack_whose_name_ends_in_no_number_is_itself():
    for name in ("lsd", "2c_b", "none"):
        (arm,) = conditions.from_packs([name], None)
        assert (arm.label, arm.series, arm.dose) == (name, name, 0.0 if name == "none" else 1.0)
        assert arm.base is not None and kinds(arm.base) == kinds(arm.pack)


def test_errors_of_packs_name_what_was_seen():
    text = error(conditions.from_packs, ["lsd", "none"], ["1"])
    assert "--intensities has 1 values (1) for 2 packs (lsd, none)" in text
    assert "--packs is empty" in error(conditions.from_packs, [], None)
    assert "holds lsd@0.5 twice" in error(conditions.from_packs, ["lsd", "lsd"], ["0.5", "0.50"])
    assert "no pack named 'lds'" in error(conditions.from_packs, ["lds"], None)
    for bad in ("much", "nan", "inf", "-0.5"):
        text = error(conditions.from_packs, ["lsd"], [bad])
        assert f"--intensities: {bad!r} for pack lsd; wanted a finite number >= 0" == text


# --- Causes -----------------------------------------------------------------------------------------------------------


def test_a_cause_keeps_its_effects_and_nothing_else():
    pack = nmjax.load_pack("cocaine")
    whole = kinds(pack)
    assert whole == ["ScaleQK", "Steer", "CountPenalty", "CountPenalty", "Temperature", "TopP"]
    wanted = {"temperature": ["Temperature"], "qk": ["ScaleQK"], "steering": ["Steer"], "full": whole, "placebo": whole}
    for cause, kept in wanted.items():
        part = conditions.part_of(pack, cause)
        assert kinds(part) == kept and part.name == f"cocaine:{cause}"
        assert all(effect in pack.effects for effect in part.effects)
    lsd = conditions.part_of(nmjax.load_pack("lsd"), "steering")
    assert kinds(lsd) == ["Steer"] * 4


def test_causes_run_at_every_dose_above_0_beside_the_sober_model():
    made = conditions.from_causes(["temperature", "full"], "cocaine", ["1", "0", "0.25"])
    assert [(arm.label, arm.series, arm.dose) for arm in made] == [
        ("none", "none", 0.0),
        ("temperature@0.25", "temperature", 0.25), ("temperature@1", "temperature", 1.0),
        ("full@0.25", "full", 0.25), ("full@1", "full", 1.0),
    ]  # fmt: skip
    assert isinstance(made[0], Arm) and made[0].pack.effects == ()
    for arm in made[1:]:
        assert [effect.dose for effect in arm.pack.effects] == [np.float32(arm.dose)] * len(arm.base.effects)
        assert all(effect.dose == 1 for effect in arm.base.effects)
    assert made == conditions.from_causes(["temperature", "full"], "cocaine", ["0.25", "1"])


def test_errors_of_causes_name_what_was_seen():
    for causes in ([], ["qk", "qk"], ["qk", "heat"]):
        text = error(conditions.from_causes, causes, "cocaine", ["1"])
        assert f"--arms={','.join(causes)}; wanted some of temperature, qk, steering, full, placebo" in text
    for doses in ([], ["0"], ["0.5", "0.50"]):
        text = error(conditions.from_causes, ["full"], "cocaine", doses)
        assert f"--doses={','.join(doses)}; wanted distinct numbers" in text
    assert "--doses: '-1'; wanted" in error(conditions.from_causes, ["full"], "cocaine", ["-1", "1"])
    text = error(conditions.from_causes, ["qk"], "lsd", ["1"])
    assert "--arms=qk: the pack lsd has no such effect; it has Steer, Steer" in text
    assert "the pack none has no such effect; it has none" in error(conditions.from_causes, ["qk"], "none", ["1"])
    heat = nmjax.compose(Temperature(change=np.float32(0.5), floor=np.float32(0.05)), name="heat")
    assert "heat neither scales attention nor steers" in error(conditions.part_of, heat, "placebo")


# --- The placebo ------------------------------------------------------------------------------------------------------


def test_the_placebo_pushes_as_hard_at_right_angles_and_scales_as_many_other_heads(lm):
    pack = nmjax.load_pack("cocaine")
    made = conditions.matched_placebo(pack, lm, seed=3)
    real, fake = pack.effects[1].bind(lm), made.effects[1].bind(lm)
    np.testing.assert_array_equal(real.coefficients, fake.coefficients)
    assert np.count_nonzero(real.coefficients), "the pack was meant to push"
    assert real.coef == fake.coef == "relative"
    v, w = (np.asarray(effect.vectors[0], np.float64) for effect in (real, fake))  # [L, D]
    np.testing.assert_allclose(np.linalg.norm(v, axis=-1), 1, rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(w, axis=-1), 1, rtol=1e-6)
    assert np.abs((v * w).sum(-1)).max() < 1e-6

    scaled, others = (effect.bind(lm).gain for effect in (pack.effects[0], made.effects[0]))
    assert scaled.shape == others.shape == (4, 4) and (scaled > 0).sum() > 0
    assert sorted(scaled.ravel()) == sorted(others.ravel()), "as many heads, by the same factor"
    assert not (scaled * others).any(), "none of the heads that the pack aims at"
    assert made.effects[2:] == pack.effects[2:], "the sampler's part stays"


def test_the_placebo_is_decided_by_its_seed(lm):
    pack = nmjax.load_pack("cocaine")
    made = [conditions.matched_placebo(pack, lm, seed) for seed in (0, 0, 1)]
    hashes = [iv.content_hash() for iv in made]
    assert hashes[0] == hashes[1] != hashes[2]
    first, again, other = (np.asarray(iv.effects[1].bind(lm).vectors) for iv in made)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.01
    assert any(
        (conditions.matched_placebo(pack, lm, seed).effects[0].gain != made[0].effects[0].gain).any()
        for seed in range(1, 6)
    )


def test_absolute_pushes_keep_their_norm_and_explicit_vectors_lose_their_aim(lm):
    named = nmjax.compose(steer("salient", 2.0, coef="absolute"), name="named")
    rows = np.random.default_rng(0).standard_normal((4, 128)).astype(np.float32)
    given = nmjax.compose(steer(rows, 2.0, coef="absolute"), steer(rows[0], 1.0), name="given")
    for pack in (named, given):
        for real, fake in zip(pack.effects, conditions.matched_placebo(pack, lm, 0).effects, strict=True):
            v, w = (np.asarray(effect.bind(lm).vectors[0], np.float64) for effect in (real, fake))
            lengths = np.linalg.norm(v, axis=-1)
            np.testing.assert_allclose(np.linalg.norm(w, axis=-1), lengths, rtol=1e-5)
            assert (np.abs((v * w).sum(-1)) < 1e-5 * lengths**2).all()


def test_a_placebo_of_several_directions_is_orthogonal_to_all_of_them(lm):
    pack = nmjax.load_pack("lsd")
    made = conditions.matched_placebo(pack, lm, seed=0)
    real = np.array([effect.bind(lm).vectors[0] for effect in pack.effects[:4]], np.float64)  # [4, L, D]
    fake = np.array([effect.bind(lm).vectors[0] for effect in made.effects[:4]], np.float64)
    assert np.abs(np.einsum("ald,bld->abl", real, fake)).max() < 1e-5
    cosines = np.einsum("ald,bld->abl", fake, fake)[~np.eye(4, dtype=bool)]
    assert np.abs(cosines).max() < 0.9, "and four directions of their own"


def test_a_placebo_needs_as_many_other_heads(lm):
    others = 1 - chosen_heads(lm, [0, 1], None)
    for factor, field, value in ((2.0, "gain", 1), (0.25, "loss", 3)):
        half = nmjax.compose(nmjax.scale_qk(factor, layers=[0, 1]), name="half of all")
        (effect,) = conditions.matched_placebo(half, lm, 0).effects
        np.testing.assert_array_equal(getattr(effect.bind(lm), field), value * others)
    whole = nmjax.compose(nmjax.scale_qk(2.0), name="all")
    assert "scales 16 of 16 heads; wanted as many others" in error(conditions.matched_placebo, whole, lm, 0)


def test_the_placebo_changes_the_model_in_its_own_way(lm):
    pack = nmjax.load_pack("cocaine")
    packs = [None, pack, conditions.matched_placebo(pack, lm, seed=0)]
    result = nmjax.forward(lm, [[1, 40, 80, 120, 160, 200, 240, 280]] * 3, packs=packs)
    sober, drugged, placebo = np.asarray(result.logits[:, -1], np.float64)  # before the sampler, which they share
    for a, b in ((sober, drugged), (sober, placebo), (drugged, placebo)):
        assert np.abs(a - b).max() > 0.05
