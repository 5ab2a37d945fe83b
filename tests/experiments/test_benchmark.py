"""The benchmark reports ratios of tokens per second; compile time is what the first run took beyond the median."""

import time

import pytest

from experiments import benchmark


def test_ratio_is_of_tokens_per_second():
    slow_once = iter([0.2] + [0.0] * 9)
    cases = [
        benchmark.Case("a", 4, lambda: time.sleep(0.02 + next(slow_once))),
        benchmark.Case("b", 4, lambda: time.sleep(0.04), against=("a", "not measured")),
    ]
    a, b = benchmark.measure(cases, "test", repeats=3, new_tokens=10)
    assert len(a["seconds"]) == 3
    assert a["ratios"] == {} and list(b["ratios"]) == ["a"] and 0.3 < b["ratios"]["a"] < 0.7
    assert a["tokens_per_second"] == pytest.approx(40 / sorted(a["seconds"])[1])
    assert 0.1 < a["compile_seconds"] < 0.5
    text = benchmark.table([dict(model="random", mode="greedy", **row) for row in (a, b)])
    assert len(text.splitlines()) == 3 and f"{b['ratios']['a']:.2f} (a)" in text
