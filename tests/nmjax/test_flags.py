import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags as absl_flags

from nmjax import flags


@pytest.fixture
def defined():
    values = absl_flags.FlagValues()
    absl_flags.DEFINE_list("packs", ["none"], "", flag_values=values)
    absl_flags.DEFINE_list("doses", ["1"], "", flag_values=values)
    absl_flags.DEFINE_spaceseplist("words", [], "", flag_values=values)
    absl_flags.DEFINE_integer("max_questions", 10, "", flag_values=values, short_name="n")
    absl_flags.DEFINE_float("dose", 1.0, "", flag_values=values)
    absl_flags.DEFINE_string("prompt", "", "", flag_values=values)
    absl_flags.DEFINE_enum("device", "cpu", ["cpu", "gpu"], "", flag_values=values)
    absl_flags.DEFINE_multi_string("seed", [], "", flag_values=values)
    absl_flags.DEFINE_boolean("test_mode", False, "", flag_values=values)
    absl_flags.DEFINE_boolean("plots", True, "", flag_values=values)
    return values


def parsed(defined, *words):
    """The flag values after `words`, through absl's own parser, which must have nothing left over."""
    assert defined(flags.normalize(["prog", *words], defined)) == ["prog"]
    return defined


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--max_questions=5"], "max_questions", 5),
        (["--max-questions=5"], "max_questions", 5),
        (["--max-questions", "5"], "max_questions", 5),
        (["-max_questions", "5"], "max_questions", 5),
        (["-n", "5"], "max_questions", 5),
        (["--max-questions", "-5"], "max_questions", -5),
        (["--dose", "-.5"], "dose", -0.5),
        (["--dose", "-1e-3"], "dose", -0.001),
        (["--dose", "-inf"], "dose", float("-inf")),
        (["--device", "gpu"], "device", "gpu"),
        (["--packs", "none", "cocaine_10", "cocaine_50"], "packs", ["none", "cocaine_10", "cocaine_50"]),
        (["--packs", "none,cocaine_10"], "packs", ["none", "cocaine_10"]),
        (["--packs=none,cocaine_10"], "packs", ["none", "cocaine_10"]),
        (["--packs", "none,", "cocaine_10"], "packs", ["none", "cocaine_10"]),
        (["--packs", "none", ",", "cocaine_10"], "packs", ["none", "cocaine_10"]),
        (["--packs="], "packs", []),
        (["--doses", "-1", "0", "-2.5"], "doses", ["-1", "0", "-2.5"]),
        (["--doses", "-1,0"], "doses", ["-1", "0"]),
        (["--words", "a", "b,c", "d"], "words", ["a", "b,c", "d"]),
        (["--words=a b"], "words", ["a", "b"]),
        (["--prompt", "- an item = 3"], "prompt", "- an item = 3"),
        (["--prompt=--not-a-flag"], "prompt", "--not-a-flag"),
        (["--prompt=a-b=c"], "prompt", "a-b=c"),
        (["--prompt", ""], "prompt", ""),
        (["--prompt", "-"], "prompt", "-"),
        (["--seed", "1", "--seed", "2"], "seed", ["1", "2"]),
        (["--test_mode"], "test_mode", True),
        (["--test-mode"], "test_mode", True),
        (["--test-mode=false"], "test_mode", False),
        (["--noplots"], "plots", False),
        (["--no-plots"], "plots", False),
        (["--no_plots"], "plots", False),
        (["--notest-mode"], "test_mode", False),
        (["--no-test-mode"], "test_mode", False),
    ],
)
def test_spellings(defined, words, name, value):
    assert getattr(parsed(defined, *words), name) == value


def test_a_list_ends_at_the_next_flag(defined):
    values = parsed(defined, *"--packs none cocaine_10 --test-mode --doses 0 -1 --max-questions 3".split())
    assert (values.packs, values.doses) == (["none", "cocaine_10"], ["0", "-1"])
    assert values.test_mode and values.max_questions == 3


def test_one_word_a_flag_comes_out(defined):
    argv = ["prog", "--packs", "a", "b", "--test-mode", "--no-plots", "--max-questions", "3", "--prompt=x y"]
    normal = flags.normalize(argv, defined)
    assert normal == ["prog", "--packs=a,b", "--test_mode", "--noplots", "--max_questions=3", "--prompt=x y"]
    assert flags.normalize(normal, defined) == normal
    assert argv[1:4] == ["--packs", "a", "b"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stray"], "argument 'stray' belongs to no flag"),
        (["--test-mode", "true"], "'true' belongs to no flag: --test_mode takes no word after it"),
        (["--test-mode", "a", "b"], "'a' belongs to no flag: --test_mode"),
        (["--no-plots", "x"], "'x' belongs to no flag"),
        (["--max-questions", "3", "4"], "'4' belongs to no flag: --max_questions takes one value"),
        (["--max-questions=3", "4"], "'4' belongs to no flag: --max_questions takes one value"),
        (["--packs=none", "cocaine_10"], "'cocaine_10' belongs to no flag: write the list as --packs A B or"),
        (["--packs", "none", "--test-mode", "--", "x"], "'--' belongs to no flag"),
        (["--"], "'--' belongs to no flag"),
        (["--max-questions"], "--max_questions needs a value"),
        (["--max-questions", "--test-mode"], "--max_questions needs a value; got '--test-mode'"),
        (["--packs"], "--packs needs a value"),
        (["--packs", "--test-mode"], "--packs needs a value; got '--test-mode'"),
        (["--max-question", "3"], "Unknown command line flag 'max-question'. Did you mean: max_questions"),
        (["--nomax_questions"], "Unknown command line flag 'nomax_questions'"),
        (["-1"], "'-1' belongs to no flag"),
    ],
)
def test_bad_lines(defined, words, message):
    with pytest.raises(absl_flags.Error) as error:
        flags.normalize(["prog", *words], defined)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "words",
    [
        "results.json --dose 2",
        "--dose 2 results.json",
        "--prompt=results.json --dose=2",
        "--dose=2 --prompt results.json",
    ],
)
def test_a_word_can_stand_for_a_flag(defined, words):
    normal = flags.normalize(["prog", *words.split()], defined, positional=("prompt",))
    assert sorted(normal[1:]) == ["--dose=2", "--prompt=results.json"]


def test_words_fill_flags_in_order_and_no_more():
    values = absl_flags.FlagValues()
    for name in ("one", "two"):
        absl_flags.DEFINE_string(name, None, "", flag_values=values)

    def filled(words):
        return flags.normalize(["prog", *words.split()], values, positional=("one", "two"))[1:]

    assert filled("a b") == ["--one=a", "--two=b"] and filled("--one=b a") == ["--one=b", "--two=a"]
    assert filled("a") == ["--one=a"]
    with pytest.raises(absl_flags.Error, match="'c' belongs to no flag"):
        filled("a b c")


BINARY = """
from absl import flags as f
from nmjax import flags
PACKS = f.DEFINE_list("packs", ["none"], "Packs.")
QUESTIONS = f.DEFINE_integer("max_questions", 10, "Questions.")
def main(argv):
    print(argv[1:], PACKS.value, QUESTIONS.value)
if __name__ == "__main__":
    flags.run(main)
"""


@pytest.fixture(scope="module")
def binary(tmp_path_factory):
    file = tmp_path_factory.mktemp("binary") / "study.py"
    file.write_text(BINARY)
    env = os.environ | {"PYTHONPATH": str(Path(flags.__file__).parent.parent)}
    return lambda *words: subprocess.run([sys.executable, file, *words], env=env, text=True, capture_output=True)


def test_a_binary_runs(binary, tmp_path):
    (tmp_path / "flags.txt").write_text("--max_questions=7\n")
    done = binary("--packs", "none", "cocaine_10", "--flagfile", tmp_path / "flags.txt")
    assert (done.returncode, done.stdout) == (0, "[] ['none', 'cocaine_10'] 7\n")


def test_a_binary_refuses_without_a_traceback(binary):
    done = binary("--packs", "none", "--max-questions", "3", "stray")
    assert (done.returncode, done.stdout) == (1, "")
    assert "argument 'stray' belongs to no flag" in done.stderr and "Traceback" not in done.stderr
