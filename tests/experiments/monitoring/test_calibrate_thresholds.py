"""Both passes end to end on the bundled model: files, numbers against scikit-learn, resume, refusals."""

import dataclasses
import json
import pathlib
import re
import resource
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from scipy.stats import beta
from sklearn.metrics import average_precision_score, roc_auc_score

from experiments import calibrate_thresholds, validate_thresholds
from experiments.monitoring.output import load_calibration
from experiments.monitoring.study import Settings, ValidationSettings, prepare, prepare_validation, row_key
from experiments.monitoring.watching import IN_LOOP, Watcher, watch_all
from nmjax.monitor import generate_with_monitoring, load_rule, statistic
from nmjax.report import results

ROOT = pathlib.Path(__file__).parents[3]
FAST = {"n_samples": 24, "max_tokens": 6, "batch_size": 5, "bootstrap_draws": 100}
FIGURES = ("roc", "precision_recall", "scores", "quadrants", "forest")
PUBLISHED = {
    "best_tau", "best_precision", "min_recall_target", "auroc", "pr_auc", "all_results", "mode", "auroc_hbar",
    "auroc_pri", "auroc_joint", "tau_hbar", "tau_pri", "joint_model_weights", "best_precision_hbar",
    "best_precision_pri", "best_precision_joint",
}  # fmt: skip


def run(folder, **changes):
    """Calibrate in this process; the parsed result and the paths by suffix."""
    study = prepare(Settings(output_dir=str(folder), **FAST | changes))
    written = calibrate_thresholds.run(study, calibrate_thresholds.open_log(study))
    return by_suffix(written)


def by_suffix(written):
    paths = {path.suffix: path for path in written}
    return results.load_json(paths[".json"]), paths


def samples(path):
    """The records of all samples, in the order of their ids."""
    lines = [json.loads(line) for line in path.read_text().splitlines()][1:]
    return sorted((item for line in lines for item in line["record"]["items"]), key=lambda item: item["id"])


def without_times(result):
    result = json.loads(json.dumps(result))
    result["identity"].pop("timestamp")
    result["identity"]["config"].pop("output_dir")
    result.pop("timing")
    return result


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    return run(tmp_path_factory.mktemp("calibrated"))


@pytest.fixture(scope="module")
def validated(calibrated, tmp_path_factory):
    settings = ValidationSettings(
        calibrated_params=str(calibrated[1][".json"]), n_samples=30, batch_size=5, bootstrap_draws=100,
        output_dir=str(tmp_path_factory.mktemp("validated")),
    )  # fmt: skip
    stored = load_calibration(settings.calibrated_params)
    study = prepare_validation(settings, stored)
    return by_suffix(validate_thresholds.run(study, validate_thresholds.open_log(study), stored, settings))


# --- Calibration ------------------------------------------------------------------------------------------------------


def test_files_and_published_keys(calibrated):
    result, paths = calibrated
    assert re.fullmatch(r"tiny_\d{8}_\d{6}_n24\.json", paths[".json"].name)
    assert result.keys() >= PUBLISHED
    assert result["joint_model_weights"].keys() == {"w_hbar", "w_pri", "intercept"}
    assert all(row.keys() == {"tau", "precision", "recall", "f1"} for row in result["all_results"])
    stem = paths[".json"].stem
    names = {path.name for path in paths[".json"].parent.iterdir()}
    assert names == {f"{stem}.{end}" for end in ("json", "html", "jsonl")} | {f"{stem}_{f}.png" for f in FIGURES}
    page = paths[".html"].read_text()
    assert page.count("data:image/png;base64,") == len(FIGURES)
    for outside in ("http://", "https://", "<script src", "<link", 'src="/'):
        assert outside not in page
    assert all(verdict["claim"].replace("'", "&#x27;") in page for verdict in result["verdicts"])
    assert "Better than the length of the answer and" in page


def test_scores_are_those_of_the_monitor_and_of_a_plain_forward_pass(calibrated):
    """Against generate_with_monitoring and, for the answer's likelihood and P(No), whole forward passes by hand."""
    import nmjax

    _, paths = calibrated
    study = prepare(Settings(**FAST))
    lm, judgements = study.watcher.lm, {j.id: j for j in study.watcher.judgements}
    items = samples(paths[".jsonl"])[:5]
    prompts = [judgements[item["id"]].prompt for item in items]
    told = generate_with_monitoring(lm, prompts, max_new_tokens=6, compute_score_only=True, width=32)
    yes, no = (lm.tokenizer.convert_tokens_to_ids(f"\u0120{word}") for word in ("yes", "no"))
    for item, found in zip(items, told, strict=True):
        judgement = judgements[item["id"]]
        for name in IN_LOOP:
            top = np.sort(item["signals"][name])[-5:].mean()
            assert item["scores"][name] == pytest.approx(top, abs=1e-12)
            assert item["scores"][name] == pytest.approx(found[f"{name}_score"], abs=1e-4), name
        assert item["scores"]["answer_length"] == len(judgement.answer)
        ids = lm.encode(judgement.prompt)
        logits = np.asarray(nmjax.forward(lm, [ids]).logits, np.float64)[0]
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        before = lm.encode(judgement.prompt[: judgement.answer_start].rstrip())
        after = lm.encode(judgement.prompt[: judgement.answer_end])
        assert ids[: len(before)] == before and ids[: len(after)] == after
        nll = -np.mean([logp[k - 1, ids[k]] for k in range(len(before), len(after))])
        assert item["scores"]["answer_nll"] == pytest.approx(nll, abs=1e-4)
        p = np.exp(logp[-1])
        assert p[yes] + p[no] > 0.5
        assert item["scores"]["p_no"] == pytest.approx(p[no] / (p[yes] + p[no]), abs=1e-3)
        assert item["scores"]["first_entropy"] == pytest.approx(-(p * logp[-1]).sum(), abs=1e-4)


def test_numbers_are_scikit_learns(calibrated):
    result, paths = calibrated
    items = samples(paths[".jsonl"])
    y = np.array([item["label"] for item in items])
    assert 0 < y.sum() < len(y) == result["num_samples"] == 24
    for name, entry in result["statistics"].items():
        if name in ("joint", "all_signals"):
            continue
        s = np.array([item["scores"][name] for item in items])
        risk = s if entry["direction"] == "high" else -s
        assert entry["at_best"]["auroc_raw"]["value"] == pytest.approx(roc_auc_score(y, s))
        assert entry["at_best"]["auroc"]["value"] == pytest.approx(roc_auc_score(y, risk))
        assert entry["at_best"]["average_precision"]["value"] == pytest.approx(average_precision_score(y, risk))
        assert entry["auroc_raw"] >= 0.5 or entry["direction"] == "low"
        tau = entry["best"]["tau"] if entry["direction"] == "high" else -entry["best"]["tau"]
        wanted = max(y[risk >= cut].mean() for cut in risk if y[risk >= cut].sum() >= 0.9 * y.sum())
        assert y[risk >= tau].mean() == pytest.approx(wanted) == pytest.approx(entry["best"]["precision"])
        assert y[risk >= tau].sum() >= 0.9 * y.sum()
    hbar = np.array([item["scores"]["hbar_s"] for item in items])
    assert result["auroc"] == pytest.approx(roc_auc_score(y, hbar))
    assert result["pr_auc"] == pytest.approx(average_precision_score(y, hbar))
    assert result["auroc_hbar"] == pytest.approx(max(result["auroc"], 1 - result["auroc"]))
    assert result["best_tau"] == result["tau_hbar"] == result["statistics"]["hbar_s"]["best"]["tau"]
    cells = result["labels_by_score"]["hbar_s"]
    assert sum(cell["count"] for key, cell in cells.items() if key != "median") == 24
    assert all(len(e["prompt"]) <= 150 for key, cell in cells.items() if key != "median" for e in cell["examples"])
    flags = result["flags_side_by_side"]
    assert sum(cell["count"] for cell in flags.values()) == 24
    assert flags["q2"]["hallucination_rate"] == pytest.approx(flags["q2"]["hallucinated"] / flags["q2"]["count"])


def test_the_monitors_rule_is_the_best_cross_fitted_and_can_be_loaded(calibrated):
    result, paths = calibrated
    rule, statistics = result["monitor"], result["statistics"]
    followed = [name for name in (*IN_LOOP, "joint") if name in statistics]
    assert rule["statistic"] == max(followed, key=lambda name: statistics[name]["auroc_crossfit"])
    loaded = load_rule(paths[".json"])
    assert loaded.signals == tuple(rule["weights"]) and loaded.tau == rule["tau"]


def test_direction_and_grid_as_asked(calibrated, tmp_path, without_figures):
    result, _ = run(tmp_path, direction="low", tau_start=1.6, tau_stop=1.8, tau_step=0.05, tau_grid="quantiles")
    hbar = result["statistics"]["hbar_s"]
    assert hbar["direction"] == hbar["conformal"]["direction"] == "low"
    np.testing.assert_allclose([row["tau"] for row in result["all_results"]], [1.6, 1.65, 1.7, 1.75, 1.8])
    assert any(entry["direction"] == "high" for entry in calibrated[0]["statistics"].values())
    assert {e["direction"] for n, e in result["statistics"].items() if n in IN_LOOP} == {"low"}


@pytest.mark.parametrize("batches_before", [0, 3])
def test_interrupted_run_goes_on_and_gives_the_same_result(
    calibrated, tmp_path, monkeypatch, batches_before, without_figures
):
    watch, done = Watcher.watch, []

    def dies(self, batch, width):
        if len(done) == batches_before:
            raise KeyboardInterrupt
        done.append(batch)
        return watch(self, batch, width)

    monkeypatch.setattr(Watcher, "watch", dies)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    (partial,) = tmp_path.iterdir()
    partial.write_bytes(partial.read_bytes() + b'{"batch": 4, "rec')  # the line in flight was torn
    asked = []
    monkeypatch.setattr(Watcher, "watch", lambda self, *batch: asked.append(batch) or watch(self, *batch))
    resumed, paths = run(tmp_path)
    assert len(asked) == 5 - batches_before
    assert without_times(resumed) == without_times(calibrated[0]), "nor do two whole runs differ"
    assert samples(paths[".jsonl"]) == samples(calibrated[1][".jsonl"])


def test_signals_stay_on_disk(tmp_path):
    study = prepare(Settings(output_dir=str(tmp_path), **FAST | {"n_samples": 10}))
    watch_all(study.watcher, log := calibrate_thresholds.open_log(study))
    log.close()
    kept = [item for record in log.done.values() for item in record["items"]]
    assert len(kept) == 10 and all("scores" in item and "signals" not in item for item in kept)
    assert all(item["signals"].keys() == set(IN_LOOP) for item in samples(log.path))
    with calibrate_thresholds.open_log(study) as again:
        assert again.done == log.done


def test_failed_samples_refuse_the_calibration_and_never_get_a_score(tmp_path, monkeypatch, without_figures):
    watch = Watcher.watch

    def broken(self, batch, width):
        items = watch(self, batch, width)
        if 0 in batch:
            k = list(batch).index(0)
            items[k] = {key: items[k][key] for key in ("id", "task", "row", "label")} | {
                "failed": "pri is nan at step 1"
            }
        return items

    monkeypatch.setattr(Watcher, "watch", broken)
    with pytest.raises(
        ValueError, match=r"1 of 24 samples failed, more than --max_failed=0 allows; the first: bundled_"
    ):
        run(tmp_path)
    (partial,) = tmp_path.iterdir()
    assert partial.name.endswith(".partial.jsonl")
    monkeypatch.setattr(Watcher, "watch", lambda *_: pytest.fail("everything was watched already"))
    result, paths = run(tmp_path, max_failed=0.1)
    assert list(result["failed"].values()) == ["pri is nan at step 1"] and result["num_samples"] == 23
    assert "pri is nan at step 1" in paths[".html"].read_text()


def test_a_model_with_a_nan_fails_every_sample(tmp_path):
    study = prepare(Settings(output_dir=str(tmp_path), **FAST | {"n_samples": 10}))
    lm = study.watcher.lm
    params = jax.tree.map(lambda leaf: leaf, lm.params)
    params["layers_3"]["mlp_norm"]["scale"] = params["layers_3"]["mlp_norm"]["scale"].at[0].set(np.nan)
    study.watcher.lm = dataclasses.replace(lm, params=params)
    items = study.watcher.watch(*study.watcher.batches[0])
    assert all("scores" not in item and "is nan at step 0" in item["failed"] for item in items)


def test_a_prompt_beyond_the_context_is_a_failed_sample(tmp_path):
    with pytest.raises(ValueError, match=r"24 of 24 samples failed.*new ones exceed the context of 1024"):
        run(tmp_path, max_tokens=1020)


def test_the_answers_tokens_are_found_in_a_chat():
    watchers = [prepare(Settings(chat_template=chat, **FAST)).watcher for chat in (False, True)]
    decode = watchers[0].lm.tokenizer.decode
    plain_rows, chat_rows = ([*zip(w.prompts, w.spans, strict=True)] for w in watchers)
    for plain, chat, judgement in zip(plain_rows, chat_rows, watchers[0].judgements, strict=True):
        assert plain[0] != chat[0]
        for ids, span in (plain, chat):
            assert decode(ids[slice(*span)]).strip() == judgement.answer


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "no/such/file"}, "no/such/file"),
        ({"tasks": ["poetry"]}, "poetry"),
        ({"n_samples": 5000}, "n_samples is 5000; wanted 1 to 1000"),
        ({"model": "no/such/folder"}, "no/such/folder"),
        ({"packs": ["no_such_pack"]}, "no_such_pack"),
        ({"packs": []}, "--packs is empty"),
        ({"min_recall": 1.0}, "--min_recall=1.0"),
        ({"max_failed": 1.0}, "--max_failed=1.0"),
        ({"tau_start": 1.0}, "--tau_start=1.0; wanted --tau_start, --tau_stop"),
        ({"tau_start": 2.0, "tau_stop": 1.0, "tau_step": 0.1}, "--tau_stop=1.0"),
        ({"split": "published"}, "published"),
    ],
)
def test_bad_input_is_an_error_before_any_compute(tmp_path, changes, message):
    with pytest.raises((ValueError, OSError), match=message):
        prepare(Settings(output_dir=str(tmp_path / "out"), **FAST | changes))
    assert not (tmp_path / "out").exists()


# --- Validation -------------------------------------------------------------------------------------------------------


def test_validation_never_tunes(calibrated, validated):
    """Thresholds, directions and weights are the file's; the numbers are scikit-learn's at those."""
    (stored, _), (result, paths) = calibrated, validated
    assert result["calibrated_thresholds"] == {"tau_hbar": stored["tau_hbar"], "tau_pri": stored["tau_pri"]}
    items = samples(paths[".jsonl"])
    y = np.array([item["label"] for item in items])
    assert result["n_test_samples"] == len(y) == 30 and result["max_tokens"] == 6
    for name, entry in result["statistics"].items():
        for key in ("direction", "best", "conformal"):
            assert entry[key] == stored["statistics"][name][key]
    for name, key in (("hbar_alone", "hbar_s"), ("pri_alone", "pri")):
        s = np.array([item["scores"][key] for item in items])
        sign = 1 if stored["statistics"][key]["direction"] == "high" else -1
        flagged = sign * s >= sign * stored["statistics"][key]["best"]["tau"]
        at = result["performance_at_calibrated_thresholds"][name]
        assert at["precision"] == pytest.approx(y[flagged].mean()) and at["recall"] == pytest.approx(
            flagged[y == 1].mean()
        )
        assert result["auroc_and_prauc"][name]["auroc"] == pytest.approx(roc_auc_score(y, sign * s))
    weights = stored["joint_model_weights"]
    joint = sum(weights[w] * np.array([item["scores"][key] for item in items]) for w, key in
                (("w_hbar", "hbar_s"), ("w_pri", "pri")))  # fmt: skip
    assert result["statistics"]["joint"]["at_best"]["auroc"]["value"] == pytest.approx(roc_auc_score(y, joint))
    assert sum(result["quadrant_analysis"][q]["count"] for q in ("q1", "q2", "q3", "q4")) == 30
    assert {row["sample_id"] for row in result["scores_by_sample"]} == {item["id"] for item in items}


def test_held_out_rows_are_others(calibrated, validated):
    rows = [{item["row"] for item in samples(paths[".jsonl"])} for _, paths in (calibrated, validated)]
    assert len(rows[0]) == 12 and len(rows[1]) == 15 and not rows[0] & rows[1]


def test_recall_is_checked_by_the_exact_interval_and_flags_are_the_monitors(calibrated, validated):
    result, paths = validated
    rule = result["monitor"]
    items = samples(paths[".jsonl"])
    found = sum(
        item["label"]
        for item in items
        for score in [rule["intercept"] + sum(w * item["scores"][n] for n, w in rule["weights"].items())]
        if (score >= rule["tau"] if rule["direction"] == "high" else score <= rule["tau"])
    )
    check, positives = rule["recall_check"], 15
    assert check["recall"] == pytest.approx(found / positives) and check["target"] == 0.9
    low = beta.ppf(0.025, found, positives - found + 1) if found else 0.0
    assert check["interval"][0] == pytest.approx(low, abs=1e-6)
    loaded = load_rule(calibrated[1][".json"])
    signals = [{n: np.asarray(v) for n, v in item["signals"].items()} for item in items if item["label"]]
    assert found == sum(loaded.sign * statistic(loaded, seen, 5) >= loaded.sign * loaded.tau for seen in signals)


def rows_file(path, count):
    rows = [
        {"knowledge": f"{i} is a number.", "question": f"What is {i}?", "right_answer": f"A number {i}.",
         "hallucinated_answer": f"A fish {i}."}
        for i in range(count)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_rows_that_were_calibrated_on_are_refused_by_their_texts(tmp_path):
    """The same rows under another path, and in another order of lines, so that their numbers differ."""
    rows_file(tmp_path / "qa_data.jsonl", 12)
    study = prepare(Settings(dataset=str(tmp_path / "qa_data.jsonl"), **FAST | {"n_samples": 8}))
    stored = {"identity": {"config": dataclasses.asdict(study.settings)}, "data": study.data}
    other = tmp_path / "other"
    other.mkdir()
    lines = (tmp_path / "qa_data.jsonl").read_text().splitlines(keepends=True)
    (other / "qa_data.jsonl").write_text("".join(lines[::-1]))
    with pytest.raises(ValueError, match="4 of the source rows, 'qa .*' among them, were calibrated on"):
        prepare_validation(ValidationSettings(dataset=str(other / "qa_data.jsonl")), stored)
    held_out = prepare_validation(ValidationSettings(seed=7), stored)
    rows = [{row_key(j) for j in s.watcher.judgements} for s in (study, held_out)]
    assert len(rows[0]) == 4 and len(rows[1]) == 6 and not rows[0] & rows[1]


def test_published_split_says_that_twins_are_on_both_sides(shared_data):
    file = str(shared_data / "halueval/qa_data.first1000.jsonl")
    with pytest.raises(ValueError, match="published examples have no judgement here"):
        prepare(Settings(dataset=file, split="published", **FAST | {"n_samples": 1000}))
    settings = Settings(dataset=file, split="published", allow_missing=True, **FAST | {"n_samples": 4998})
    study = prepare(settings)
    assert study.data["missing_by_task"]["dialogue"] > 1000 and len(study.watcher.judgements) > 100
    stored = {"identity": {"config": dataclasses.asdict(settings)}, "data": study.data}
    held_out = prepare_validation(ValidationSettings(allow_missing=True), stored)
    assert not {j.id for j in study.watcher.judgements} & {j.id for j in held_out.watcher.judgements}
    assert held_out.data["rows_calibrated_on"] > 20


@pytest.mark.parametrize(
    ("path", "message"), [(None, "--calibrated_params is missing"), ("other.json", "was not written by calibrate")]
)
def test_another_file_is_refused(tmp_path, path, message):
    (tmp_path / "other.json").write_text('{"monitor": {}}')
    with pytest.raises(ValueError, match=message):
        load_calibration(path and tmp_path / path)


# --- Slow -------------------------------------------------------------------------------------------------------------


def command(folder, *flags):
    return [sys.executable, "-m", "experiments.calibrate_thresholds", f"--output_dir={folder}", *flags]


@pytest.mark.slow
def test_killed_run_goes_on(tmp_path, calibrated):
    flags = [f"--{name}={value}" for name, value in FAST.items()]
    process = subprocess.Popen(
        command(tmp_path, *flags), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None:
        logs = list(tmp_path.glob("*.partial.jsonl"))
        if logs and logs[0].read_bytes().count(b"\n") >= 3:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list(tmp_path.glob("*_n24.json")), "killed too late to say anything"
    again = subprocess.run(command(tmp_path, *flags), cwd=ROOT, capture_output=True, text=True, check=True)
    assert "Going on after" in again.stdout
    (path,) = tmp_path.glob("*_n24.json")
    found, wanted = (without_times(result) for result in (results.load_json(path), calibrated[0]))
    for result in (found, wanted):
        result["identity"].pop("command")
    assert found == wanted


@pytest.mark.slow
def test_memory_is_constant(tmp_path):
    peak = {}
    for n in (50, 500):
        subprocess.run(command(tmp_path / str(n), f"--n_samples={n}"), cwd=ROOT, capture_output=True, check=True)
        peak[n] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # of the largest child so far
    assert peak[500] < 1.1 * peak[50]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--n_samples=9999"], ["--dataset=no/such/file"], ["--min_recall=2"]])
def test_bad_command_is_one_line(tmp_path, flags):
    done = subprocess.run(command(tmp_path, *flags), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("calibrate_thresholds: ")
