"""Every prediction can be supported, contradicted, undecided and not measured; and by nothing that says nothing."""

import numpy as np
import pytest

from experiments.calibration import analysis, predictions
from experiments.calibration import arms as conditions
from nmjax.metrics.stats import wilson_interval
from nmjax.report.tables import with_interval

PROMPTS = 12
DOSED = ("entropy_falls", "confidence_and_ece_rise", "accuracy_stays", "there_is_a_ceiling")


def verdict(made, which):
    """(verdict, reason) of a prediction, by the name of its function."""
    found = getattr(predictions, which)(made.study, made.findings)
    return found.verdict, found.because


def not_measured(made, which):
    said, because = verdict(made, which)
    return said == "undecided" and because.startswith("Not measured: ")


# --- The rules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "seen"),
    [
        ({"interval": [0.1, 0.2]}, 1),
        ({"interval": [-0.2, -0.1]}, -1),
        ({"interval": [-0.1, 0.2]}, 0),
        ({"interval": [0.0, 0.2]}, 0),
        ({"interval": [0.0, 0.0]}, 0),
        ({"interval": None}, 0),
        ({"interval": None, "p_value": None}, 0),
        ({"interval": [1e-9, 2e-9]}, 0),
        ({"interval": [-2e-9, -1e-9]}, 0),
        ({"interval": [0.1, 0.2], "p_value": 0.04}, 1),
        ({"interval": [0.1, 0.2], "p_value": 0.06}, 0),
    ],
)
def test_a_direction_takes_an_interval_beside_0(found, seen):
    assert predictions.direction(found) == seen


def test_all_parts_support_and_one_contradicts():
    assert predictions.decide([1, -1], [1, -1]) == "supported"
    assert predictions.decide([1, 1], [1, -1]) == "contradicted"
    assert predictions.decide([1, 0], [1, -1]) == "undecided"
    assert predictions.decide([-1, 0], [1, -1]) == "contradicted"
    tests = {name: {"verdict": name} for name in ("equivalent", "different", "undecided")}
    assert predictions.decide_equal([tests["equivalent"]] * 2) == "supported"
    assert predictions.decide_equal([tests["equivalent"], tests["undecided"]]) == "undecided"
    assert predictions.decide_equal([tests["undecided"], tests["different"]]) == "contradicted"


def test_all_verdicts_come_in_their_order_each_with_a_reason(lab):
    made = lab.make(lab.sharpened([1, 1.1, 1.5, 2], n=20))
    found = predictions.verdicts(made.study, made.findings)
    words = ["Entropy", "Confidence", "Accuracy", "Off the", "The sober", "The base", "There is a ceiling"]
    assert len(found) == 7 and all(v.claim.startswith(w) for v, w in zip(found, words, strict=True))
    assert all(v.because.endswith(".") for v in found)


def test_what_needs_doses_and_questions_is_not_measured_without(lab):
    probs, labels = lab.sharpened([1, 1.1, 1.5, 9], n=6)
    enough = lab.make((probs, labels))
    sober = lab.make((probs[:1], labels), packs=["none"])
    apart = lab.make((probs[:2], labels), packs=["lsd", "cocaine_100"])
    five = lab.make((probs[:, :5], labels[:5]))  # they agree too easily
    for which in DOSED:
        assert not not_measured(enough, which)
        assert all(not_measured(made, which) for made in (sober, apart, five))


def test_arms_that_do_nothing_decide_nothing(lab):
    """Identical answers have intervals without width."""
    made = lab.make(lab.sharpened([1, 1, 1, 1], n=40))
    assert [verdict(made, which)[0] for which in DOSED] == ["undecided"] * 4


def test_the_main_series_and_the_first_model_are_meant(lab):
    probs, labels = lab.sharpened([1, 0.5, 1.1, 1.5, 2], n=60)
    packs = ["none", "lsd", *lab.DOSES[1:]]
    falling, rising = (probs, labels), (probs[[4, 1, 3, 2, 0]], labels)
    assert verdict(lab.make([falling, rising], packs), "entropy_falls")[0] == "supported"
    assert verdict(lab.make([rising, falling], packs), "entropy_falls")[0] == "contradicted"


# --- 1: entropy -------------------------------------------------------------------------------------------------------


def test_entropy(lab):
    probs, labels = lab.sharpened([1, 1.1, 1.5, 2], n=60)
    made = lab.make((probs, labels, probs[[0] * 4]))
    said, because = verdict(made, "entropy_falls")
    entropy = made.findings.trends[0]["metrics"]["entropy"]
    assert said == "supported" and entropy["interval"][1] < 0
    assert with_interval(entropy["slope"], entropy["interval"], sign=True) in because
    assert "Before the sampler's effects, slope 0.000 [0.000, 0.000]." in because, "all of it is the sampler's"
    assert verdict(lab.make((probs[::-1], labels)), "entropy_falls")[0] == "contradicted"
    rng = np.random.default_rng(0)
    powers = rng.choice([0.5, 2], size=(4, 60, 1))  # each arm sharpens some answers and flattens others
    assert verdict(lab.make(lab.sharpened(powers, n=60)), "entropy_falls")[0] == "undecided"


# --- 2: confidence and calibration error ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("confidences", "accuracy", "wanted"),
    [
        ([0.5, 0.65, 0.8, 0.95], [0.5] * 4, "supported"),
        ([0.95, 0.8, 0.65, 0.5], [0.5] * 4, "contradicted"),
        ([0.5, 0.65, 0.95, 0.8], [0.5] * 4, "contradicted"),  # rises on the whole, but not by every step
        ([0.5, 0.65, 0.8, 0.95], [0.5, 0.65, 0.8, 0.95], "undecided"),  # confidence rises, always deserved
        ([0.5, 0.65, 0.8, 0.95], [0.2, 0.5, 0.75, 0.95], "contradicted"),  # rises, and gets better calibrated
    ],
)
def test_confidence_and_calibration_error(lab, confidences, accuracy, wanted):
    made = lab.make(lab.held(confidences, accuracy, n=200, jitter=0.01))
    said, because = verdict(made, "confidence_and_ece_rise")
    assert said == wanted
    for name in ("confidence", "ece"):
        for step in made.findings.trends[0]["steps"][name]:
            assert with_interval(step["difference"], step["interval"], sign=True) in because


def test_a_step_that_rises_by_chance_is_no_support(lab):
    """All means rise and the slopes are clear, but nothing tells the first two doses apart."""
    probs, labels = lab.held([0.55, 0.552, 0.8, 0.95], [0.5] * 4, n=200, jitter=0.01)
    means = probs.max(-1).mean(-1)
    assert (np.diff(means) > 0).all()
    made = lab.make((probs, labels))
    trend = made.findings.trends[0]
    eces = [made.findings.profile(label)["ece"] for label in trend["conditions"]]
    assert trend["metrics"]["confidence"]["interval"][0] > 0 and trend["metrics"]["ece"]["interval"][0] > 0
    assert (np.diff(eces) > 0).all()
    assert verdict(made, "confidence_and_ece_rise")[0] == "undecided"


# --- 3: accuracy ------------------------------------------------------------------------------------------------------


def test_accuracy(lab):
    supported = lab.make(lab.held([0.6] * 4, [0.700, 0.695, 0.705, 0.690], n=200))
    assert verdict(supported, "accuracy_stays")[0] == "supported"
    assert verdict(lab.make(lab.held([0.6] * 4, [0.7, 0.7, 0.7, 0.5], n=200)), "accuracy_stays")[0] == "contradicted"
    assert verdict(lab.make(lab.held([0.6] * 4, [0.70, 0.70, 0.70, 0.66], n=100)), "accuracy_stays")[0] == "undecided"
    margin = lab.make(lab.held([0.6] * 4, [0.70, 0.70, 0.70, 0.66], n=100), margin=0.2)
    assert verdict(margin, "accuracy_stays")[0] == "supported"
    assert "(within 0.2, fixed beforehand)" in predictions.accuracy_stays(margin.study, margin.findings).claim


def test_accuracy_that_never_changed_takes_enough_questions(lab):
    for n, wanted in ((30, "undecided"), (90, "supported")):
        made = lab.make(lab.held([0.6, 0.7, 0.8, 0.9], [0.7] * 4, n=n))
        assert made.findings.trends[0]["metrics"]["accuracy"]["interval"] == [0, 0]
        assert verdict(made, "accuracy_stays")[0] == wanted


def test_accuracy_is_that_of_the_lowest_dose_whatever_else_was_run(lab):
    """Without `none` the first arm is the baseline of all tables; it may be another pack."""
    probs, labels = lab.held([0.6] * 3, [0.4, 0.7, 0.7], n=200)
    made = lab.make((probs, labels), packs=["lsd", "cocaine_10", "cocaine_100"])
    assert made.findings.baseline_label == "lsd"
    said, because = verdict(made, "accuracy_stays")
    assert said == "supported" and because.startswith("Difference from cocaine_10 [90% interval]: cocaine_100 ")


def test_accuracy_says_how_many_of_the_confident_answers_are_right(lab):
    probs, labels = lab.held([0.6, 0.7, 0.92, 0.96], [0.7] * 4, n=100)
    because = verdict(lab.make((probs, labels)), "accuracy_stays")[1]
    share = with_interval(0.7, [float(end) for end in wilson_interval(70, 100)])
    assert "none: at 0.9 none, at 0.95 none, at 0.99 none" in because
    assert f"cocaine_100: at 0.9 {share} of 100, at 0.95 {share} of 100, at 0.99 none" in because


# --- 4 and 5: texts ---------------------------------------------------------------------------------------------------


def plain(i, length=16):
    return " ".join(f"word{i}x{k}" for k in range(length))


def looping(i, length=16):
    return "Sorry but I cannot help with that, a testament to " + " ".join(["round", "and"] * length)


def written(lab, packs=lambda: ["none", "cocaine_100"], prompts=PROMPTS, **texts):
    own = {arm: [text(i) for i in range(prompts)] for arm, text in texts.items()}
    answers = lab.sharpened([1, 2], n=20)
    return lab.make(answers, packs=packs(), texts=own)


def test_texts(lab):
    said, because = verdict(written(lab, none=plain, cocaine_100=looping), "texts_get_worse")
    assert said == "supported" and because.startswith("cocaine_100 less none, at equal length: diversity -")
    assert verdict(written(lab, none=looping, cocaine_100=plain), "texts_get_worse")[0] == "contradicted"
    assert verdict(written(lab, none=plain, cocaine_100=plain), "texts_get_worse")[0] == "undecided"
    four = written(lab, prompts=4, none=plain, cocaine_100=looping)
    assert verdict(four, "texts_get_worse")[0] == "undecided", "no test of four prompts is below 0.05"


def test_texts_without_any_refusal_leave_refusals_undecided(lab):
    def no_refusal(i):
        return looping(i).replace("cannot", "shall")

    said, because = verdict(written(lab, none=plain, cocaine_100=no_refusal), "texts_get_worse")
    assert said == "undecided" and "refusals (as written) 0.000 [0.000, 0.000]" in because
    found = written(lab, none=plain, cocaine_100=no_refusal)
    entry = analysis.writing(found.study, 0, found.written[0])[1]["against_sober"]["length_matched"]
    assert all(predictions.direction(entry[name]) == way for name, _, way in predictions.TEXT_CLAIMS[:3])


def test_a_longer_text_is_not_blamed_for_its_length(lab):
    """The arms write the same words; the sober one goes on, and round in circles."""

    def goes_on(i):
        return plain(i, 10) + " " + " ".join(["round", "and"] * 10) + " a testament to"

    made = written(lab, none=goes_on, cocaine_100=lambda i: plain(i, 10))
    entry = analysis.writing(made.study, 0, made.written[0])[1]["against_sober"]
    assert all(predictions.direction(entry[n]) == -1 for n in ("repetition_rate", "stock_phrase_rate"))
    assert verdict(made, "texts_get_worse")[0] == "undecided"


def test_texts_that_say_nothing_decide_nothing(lab):
    for which in ("texts_get_worse", "stimulant_loses_most"):
        silent = written(lab, none=plain, cocaine_100=lambda i: "", lsd=plain)
        said, because = verdict(silent, which)
        assert said == "undecided" and "undefined" in because


def test_the_stimulant_loses_most(lab):
    kinds = {"none": plain, "cocaine_100": looping, "lsd": plain}
    which = "stimulant_loses_most"
    said, because = verdict(written(lab, **kinds), which)
    assert said == "supported" and "cocaine_100 less none -" in because and "less lsd -" in because
    assert verdict(written(lab, **{**kinds, "cocaine_100": plain, "lsd": looping}), which)[0] == "contradicted"
    assert verdict(written(lab, **{**kinds, "lsd": looping}), which)[0] == "undecided"
    assert verdict(written(lab, **{**kinds, "cocaine_100": plain}), which)[0] == "undecided"


def test_texts_are_not_measured_where_none_were_written_under_a_dose(lab):
    answers = lab.sharpened([1, 2], n=20)
    for which in ("texts_get_worse", "stimulant_loses_most"):
        assert not_measured(lab.make(answers, packs=["none", "cocaine_100"]), which)
        sober = written(lab, packs=lambda: ["none", "caffeine"], none=plain, lsd=plain)
        assert not_measured(sober, which)
    own = written(lab, packs=lambda: ["none", "lsd"], none=plain, lsd=looping)
    assert not_measured(own, "stimulant_loses_most"), "the psychedelic is not compared with itself"
    assert not not_measured(own, "texts_get_worse")


def test_texts_are_those_of_the_largest_dose(lab):
    answers = lab.sharpened([1, 1.1, 1.5, 2], n=20)
    own = {"none": plain, "cocaine_100": plain, "cocaine_10": looping, "lsd": plain}
    made = lab.make(answers, texts={arm: [text(i) for i in range(PROMPTS)] for arm, text in own.items()})
    assert "cocaine_100 less none" in verdict(made, "texts_get_worse")[1]


# --- 6: base against instruct -----------------------------------------------------------------------------------------


def two_models(lab, drugged, n=400, confidence=0.85, accuracy=0.85, **settings):
    """The base model's answers under the largest dose are held at and right in `drugged`; the other's as given."""
    base, labels = lab.held([0.5, drugged[0]], [0.5, drugged[1]], n=n, jitter=0.003)
    instruct, _ = lab.held([confidence] * 2, [accuracy] * 2, n=n, jitter=0.003)
    return lab.make([(base, labels), (instruct, labels)], packs=["none", "cocaine_100"], **settings)


def test_base_and_instruct(lab):
    which = "base_becomes_instruct"
    said, because = verdict(two_models(lab, (0.85, 0.845)), which)
    assert said == "supported" and because.startswith("cocaine_100 less instruct: none [90% interval], margin 0.05: ")
    assert because.count("(equivalent)") == len(analysis.EQUIVALENCE)
    said, because = verdict(two_models(lab, (0.95, 0.85)), which)
    assert said == "contradicted" and "(different)" in because
    assert verdict(two_models(lab, (0.85, 0.80), n=60), which)[0] == "undecided"
    assert verdict(two_models(lab, (0.85, 0.845), margin=0.005), which)[0] == "undecided"


def test_one_measure_that_differs_contradicts_and_the_distance_of_the_answers_is_told(lab):
    """As right and about as confident, but confident where it is wrong."""
    made = two_models(lab, (0.85, 0.85), n=300)
    base, instruct = made.asked
    for k, row in enumerate(base):
        right = row["probs"][1].argmax() == row["answer"]
        c = 0.95 if (not right or k % 2 == 0) else 0.72
        row["probs"] = row["probs"].copy()
        row["probs"][1] = (1 - c) / 3
        row["probs"][1, instruct[k]["probs"][0].argmax()] = c
    found = analysis.analyse(made.study, made.asked, made.slopes, made.written)
    entry = found.comparison[-1]
    assert entry["profile"]["accuracy"]["verdict"] == "equivalent"
    assert entry["profile"]["ece"]["verdict"] == "different"
    said = predictions.base_becomes_instruct(made.study, found)
    assert said.verdict == "contradicted"
    apart, sober = (c["distance"]["total_variation"] for c in (entry, found.comparison[0]))
    far, near = (with_interval(d["mean"], d["interval"]) for d in (apart, sober))
    assert f"The answers are {far} apart in total variation (without a dose {near})." in said.because


def test_base_and_instruct_are_not_measured_without_a_dose_or_a_second_model(lab):
    which = "base_becomes_instruct"
    answers = lab.sharpened([1, 1, 1, 1], n=200)
    assert not_measured(lab.make(answers), which)
    equal = lab.make([(answers[0][:1], answers[1])] * 2, packs=["none"])
    assert equal.findings.comparison[0]["profile"]["accuracy"]["verdict"] == "equivalent"
    assert not_measured(equal, which), "without a dose there is nothing to become"
    assert not_measured(lab.make([(answers[0][:2], answers[1])] * 2, packs=["cocaine_10", "cocaine_100"]), which)
    few = [(p[:, :5], y[:5]) for p, y in [answers] * 2]
    assert not_measured(lab.make(few), which)


# --- 7: the ceiling ---------------------------------------------------------------------------------------------------


def test_the_ceiling(lab):
    which = "there_is_a_ceiling"
    peaked = lab.make(lab.held([0.6] * 4, [0.5, 0.8, 0.7, 0.5], n=300))
    said, because = verdict(peaked, which)
    assert said == "supported"
    assert "accuracy is best at dose 0.1 [0.1, 0.1] and changes by -0.300 [" in because
    assert "NLL (nats) is best at dose 0.1 [0.1, 0.1] and changes by +" in because and "at dose 1; " in because
    rising = lab.make(lab.held([0.6] * 4, [0.3, 0.5, 0.7, 0.9], n=300))
    said, because = verdict(rising, which)
    assert said == "contradicted"
    assert because.startswith("accuracy is best at dose 1 [1, 1]; NLL (nats) is best at dose 1 [1, 1]; ")
    flat = lab.make(lab.held([0.6] * 4, [0.60, 0.59, 0.61, 0.60], n=100))
    assert verdict(flat, which)[0] == "undecided"
    unsure = lab.make(lab.held([0.6] * 4, [0.58, 0.59, 0.60, 0.61], n=100))
    said, because = verdict(unsure, which)
    assert said == "undecided" and "accuracy is best at dose 1 [" in because and "changes" not in because


def test_a_worse_score_of_the_same_answers_is_a_ceiling_too(lab):
    """Accuracy stays and confidence outgrows it: NLL and Brier's score both say so."""
    made = lab.make(lab.held([0.6, 0.7, 0.9, 0.99], [0.7] * 4, n=300))
    best = made.findings.trends[0]["best"]
    assert best["accuracy"]["falls_beyond"] is False and best["nll"]["falls_beyond"] and best["nll"]["dose"] == 0.1
    assert verdict(made, "there_is_a_ceiling")[0] == "supported"


def test_accuracy_alone_makes_a_ceiling(lab):
    """Fewer answers are right, but they are no longer held at 0.99, and NLL takes that for better."""
    made = lab.make(lab.held([0.99, 0.99, 0.99, 0.65], [0.8, 0.8, 0.8, 0.65], n=150))
    best = made.findings.trends[0]["best"]
    assert not best["nll"]["falls_beyond"] and best["accuracy"]["falls_beyond"]
    assert verdict(made, "there_is_a_ceiling")[0] == "supported"


def test_the_floor_of_nll_makes_no_ceiling(lab):
    """Right answers that truncation cut cost 27.6 nats each, a number that is our choice; all else got no worse."""
    probs, labels = lab.held([0.6] * 4, [0.7] * 4, n=300, jitter=0.05)
    rng = np.random.default_rng(1)
    power = 1 + 0.2 * rng.standard_normal((300, 1))
    probs[3] = probs[3] ** power
    wrong = np.flatnonzero(probs[3].argmax(-1) != labels)[:10]
    probs[3, wrong, labels[wrong]] = 1e-12
    probs[3] /= probs[3].sum(-1, keepdims=True)
    made = lab.make((probs, labels))
    best = made.findings.trends[0]["best"]
    assert best["nll"]["falls_beyond"] and best["nll"]["difference"] > 0.5
    assert not best["brier_multiclass"]["falls_beyond"]
    said, because = verdict(made, "there_is_a_ceiling")
    assert said == "undecided" and "a rise of NLL alone may be no more than the floor" in because


# --- Arms of causes ---------------------------------------------------------------------------------------------------


def test_of_causes_the_whole_pack_is_the_main_series(lab):
    arms = conditions.from_causes(["temperature", "qk", "full", "placebo"], "cocaine", ["0.5", "1"])
    power = {"none": 1, "temperature": 0.5, "qk": 0.5, "full": 2, "placebo": 0.5}
    probs, labels = lab.sharpened([power[arm.series] ** arm.dose for arm in arms])
    made = lab.make((probs, labels), arms=arms)
    assert [t["series"] for t in made.findings.trends] == ["temperature", "qk", "full", "placebo"]
    said, because = verdict(made, "entropy_falls")
    assert said == "supported" and "at doses 0, 0.5, 1" in because
