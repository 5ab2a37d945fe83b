"""What a monitor does to a generation, and what it leaves alone. The numbers themselves are in `test_signals.py`.

One batch of twelve rows, six greedy and six sampled, under packs that act at every kind of place, is one compiled
program; the tests vary its inputs.
"""

import json
import math

import numpy as np
import pytest
from scipy.special import softmax

import nmjax
from nmjax import generation
from nmjax.monitor import NEVER, generate_with_monitoring, load_rule, monitor, top_mean
from nmjax.signals import SIGNALS, make_monitor

NEW, V = 16, 97
rng = np.random.default_rng(4)
PROMPTS = [rng.integers(3, V, n).tolist() for n in (2, 11, 5, 16, 9, 7)]
VECTORS = rng.standard_normal((2, 32)).astype(np.float32)
INSIDE = nmjax.compose(nmjax.steer(VECTORS[0], 2.0), nmjax.scale_qk(1.5))
PACKS = [
    None,
    None,
    INSIDE,
    nmjax.contrast(nmjax.steer(VECTORS[1], 2.0), 0.8),  # decided with a hidden row
    nmjax.preface("w60 w61 w62"),
    nmjax.compose(nmjax.temperature(0.7), nmjax.top_p(0.9)),  # at the logits only
]
ROWS, HALF = range(12), [0.0] * 6 + [1.0] * 6
BESIDES = dict(max_new_tokens=NEW, eos_token_id=[], seed=5)


@pytest.fixture(scope="module")
def run(word_lm):
    """`generate` for the twelve rows."""

    def generate(prompts=PROMPTS * 2, packs=PACKS * 2, watch=None, **options):
        watch = make_monitor(len(prompts), **{"pfail_cutoff": NEVER, **(watch or {})})
        options = {**BESIDES, "temperature": (HALF * 2)[: len(prompts)], **options}
        return nmjax.generate(word_lm, prompts, packs, monitor=watch, **options)

    return generate


@pytest.fixture(scope="module")
def told(word_lm):
    """`generate_with_monitoring` for the twelve rows."""

    def generate(prompts=PROMPTS * 2, packs=PACKS * 2, **options):
        options = {**BESIDES, "temperature": (HALF * 2)[: len(prompts)], "packs": packs, **options}
        return generate_with_monitoring(word_lm, prompts, **options)

    return generate


@pytest.fixture(scope="module")
def base(run):
    """Nobody halts."""
    return run()


def same_bits(a, b, a_steps=slice(None), b_steps=slice(None), names=SIGNALS):
    for name in names:
        np.testing.assert_array_equal(a[name][a_steps], b[name][b_steps], err_msg=name)


@pytest.fixture(scope="module")
def by_hand(tiny_lm, base):
    """Logits [T, V] and states [T, L, D] of each row by one pass without a cache: its own effects, no sampler's."""
    texts = [[60, 61, 62] * (i % 6 == 4) + PROMPTS[i % 6] + base.tokens[i] for i in ROWS]
    result = nmjax.forward(tiny_lm, texts, [INSIDE if i % 6 == 2 else None for i in ROWS], capture=("resid_post",))
    steps = slice(-NEW - 1, -1)
    logits, states = np.asarray(result.logits), np.asarray(result.activations["resid_post"])
    return [(logits[i, steps], states[:, i, steps].swapaxes(0, 1)) for i in ROWS]


def test_signals_are_of_the_row_before_its_sampler(base, by_hand, signals_by_definition, assert_signals):
    """Greedy and sampled, steered, contrasted, prefaced, and heated rows."""
    for i in ROWS:
        wanted = signals_by_definition(*by_hand[i], base.tokens[i])
        assert_signals(base.seen[i], wanted)
        assert_signals(monitor(*by_hand[i], base.tokens[i]), wanted)
        assert all(base.seen[i][name].shape == (NEW,) and base.seen[i][name].dtype == np.float32 for name in SIGNALS)
    drawn = {tuple(base.tokens[i]) for i in ROWS}
    assert len(drawn) > 9, "rows hardly differ"


def test_effects_inside_move_the_signals(tiny_lm, base):
    """Those of the steered row are not what the model alone gives on the same text."""
    for i in (2, 8):
        result = nmjax.forward(tiny_lm, [PROMPTS[2] + base.tokens[i]], capture=("resid_post",))
        steps = slice(len(PROMPTS[2]) - 1, -1)
        states = np.asarray(result.activations["resid_post"][:, 0]).swapaxes(0, 1)
        alone = monitor(np.asarray(result.logits[0])[steps], states[steps], base.tokens[i])
        assert np.abs(alone["hbar_s"] - base.seen[i]["hbar_s"]).max() > 0.02


def test_a_monitor_changes_no_token(tiny_lm, base):
    """Greedy and sampled; the rest of the batch is other rows."""
    out = nmjax.generate(
        tiny_lm, PROMPTS[:2] * 3, row_ids=[0, 1, 6, 7, 0, 0], temperature=[0, 0, 1, 1, 0, 0], **BESIDES
    )
    assert out.seen is None
    for mine, theirs in enumerate((0, 1, 6, 7)):
        assert out.tokens[mine] == base.tokens[theirs]
        np.testing.assert_allclose(out.logprobs[mine], base.logprobs[theirs], atol=1e-4)
    assert out.tokens[2] != out.tokens[0]


@pytest.mark.slow
def test_a_monitor_changes_no_token_under_packs(word_lm, base):
    out = nmjax.generate(word_lm, PROMPTS * 2, PACKS * 2, temperature=HALF, **BESIDES)
    assert out.tokens == base.tokens and out.text == base.text


def test_what_is_watched_for_changes_no_token(run, base):
    """The same bits whatever the numbers, as long as nobody halts; and those do change pfail and pri."""
    other = run(watch=dict(tau=[0.1 * i for i in ROWS], lambda_=2.0, alpha=1.0, yes=[3], no=[4, 5]))
    assert other.tokens == base.tokens
    for i in ROWS:
        np.testing.assert_array_equal(other.logprobs[i], base.logprobs[i])
        same_bits(other.seen[i], base.seen[i], names=set(SIGNALS) - {"pfail", "pri"})
        assert np.abs(other.seen[i]["pfail"] - base.seen[i]["pfail"]).max() > 0.1
        seen = other.seen[i]
        np.testing.assert_allclose(seen["pri"], seen["surprise"] * (1 + seen["delta_h"]), rtol=1e-6)


# --- Halting ----------------------------------------------------------------------------------------------------------

BEYOND = math.log(0.85 / 0.15) / 5  # hbar_s - tau at the default cutoff


def records(values):
    """Steps at which the largest so far is passed."""
    return [t for t in range(len(values)) if t == 0 or values[t] > values[:t].max() + 1e-4]


@pytest.fixture(scope="module")
def plan(base):
    """A step for every row to halt at, or None, and the tau that does it."""
    steps, taus = [], []
    for i in ROWS:
        hbar = base.seen[i]["hbar_s"]
        at = records(hbar)
        step = None if i in (3, 7) else at[-1] if i % 2 else at[len(at) // 2] if i else 0
        low = -1.0 if not step else hbar[:step].max()
        steps.append(step)
        taus.append(5.0 if step is None else float((low + hbar[step]) / 2 - BEYOND))
    assert steps[0] == 0 and len(set(steps)) > 4, steps
    return steps, taus


def test_rows_halt_on_their_own(run, base, plan):
    """Each at its step, its token dropped; what came before, and the rows that go on, are the same bits."""
    steps, taus = plan
    out = run(watch=dict(tau=taus, pfail_cutoff=0.85))
    for i, step in enumerate(steps):
        kept = NEW if step is None else step
        assert out.tokens[i] == base.tokens[i][:kept]
        assert out.finish_reason[i] == ("length" if step is None else "halted")
        assert len(out.logprobs[i]) == len(out.sample_logprobs[i]) == kept
        np.testing.assert_array_equal(out.logprobs[i], base.logprobs[i][:kept])
        scored = NEW if step is None else step + 1
        assert all(len(out.seen[i][name]) == scored for name in SIGNALS)
        same_bits(out.seen[i], base.seen[i], b_steps=slice(scored), names=set(SIGNALS) - {"pfail"})
        pfail = out.seen[i]["pfail"]
        assert (pfail[: kept if step is None else step] <= 0.85).all() and (step is None or pfail[step] > 0.85)
    assert out.text[0] == "" and out.tokens[0] == []
    assert out.full_text[0] == " ".join(f"w{t}" for t in PROMPTS[0])


def test_a_row_halts_as_it_does_alone(run, plan):
    steps, taus = plan
    together = run(watch=dict(tau=taus, pfail_cutoff=0.85))
    for i in (0, 2, 9):
        out = run(watch=dict(tau=[taus[i] if j == i else 9.0 for j in ROWS], pfail_cutoff=0.85))
        assert [reason == "halted" for reason in out.finish_reason] == [j == i for j in ROWS]
        assert out.tokens[i] == together.tokens[i]
        same_bits(out.seen[i], together.seen[i])


def test_what_is_told_of_halting(told, base, plan):
    steps, taus = plan
    rows = told(tau=taus)
    for i, (row, step) in enumerate(zip(rows, steps, strict=True)):
        assert row["halted"] == (step is not None) and row["halt_step"] == step
        assert row["halt_reason"] == ("max tokens" if step is None else "P_fail above cutoff")
        assert row["prompt"] == PROMPTS[i % 6]
        kept = base.tokens[i][:step]
        assert row["tokens"] == kept
        assert row["text"].split() == [f"w{t}" for t in kept if t > 2]
        assert [item["step"] for item in row["trajectory"]] == list(range(NEW if step is None else step + 1))
        for item in row["trajectory"]:
            assert item.keys() == {"step", *SIGNALS}
            assert item["hbar_s"] == base.seen[i]["hbar_s"][item["step"]]
        assert json.loads(json.dumps(row, allow_nan=False)) == row
        assert not {"score", "flagged"} & row.keys()


def test_a_cutoff_that_is_reached_but_not_passed(run, base):
    largest = [base.seen[i]["pfail"].max() for i in ROWS]
    at = run(watch=dict(pfail_cutoff=[float(x) for x in largest]))
    assert at.tokens == base.tokens and set(at.finish_reason) == {"length"}
    below = run(watch=dict(pfail_cutoff=[float(np.nextafter(x, np.float32(0))) for x in largest]))
    assert [len(tokens) for tokens in below.tokens] == [int(base.seen[i]["pfail"].argmax()) for i in ROWS]
    sure = run(watch=dict(tau=-1e6, pfail_cutoff=1.0))  # P_fail is 1
    assert sure.tokens == base.tokens and (sure.seen[0]["pfail"] == 1).all()


def test_lambda_and_cutoff_of_each_row(run, base):
    """A negative lambda halts where hbar_s is low."""
    hbar = [base.seen[i]["hbar_s"] for i in ROWS]
    steep, cutoffs = [[-1e7, 1e7][i % 2] for i in ROWS], [0.6 + 0.02 * i for i in ROWS]
    tau = [float(np.sort(x)[[slice(2), slice(-2, None)][i % 2]].mean()) for i, x in enumerate(hbar)]
    out = run(watch=dict(tau=tau, lambda_=steep, pfail_cutoff=cutoffs))
    wanted = [int(x.argmax() if i % 2 else x.argmin()) for i, x in enumerate(hbar)]
    assert [len(tokens) for tokens in out.tokens] == wanted and len(set(wanted)) > 4


@pytest.mark.parametrize("every", [3, 7, 16, 17])
def test_only_every_so_many_steps_are_checked(told, base, by_hand, every):
    rows = told(check_every_k_tokens=every, pfail_cutoff=NEVER)
    for i, row in enumerate(rows):
        assert row["tokens"] == base.tokens[i]
        assert [item["step"] for item in row["trajectory"]] == list(range(every - 1, NEW, every))
        wanted = monitor(*by_hand[i], base.tokens[i], every=every)
        for item in row["trajectory"]:
            for name in SIGNALS:
                np.testing.assert_allclose(item[name], wanted[name][item["step"]], atol=3e-5, err_msg=name)
    if every == 3:  # delta_h spans three tokens
        spans = [[item["delta_h"] for item in row["trajectory"]] for row in rows]
        assert all(span[0] == 0 for span in spans)
        singles = [base.seen[i]["delta_h"][2::3] for i in ROWS]
        assert np.abs(np.asarray(spans)[:, 1:] - np.asarray(singles)[:, 1:]).max() > 0.05
    halted = told(check_every_k_tokens=every, pfail_cutoff=-1)
    assert [row["halt_step"] for row in halted] == [every - 1 if every <= NEW else None] * 12
    assert [row["tokens"] for row in halted] == [tokens[: every - 1] for tokens in base.tokens]


def test_the_step_that_ends_a_text_is_scored(told, base):
    """And where it is halted, too, the halt comes first and drops the token."""
    firsts = {tokens[0] for tokens in base.tokens}
    ends = [t for t in set(base.tokens[0][2:] + base.tokens[8][2:]) if t not in firsts][:3]
    at = [next((t for t, token in enumerate(tokens) if token in ends), NEW) for tokens in base.tokens]
    assert {NEW} < set(at) and len(set(at)) > 3 and min(at) < at[0] < NEW, at
    rows = told(eos_token_id=ends, pfail_cutoff=NEVER)
    for i, row in enumerate(rows):
        assert row["halt_reason"] == ("end of text" if at[i] < NEW else "max tokens") and not row["halted"]
        assert row["tokens"] == base.tokens[i][: at[i] + 1]
        assert len(row["trajectory"]) == min(at[i] + 1, NEW)
        last = row["trajectory"][-1]
        assert last["surprise"] == base.seen[i]["surprise"][last["step"]]
    every = at[0] + 1
    for i, row in enumerate(told(eos_token_id=ends, check_every_k_tokens=every, pfail_cutoff=-1)):
        first = at[i] < at[0]
        assert row["halt_reason"] == ("end of text" if first else "P_fail above cutoff")
        assert row["tokens"] == base.tokens[i][: at[i] + 1 if first else at[0]]


@pytest.mark.parametrize("looks", [1, 4, 16])
def test_stop_strings(told, run, base, plan, looks, monkeypatch):
    """A row that is halted first has halted, one that is stopped first has stopped, however late that is seen."""
    monkeypatch.setattr(generation, "STOP_CHECK_EVERY", looks)
    stop = [f" w{base.tokens[0][3]}", f" w{base.tokens[7][11]}"]
    words = [[f" w{t}" for t in tokens] for tokens in base.tokens]
    at = [next((t for t, word in enumerate(row) if word in stop), NEW) for row in words]
    assert at[0] == 3 and at[7] <= 11 and NEW in at
    rows = told(stop=stop, check_every_k_tokens=9, pfail_cutoff=-1)
    for i, row in enumerate(rows):
        stopped = at[i] < 8
        assert row["halt_reason"] == ("stop string" if stopped else "P_fail above cutoff")
        assert row["halted"] == (not stopped) and row["halt_step"] == (None if stopped else 8)
        assert row["tokens"] == base.tokens[i][: at[i] + 1 if stopped else 8]
        assert [item["step"] for item in row["trajectory"]] == ([] if stopped else [8])
    watched = told(stop=stop, pfail_cutoff=NEVER)
    assert [len(row["trajectory"]) for row in watched] == [min(t + 1, NEW) for t in at]
    steps, taus = plan
    later = [i for i in ROWS if steps[i] is not None and at[i] < steps[i]]
    assert later, (at, steps)
    both = run(stop=stop, watch=dict(tau=taus, pfail_cutoff=0.85))
    for i in later:
        assert both.finish_reason[i] == "stop" and len(both.seen[i]["pri"]) == len(both.tokens[i]) == at[i] + 1


def test_copies(told, run, plan, base):
    """Every copy is watched for with its prompt's numbers."""
    steps, taus = plan
    rows = told(PROMPTS, PACKS, num_return_sequences=2, tau=taus[:6], temperature=[0.0] * 6)
    assert [row["halt_step"] for row in rows] == [step for step in steps[:6] for _ in (0, 1)]
    assert [row["prompt"] for row in rows] == [prompt for prompt in PROMPTS for _ in (0, 1)]
    assert [row["tokens"] for row in rows] == [base.tokens[i][: steps[i]] for i in range(6) for _ in (0, 1)]
    drawn = told(PROMPTS, PACKS, num_return_sequences=2, pfail_cutoff=NEVER, temperature=1.0)
    assert drawn[0]["tokens"] != drawn[1]["tokens"] and drawn[0]["p_yes"] == drawn[1]["p_yes"]


def test_batches_of_rows(run, plan):
    """The second batch holds the first one's rows in another order."""
    steps, taus = plan
    order = [*ROWS, *rng.permutation(12)]

    def pick(values):
        return [values[i] for i in order]

    watch = dict(tau=pick(taus), pfail_cutoff=0.85)
    options = dict(batch_size=12, row_ids=order, temperature=pick(HALF))
    out = run(pick(PROMPTS * 2), pick(PACKS * 2), watch=watch, **options)
    assert [len(tokens) for tokens in out.tokens] == [NEW if steps[i] is None else steps[i] for i in order]
    for place, i in enumerate(order[12:], 12):
        assert out.tokens[place] == out.tokens[i]
        for name in SIGNALS:
            np.testing.assert_allclose(out.seen[place][name], out.seen[i][name], atol=3e-5)


@pytest.mark.slow
def test_a_batch_that_is_filled_up(tiny_lm):
    """Five rows, two at a time and one at a time, beside all together."""

    def generate(size, **watch):
        return nmjax.generate(tiny_lm, PROMPTS[:5], batch_size=size, monitor=make_monitor(5, **watch), **BESIDES)

    hbar = [seen["hbar_s"] for seen in generate(None, pfail_cutoff=NEVER).seen]
    taus = [float(x[records(x)[-1]]) - BEYOND - 1e-4 for x in hbar[:4]] + [9.0]
    outs = [generate(size, tau=taus) for size in (None, 2, 1)]
    assert [len(tokens) for tokens in outs[0].tokens] == [records(x)[-1] for x in hbar[:4]] + [NEW]
    for out in outs[1:]:
        assert out.tokens == outs[0].tokens and out.finish_reason == outs[0].finish_reason
        for i in range(5):
            for name in SIGNALS:
                np.testing.assert_allclose(out.seen[i][name], outs[0].seen[i][name], atol=3e-5)


# --- Scores -----------------------------------------------------------------------------------------------------------


def mean_of_largest(values, k):
    largest = sorted(map(float, values))[-k:]
    return math.fsum(largest) / len(largest)


@pytest.mark.parametrize("k", [5, 1, 3, 40])
def test_scores_are_means_of_the_largest_values(told, base, k):
    """In bits, of every signal; every step is checked and none halts, whatever is asked."""
    k_top = {} if k == 5 else {"k_top": k}  # five is the published number
    rows = told(compute_score_only=True, tau=-9.0, pfail_cutoff=0.1, check_every_k_tokens=4, **k_top)
    for row, seen in zip(rows, base.seen, strict=True):
        assert not row["halted"] and row["halt_reason"] == "max tokens"
        for name in set(SIGNALS) - {"pfail"}:
            assert row[f"{name}_score"] == mean_of_largest(seen[name], k)
        assert row["score"] == row["hbar_s_score"]
        assert not {"trajectory", "tokens", "text"} & row.keys()


def test_scores_of_short_texts(told, base):
    lengths = [1, 2, 3, 4, 5, 6] * 2
    rows = told(compute_score_only=True, max_new_tokens=lengths)
    full = told(max_new_tokens=lengths, pfail_cutoff=NEVER)
    for i, n in enumerate(lengths):
        assert rows[i]["score"] == mean_of_largest(base.seen[i]["hbar_s"][:n], 5)
        for name in SIGNALS:
            assert rows[i][f"{name}_score"] == mean_of_largest([item[name] for item in full[i]["trajectory"]], 5)


def test_top_mean():
    values = np.array([3, np.nan, 1, 2, np.nan, 5], np.float32)
    assert [top_mean(values, k) for k in (1, 2, 3, 4, 9)] == [5, 4, 10 / 3, 2.75, 2.75]
    assert top_mean(np.array([np.nan])) == top_mean(np.array([])) == 0


def test_yes_and_no(told, by_hand):
    """Each token counted once; one that begins a yes and a no says neither; only the first step matters."""
    rows = told(yes=("w10", "w11", "w10 w5", "w13"), no=["w12", "w13 w4"], check_every_k_tokens=5)
    for row, (logits, _) in zip(rows, by_hand, strict=True):
        p = softmax(logits[0].astype(np.float64))
        assert math.isclose(row["p_yes"], p[10] + p[11], rel_tol=1e-4)
        assert math.isclose(row["p_no"], p[12], rel_tol=1e-4)


# --- Calibrated thresholds --------------------------------------------------------------------------------------------


@pytest.fixture
def calibrated(tmp_path):
    def write(**changes):
        chosen = {"weights": {"hbar_s": 1.0}, "intercept": 0.0, "tau": 1.0, "direction": "high"} | changes
        path = tmp_path / "calibration.json"
        path.write_text(json.dumps({"monitor": chosen, "best_tau": 0.3}), encoding="utf-8")
        return path

    return write


def running(seen, names, weights, intercept, k, every=1):
    """The statistic after every step, NaN before k checks and between them."""
    found = np.full(NEW, np.nan)
    for t in range(every * k - 1, NEW, every):
        checked = [np.sort(np.asarray(seen[name][every - 1 : t + 1 : every], float)) for name in names]
        found[t] = intercept + np.dot(weights, [values[-k:].mean() for values in checked])
    return found


@pytest.mark.parametrize("direction, every", [("high", 1), ("low", 1), ("high", 2)])
def test_rows_halt_by_the_calibrated_statistic(told, base, calibrated, direction, every):
    """From the k-th check on, once the running mean is beyond tau; P_fail plays no part."""
    weight, intercept = (1.0, 0.0) if direction == "high" else (-0.5, 0.25)  # the mean only rises
    curves = np.stack([running(base.seen[i], ["hbar_s"], [weight], intercept, 5, every) for i in ROWS])
    sign = 1 if direction == "high" else -1
    candidates = np.linspace(np.nanmin(curves), np.nanmax(curves), 200)

    def crossings(tau):
        with np.errstate(invalid="ignore"):
            beyond = sign * curves >= sign * tau
        return [int(row.argmax()) if row.any() else None for row in beyond]

    safe = [t for t in candidates if np.nanmin(np.abs(curves - t)) > 1e-5]
    tau = max(safe, key=lambda t: len(set(crossings(t))))
    wanted = crossings(tau)
    assert {5 * every - 1, None} <= set(wanted) and len(set(wanted)) > 3, wanted
    path = calibrated(weights={"hbar_s": weight}, intercept=intercept, tau=tau, direction=direction)
    rows = told(thresholds=path, tau=-9.0, check_every_k_tokens=every)
    for i, row in enumerate(rows):
        assert row["halt_step"] == wanted[i]
        assert row["halted"] == row["flagged"] == (wanted[i] is not None)
        assert row["halt_reason"] == ("statistic beyond its threshold" if row["halted"] else "max tokens")
        assert row["tokens"] == base.tokens[i][: wanted[i]]
        assert math.isclose(row["statistic"], curves[i, row["trajectory"][-1]["step"]], rel_tol=1e-6)
    scored = told(thresholds=path, compute_score_only=True)
    for i, row in enumerate(scored):
        assert not row["halted"]
        assert row["statistic"] == intercept + weight * mean_of_largest(base.seen[i]["hbar_s"], 5)
        assert row["flagged"] == (sign * row["statistic"] >= sign * tau)
        assert row["score"] == mean_of_largest(base.seen[i]["hbar_s"], 5)
    assert len({row["flagged"] for row in scored}) == 2 or every == 2  # which sees less


@pytest.mark.parametrize("rule", [dict(tau=-1), dict(tau=9, direction="low"), dict(tau=-9, weights={"hbar_s": -1})])
def test_a_short_text_is_flagged_but_not_halted(told, calibrated, rule):
    """A mean of fewer than k is not what was calibrated; at the end it is all there is. Here any mean is beyond."""
    path = calibrated(**rule)
    rows = told(thresholds=path, max_new_tokens=[3, 4, 5, 6, 3, 16] * 2)
    assert [row["halt_step"] for row in rows] == [None, None, 4, 4, None, 4] * 2
    assert all(row["flagged"] for row in rows)
    rows = told(thresholds=path, check_every_k_tokens=3)
    assert [row["halt_step"] for row in rows] == [14] * 12
    rows = told(thresholds=path, pfail_cutoff=1.5)  # no row is halted
    assert not any(row["halted"] for row in rows) and all(row["flagged"] for row in rows)


def test_a_threshold_that_is_a_texts_own_score(told, calibrated):
    """It flags that text, in float64 as it was calibrated; a hair beyond it does not."""
    rows = told(compute_score_only=True)
    for direction, away in (("high", np.inf), ("low", -np.inf)):
        for i in (0, 5, 8):
            score = rows[i]["score"]
            at = told(thresholds=calibrated(tau=score, direction=direction), compute_score_only=True)
            assert at[i]["flagged"]
            beyond = calibrated(tau=float(np.nextafter(score, away)), direction=direction)
            assert not told(thresholds=beyond, compute_score_only=True)[i]["flagged"]


def test_a_statistic_of_several_signals(base, by_hand, calibrated):
    """In the loop, step by step: two signals of opposite weight, the three largest of each."""
    import jax
    import jax.numpy as jnp

    names, weights = ["hbar_s_final", "pri"], [1.5, -0.25]
    rule = load_rule(calibrated(weights=dict(zip(names, weights, strict=True)), intercept=0.5, tau=-0.1))
    watch = make_monitor(12, rule=rule, k_top=3)
    curves = np.stack([running(base.seen[i], names, weights, 0.5, 3) for i in ROWS])
    logits, states = (jnp.stack([by_hand[i][k] for i in ROWS]) for k in (0, 1))
    tokens, observe = jnp.asarray(base.tokens), jax.jit(lambda *a: watch.observe(*a, jnp.ones(12, bool)))
    seen, halts = watch.start(12, NEW, 32), []
    for t in range(NEW):
        seen, now = observe(seen, logits[:, t], states[:, t].swapaxes(0, 1), tokens[:, t], jnp.int32(t))
        halts.append(np.asarray(now))
    clear = ~(np.abs(curves + 0.1) < 1e-5)
    with np.errstate(invalid="ignore"):
        wanted = curves >= -0.1
    np.testing.assert_array_equal(np.stack(halts, axis=1)[clear], wanted[clear])
    assert 0.1 < wanted.mean() < 0.9 and not wanted[:, :2].any()


@pytest.mark.parametrize(
    "content, message",
    [
        ("[1, 2]", "has no key 'monitor' with"),
        ("{}", "has no key 'monitor' with"),
        ('{"monitor": 3}', "has no key 'monitor' with"),
        ('{"monitor": {"weights": {"hbar_s": 1}, "intercept": 0, "tau": 1}}', r"'direction', 'intercept', 'tau'"),
        (dict(weights={"hbar": 1.0}), r"weights=\{'hbar': 1.0\}, wanted a number for some of \['I_cat'"),
        (dict(weights={}), r"weights=\{\}, wanted"),
        (dict(weights=[1.0]), r"weights=\[1.0\], wanted"),
        (dict(weights={"pri": "1"}), r"weights\['pri'\]='1', wanted a finite number"),
        (dict(weights={"pri": True}), r"weights\['pri'\]=True, wanted a finite number"),
        (dict(tau=None), "tau=None, wanted a finite number"),
        (dict(intercept=[0.0]), r"intercept=\[0.0\], wanted a finite number"),
        (dict(direction="up"), "direction='up', wanted 'high' or 'low'"),
        (dict(direction=["high"]), r"direction=\['high'\], wanted"),
        (dict(tau=math.nan), "holds NaN, which is not JSON"),
        ('{"monitor": {"weights": {"pri": 1}, "intercept": 0, "tau": 1e999, "direction": "low"}}', "tau=inf, wanted"),
        ("{", "is not JSON"),
    ],
    ids=str,
)
def test_bad_calibrations(told, calibrated, content, message, monkeypatch):
    monkeypatch.setattr(generation, "prefill", None)  # before any compute
    path = calibrated(**(content if isinstance(content, dict) else {}))
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as raised:
        told(thresholds=path)
    assert "calibration.json" in str(raised.value)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        load_rule("nowhere.json")


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(tau=[1.0] * 11), "tau has 11 values, wanted one for all 12 rows or one a row"),
        (dict(lambda_=[1.0] * 13), "lambda_ has 13 values"),
        (dict(pfail_cutoff=[0.5]), "pfail_cutoff has 1 values"),
        (dict(tau=[1.0] * 24, num_return_sequences=2), "tau has 24 values, wanted one for all 12 rows"),
        (dict(check_every_k_tokens=0), "check_every_k_tokens=0"),
        (dict(k_top=-1), "k_top=-1"),
        (dict(alpha_pri="a"), "alpha_pri='a'"),
        (dict(temperature=-1), "temperature=-1"),
        (dict(max_new_tokens=0), "max_new_tokens=0"),
        (dict(yes=[""]), "yes, no='' has no tokens"),
    ],
    ids=str,
)
def test_bad_arguments(told, options, message, monkeypatch):
    monkeypatch.setattr(generation, "prefill", None)
    with pytest.raises(ValueError, match=message):
        told(**options)


def test_a_monitor_of_other_rows(tiny_lm, monkeypatch):
    monkeypatch.setattr(generation, "prefill", None)
    for rows in (1, 3, 4):
        with pytest.raises(ValueError, match=f"monitor is one of {rows} rows, wanted 2, one a prompt"):
            nmjax.generate(tiny_lm, PROMPTS[:2], num_return_sequences=2, monitor=make_monitor(rows))


def test_sweeps_are_one_program(told, calibrated, base):
    """Also whether scores or trajectories are asked for."""
    prefill, decode = generation.prefill, generation.decode
    told()
    told(thresholds=calibrated())
    before, found = (prefill._cache_size(), decode._cache_size()), set()
    for options in (
        dict(tau=1.3, lambda_=9),
        dict(tau=list(np.linspace(0.5, 1.5, 12)), pfail_cutoff=[0.7] * 12),
        dict(pfail_cutoff=0),
        dict(alpha_pri=0.2, check_every_k_tokens=3),
        dict(seed=list(ROWS), temperature=0.7),
        dict(compute_score_only=True, k_top=3),
        dict(yes="w3", no=["w4", "w5", "w6"]),
        dict(thresholds=calibrated(tau=0.9, direction="low", intercept=3, weights={"hbar_s": -1})),
        dict(thresholds=calibrated(tau=1), compute_score_only=True),
        dict(max_new_tokens=[3, 9] * 6),
    ):
        found.add(str(told(**options)))
    assert (prefill._cache_size(), decode._cache_size()) == before
    assert len(found) == 10
