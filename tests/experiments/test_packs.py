"""The binary of packs: what it says is what the packs hold, and it leaves nothing out in silence."""

import functools
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from absl import flags

import nmjax
from experiments import packs as experiment
from nmjax import pack_tools, packs

QK = {"effect": "qk_score_scaling", "weight": 0.5, "direction": "up", "parameters": {"layers": "all"}}
HEAT = {"effect": "temperature", "weight": 0.25, "direction": "up", "parameters": {}}
STEER = {"effect": "steering", "weight": 0.5, "direction": "down", "parameters": {"steering_type": "odd"}}


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))


@pytest.fixture
def save(tmp_path):
    def write(name, *effects, **fields):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"name": name, "effects": list(effects), **fields}))
        return str(path)

    return write


def cells(text: str, effect: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.strip("> ").startswith(f"{effect}  ")]
    return re.split(r"\s{2,}", line.strip())


def test_the_list_has_every_pack_and_what_it_needs():
    text = pack_tools.listing()
    for name in nmjax.list_packs():
        pack = nmjax.load_pack(name)
        row = cells(text, name)
        assert row[:3] == [name, pack.category, str(len(pack.effects))]
        assert pack.description.startswith(row[4])
    assert cells(text, "cocaine")[3] == "vectors salient; induction heads"
    assert cells(text, "none")[3] == "-"


def test_a_broken_pack_does_not_hide_the_others(tmp_path, monkeypatch):
    (tmp_path / "packs").mkdir()
    (tmp_path / "packs" / "zzz.json").write_text("{")
    monkeypatch.setenv("NMJAX_HOME", str(tmp_path))
    text = pack_tools.listing()
    assert "BAD: pack zzz.json: not valid JSON" in text and cells(text, "cocaine")[2] == "6"


def test_explain_gives_values_and_places(copying_lm, save):
    path = save("mine", QK, HEAT, STEER, description="Mine.", category="own")
    text = pack_tools.explain(path, 0.5, copying_lm, "known")
    assert text.startswith("mine (own) at dose 0.5, in known: 2 layers of 3 heads\n\nMine.\n")
    assert cells(text, "qk_score_scaling") == [
        "qk_score_scaling", "0.5 up", "factor 1.5", "scale_qk", "query", "0-1", "induction 1: 2", 'layers="all"',
    ]  # fmt: skip
    assert cells(text, "temperature")[2:] == ["T 1.125", "temperature", "logits", "-", "-", "-"]
    assert cells(text, "steering")[2] == "-0.075 of the residual's norm"
    assert "induction heads: found, layer: heads 1: 2" in text
    assert "'odd': MISSING" in text and "--types=odd" in text
    assert nmjax.load_pack(path).at(0.5).content_hash() in text
    assert "  none\n" in text


def test_explain_says_when_induction_heads_are_missing(copying_lm, save):
    def heads(**parameters):
        entry = QK | {"parameters": {"layers": [0], **parameters}}
        return cells(pack_tools.explain(save("mine", entry), 1.0, copying_lm), "qk_score_scaling")[6]

    assert heads() == "no induction heads here; middle heads 0: 1"  # of three heads
    assert heads(on_empty="none") == "no induction heads here; nothing is changed"
    assert heads(on_empty="error") == "no induction heads here; using it is an error"
    assert heads(heads=[0, -1]) == "0: 0, 2" and heads(heads="all") == "all"
    assert heads(heads=[7]) == "error: heads: 7, wanted an index from -3 to 2"


def test_explain_tells_clamps_and_what_is_contrasted(copying_lm, save):
    sharp = {"effect": "qk_score_scaling", "weight": 0.25, "parameters": {"heads": "all"}}
    rival = {"effect": "contrastive_decoding", "weight": 1, "parameters": {"against": [sharp]}}
    cold = {"effect": "temperature", "weight": 0.5, "direction": "down"}
    text = pack_tools.explain(save("mine", cold, rival), 4, copying_lm)
    assert "temperature -1 raised to 0.05" in text and "dose 4 extrapolates beyond 1" in text
    assert cells(text, "contrastive_decoding")[2] == "alpha 1.2"
    assert "> qk_score_scaling" in text and "factor 1.5" in text  # the other run stays at its own dose
    assert "No effects." in pack_tools.explain("none", 1.0, copying_lm)
    absolute = STEER | {"parameters": {"vector": [1.0, 2.0], "coef": "absolute"}}
    assert "-0.15 times the vector" in pack_tools.explain(save("mine", absolute), 1.0, copying_lm)
    for dose in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="dose="):
            pack_tools.explain("cocaine", dose, copying_lm)


@pytest.mark.parametrize("name", nmjax.list_packs())
def test_explain_knows_every_shipped_pack(name, copying_lm):
    text = pack_tools.explain(name, 0.5, copying_lm)
    for effect in {entry["effect"] for entry in packs.read_spec(packs.pack_path(name))["effects"]}:
        assert f"\n{effect} " in text


def test_validate_counts_the_bad_ones(save, tmp_path, capsys):
    good, bad = save("good", QK), save("bad", QK | {"weight": 2})
    assert experiment.validate([good, bad, "cocaine", "nobody"]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["OK", "BAD", "OK", "BAD"]
    assert "weight=2" in lines[1]


def test_diff_names_what_differs(save):
    first = save("first", QK, HEAT, STEER)
    second = save("second", HEAT, QK | {"weight": 0.75, "parameters": {}}, STEER | {"effect": "random_direction",
                  "parameters": {"seed": 1}}, HEAT)  # fmt: skip
    lines = pack_tools.diff(first, second).splitlines()
    assert lines[1:] == [
        '~ changed  qk_score_scaling: weight 0.5 -> 0.75; layers "all" -> default',
        "= equal    temperature 0.25 up",
        '- removed  steering 0.5 down (steering_type="odd")',
        "+ added    random_direction 0.5 down (seed=1)",
        "+ added    temperature 0.25 up",
        "The order of the effects differs, and they act in order.",
        lines[-1],
    ]
    assert lines[-1].startswith("The two differ")
    assert "are the same intervention" in pack_tools.diff(first, first)
    assert "are the same intervention" in pack_tools.diff("cocaine", "cocaine_100")


COLLECTION = {
    "packs": {
        "mixed": {
            "name": "mixed",
            "description": "Two parts.",
            "effects": [
                {"effect": "temperature", "weight": 0.25, "direction": "up", "parameters": {}},
                {"effect": "top_p", "weight": 0.2, "direction": "up"},
                {"effect": "kv_compression", "weight": 0.55, "direction": "down"},
                {"effect": "steering", "weight": 0.1, "parameters": {"steering_type": "calm", "strength": 2}},
                {"effect": "temperature", "weight": 1.5},
                {"effect": "temperature", "direction": "both"},
                {"effect": "presence_penalty"},
                "temperature",
            ],
            "j_space": {"band": [0, 1]},
        },
        "nothing": {"name": "Nothing at all", "description": "", "effects": []},
    },
    "metadata": {},
}


def test_import_keeps_what_can_be_honoured_and_says_the_rest(tmp_path, capsys):
    source, folder = tmp_path / "config.json", tmp_path / "out"
    source.write_text(json.dumps(COLLECTION))
    written, errors = experiment.import_packs(str(source), str(folder))
    assert errors == [] and [path.name for path in written] == ["mixed.json", "nothing.json"]
    spec = json.loads((folder / "mixed.json").read_text())
    assert spec["effects"] == [
        {"effect": "temperature", "weight": 0.25, "direction": "up", "parameters": {}},
        {"effect": "presence_penalty", "weight": 0.5, "direction": "up", "parameters": {}},
    ]
    assert spec["description"] == (
        "Two parts. Left out at import, since it can't be honoured: top_p 0.2 up; kv_compression 0.55 down; "
        "steering 0.1 up; temperature 1.5 up; temperature 0.5 both; 'temperature'; the field 'j_space'."
    )
    assert len(nmjax.load_pack(folder / "mixed.json").effects) == 2
    assert nmjax.load_pack(folder / "nothing.json").effects == ()
    out = capsys.readouterr().out
    for words in (
        "dropped effects[1]: (top_p): direction='up'",
        "dropped effects[2]: unknown effect 'kv_compression'",
        "dropped effects[3]: (steering): parameters: unknown field 'strength'",
        "dropped effects[4]: (temperature): weight=1.5",
        "dropped effects[5]: (temperature): direction='both'",
        "dropped effects[7]",
        "dropped the field 'j_space'",
        "'Nothing at all' gives way",
    ):
        assert words in out
    assert out.count("dropped") == 7

    before = (folder / "mixed.json").read_bytes()
    with pytest.raises(nmjax.PackError, match="exists .*--overwrite"):
        experiment.import_packs(str(source), str(folder))
    (folder / "mixed.json").write_text("old")
    experiment.import_packs(str(source), str(folder), overwrite=True)
    assert (folder / "mixed.json").read_bytes() == before


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "a\nb", "ä", "/etc/x"])
def test_import_refuses_names_of_no_file(name, tmp_path):
    source, folder = tmp_path / "config.json", tmp_path / "out"
    source.write_text(json.dumps({"packs": {name: {"effects": [HEAT]}, "fine": {"effects": [HEAT]}}}))
    written, errors = experiment.import_packs(str(source), str(folder))
    assert [path.name for path in written] == ["fine.json"] and len(errors) == 1 and "wanted letters" in errors[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "out"]


@pytest.mark.parametrize(
    "pack, words",
    [
        ({"effects": [{"effect": "unheard_of"}]}, "nothing of it can be honoured"),
        ({"effects": None}, "effects=None"),
        ({}, "effects=None"),
        (3, "wanted a list"),
        ({"effects": [HEAT], "description": 3}, "description=3"),
        ({"effects": [{"effect": "contrastive_decoding"}] * 2}, "a second contrastive_decoding"),
    ],
)
def test_packs_of_which_nothing_is_left_are_errors(pack, words):
    specs, _, errors = pack_tools.imported({"packs": {"odd": pack}}, "config.json")
    assert specs == {} and len(errors) == 1 and words in errors[0] and "odd" in errors[0]


@pytest.mark.parametrize("content", [[], {}, {"packs": []}, {"packs": {}}, None, {"packs": {"a": float("nan")}}])
def test_files_that_are_no_collection(content):
    with pytest.raises(nmjax.PackError, match="config.json"):
        pack_tools.imported(content, "config.json")


def test_rendered_packs_read_back():
    for name in nmjax.list_packs():
        spec = packs.read_spec(packs.pack_path(name))
        assert json.loads(pack_tools.render(spec)) == spec


@pytest.fixture
def given(monkeypatch):
    """The flags as a command line sets them."""

    def parse(*arguments):
        values = flags.FlagValues()
        with monkeypatch.context() as patch:
            for name in ("bool", "string", "float", "list"):
                define = functools.partial(getattr(flags, f"DEFINE_{name}"), flag_values=values)
                patch.setattr(flags, f"DEFINE_{name}", define)
            experiment.define_flags()
        values(["packs", *arguments])
        return values

    return parse


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--list", "--diff=a,b"], "--list and --diff"),
        (["--dose=1"], "--dose goes with --explain"),
        (["--diff=a,b", "--overwrite"], "--overwrite goes with --import_file"),
        (["--diff=cocaine"], "--diff=cocaine, wanted two"),
        (["--diff=cocaine,nobody"], "no pack named 'nobody'"),
        (["--validate="], "--validate is empty"),
        (["--validate=cocaine,nobody"], "1 of 2"),
        (["--import_file=x.json"], "needs --output"),
        (["--import_file=x.json", "--output=y"], "does not exist"),
        (["--explain=nobody"], "no pack named 'nobody'"),
        (["--explain="], "pack name ''"),
        (["--explain=cocaine", "--dose=-1"], "dose=-1"),
        (["--explain=cocaine", "--model=checkpoints/nobody"], "nobody"),
    ],
)
def test_bad_flags_are_named(arguments, words, given):
    with pytest.raises(ValueError, match=words):
        experiment.run(given(*arguments))


def test_without_flags_the_packs_are_listed(given, capsys):
    experiment.run(given())
    assert capsys.readouterr().out.startswith("pack ")


@pytest.mark.slow
def test_command_line(tmp_path):
    root = pathlib.Path(__file__).parents[2]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}

    def call(*arguments):
        command = [sys.executable, "-m", "experiments.packs", *arguments]
        return subprocess.run(command, cwd=root, env=environment, text=True, capture_output=True)

    done = call("--explain=lsd", "--dose", "0.5")
    assert done.returncode == 0, done.stderr
    assert "T 1.225" in done.stdout and "4 layers of 4 heads" in done.stdout
    (tmp_path / "bad.json").write_text("[" * 100_000)
    done = call("--validate", "lsd", str(tmp_path / "bad.json"))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stdout.splitlines()[0].startswith("OK lsd") and done.stdout.splitlines()[1].startswith("BAD")
    assert done.stderr.splitlines()[-1] == "packs: 1 of 2 can't be honoured"
    done = call("--explain=nobody")
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("packs: no pack named 'nobody'")
