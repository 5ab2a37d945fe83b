"""Redrawing from a stored file."""

import pathlib
import subprocess
import sys
import types

import pytest

from experiments import plot_confidence_results as binary
from experiments.lookahead import output
from experiments.lookahead.report import Report
from experiments.lookahead.results import save_results

ROOT = pathlib.Path(__file__).parents[3]


def test_files_are_those_of_the_run(compared, tmp_path, drawn, capsys):
    """From the results alone, under the same names and with the same content."""
    paths = output.write(compared, tmp_path, "20260131_235959")
    before = {path: path.read_text() for path in paths if path.suffix in (".txt", ".html")}
    for path in paths[:-1]:
        path.unlink()
    drawn.clear()
    assert binary.redraw(str(paths[-1])) == paths[:-1]
    assert {path: path.read_text() for path in before} == before
    assert Report(compared).headline() in capsys.readouterr().out


def test_prefix_and_folder_are_chosen(single, tmp_path, drawn):
    file = save_results(single, tmp_path / "intermediate_results.json")
    written = binary.redraw(str(file), str(tmp_path / "figures"), "so_far")
    assert {path.parent for path in written} == {tmp_path / "figures"}
    assert written[0].name == "so_far_summary.txt" and list(tmp_path.glob("*.*")) == [file]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("half a fi", "is not JSON"),
        ("[1, 2]", "is no result of this experiment"),
        ('{"identity": {}}', "is no result of this experiment"),
    ],
)
def test_another_file_is_one_line(tmp_path, monkeypatch, content, message):
    file = tmp_path / "other.json"
    if content is not None:
        file.write_text(content)
    values = types.SimpleNamespace(results_file=str(file), results_dir=None, prefix=None)
    monkeypatch.setattr(binary.flags, "FLAGS", values)
    with pytest.raises(SystemExit) as stopped:
        binary.main([])
    told = str(stopped.value.code)  # a text: printed, and the exit status is 1
    assert told.startswith("plot_confidence_results: ") and message in told and "other.json" in told


@pytest.mark.slow
def test_both_spellings_of_the_command(single, tmp_path):
    file = save_results(single, tmp_path / "1_results.json")
    command = [sys.executable, "-m", "experiments.plot_confidence_results"]
    for words in ([file, "--prefix", "P", "--results-dir", tmp_path / "a"], [f"--results_file={file}"]):
        subprocess.run([*command, *words], cwd=ROOT, check=True, capture_output=True)
    assert (tmp_path / "a" / "P_report.html").exists() and (tmp_path / "1_report.html").exists()
    for words, message in (([], "results_file must have a value"), ([tmp_path / "no.json"], "no.json")):
        done = subprocess.run([*command, *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
