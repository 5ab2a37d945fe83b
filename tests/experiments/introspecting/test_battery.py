"""The runner of suites: killed runs go on, done ones are read, other plans are not mixed in."""

import pytest

from experiments.introspecting.battery import Battery
from nmjax.report import results


class Counting:
    """Three units, of which the one at `kill` raises once."""

    units = 3

    def __init__(self, kill=None):
        self.kill, self.asked = kill, []

    def ask(self, unit):
        self.asked.append(unit)
        if unit == self.kill:
            raise KeyboardInterrupt
        return {"unit": unit}

    def analyse(self, records):
        return {"sum": sum(record["unit"] for record in records)}


def run(folder, suite, seed=0):
    return Battery({"counting": suite}, {"counting": {"seed": seed}}, folder).run(progress=False)


def test_a_killed_run_goes_on_and_a_done_one_is_read(tmp_path):
    killed, second, third, other = Counting(kill=1), Counting(), Counting(), Counting()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, killed)
    assert run(tmp_path, second) == run(tmp_path, third) == {"counting": {"sum": 3}}
    assert (killed.asked, second.asked, third.asked) == ([0, 1], [1, 2], [])
    assert run(tmp_path, other, seed=1) == {"counting": {"sum": 3}} and other.asked == [0, 1, 2]
    names = sorted(path.suffixes[-1] for path in tmp_path.iterdir())
    assert names == [".json", ".json", ".jsonl", ".jsonl"]  # and no partial log


def test_killed_between_the_findings_and_the_last_name_of_the_log(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(results.JsonlLog, "finish", lambda log, path: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, Counting())
    again = Counting()
    assert run(tmp_path, again) == {"counting": {"sum": 3}} and again.asked == []
    assert sorted(path.suffixes for path in tmp_path.iterdir()) == [[".json"], [".jsonl"]]
