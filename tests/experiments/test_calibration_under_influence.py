"""The experiment: its plan, its resume, its numbers against one-by-one scoring, and its files."""

import dataclasses
import json
import pathlib
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
    params = module.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    params = jax.tree.map(lambda x: 6 * x if x.ndim > 1 else x, params)  # larger logits: answers that differ
    folder = tmp_path_factory.mktemp("model") / "random"
    models.save(nmjax.LanguageModel(module=module, params=params, tokenizer=tokenizer), folder)
    return folder


@pytest.fixture
def settings(model_folder, tmp_path):
    return experiment.Settings(
        model=str(model_folder), max_questions=22, batch_size=5, bootstrap_draws=100, output_dir=str(tmp_path / "out")
    )


def run(settings, **changes):
    """Run in this process; the result as parsed JSON and the paths written by suffix."""
    settings = dataclasses.replace(settings, **changes)
    written = experiment.run(settings, *experiment.prepare(settings))
    paths = {path.name.rsplit("_", 2)[0]: path for path in written if path.suffix != ".html"}
    paths["page"] = next(path for path in written if path.suffix == ".html")
    return results.load_json(paths["calibration_experiment"]), paths


def without_times(result):
    result = json.loads(json.dumps(result))
    result["identity"].pop("timestamp")
    result["identity"]["config"].pop("output_dir")
    result.pop("timing")
    return result


def test_numbers_equal_a_forward_pass_for_each_pack(settings, model_folder, capsys):
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
    assert "cocaine_100" in printed and str(paths["reliability"]) in printed


def test_files_say_the_same_and_are_complete(settings):
    result, paths = run(settings)
    folder = pathlib.Path(settings.output_dir)
    assert sorted(p.suffix for p in folder.iterdir()) == [".html", ".json", ".jsonl", ".png", ".png", ".txt"]
    assert paths["reliability"].read_bytes().startswith(b"\x89PNG") and paths["metrics"].stat().st_size > 10_000
    page = paths["page"].read_text()
    assert page.count("data:image/png;base64,") == 2
    for outside in ("http://", "https://", "<script ", "<link", "@import", "url(", "src=\"/"):
        assert outside not in page, "the page must not need anything else"
    summary = paths["calibration_summary"].read_text()
    for entry in result["results"]:
        shown = f"{entry['calibration']['accuracy']:.3f} [{entry['calibration']['intervals']['accuracy'][0]:.3f}, "
        assert shown in summary and shown.split(" ")[0] in page
    records = [json.loads(line) for line in paths["calibration_records"].read_text().splitlines()]
    assert len(records) == 1 + 5  # the plan, then 22 questions in batches of 5
    items = [item for record in records[1:] for item in record["record"]["items"]]
    assert [item["id"] for item in items] == [q.id for q in load_questions("bundled", 22, 0)]
    assert np.asarray(items[0]["probs"]).shape == (4, 4)
    identity = result["identity"]
    assert identity["config"]["packs"] == ["none", "cocaine_10", "cocaine_50", "cocaine_100"]
    assert set(identity["hashes"]) == {"model", *(f"pack {p}" for p in identity["config"]["packs"])}
    assert identity["versions"]["jax"] == jax.__version__
    assert sorted(result["questions_by_subject"].values()) == [4, 4, 4, 5, 5]


def test_two_runs_are_equal_but_for_times_and_another_seed_is_not(settings, tmp_path):
    first, _ = run(settings)
    again, _ = run(settings, output_dir=str(tmp_path / "again"))
    other, _ = run(settings, output_dir=str(tmp_path / "other"), seed=1)
    assert without_times(first) == without_times(again)
    assert first["plan"]["questions"] != other["plan"]["questions"]


@pytest.mark.parametrize("batches_before", [0, 1, 4])
def test_interrupted_run_goes_on_and_gives_the_same_result(settings, tmp_path, batches_before, capsys):
    unbroken, _ = run(settings, output_dir=str(tmp_path / "unbroken"))
    plan, score, log = experiment.prepare(settings)
    calls = []

    def dies(prompts, numbers):
        if len(calls) == batches_before:
            raise KeyboardInterrupt
        calls.append(numbers)
        return score(prompts, numbers)

    with pytest.raises(KeyboardInterrupt):
        experiment.run(settings, plan, dies, log)
    (partial,) = pathlib.Path(settings.output_dir).iterdir()
    partial.write_bytes(partial.read_bytes() + b'{"batch": 4, "rec')  # and the line in flight was torn

    plan, score, log = experiment.prepare(settings)
    asked = []
    written = experiment.run(settings, plan, lambda prompts, n: asked.append(n) or score(prompts, n), log)
    assert len(asked) == 5 - batches_before
    assert ("Going on after" in capsys.readouterr().out) == (batches_before > 0)
    resumed = results.load_json(next(p for p in written if p.suffix == ".json"))
    assert without_times(resumed) == without_times(unbroken)
    assert not list(pathlib.Path(settings.output_dir).glob("*.partial.jsonl"))


def test_noresume_starts_anew_and_another_plan_has_another_log(settings):
    plan, _, log = experiment.prepare(settings)
    with log:
        log.append(0, {"seconds": 1.0, "items": []})
    with experiment.prepare(dataclasses.replace(settings, seed=3))[2] as other:
        assert other.path != log.path and other.done == {}
    with experiment.prepare(settings)[2] as kept:
        assert list(kept.done) == [0]
    with experiment.prepare(dataclasses.replace(settings, resume=False))[2] as fresh:
        assert fresh.path == log.path and fresh.done == {}


class Scores:
    """What a scorer returns, made of probabilities [rows, 4]."""

    def __init__(self, probs, sober, mass=0.5):
        self.probs, self.logprobs = probs, np.log(mass * probs)
        self.sober_logprobs, self.removed = np.log(sober), np.zeros(len(probs))


def test_rows_are_question_by_question_with_packs_within(settings, tmp_path):
    """A scorer that knows the answers: pack k puts 0.4 + 0.1 k on the right one."""
    plan, _ = experiment.make_plan(settings)

    def score(prompts, numbers):
        assert len(prompts) == 5, "the last batch must be as large as the others"
        rows = []
        for number, prompt in zip(numbers, prompts, strict=True):
            assert prompt == format_mmlu(plan.questions[number])
            for k in range(4):
                row = np.full(4, (0.6 - 0.1 * k) / 3)
                row[plan.questions[number].answer] = 0.4 + 0.1 * k
                rows.append(row)
        return Scores(np.array(rows), np.full((20, 4), 0.2))

    with results.JsonlLog(tmp_path / "log.jsonl", plan.describe()) as log:
        answers = experiment.ask(plan, score, log)
    np.testing.assert_allclose(answers.mass, 0.5)
    np.testing.assert_allclose(answers.sober_mass, 0.8)
    report = experiment.analyse(plan, answers, 100)
    for k, profile in enumerate(report.after.profiles):
        assert profile["confidence"] == pytest.approx(0.4 + 0.1 * k) and profile["accuracy"] == 1.0
        assert profile["ece"] == pytest.approx(0.6 - 0.1 * k)
    assert report.after.differences[3]["nll"]["difference"] == pytest.approx(np.log(0.4 / 0.7))
    assert report.after.differences[0] is None
    mass = report.mass[2]["after_all_effects"]
    assert mass == {"mean": pytest.approx(0.5), "interval": pytest.approx([0.5, 0.5]), "min": pytest.approx(0.5)}
    text = report.text()
    assert "0.600 [0.600, 0.600]" in text and "== Before the sampler's effects ==" in text


def test_a_number_that_is_not_finite_is_an_error_that_names_it(settings, tmp_path):
    plan, _ = experiment.make_plan(settings)
    bad = np.full((20, 4), 0.25)
    bad[6, 2] = np.nan
    with results.JsonlLog(tmp_path / "log.jsonl", plan.describe()) as log:
        with pytest.raises(ValueError, match=r"items\[1\]\.probs\[2\]\[2\] is nan"):
            experiment.ask(plan, lambda prompts, numbers: Scores(bad, bad), log)
        assert log.done == {}


def test_baseline_is_none_wherever_it_stands_and_doses_are_in_the_label(settings):
    plan, _ = experiment.make_plan(dataclasses.replace(settings, packs=["cocaine", "none"], intensities=["0.5", "1"]))
    assert [arm.label for arm in plan.arms] == ["cocaine@0.5", "none"] and plan.baseline == 1
    half = nmjax.load_pack("cocaine").at(0.5)
    assert plan.arms[0].pack.content_hash() == half.content_hash()
    plan, _ = experiment.make_plan(dataclasses.replace(settings, packs=["cocaine", "cocaine_10"]))
    assert plan.baseline == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packs": ["none", "cocaine"], "intensities": ["1"]}, r"--intensities has 1 values \(1\) for 2 packs"),
        ({"packs": ["none"], "intensities": ["much"]}, "'much' for pack none"),
        ({"packs": ["none"], "intensities": ["nan"]}, "'nan' for pack none"),
        ({"packs": ["cocaine"], "intensities": ["-1"]}, "dose"),
        ({"packs": []}, "--packs is empty"),
        ({"packs": ["none", "none"]}, "holds none twice"),
        ({"packs": ["no_such_pack"]}, "no_such_pack"),
        ({"questions": "no/such/file"}, "questions='no/such/file'"),
        ({"subjects": ["alchemy"]}, "alchemy.*geography"),
        ({"max_questions": 1}, "1 question; intervals need at least 2"),
        ({"model": "no/such/folder"}, "no/such/folder"),
    ],
)
def test_bad_input_is_an_error_before_any_compute(settings, changes, message):
    with pytest.raises((ValueError, OSError), match=message):
        experiment.prepare(dataclasses.replace(settings, **changes))
    assert not pathlib.Path(settings.output_dir).exists()


def test_a_question_longer_than_the_context_is_named(settings, tmp_path):
    rows = [{"question": "short", "choices": list("abcd"), "answer": 0}]
    rows.append({"question": "long " * 120, "choices": list("abcd"), "answer": "B"})
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=r"question 'questions:2' has \d+ tokens.*context of .* is 512"):
        experiment.prepare(dataclasses.replace(settings, questions=str(path)))


def command(model_folder, out, *more):
    return [
        sys.executable, "-m", "experiments.calibration_under_influence", f"--model={model_folder}",
        "--max-questions", "60", "--batch-size", "2", "--packs", "none", "cocaine_100", "--output_dir", str(out),
        "--bootstrap_draws=100", *more,
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
    for lines in (3, 12, 25):
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
