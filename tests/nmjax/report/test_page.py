"""The page: one file, nothing outside, everything escaped; read back with the parser of the standard library."""

import base64
import html.parser
import re
import struct

import pytest

from nmjax.report import page
from nmjax.report.style import SCRIPT, STYLE
from nmjax.report.tables import Table
from nmjax.report.verdicts import MARKS, Verdict, Verdicts

PNG = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", 1500, 600)  # as far as the page reads it


class Reader(html.parser.HTMLParser):
    """Collects texts by innermost tag and checks that every tag that opens closes in order."""

    VOID = ("meta", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.attributes = [], {}, []
        self.feed(text)
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and data.strip():
            self.texts.setdefault(self.open[-1], []).append(data)


BLOCKS = [
    page.Cards([("ECE", "0.1 & more", "<remark>")]),
    page.Heading("First <b>"),
    page.Paragraph("a < b & c"),
    Table(["pack", "x"], [["none", "0.500 [0.400, 0.600]*"], ["<i>", "plain [text"]], "A <caption>"),
    page.Heading("Second"),
    page.Picture(PNG, "what it shows", 'an "alt"'),
    Verdicts([Verdict("a < b", "supported", "p <0.001 & more"), Verdict("<b>", "undecided", "")]),
    page.Details("Identity", {"config": {"packs": ["none", "x"], "dtype": None}, "seed": 0}),
]


def test_page_holds_every_text_unchanged_and_well_formed():
    reader = Reader(page.render_page("Title & <tag>", "Sub", BLOCKS))
    texts = reader.texts
    assert texts["h1"] == ["Title & <tag>"] == texts["title"]
    assert texts["h2"] == ["First <b>", "Second"] == texts["a"]
    assert texts["p"] == ["Sub", "a < b & c"]
    assert texts["td"] == ["0.500*", "plain [text"] and texts["small"] == ["[0.400, 0.600]"]
    assert texts["button"] == ["pack", "x"] and texts["th"] == ["none", "<i>"]
    assert texts["dt"] == ["config.packs", "config.dtype", "seed"] and texts["dd"] == ["none, x", "-", "0"]
    assert texts["div"] == ["ECE", "0.1 & more", "<remark>", "a < b", "p <0.001 & more", "<b>"]
    assert texts["span"] == ["\u2713", " supported", "?", " undecided"]
    links = [value for _, name, value in reader.attributes if name == "href"]
    ids = [value for _, name, value in reader.attributes if name == "id"]
    assert links == ["#s0", "#s1"] and ids == ["s0", "s1"]


def test_pictures_are_inside():
    reader = Reader(page.render_page("T", "S", BLOCKS))
    (source,) = [value for _, name, value in reader.attributes if name == "src"]
    head, data = source.split(",")
    assert head == "data:image/png;base64" and base64.b64decode(data) == PNG
    assert ("img", "alt", 'an "alt"') in reader.attributes
    assert ("img", "width", "1000") in reader.attributes, "1500 dots at 150 an inch, shown at 100"
    with pytest.raises(ValueError, match="png begins with b'GIF89a'; wanted a PNG"):
        page.Picture(b"GIF89a", "", "")


def test_nothing_is_loaded_and_there_is_one_script():
    text = page.render_page("T", "S", [*BLOCKS, *BLOCKS])
    reader = Reader(text)
    assert reader.texts["script"] == [SCRIPT] and text.count("<script") == 1
    assert not any(word in text for word in ("http:", "https:", "<link", "<iframe", "@import", "url(", "fetch("))
    loads = [(tag, value) for tag, name, value in reader.attributes if name in ("src", "srcset", "data", "action")]
    assert [tag for tag, _ in loads] == ["img", "img"] and all(value.startswith("data:") for _, value in loads)
    assert [value[0] for tag, name, value in reader.attributes if name == "href"] == ["#"] * 4


def test_every_column_can_be_sorted_by_the_keys_of_its_cells():
    cells = [["none", "0.500 [0.400, 0.600]*"], ['"x" & <y>', "-"], ["2", "<0.001"]]
    reader = Reader(page.render_page("T", "S", [Table(["pack", "p"], cells)]))
    assert [value for tag, name, value in reader.attributes if name == "aria-sort"] == ["none", "none"]
    assert [value for tag, name, value in reader.attributes if (tag, name) == ("button", "type")] == ["button"] * 2
    keys = [(tag, value) for tag, name, value in reader.attributes if name == "data-key"]
    assert keys[:5] == [("th", "none"), ("td", "0.5"), ("th", '"x" & <y>'), ("td", ""), ("th", "2.0")]
    assert len(keys) == 6 and 0.00099 < float(keys[5][1]) < 0.001


def luminance(colour):
    """Relative luminance of "#rrggbb" (WCAG 2.2)."""
    parts = (int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5))
    linear = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("name", MARKS)
def test_badges_are_legible(name):
    ink, ground = re.search(rf"\.{name} {{ color: (#\w+); background: (#\w+); }}", STYLE).groups()
    assert (luminance(ground) + 0.05) / (luminance(ink) + 0.05) > 4.5, "WCAG AA"


def test_unknown_blocks_are_refused():
    with pytest.raises(TypeError, match="a page cannot show a dict"):
        page.render_page("T", "S", [{}])
