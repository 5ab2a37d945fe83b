"""Tables and numbers as text."""

import pytest

from nmjax.report.tables import Table, estimate, number, p_text, sort_key, with_interval


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
    assert estimate({"value": 0.01, "interval": [-0.02, 0.04]}, 2, sign=True) == "+0.01 [-0.02, +0.04]"
    assert estimate({"value": None, "interval": None}) == estimate(None) == "-"
    assert (p_text(1 / 2001), p_text(0.0344), p_text(None)) == ("<0.001", "0.034", "-")


@pytest.mark.parametrize(
    ("cell", "key"),
    [
        ("0.61 [0.58, 0.64]*", 0.61),
        ("+0.020 [-0.01, +0.05] ", 0.02),
        ("-0.3", -0.3),
        ("\u22120.3", -0.3),
        ("12", 12.0),
        ("3 of 12", 3.0),
        ("1,234", 1234.0),
        ("1.5e-07", 1.5e-7),
        ("50%", 50.0),
        ("0.5x", 0.5),
        ("0.1 to 0.4", 0.1),
        ("-", ""),
        ("", ""),
        ("none", "none"),
        ("cocaine_50", "cocaine_50"),
        ("4bit", "4bit"),
        ("0x10", "0x10"),
        ("2026-01-31", "2026-01-31"),
        ("1.2.3", "1.2.3"),
        ("[0.1, 0.2]", "[0.1, 0.2]"),
    ],
)
def test_cells_sort_by_their_leading_number_or_their_text(cell, key):
    assert sort_key(cell) == key and type(sort_key(cell)) is type(key)


def test_bounds_sort_beside_the_value_they_name():
    cells = ["0.002", ">0.001", "0.001", "<0.001", "0.0005"]
    assert sorted(cells, key=sort_key) == cells[::-1]
