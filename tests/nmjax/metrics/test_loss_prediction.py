"""Measures of predicted losses against scipy and scikit-learn; rivals never saw what they predict; intervals."""

import json

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import PredefinedSplit, cross_val_predict

from nmjax.metrics import calibration, crossfit, stats
from nmjax.metrics import loss_prediction as lp


@pytest.fixture(scope="module")
def tokens():
    """600 tokens of 30 chunks: losses that rise with the entropy and by chunk, a head that knows some of both."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(30), 20)
    entropy = rng.gamma(4, 0.5, 600)
    known = 0.5 * entropy + rng.normal(0, 0.5, 30)[groups]
    actual = known + rng.exponential(0.5, 600)
    return {
        "predicted": 0.8 * known + 0.6 + rng.normal(0, 0.1, 600),
        "actual": actual,
        "wrong": rng.random(600) < 1 - np.exp(-np.maximum(actual, 0) / 2),
        "entropy": entropy,
        "max_prob": np.clip(np.exp(-entropy / 2) + rng.normal(0, 0.1, 600), 0, 1),
        "groups": groups,
    }


def of_head(tokens, **changed):
    return lp.quality(**{k: v for k, v in (tokens | changed).items() if k not in ("entropy", "max_prob")})


def of_rivals(tokens, **changed):
    return lp.baselines(**{k: v for k, v in (tokens | changed).items() if k != "predicted"})


def flat(value):
    if isinstance(value, dict):
        return [number for v in value.values() for number in flat(v)]
    return [number for v in value for number in flat(v)] if isinstance(value, list) else [value]


def folds_of(groups):
    return crossfit.grouped_folds(groups, np.zeros(len(groups)))


def test_measures_equal_scipy_and_scikit_learn(tokens):
    c, f, found = tokens["predicted"], tokens["actual"], of_head(tokens)
    line = LinearRegression().fit(c[:, None], f)
    expected = {
        "n": 600,
        "mse": sklearn.metrics.mean_squared_error(f, c),
        "r2": sklearn.metrics.r2_score(f, c),
        "pearson": np.corrcoef(c, f)[0, 1],
        "spearman": np.corrcoef(scipy.stats.rankdata(c), scipy.stats.rankdata(f))[0, 1],
        "calibration_slope": line.coef_[0],
        "calibration_intercept": line.intercept_,
        "auroc_wrong": sklearn.metrics.roc_auc_score(tokens["wrong"], c),
        "median": np.median(f),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert 0.3 < found["r2"] < 0.9 and found["auroc_wrong"] > 0.55 and found["calibration_slope"] > 1.05
    json.dumps(found, allow_nan=False)


def test_reliability_equals_bins_cut_from_the_sorted_predictions(tokens):
    c, f, found = tokens["predicted"], tokens["actual"], of_head(tokens)
    bins = np.split(np.argsort(c), 10)
    assert found["reliability"]["counts"] == [60] * 10
    np.testing.assert_allclose(found["reliability"]["predicted"], [c[b].mean() for b in bins])
    np.testing.assert_allclose(found["reliability"]["actual"], [f[b].mean() for b in bins])
    assert found["reliability_error"] == pytest.approx(np.mean([abs(c[b].mean() - f[b].mean()) for b in bins]))
    assert of_head(tokens, predicted=c + 1)["reliability_error"] > 0.5 > found["reliability_error"]


def test_tied_predictions_share_a_bin():
    predicted, actual = np.repeat([1.0, 2.0], [30, 10]), np.arange(40) / 10
    found = lp.quality(predicted, actual, actual > 2, np.arange(40), n_bins=4)
    assert found["reliability"] == {
        "predicted": [1.0, None, None, 2.0],
        "actual": [pytest.approx(1.45), None, None, pytest.approx(3.45)],
        "counts": [30, 0, 0, 10],
    }
    assert found["reliability_error"] == pytest.approx((30 * 0.45 + 10 * 1.45) / 40)


def test_probability_of_a_high_loss_comes_from_a_logistic_curve_of_the_other_folds(tokens):
    c, above, fold = tokens["predicted"], tokens["actual"] > np.median(tokens["actual"]), folds_of(tokens["groups"])
    p = np.empty(600)
    for k in range(5):
        (weight,), intercept = crossfit.fit_logistic(c[fold != k, None], above[fold != k])
        p[fold == k] = 1 / (1 + np.exp(-(intercept + weight * c[fold == k])))
    found, bins = of_head(tokens), np.ceil(p * 10)
    ece = sum(abs((p - above)[bins == b].sum()) for b in range(1, 11)) / 600
    assert found["ece_above_median"] == pytest.approx(ece)
    assert found["brier_above_median"] == pytest.approx(sklearn.metrics.brier_score_loss(above, p))
    assert ece < 0.1 and found["brier_above_median"] < 0.2


def test_a_curve_that_does_not_fit_shows_in_the_ece():
    """Losses that are high in the middle and low at both ends: no rising curve tells the probability."""
    predicted = np.tile(np.linspace(-1, 1, 50), 20)
    actual = np.where(np.abs(predicted) < 0.3, 2.0, 1.0) + np.where(predicted > 0.8, 1.0, 0.0)
    found = lp.quality(predicted, actual, actual > 1, np.repeat(np.arange(20), 50))
    assert found["ece_above_median"] > 0.25


def test_perfect_predictions_and_shuffled_ones(tokens):
    f = tokens["actual"]
    found = of_head(tokens, predicted=f)
    perfect = dict(mse=0, r2=1, pearson=1, spearman=1, calibration_slope=1, calibration_intercept=0)
    assert {name: found[name] for name in perfect} == pytest.approx(perfect, abs=1e-12)
    assert found["reliability_error"] == pytest.approx(0, abs=1e-12) and found["brier_above_median"] < 0.03
    shuffled = of_head(tokens, predicted=np.random.default_rng(1).permutation(f))
    assert shuffled["mse"] == pytest.approx(2 * f.var(), rel=0.15) and shuffled["r2"] == pytest.approx(-1, abs=0.15)
    assert max(abs(shuffled[name]) for name in ("pearson", "spearman", "calibration_slope")) < 0.15
    assert shuffled["auroc_wrong"] == pytest.approx(0.5, abs=0.07)
    assert shuffled["brier_above_median"] == pytest.approx(0.25, abs=0.01)


def test_what_is_undefined_is_none(tokens):
    constant = of_head(tokens, predicted=np.full(600, 0.1))
    undefined = ("pearson", "spearman", "calibration_slope", "calibration_intercept")
    assert [constant[name] for name in undefined] == [None] * 4
    assert constant["auroc_wrong"] == 0.5 and constant["r2"] < 0
    assert sorted(constant["reliability"]["counts"]) == [0] * 9 + [600]
    same_loss = of_head(tokens, actual=np.full(600, 0.1))
    undefined = ("r2", "pearson", "spearman", "ece_above_median", "brier_above_median")
    assert [same_loss[name] for name in undefined] == [None] * 5
    assert same_loss["calibration_slope"] == pytest.approx(0, abs=1e-12)
    assert of_head(tokens, wrong=np.ones(600))["auroc_wrong"] is None
    # All high losses in one chunk: the others do not show what it is to be high.
    assert of_head(tokens, actual=np.where(tokens["groups"] == 3, 2.0, 1.0))["ece_above_median"] is None
    everything = [constant, same_loss, of_rivals(tokens, actual=np.full(600, 0.1), entropy=np.full(600, 0.1))]
    everything.append(lp.compare_with_baselines(**tokens | {"actual": np.full(600, 0.1), "wrong": np.zeros(600)}))
    assert everything[-1]["entropy"]["r2"] == {"difference": None, "interval": None}
    json.dumps(everything, allow_nan=False)


@pytest.mark.parametrize("signal", ["entropy", "max_prob"])
def test_a_rival_is_the_line_that_the_other_folds_give(tokens, signal):
    f, split = tokens["actual"], PredefinedSplit(folds_of(tokens["groups"]))
    predicted = cross_val_predict(LinearRegression(), tokens[signal][:, None], f, cv=split)
    found = of_rivals(tokens)[signal]
    assert found["mse"] == pytest.approx(sklearn.metrics.mean_squared_error(f, predicted))
    assert found["r2"] == pytest.approx(sklearn.metrics.r2_score(f, predicted))
    reference = scipy.stats.linregress(predicted, f)
    assert found["calibration_slope"] == pytest.approx(reference.slope)
    assert found["calibration_intercept"] == pytest.approx(reference.intercept)
    risk = tokens[signal] if signal == "entropy" else -tokens[signal]
    assert found["auroc_wrong"] == pytest.approx(sklearn.metrics.roc_auc_score(tokens["wrong"], risk))
    assert found["pearson"] == pytest.approx(np.corrcoef(risk, f)[0, 1])
    assert found["spearman"] == pytest.approx(scipy.stats.spearmanr(risk, f).statistic)
    assert found["brier_above_median"] == pytest.approx(of_head(tokens, predicted=risk)["brier_above_median"])
    assert found["r2"] > 0.1 and found["auroc_wrong"] > 0.5


def test_the_constant_is_the_mean_of_the_other_folds(tokens):
    f, fold = tokens["actual"], folds_of(tokens["groups"])
    predicted = np.array([f[fold != k].mean() for k in fold])
    found = of_rivals(tokens)["constant"]
    assert len(set(predicted)) == 5 and found["mse"] == pytest.approx(np.mean((predicted - f) ** 2))
    assert found["r2"] < 0 and found["auroc_wrong"] == 0.5 and found["brier_above_median"] >= 0.25
    assert [found[name] for name in ("pearson", "spearman", "calibration_slope", "calibration_intercept")] == [None] * 4


def test_lines_fitted_to_noise_are_worse_than_the_mean():
    """A line that has seen the tokens it is scored on is always at least as good as their mean."""
    found, seen = [], []
    for trial in range(15):
        x, z, f = np.random.default_rng([4, trial]).normal(size=(3, 30))
        rivals = lp.baselines(f, f > 0, x, z, np.arange(30))
        found.append([rivals[name]["r2"] for name in ("constant", "entropy", "max_prob")])
        seen.append(scipy.stats.linregress(x, f).rvalue ** 2)
    constant, entropy, max_prob = np.transpose(found)
    assert constant.max() <= 0 and np.mean(seen) > 0.02
    assert entropy.mean() < -0.05 and max_prob.mean() < -0.05


def test_a_chunk_that_is_alike_is_never_split():
    """The entropy names the chunk and its loss is noise: whoever saw a part of a chunk knows something of the rest."""
    chunk, r2 = np.repeat(np.arange(6), 10), []
    for trial in range(12):
        name, loss = np.random.default_rng([5, trial]).normal(size=(2, 6))
        f, h = loss[chunk], name[chunk]
        r2.append([lp.baselines(f, f > 0, h, h, groups, 2)["entropy"]["r2"] for groups in (chunk, np.arange(60))])
    whole, split = np.mean(r2, axis=0)
    assert whole < 0 < split


def test_differences_and_intervals_equal_scikit_learn_with_the_weights_of_each_draw(tokens):
    found = lp.compare_with_baselines(**tokens, draws=40)
    f, y, fold = tokens["actual"], tokens["wrong"], folds_of(tokens["groups"])
    split = PredefinedSplit(fold)
    line = cross_val_predict(LinearRegression(), tokens["entropy"][:, None], f, cv=split)
    rivals = {
        "entropy": (line, tokens["entropy"]),
        "constant": (np.array([f[fold != k].mean() for k in fold]), np.zeros(600)),
    }

    def measures(predicted, order, w):
        return {
            "mse": sklearn.metrics.mean_squared_error(f, predicted, sample_weight=w),
            "r2": sklearn.metrics.r2_score(f, predicted, sample_weight=w),
            "auroc_wrong": sklearn.metrics.roc_auc_score(y, order, sample_weight=w),
        }

    draws = [np.ones(600), *np.concatenate(list(stats.cluster_bootstrap_weights(tokens["groups"], 40)))]
    head = [measures(tokens["predicted"], tokens["predicted"], w) for w in draws]
    for name, (predicted, order) in rivals.items():
        rival = [measures(predicted, order, w) for w in draws]
        for measure in lp.COMPARED:
            difference = [a[measure] - b[measure] for a, b in zip(head, rival, strict=True)]
            assert found[name][measure]["difference"] == pytest.approx(difference[0])
            np.testing.assert_allclose(found[name][measure]["interval"], np.quantile(difference[1:], [0.025, 0.975]))
    for name, rival in of_rivals(tokens).items():
        for measure in lp.COMPARED:
            difference = of_head(tokens)[measure] - rival[measure]
            assert found[name][measure]["difference"] == pytest.approx(difference)


def test_intervals_tell_a_better_head_from_the_entropy_itself(tokens):
    line = np.polyval(np.polyfit(tokens["entropy"], tokens["actual"], 1), tokens["entropy"])
    better, same = (
        lp.compare_with_baselines(**tokens | {"predicted": p}, draws=300)["entropy"]
        for p in (tokens["predicted"], line)
    )
    assert better["mse"]["interval"][1] < 0 < better["r2"]["interval"][0]
    assert same["auroc_wrong"] == {"difference": 0.0, "interval": [0.0, 0.0]}
    assert abs(same["r2"]["difference"]) < 0.02 < better["r2"]["difference"]


def test_results_are_repeatable_and_need_no_order_of_tokens(tokens):
    mixed = np.random.default_rng(6).permutation(600)
    again = {name: values[mixed] for name, values in tokens.items()}
    assert of_rivals(tokens) == of_rivals(tokens)
    np.testing.assert_allclose(
        np.array(flat([of_rivals(tokens), of_head(tokens)]), dtype=float),
        np.array(flat([of_rivals(again), of_head(again)]), dtype=float),
        rtol=1e-6,
    )
    assert of_rivals(tokens, seed=1)["entropy"]["mse"] != of_rivals(tokens)["entropy"]["mse"]


def test_event_ece_bins_the_probability_of_the_event():
    rng = np.random.default_rng(7)
    p = rng.random(500)
    happened = rng.random(500) < p**2
    probs = np.stack([1 - p, p], axis=1)
    index = np.ceil(p * 10)
    by_hand = sum(abs((p - happened)[index == b].sum()) for b in range(1, 11)) / 500
    assert float(calibration.event_ece(p, happened)) == pytest.approx(by_hand)
    assert float(calibration.event_ece(p, happened)) == pytest.approx(
        float(calibration.classwise_ece(probs, happened.astype(int)))
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"actual": np.ones(5)}, r"actual has shape \(5,\); wanted \[N\].*as many as predicted, which has 600"),
        ({"predicted": np.ones((600, 1))}, r"predicted has shape \(600, 1\)"),
        ({"actual": np.full(600, np.nan)}, r"actual\[0\] is nan; wanted finite"),
        ({"wrong": np.ones(3)}, r"wrong has shape \(3,\); wanted \[600\]"),
        ({"wrong": np.full(600, 0.5)}, "wrong holds 0.5; wanted 0 and 1"),
        ({"groups": np.ones(3)}, r"groups has shape \(3,\)"),
        ({"groups": np.ones(600)}, "folds is 5 of 1 groups"),
    ],
)
def test_bad_input_is_named(tokens, changed, message):
    with pytest.raises(ValueError, match=message):
        of_head(tokens, **changed)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: calibration.event_ece([0.5], [1, 0]), r"probability has shape \(1,\) and happened \(2,\)"),
        (lambda: calibration.event_ece([0.5, 1.5], [1, 0]), "probability holds 1.5"),
    ],
)
def test_bad_probabilities_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
