"""The experiment: its plan, its resume, its numbers against one-by-one scoring, and its files."""

import csv
import dataclasses
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from scipy.special import softmax
from tokenizers import Regex, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

import models
import nmjax
import nmjax.scoring
from experiments import calibration_under_influence as experiment
from experiments.calibration.study import Settings, Study, prepare
from nmjax.data.questions import format_mmlu, load_questions
from nmjax.metrics import calibration
from nmjax.report import results
from nmjax.steering.store import named_vector

ROOT = pathlib.Path(__file__).parents[2]
LETTER_PIECES = [f"\u0120{letter}" for letter in "ABCD"]  # byte-level BPE writes a space as this sign


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A random Llama of three layers with a tokenizer of bytes and answer letters, as a checkpoint."""
    split = pre_tokenizers.Split(Regex(" [A-D]$"), "isolated")
    pieces = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *LETTER_PIECES]
    backend = tokenizers.Tokenizer(BPE({piece: k for k, piece in enumerate(pieces)}, [], ignore_merges=True))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    config = models.LlamaConfig.from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 48,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }
    )
    module = models.Llama(config)
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    params = jax.tree.map(lambda x: 6 * x if x.ndim > 1 else x, params)  # larger logits: answers that differ
    folder = tmp_path_factory.mktemp("model") / "random"
    models.save(nmjax.LanguageModel(module=module, params=params, tokenizer=tokenizer), folder)
    return folder


def questions_alone(model_folder, folder):
    """Questions in batches of 5."""
    return Settings(
        model=str(model_folder), max_questions=22, batch_size=5, bootstrap_draws=100, gradient_questions=0, ood=False,
        output_dir=str(folder / "out"),
    )  # fmt: skip


def everything(model_folder, folder):
    """Of each a little: 5 batches of questions, 1 of derivatives, 2 of texts."""
    return dataclasses.replace(
        questions_alone(model_folder, folder), packs=["none", "cocaine_100"], gradient_questions=5, ood=True,
        ood_per_category=2, ood_seeds=1, ood_tokens=5,
    )  # fmt: skip


@pytest.fixture
def settings(model_folder, tmp_path):
    return questions_alone(model_folder, tmp_path)


@pytest.fixture
def whole(model_folder, tmp_path):
    return everything(model_folder, tmp_path)


@pytest.fixture(scope="module")
def unbroken(model_folder, tmp_path_factory):
    """Everything, run once: the result and the paths."""
    return run(everything(model_folder, tmp_path_factory.mktemp("unbroken")))


def run(settings, **changes):
    """Run in this process; the result as parsed JSON and the paths written by suffix."""
    study = prepare(dataclasses.replace(settings, **changes))
    written = experiment.run(study, experiment.open_log(study))
    paths = {path.name.rsplit("_", 2)[0]: path for path in written if path.suffix != ".html"}
    paths["page"] = next(path for path in written if path.suffix == ".html")
    return results.load_json(paths["calibration_experiment"]), paths


def without_times(result):
    result = json.loads(json.dumps(result))
    result["identity"].pop("timestamp")
    result["identity"]["config"].pop("output_dir")
    result.pop("timing")
    result.pop("generation_time")
    return result


def test_numbers_equal_a_forward_pass_for_each_pack(settings, model_folder, capsys, without_figures):
    traces = nmjax.scoring._score._cache_size()
    result, paths = run(settings)
    assert nmjax.scoring._score._cache_size() == traces + 1, "all batches and packs must be one compiled program"

    lm = models.load(model_folder)
    questions = load_questions("bundled", 22, 0)
    labels = [q.answer for q in questions]
    letters = np.array(lm.tokenizer.convert_tokens_to_ids(LETTER_PIECES))
    salient = named_vector(lm, "salient")
    packs, doses = [], (0, 0.1, 0.5, 1)
    for dose in doses:
        # A random model has no induction heads, so the middle ones of the middle layer are scaled.
        sharper = nmjax.scale_qk(1 + 0.9 * dose, layers=[1], heads=[1, 2])
        packs.append(nmjax.compose(sharper, nmjax.steer(salient, 0.3 * 0.35 * dose, layers=[1], coef="relative")))
    prompts = [format_mmlu(q) for q in questions] * len(doses)
    result_of = nmjax.forward(lm, prompts, packs=[pack for pack in packs for _ in questions])
    passes = np.asarray(result_of.logits[:, -1], np.float64).reshape(len(doses), len(questions), -1)
    probs, sober = [], []
    for dose, logits in zip(doses, passes, strict=True):
        sober.append(softmax(logits[:, letters], axis=-1))
        shares = softmax(logits / (1 - 0.3 * dose), axis=-1)
        ordered = -np.sort(-shares, axis=-1)
        before = np.cumsum(ordered, axis=-1) - ordered
        smallest = np.where(before < 1 - 0.3 * 0.35 * dose, ordered, 1).min(-1, keepdims=True)  # in the nucleus
        chosen = shares[:, letters]
        kept = (chosen >= smallest) | (chosen == chosen.max(-1, keepdims=True))
        cut = np.where(kept, chosen / chosen.sum(-1, keepdims=True), 1e-12)
        probs.append(cut / cut.sum(-1, keepdims=True))
    assert np.abs(sober[3] - sober[0]).max() > 0.01, "the packs were meant to move this model"
    for p, entry in enumerate(result["results"]):
        assert entry["pack_name"] == ("none", "cocaine_10", "cocaine_50", "cocaine_100")[p]
        for key, expected in (("calibration", probs[p]), ("calibration_before_sampler", sober[p])):
            for name, metric in (
                ("accuracy", calibration.accuracy),
                ("confidence", calibration.mean_confidence),
                ("ece", calibration.ece),
                ("mce", calibration.mce),
                ("brier_score", calibration.brier_top_label),
                ("brier_multiclass", calibration.brier_multiclass),
                ("nll", calibration.nll),
            ):
                assert entry[key][name] == pytest.approx(float(metric(expected, labels)), abs=2e-5), (p, key, name)
            assert entry[key]["num_samples"] == 22
            assert set(entry[key]["calibration_bins"]) == {f"bin_{b}" for b in range(10)}
    printed = capsys.readouterr().out
    assert "cocaine_100" in printed and str(paths["page"]) in printed


def test_files_say_the_same_and_are_complete(unbroken):
    result, paths = unbroken
    folder = paths["page"].parent
    figures = ["dose_response", "metrics", "ood", "reliability", "risk_coverage"]
    assert sorted(p.name.rsplit("_", 2)[0] for p in folder.glob("*.png")) == figures
    assert sorted(p.suffix for p in folder.iterdir() if p.suffix != ".png") == [".html", ".json", ".jsonl", ".txt"]
    page = paths["page"].read_text()
    assert page.count("data:image/png;base64,") == len(figures)
    for outside in ("http://", "https://", "<script src", "<link", 'src="/'):
        assert outside not in page, "the page must not need anything else"
    summary = paths["calibration_summary"].read_text()
    for entry in result["results"]:
        shown = f"{entry['calibration']['accuracy']:.3f} [{entry['calibration']['intervals']['accuracy'][0]:.3f}, "
        assert shown in summary and shown.split(" ")[0] in page
        assert set(entry["ood_metrics"]) == {
            "perplexity", "unique_ngrams", "total_ngrams", "diversity_ratio", "repetition_rate", "avg_response_length"
        }  # fmt: skip
    assert len(result["verdicts"]) == 7 and all(verdict["claim"] in page for verdict in result["verdicts"])
    records = [json.loads(line) for line in paths["calibration_records"].read_text().splitlines()]
    assert len(records) == 1 + 5 + 1 + 2
    items = [item for record in records[1:6] for item in record["record"]["items"]]
    assert sorted(item["id"] for item in items) == sorted(q.id for q in load_questions("bundled", 22, 0))
    assert np.asarray(items[0]["probs"]).shape == (2, 4)
    identity = result["identity"]
    assert identity["config"]["packs"] == ["none", "cocaine_100"]
    assert identity["versions"]["jax"] == jax.__version__
    assert sorted(result["questions_by_subject"].values()) == [4, 4, 4, 5, 5]


def test_two_runs_are_equal_but_for_times_and_another_seed_is_not(unbroken, whole):
    first, paths = unbroken
    again, others = run(whole)
    assert without_times(first) == without_times(again)
    for name in ("reliability", "ood", "dose_response", "calibration_summary"):
        assert paths[name].read_bytes() == others[name].read_bytes()
    other = prepare(dataclasses.replace(whole, seed=1))
    assert first["plan"]["questions"] != other.description["questions"] and other.writers[0].seed == 1


@pytest.mark.parametrize(
    "batches_before", [pytest.param(0, marks=pytest.mark.slow), 3, pytest.param(7, marks=pytest.mark.slow)]
)
def test_interrupted_run_goes_on_and_gives_the_same_result(
    unbroken, whole, monkeypatch, batches_before, capsys, without_figures
):
    """Stopped before anything, among the questions, among the texts."""
    work = Study.work
    done = []

    def dies(self, task):
        if len(done) == batches_before:
            raise KeyboardInterrupt
        done.append(task)
        return work(self, task)

    monkeypatch.setattr(Study, "work", dies)
    study = prepare(whole)
    with pytest.raises(KeyboardInterrupt):
        experiment.run(study, experiment.open_log(study))
    (partial,) = pathlib.Path(whole.output_dir).iterdir()
    partial.write_bytes(partial.read_bytes() + b'{"batch": 7, "rec')  # and the line in flight was torn

    asked = []
    monkeypatch.setattr(Study, "work", lambda self, task: asked.append(task) or work(self, task))
    resumed, _ = run(whole)
    assert len(asked) == 8 - batches_before
    assert ("Going on after" in capsys.readouterr().out) == (batches_before > 0)
    assert without_times(resumed) == without_times(unbroken[0])
    assert not list(pathlib.Path(whole.output_dir).glob("*.partial.jsonl"))


def test_noresume_starts_anew_and_another_plan_has_another_log(settings):
    with experiment.open_log(prepare(settings)) as log:
        log.append(0, {"seconds": 1.0, "items": []})
    with experiment.open_log(prepare(dataclasses.replace(settings, seed=3))) as other:
        assert other.path != log.path and other.done == {}
    with experiment.open_log(prepare(settings)) as kept:
        assert list(kept.done) == [0]
    with experiment.open_log(prepare(dataclasses.replace(settings, resume=False))) as fresh:
        assert fresh.path == log.path and fresh.done == {}


def test_a_number_that_is_not_finite_is_an_error_that_names_it(settings, monkeypatch):
    study = prepare(settings)
    items = [{"id": "x", "answer": 0, "probs": np.full((4, 4), 0.25)} for _ in range(5)]
    items[1]["probs"][2, 3] = np.nan
    monkeypatch.setattr(Study, "work", lambda self, task: items)
    with experiment.open_log(study) as log:
        with pytest.raises(ValueError, match=r"items\[1\]\.probs\[2\]\[3\] is nan"):
            experiment.perform(study, log)
        assert log.done == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packs": ["none", "cocaine"], "intensities": ["1"]}, r"--intensities has 1 values \(1\) for 2 packs"),
        ({"packs": ["none"], "intensities": ["much"]}, "'much' for pack none"),
        ({"packs": ["none"], "intensities": ["nan"]}, "'nan' for pack none"),
        ({"packs": ["cocaine"], "intensities": ["-1"]}, "'-1' for pack cocaine; wanted a finite number >= 0"),
        ({"packs": []}, "--packs is empty"),
        ({"packs": ["none", "none"]}, "holds none twice"),
        ({"packs": ["no_such_pack"]}, "no_such_pack"),
        ({"questions": "no/such/file"}, "questions='no/such/file'"),
        ({"subjects": ["alchemy"]}, "alchemy.*geography"),
        ({"max_questions": 1}, "1 question; intervals need at least 2"),
        ({"model": "no/such/folder"}, "no/such/folder"),
        ({"arms": ["temperature", "dance"]}, "--arms=temperature,dance; wanted some of temperature, qk"),
        ({"arms": ["full"], "intensities": ["1"]}, "--intensities belong to --packs"),
        ({"arms": ["full"], "doses": ["0"]}, "--doses=0; wanted distinct numbers"),
        ({"arms": ["qk"], "arms_of": "lsd"}, "--arms=qk: the pack lsd has no such effect"),
        ({"chat_template": True}, "has no chat template"),
        ({"margin": 0.0}, "--margin=0.0"),
        ({"compare_model": "no/such/folder"}, "no/such/folder"),
        ({"ood": True, "ood_prompts": "no/such/file"}, "no/such/file"),
        ({"ood": True, "ood_tokens": 500}, "of 102 prompts fit the context"),
    ],
)
def test_bad_input_is_an_error_before_any_compute(settings, changes, message):
    with pytest.raises((ValueError, OSError), match=message):
        prepare(dataclasses.replace(settings, **changes))
    assert not pathlib.Path(settings.output_dir).exists()


def question_rows(count, subject, words=1):
    options = {f"choice{k}": option for k, option in enumerate("abcd")}
    return [{"question": f"{subject} {i} " + "long " * words, "answer": "ABCD"[i % 4], **options} for i in range(count)]


def write_csv(path, rows):
    path.parent.mkdir(exist_ok=True, parents=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def test_questions_longer_than_the_context_are_left_out_before_sampling_and_counted(
    settings, tmp_path, capsys, without_figures
):
    write_csv(tmp_path / "mmlu/test/law_test.csv", question_rows(3, "law") + question_rows(5, "law", 120))
    write_csv(tmp_path / "mmlu/test/logic_test.csv", question_rows(4, "logic"))
    result, paths = run(settings, questions=str(tmp_path / "mmlu"), max_questions=6, packs=["none"])
    assert result["questions_by_subject"] == {"law": 3, "logic": 3}
    assert result["left_out_as_too_long"]["questions_by_subject"] == {"law": 5}
    assert "Left out as longer than the context: 5 questions" in capsys.readouterr().out
    assert "law" in paths["page"].read_text()
    write_csv(tmp_path / "long/test/law_test.csv", question_rows(3, "law", 120))
    with pytest.raises(ValueError, match="none of the 3 questions.* fits: the shortest has .* at most 512"):
        prepare(dataclasses.replace(settings, questions=str(tmp_path / "long")))


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"answer": "E"}, r"law_test\.csv, row 3: answer is 'E'; wanted 0 to 3 or A to D"),
        ({"choice2": ""}, r"law_test\.csv, row 3: the options are"),
        ({"question": " "}, r"law_test\.csv, row 3: question is"),
    ],
)
def test_a_bad_row_is_named(settings, tmp_path, cells, message):
    rows = question_rows(4, "law")
    rows[1] |= cells
    write_csv(tmp_path / "mmlu/test/law_test.csv", rows)
    with pytest.raises(ValueError, match=message):
        prepare(dataclasses.replace(settings, questions=str(tmp_path / "mmlu")))


def test_a_missing_column_and_a_missing_dev_set_are_named(settings, tmp_path):
    rows = [{k: v for k, v in row.items() if k != "choice3"} for row in question_rows(4, "law")]
    write_csv(tmp_path / "mmlu/test/law_test.csv", rows)
    with pytest.raises(ValueError, match="law_test.csv has no columns choice0 to choice3"):
        prepare(dataclasses.replace(settings, questions=str(tmp_path / "mmlu")))
    write_csv(tmp_path / "mmlu/test/law_test.csv", question_rows(4, "law"))
    with pytest.raises(ValueError, match=r"--num_fewshot=2: .* has 0 examples \(dev\) of law"):
        prepare(dataclasses.replace(settings, questions=str(tmp_path / "mmlu"), num_fewshot=2))


def test_two_models_take_the_same_battery(settings, model_folder, tmp_path, without_figures):
    """The same weights twice: the second one's arms answer as the first one's."""
    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    result, _ = run(settings, compare_model=str(other), packs=["none", "cocaine_100"])
    assert [(r["model_name"], r["pack_name"]) for r in result["results"]] == [
        ("random", "none"), ("random", "cocaine_100"), ("other", "none"), ("other", "cocaine_100")
    ]  # fmt: skip
    for a, b in ((0, 2), (1, 3)):
        assert result["results"][a]["calibration"] == result["results"][b]["calibration"]
    sober, drugged = result["base_against_instruct"]
    assert sober["distance"]["total_variation"]["mean"] == 0
    assert {test["difference"] for test in sober["profile"].values()} == {0}
    assert drugged["distance"]["total_variation"]["mean"] > 1e-3
    with pytest.raises(ValueError, match="--compare_model=.* is --model"):
        prepare(dataclasses.replace(settings, compare_model=settings.model))


def command(model_folder, out, *more):
    return [
        sys.executable, "-m", "experiments.calibration_under_influence", f"--model={model_folder}",
        "--max-questions", "60", "--batch-size", "2", "--packs", "none", "cocaine_100", "--output_dir", str(out),
        "--bootstrap_draws=100", "--ood_per_category=4", "--ood_tokens=8", "--gradient_questions=8", *more,
    ]  # fmt: skip


def test_command_line_takes_the_published_spelling_and_reports_bad_input_in_one_line(model_folder, tmp_path):
    done = subprocess.run(
        command(model_folder, tmp_path, "--intensities", "1.0"), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "calibration_under_influence: --intensities has 1 values (1.0) for 2 packs" in done.stderr


@pytest.mark.slow
def test_sigkill_and_restart_give_the_unbroken_result(model_folder, tmp_path):
    subprocess.run(command(model_folder, tmp_path / "unbroken"), cwd=ROOT, check=True, capture_output=True)
    out = tmp_path / "killed"
    for lines in (3, 12, 33, 37):
        process = subprocess.Popen(command(model_folder, out), cwd=ROOT, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            if any(path.read_bytes().count(b"\n") >= lines for path in out.glob("*.partial.jsonl")):
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.returncode == -signal.SIGKILL, "the run was over before it could be killed"
    done = subprocess.run(command(model_folder, out), cwd=ROOT, check=True, capture_output=True, text=True)
    assert "Going on after" in done.stdout
    (resumed,), (unbroken,) = (list(folder.glob("*.json")) for folder in (out, tmp_path / "unbroken"))
    drop = {"command": None}
    first, second = (without_times(results.load_json(path)) for path in (resumed, unbroken))
    assert {**first, "identity": first["identity"] | drop} == {**second, "identity": second["identity"] | drop}


@pytest.mark.slow
@pytest.mark.parametrize("model", ["stories260K-hf", "checkpoints/tiny"])
def test_all_of_mmlus_subjects(shared_data, tmp_path, model):
    """Two questions of each; long ones are left out, and no subject is lost."""
    settings = Settings(
        model=str(shared_data / model) if model == "stories260K-hf" else model, compare_model="none", max_questions=114,
        questions=str(shared_data / "mmlu"), ood_per_category=2, ood_tokens=16, gradient_questions=8,
        bootstrap_draws=200, output_dir=str(tmp_path),
    )  # fmt: skip
    result, _ = run(settings)
    assert len(result["questions_by_subject"]) == 57 and set(result["questions_by_subject"].values()) == {2}
    assert [entry["pack_name"] for entry in result["results"]] == ["none", "cocaine_10", "cocaine_50", "cocaine_100"]
    left_out = sum(result["left_out_as_too_long"]["questions_by_subject"].values())
    assert left_out == (2102 if model == "stories260K-hf" else 865)
    moved = [entry["calibration"]["entropy"] for entry in result["results"]]
    assert moved[3] < moved[0] - 0.1
