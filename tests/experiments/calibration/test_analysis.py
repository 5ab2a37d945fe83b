"""The analysis against closed forms, finite differences, loops and SciPy."""

import dataclasses

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.special import log_softmax
from scipy.stats import binom

from experiments.calibration import analysis
from experiments.calibration import arms as conditions
from nmjax.metrics import battery, calibration, stats, texts, trend


def linear_confidence(n, doses, seed=0):
    """Answers [P, n, 4] held at 0.4 + dose * b, and each question's b [n]; and labels [n], all right."""
    rng = np.random.default_rng(seed)
    b, labels = rng.uniform(0.1, 0.5, n), rng.integers(4, size=n)
    probs = []
    for dose in doses:
        c = 0.4 + dose * b
        p = np.repeat((1 - c[:, None]) / 3, 4, axis=1)
        p[np.arange(n), labels] = c
        probs.append(p)
    return np.array(probs), labels, b


# --- Records ----------------------------------------------------------------------------------------------------------


def test_collect_puts_conditions_in_front_and_models_behind_each_other(lab):
    rng = np.random.default_rng(0)
    first, second = rng.dirichlet([1] * 4, size=(3, 7)), rng.dirichlet([1] * 4, size=(2, 7))
    labels = rng.integers(4, size=7)
    sober = rng.dirichlet([1] * 4, size=(3, 7))
    asked = [lab.records(first, labels, sober, mass=0.5), lab.records(second, labels, mass=0.25)]
    for rows in asked:  # as they come back from the log
        for row in rows:
            row.update({k: x.tolist() for k, x in row.items() if isinstance(x, np.ndarray)})
    asked[0][4]["removed"][1] = 0.75
    answers = analysis.collect(asked)
    np.testing.assert_allclose(answers.probs, np.concatenate([first, second]), atol=1e-15)
    np.testing.assert_allclose(answers.sober_probs, np.concatenate([sober, second]), atol=1e-15)
    np.testing.assert_allclose(answers.mass, np.repeat([[0.5], [0.25]], [3, 2], axis=0) * np.ones(7))
    np.testing.assert_allclose(answers.sober_mass, answers.mass)
    assert answers.other_mass.shape == (5, 7) and (answers.other_mass == 0.1).all()
    assert answers.removed[1, 4] == 0.75 == answers.removed.sum()
    np.testing.assert_array_equal(answers.labels, labels)


def test_the_mass_of_the_letters_is_a_mean_with_its_interval_and_the_least(lab):
    rng = np.random.default_rng(1)
    probs, labels = rng.dirichlet([1] * 4, size=(2, 30)), rng.integers(4, size=30)
    answers = analysis.collect([lab.records(probs, labels)])
    mass, sober_mass = rng.random((2, 2, 30))
    answers = dataclasses.replace(answers, mass=mass, sober_mass=sober_mass, removed=mass / 2)
    strata = [str(i % 3) for i in range(30)]
    entry = analysis.letter_mass(answers, 1, 300, 5, strata)
    for name, values in (("after_all_effects", mass[1]), ("before_sampler", sober_mass[1])):
        draws = np.concatenate(list(stats.bootstrap_weights(30, 300, 5, strata))) @ values / 30
        np.testing.assert_allclose(entry[name]["interval"], np.quantile(draws, [0.025, 0.975]))
        assert (entry[name]["mean"], entry[name]["min"]) == (values.mean(), values.min())
    assert entry["other_form"] == pytest.approx(0.1)
    assert entry["removed_by_truncation"] == pytest.approx(mass[1].mean() / 2)


# --- Dose and response ------------------------------------------------------------------------------------------------


def test_slopes_and_steps_of_what_is_linear_in_the_dose(lab):
    order = ["cocaine_50", "none", "cocaine_100", "lsd", "cocaine_10"]  # not in order of dose, another pack between
    doses = [0.5, 0.0, 1.0, 0.7, 0.1]
    probs, labels, b = linear_confidence(90, doses)
    made = lab.make((probs, labels, probs[::-1]), packs=order)
    found = made.findings
    cocaine, lsd = found.trends
    assert (cocaine["series"], cocaine["doses"]) == ("cocaine", [0, 0.1, 0.5, 1])
    assert cocaine["conditions"] == ["none", "cocaine_10", "cocaine_50", "cocaine_100"]
    assert (lsd["series"], lsd["doses"], lsd["conditions"]) == ("lsd", [0, 1], ["none", "lsd"])

    slope = cocaine["metrics"]["confidence"]
    assert slope["slope"] == pytest.approx(b.mean(), abs=1e-12) and slope["monotone"] == "rising"
    strata = [q.subject for q in made.study.questions]
    np.testing.assert_allclose(slope["interval"], stats.mean_interval(b, 100, 0, strata), atol=1e-12)
    assert slope["p_value"] < 0.001
    np.testing.assert_allclose(  # Brier's score is (1 - 0.4 - dose b)^2
        cocaine["metrics"]["brier_score"]["slope"],
        np.polyfit([0, 0.1, 0.5, 1], [((0.6 - d * b) ** 2).mean() for d in (0, 0.1, 0.5, 1)], 1)[0],
    )
    eces = [float(calibration.ece(probs[order.index(label)], labels)) for label in cocaine["conditions"]]
    assert cocaine["metrics"]["ece"]["slope"] == pytest.approx(np.polyfit([0, 0.1, 0.5, 1], eces, 1)[0])
    flat = cocaine["metrics"]["accuracy"]  # all are right: rounding must not look like a trend
    assert (flat["slope"], flat["interval"], flat["p_value"], flat["monotone"]) == (0, [0, 0], 1, "flat")
    assert lsd["metrics"]["confidence"]["slope"] == pytest.approx(0.7 * b.mean())

    for step, change in zip(cocaine["steps"]["confidence"], (0.1, 0.4, 0.5), strict=True):
        assert step["difference"] == pytest.approx(change * b.mean())
        low, high = stats.mean_interval(change * b, 100, 0, strata)  # about the draws' own mean, at the estimate
        np.testing.assert_allclose(step["interval"], (low, high), atol=0.05 * change)
        assert step["interval"][0] < step["difference"] < step["interval"][1]
    assert [step["difference"] for step in cocaine["steps"]["ece"]] == pytest.approx(list(np.diff(eces)))

    # Before the sampler the arms were given in reverse.
    sober = {label: doses[::-1][order.index(label)] for label in cocaine["conditions"]}
    reversed_means = [0.4 + dose * b.mean() for dose in sober.values()]
    assert cocaine["metrics_before_sampler"]["confidence"]["slope"] == pytest.approx(
        np.polyfit([0, 0.1, 0.5, 1], reversed_means, 1)[0]
    )


def test_the_best_doses_are_those_of_each_measure(lab):
    probs, labels = lab.held([0.5, 0.6, 0.7, 0.8], [0.5, 0.8, 0.6, 0.4], n=300)
    found = lab.make((probs, labels)).findings
    best = found.trends[0]["best"]
    values = found.after.questions
    for name, largest in (("accuracy", True), ("nll", False), ("brier_multiclass", False)):
        strata = [f"subject {i % 3}" for i in range(300)]
        assert best[name] == trend.peak([0, 0.1, 0.5, 1], values[name], 100, 0, strata, largest)
        assert best[name]["dose"] == 0.1 and best[name]["falls_beyond"] is True
    assert best["accuracy"]["difference"] == pytest.approx(-0.4) and best["nll"]["difference"] > 0


def test_a_dose_that_two_arms_have_counts_once_and_one_dose_is_no_trend(lab):
    probs, labels, _ = linear_confidence(30, [0, 1, 0.5])
    found = lab.make((probs, labels), packs=["none", "cocaine", "cocaine_100"]).findings
    assert [(t["doses"], t["conditions"]) for t in found.trends] == [([0, 1], ["none", "cocaine"])]
    assert lab.make((probs[:1], labels), packs=["none"]).findings.trends == []
    assert lab.make((probs[:2], labels), packs=["lsd", "cocaine_100"]).findings.trends == []


# --- Derivatives ------------------------------------------------------------------------------------------------------


def smooth_error(confidence, correct, bandwidth):
    """The smooth ECE by its definition: Gaussians reflected at 0 and 1, the absolute surplus integrated."""
    t = (np.arange(20_000) + 0.5) / 20_000
    kernel = sum(  # [20000, N]; the reflections at 2 c and -2 are out of reach
        np.exp(-(((t[:, None] - centre) / bandwidth) ** 2) / 2) for centre in (confidence, -confidence, 2 - confidence)
    ) / (bandwidth * np.sqrt(2 * np.pi))
    return np.abs(kernel @ (confidence - correct)).mean() / len(correct)


def test_derivatives_are_those_of_finite_differences(lab):
    rng = np.random.default_rng(2)
    Q, G = 12, len(lab.POINTS)
    a, b = rng.normal(size=(Q, G, 4)) - 2, rng.normal(size=(Q, G, 4))  # logarithms of unnormalised probabilities
    probs, labels = lab.sharpened([1, 1, 1, 1], n=20)
    made = lab.make((probs, labels), slopes=(a, b))
    found = analysis.derivatives(made.study, 0, made.slopes[0])
    assert [(d["series"], d["dose"], d["questions"]) for d in found] == [(*point, Q) for point in lab.POINTS]
    y, step = labels[:Q], 1e-4
    for g, entry in enumerate(found):

        def nll(move, g=g):
            return -log_softmax(a[:, g] + move * b[:, g], axis=-1)[np.arange(Q), y]

        def error(move, g=g):
            p = np.exp(log_softmax(a[:, g] + move * b[:, g], axis=-1))
            return smooth_error(p.max(-1), p.argmax(-1) == y, analysis.BANDWIDTH)

        slopes = (nll(step) - nll(-step)) / (2 * step)
        assert entry["nll"]["value"] == pytest.approx(nll(0).mean())
        assert entry["nll"]["derivative"] == pytest.approx(slopes.mean(), abs=1e-6)
        strata = [q.subject for q in made.study.questions[:Q]]
        np.testing.assert_allclose(entry["nll"]["interval"], stats.mean_interval(slopes, 100, 0, strata), atol=1e-6)
        assert entry["soft_ece"]["value"] == pytest.approx(error(0), abs=1e-4)
        assert entry["soft_ece"]["derivative"] == pytest.approx((error(step) - error(-step)) / (2 * step), abs=1e-3)
    assert np.abs([d["soft_ece"]["derivative"] for d in found]).max() > 0.02, "there is something to compare"


def test_one_question_has_a_derivative_without_an_interval(lab):
    rng = np.random.default_rng(3)
    probs, labels = lab.sharpened([1, 1, 1, 1], n=20)
    made = lab.make((probs, labels), slopes=rng.normal(size=(2, 1, 4, 4)))
    found = analysis.derivatives(made.study, 0, made.slopes[0])
    assert all(d["nll"]["interval"] is None and np.isfinite(d["nll"]["derivative"]) for d in found)
    assert analysis.derivatives(made.study, 0, []) == []


# --- Texts ------------------------------------------------------------------------------------------------------------


def test_perplexity_is_the_exponential_of_the_loss_of_a_token():
    tokens, nll, sober = [4, 2, 10, 6, 40, 1], [8.0, 1.0, 30.0, 9.0, 20.0, 5.0], [10.0, 2.0, 50.0, 12.0, 25.0, 6.0]
    responses = [{"tokens": t, "nll": a, "sober_nll": b} for t, a, b in zip(tokens, nll, sober, strict=True)]
    prompts = ["p", "p", "q", "r", "s", "t"]
    found = analysis.perplexities(responses, prompts, 200, 7)
    assert found["perplexity"] == pytest.approx(np.exp(73 / 63))
    assert found["perplexity_sober"] == pytest.approx(np.exp(105 / 63))
    by_prompt = {"perplexity": [9, 30, 9, 20, 5], "perplexity_sober": [12, 50, 12, 25, 6]}
    for name, losses in by_prompt.items():
        draws = []
        for weights in np.concatenate(list(stats.bootstrap_weights(5, 200, 7))):
            loss = sum(w * x for w, x in zip(weights, losses, strict=True))
            draws.append(np.exp(loss / sum(w * x for w, x in zip(weights, [6, 10, 6, 40, 1], strict=True))))
        np.testing.assert_allclose(found[f"{name}_interval"], np.quantile(draws, [0.025, 0.975]))


def test_texts_are_measured_arm_by_arm_and_compared_with_the_sober_and_the_psychedelic(lab):
    own = {
        "none": [f"one two three four word{i} six" for i in range(7)],
        "cocaine_100": [f"one two one two one two word{i}" for i in range(7)],
        "lsd": ["a b c d e f g h i j k l m n o p q"] * 7,
    }
    made = lab.make(lab.sharpened([1, 1.2], n=20), packs=["none", "cocaine_100"], texts=own)
    found = {entry["arm"]: entry for entry in analysis.writing(made.study, 0, made.written[0])}
    assert list(found) == list(own) and [entry["ended"] for entry in found.values()] == [1, 1, 0]
    prompts = [f"p{i}" for i in range(7)]
    cut = dict(zip(own, texts.length_matched(list(own.values())), strict=True))
    measured = {arm: texts.measure_responses(t, prompts, 100, 0) for arm, t in own.items()}
    matched = {arm: texts.measure_responses(t, prompts, 100, 0) for arm, t in cut.items()}
    for arm, entry in found.items():
        assert {name: entry["measures"][name] for name in measured[arm]} == measured[arm]
        assert entry["measures"]["length_matched"] == matched[arm]
        assert entry["measures"]["perplexity_sober"] == pytest.approx(np.exp(2))
        for name, other in (("against_sober", "none"), ("against_psychedelic", "lsd")):
            if arm == other:
                assert name not in entry
                continue
            wanted = texts.compare_responses(measured[arm], measured[other], 100, 0)
            assert {k: v for k, v in entry[name].items() if k != "length_matched"} == wanted
            assert entry[name]["length_matched"] == texts.compare_responses(matched[arm], matched[other], 100, 0)
    assert analysis.writing(made.study, 0, []) == []


# --- Equality, base against instruct ----------------------------------------------------------------------------------


def test_what_never_differed_is_known_as_well_as_the_number_of_questions_allows(lab):
    """No width is no knowledge: the binomial says how many differences N questions may have missed."""
    for n, verdict in ((20, "undecided"), (58, "undecided"), (60, "equivalent"), (300, "equivalent")):
        probs, labels = lab.sharpened([1, 1], n=n)
        measured = battery.measure(probs, labels, draws=100)
        for name, unit in (("accuracy", 1), ("confidence", 1), ("entropy", np.log(4))):
            found = analysis.equality(measured, name, 1, 0, margin=0.05)
            low, high = found["interval_90"]
            assert binom.cdf(0, n, high / unit) == pytest.approx(0.05) and low == -high
            assert (found["verdict"], found["difference"]) == (verdict, 0), (n, name)
    assert analysis.equality(measured, "ece", 1, 0, 0.05)["interval_90"][1] > 0, "ECE has its own bounds of the bias"


def test_equality_is_decided_by_the_90_percent_interval_of_the_paired_difference(lab):
    probs, labels = lab.held([0.7, 0.72, 0.9], [0.7, 0.7, 0.7], n=200, jitter=0.05)
    measured = battery.measure(probs, labels, draws=400, seed=3)
    for k, verdict in ((1, "equivalent"), (2, "different")):
        found = analysis.equality(measured, "confidence", k, 0, margin=0.05)
        change = probs[k].max(-1) - probs[0].max(-1)
        draws = np.concatenate(list(stats.bootstrap_weights(200, 400, 3))) @ change / 200
        ends = change.mean() + np.quantile(draws - draws.mean(), [0.05, 0.95])
        np.testing.assert_allclose(found["interval_90"], ends)
        np.testing.assert_allclose(found["interval"], change.mean() + np.quantile(draws - draws.mean(), [0.025, 0.975]))
        assert (found["verdict"], found["margin"]) == (verdict, 0.05)
    wide = analysis.equality(measured, "entropy", 2, 0, margin=0.05)
    assert wide["margin"] == pytest.approx(0.05 * np.log(4))


def test_models_are_as_far_apart_as_counted_by_hand(lab):
    rng = np.random.default_rng(5)
    base, instruct = rng.dirichlet([1] * 4, size=(4, 40)), rng.dirichlet([1] * 4, size=(4, 40))
    base[0, :2] = [[1, 0, 0, 0], [0, 1, 0, 0]]  # zeros, and two that share nothing with
    instruct[0, :2] = [[0, 0, 1, 0], [0, 1, 0, 0]]
    labels = rng.integers(4, size=40)
    made = lab.make([(base, labels), (instruct, labels)])
    comparison = made.findings.comparison
    assert [(c["left"], c["right"], c["dose"]) for c in comparison] == [
        ("none", "instruct: none", 0), ("cocaine_10", "instruct: none", 0.1),
        ("cocaine_50", "instruct: none", 0.5), ("cocaine_100", "instruct: none", 1),
    ]  # fmt: skip
    strata = [q.subject for q in made.study.questions]
    for p, entry in zip(base, comparison, strict=True):
        q = instruct[0]
        pairs = list(zip(p, q, strict=True))
        counted = {
            "total_variation": [sum(max(a - b, 0) for a, b in zip(x, y, strict=True)) for x, y in pairs],
            "jensen_shannon": [jensenshannon(x, y) ** 2 for x, y in pairs],
            "same_answer": [float(np.argmax(x) == np.argmax(y)) for x, y in pairs],
        }
        for name, values in counted.items():
            assert entry["distance"][name]["mean"] == pytest.approx(np.mean(values)), name
            np.testing.assert_allclose(
                entry["distance"][name]["interval"], stats.mean_interval(values, 100, 0, strata), atol=1e-9
            )
        assert list(entry["profile"]) == list(analysis.EQUIVALENCE)
        gap = calibration.mean_confidence(p, labels) - calibration.mean_confidence(q, labels)
        assert entry["profile"]["confidence"]["difference"] == pytest.approx(float(gap))
    assert counted["total_variation"] != [0] * 40


def test_other_series_are_not_compared_and_without_a_sober_second_model_nothing_is(lab):
    probs, labels = lab.sharpened([1] * 4, n=20)
    made = lab.make([(probs, labels)] * 2, packs=["none", "lsd", "cocaine_10", "cocaine_100"])
    assert [c["left"] for c in made.findings.comparison] == ["none", "cocaine_10", "cocaine_100"]
    made = lab.make([(probs[:2], labels)] * 2, packs=["cocaine_10", "cocaine_100"])
    assert made.findings.comparison == []


def test_findings_know_the_baseline_and_the_labels_of_both_models(lab):
    probs, labels = lab.sharpened([2, 1, 1.5], n=20)
    arms = conditions.from_packs(["cocaine_100", "none", "lsd"], None)
    found = lab.make([(probs, labels)] * 2, arms=arms).findings
    own = [arm.label for arm in arms]
    assert found.labels == [*own, *(f"instruct: {label}" for label in own)]
    assert (found.baseline, found.baseline_label) == (1, "none")
    assert found.after.differences[1] is None and found.after.differences[0] is not None
    assert found.profile("lsd")["confidence"] == pytest.approx(probs[2].max(-1).mean())
    test = found.equality("confidence", "lsd", "instruct: lsd", 0.05)
    assert test["difference"] == 0 and found.equality("confidence", "lsd", "none", 0.05)["difference"] > 0.01
