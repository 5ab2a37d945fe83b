"""Strict JSON, atomic writes, the run's identity, and logs that survive a kill at every byte."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from nmjax.report import results


@dataclasses.dataclass
class Pair:
    left: object
    right: object


def test_numpy_jax_and_dataclass_values_become_plain_json():
    value = {
        "pair": Pair(np.float32(0.5), (1, None)),
        "arrays": [np.arange(3), jnp.ones((1, 2)), jnp.bfloat16(1.5), np.array([True])],
        "path": pathlib.PurePosixPath("a/b"),
        "scalars": [np.int64(7), np.bool_(False), np.float64(0.1), True, "x"],
    }
    assert json.loads(results.dump_json(value)) == {
        "pair": {"left": 0.5, "right": [1, None]},
        "arrays": [[0, 1, 2], [[1.0, 1.0]], 1.5, [True]],
        "path": "a/b",
        "scalars": [7, False, 0.1, True, "x"],
    }


def test_float32_survives_the_round_trip():
    values = np.random.default_rng(0).normal(size=100).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(json.loads(results.dump_json(values)), np.float32), values)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), np.float32("inf"), jnp.nan])
def test_numbers_that_json_lacks_are_refused_with_their_place(bad):
    with pytest.raises(ValueError, match=r"^\$\.packs\[1\]\.ece is"):
        results.dump_json({"packs": [{"ece": 0.0}, {"ece": bad}]})
    with pytest.raises(ValueError, match=r"^\$\.bins\[0\]\[1\] is"):
        results.dump_json({"bins": np.array([[0.0, bad]])})


def test_types_that_json_lacks_are_refused_with_their_place():
    with pytest.raises(TypeError, match=r"\$\.a\[0\] has the type set"):
        results.dump_json({"a": [{1, 2}]})
    with pytest.raises(TypeError, match=r"\$\.a has the key 1 of type int"):
        results.dump_json({"a": {1: 2}})
    with pytest.raises(TypeError, match=r"\$\[0\] is an array of complex128"):
        results.dump_json([np.array([1j])])


def test_a_refused_value_leaves_the_old_file_and_nothing_else(tmp_path):
    path = results.write_json(tmp_path / "new" / "r.json", {"a": 1})
    with pytest.raises(ValueError, match=r"\$\.a is nan"):
        results.write_json(path, {"a": float("nan")})
    assert results.load_json(path) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["r.json"]


def test_a_failed_rename_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = results.write_atomic(tmp_path / "r.txt", "old")

    def fail(*_):
        raise OSError("disk on fire")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="on fire"):
        results.write_atomic(path, "new")
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_load_json_names_the_file(tmp_path):
    (tmp_path / "nan.json").write_text('{"a": NaN}')
    (tmp_path / "torn.json").write_text('{"a": ')
    with pytest.raises(ValueError, match=r"nan\.json holds NaN"):
        results.load_json(tmp_path / "nan.json")
    with pytest.raises(ValueError, match=r"torn\.json is not JSON"):
        results.load_json(tmp_path / "torn.json")


def test_hashes_follow_the_content(tmp_path):
    assert results.content_hash({"a": 1, "b": [2.5]}) == results.content_hash({"b": (2.5,), "a": np.int32(1)})
    assert results.content_hash({"a": 1}) != results.content_hash({"a": 2})
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "weights").write_bytes(b"abc")
    assert results.path_hash(folder / "sub" / "weights") == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, the example "abc"
    )
    before = results.path_hash(folder)
    (folder / ".cache").write_text("hidden")
    assert results.path_hash(folder) == before
    (folder / "sub" / "weights").rename(folder / "sub" / "renamed")
    assert results.path_hash(folder) != before
    with pytest.raises(FileNotFoundError):
        results.path_hash(folder / "absent")


def test_run_identity_is_complete_and_strict():
    identity = results.run_identity("demo", {"packs": ["none"]}, {"seed": 3}, {"model": "abc"})
    assert identity["config"] == {"packs": ["none"]} and identity["seeds"] == {"seed": 3}
    assert identity["versions"]["numpy"] == np.__version__
    assert identity["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"jax", "flax", "transformers", "nmjax"} <= set(identity["versions"])
    assert identity["hashes"] == {"model": "abc"} and identity["timestamp"].endswith("+00:00")
    json.loads(results.dump_json(identity))


PLAN = {"model": "tiny", "seed": 0}


def filled_log(path, batches=3):
    with results.JsonlLog(path, PLAN) as log:
        for k in range(batches):
            log.append(k, {"values": [k, k + 0.5]})
    return path.read_bytes()


def test_log_resumes_after_a_cut_at_every_byte(tmp_path):
    path = tmp_path / "log.jsonl"
    content = filled_log(path)
    ends = [k + 1 for k, byte in enumerate(content) if byte == ord("\n")]
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        whole = max(0, sum(end <= cut for end in ends) - 1)
        with results.JsonlLog(path, PLAN) as log:
            assert log.done == {k: {"values": [k, k + 0.5]} for k in range(whole)}
            for k in range(3):
                if k not in log.done:
                    log.append(k, {"values": [k, k + 0.5]})
        assert path.read_bytes() == content, f"cut at byte {cut}"


def test_log_of_another_plan_is_refused_or_overwritten_on_request(tmp_path):
    path = tmp_path / "log.jsonl"
    content = filled_log(path)
    with pytest.raises(ValueError, match=r"log\.jsonl, line 1 belongs to another plan.*--noresume"):
        results.JsonlLog(path, {"model": "tiny", "seed": 1})
    assert path.read_bytes() == content
    with results.JsonlLog(path, {"model": "tiny", "seed": 1}, resume=False) as log:
        assert log.done == {}
        log.append(0, [1])
    with results.JsonlLog(path, {"model": "tiny", "seed": 1}) as log:
        assert log.done == {0: [1]}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda lines: [lines[0], b"{oops\n", *lines[2:]], "line 2 is not JSON"),
        (lambda lines: [lines[0], lines[1], lines[1]], "line 3 repeats batch 0"),
        (lambda lines: lines[1:], r"line 1 lacks the fields \['plan', 'plan_hash', 'schema'\]"),
        (lambda lines: [lines[0], b"[1]\n"], r"line 2 lacks the fields \['batch', 'record'\]"),
    ],
)
def test_damage_other_than_a_torn_tail_is_an_error(tmp_path, spoil, message):
    path = tmp_path / "log.jsonl"
    lines = filled_log(path).splitlines(keepends=True)
    path.write_bytes(b"".join(spoil(lines)))
    with pytest.raises(ValueError, match=message):
        results.JsonlLog(path, PLAN)


def test_log_refuses_a_second_writer_a_repeated_batch_and_nan(tmp_path):
    path = tmp_path / "log.jsonl"
    with results.JsonlLog(path, PLAN) as log:
        log.append(0, np.arange(2))
        assert log.done == {0: [0, 1]}, "an unbroken run must see what a resumed one reads"
        with pytest.raises(ValueError, match="batch 0 is in"):
            log.append(0, [])
        with pytest.raises(ValueError, match=r"\$\.record\[0\] is nan"):
            log.append(1, [float("nan")])
        with pytest.raises(OSError, match="being written by another run"):
            results.JsonlLog(path, PLAN)
    with results.JsonlLog(path, PLAN) as log:
        assert log.done == {0: [0, 1]}


def test_finished_log_gets_its_final_name(tmp_path):
    log = results.JsonlLog(tmp_path / "partial.jsonl", PLAN)
    log.append(0, [1])
    final = log.finish(tmp_path / "records.jsonl")
    assert [p.name for p in tmp_path.iterdir()] == ["records.jsonl"]
    assert json.loads(final.read_text().splitlines()[1]) == {"batch": 0, "record": [1]}


def test_sigkill_loses_at_most_the_batch_in_flight(tmp_path):
    path = tmp_path / "log.jsonl"
    code = (
        "import os, signal, sys\nfrom nmjax.report import results\n"
        f"log = results.JsonlLog({str(path)!r}, {PLAN!r})\n"
        "for k in range(4):\n    log.append(k, [k])\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=pathlib.Path(__file__).parents[3], check=False)
    assert done.returncode == -signal.SIGKILL
    with results.JsonlLog(path, PLAN) as log:
        assert log.done == {k: [k] for k in range(4)}


def test_log_keeps_in_memory_what_it_is_told_to(tmp_path):
    keep = lambda record: {"score": record["score"]}  # noqa: E731
    with results.JsonlLog(tmp_path / "log.jsonl", PLAN, keep=keep) as log:
        log.append(0, {"score": 1, "steps": [1, 2, 3]})
        assert log.done == {0: {"score": 1}}
    with results.JsonlLog(tmp_path / "log.jsonl", PLAN, keep=keep) as log:
        assert log.done == {0: {"score": 1}}
    with results.JsonlLog(tmp_path / "log.jsonl", PLAN) as log:
        assert log.done == {0: {"score": 1, "steps": [1, 2, 3]}}
