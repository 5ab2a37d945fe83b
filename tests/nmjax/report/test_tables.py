"""Tables and numbers as text."""

import pytest

from nmjax.report.tables import Table, number, with_interval


def test_text_aligns_first_column_left_and_others_right():
    table = Table(["pack", "x", "long name"], [["none", "1.25", "a"], ["cocaine", "10", "bcd"]], "Caption")
    assert table.text().splitlines() == [
        "Caption",
        "pack        x  long name",
        "-------  ----  ---------",
        "none     1.25          a",
        "cocaine    10        bcd",
    ]


def test_ragged_rows_are_refused():
    with pytest.raises(ValueError, match="row 1 has 1 cells"):
        Table(["a", "b"], [["1", "2"], ["3"]])


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ((0.12345,), "0.123"),
        ((None,), "-"),
        ((-0.0001,), "0.000"),
        ((0.0001, 3, True), "0.000"),
        ((0.5, 1, True), "+0.5"),
        ((-0.5, 1, True), "-0.5"),
        ((2.0, 0), "2"),
    ],
)
def test_numbers(args, text):
    assert number(*args) == text


def test_intervals():
    assert with_interval(0.5, (0.4, 0.6)) == "0.500 [0.400, 0.600]"
    assert with_interval(0.5, None) == "0.500"
    assert with_interval(0.01, (-0.02, 0.04), 2, sign=True) == "+0.01 [-0.02, +0.04]"
