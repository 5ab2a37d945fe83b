"""The page: one file, nothing outside, everything escaped; read back with the parser of the standard library."""

import base64
import html.parser

import pytest

from nmjax.report import page
from nmjax.report.tables import Table


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
    page.Picture(b"\x89PNG bytes", "what it shows", 'an "alt"'),
    page.Details("Identity", {"config": {"packs": ["none", "x"], "dtype": None}, "seed": 0}),
]


def test_page_holds_every_text_unchanged_and_well_formed():
    reader = Reader(page.render_page("Title & <tag>", "Sub", BLOCKS))
    texts = reader.texts
    assert texts["h1"] == ["Title & <tag>"] == texts["title"]
    assert texts["h2"] == ["First <b>", "Second"] == texts["a"]
    assert texts["p"] == ["Sub", "a < b & c"]
    assert texts["td"] == ["0.500*", "plain [text"] and texts["small"] == ["[0.400, 0.600]"]
    assert texts["th"] == ["pack", "x", "none", "<i>"]
    assert texts["dt"] == ["config.packs", "config.dtype", "seed"] and texts["dd"] == ["none, x", "-", "0"]
    assert texts["div"] == ["ECE", "0.1 & more", "<remark>"]
    links = [value for _, name, value in reader.attributes if name == "href"]
    ids = [value for _, name, value in reader.attributes if name == "id"]
    assert links == ["#s0", "#s1"] and ids == ["s0", "s1"]


def test_pictures_are_inside():
    reader = Reader(page.render_page("T", "S", BLOCKS))
    (source,) = [value for _, name, value in reader.attributes if name == "src"]
    head, data = source.split(",")
    assert head == "data:image/png;base64" and base64.b64decode(data) == b"\x89PNG bytes"
    assert ("img", "alt", 'an "alt"') in reader.attributes


def test_unknown_blocks_are_refused():
    with pytest.raises(TypeError, match="a page cannot show a dict"):
        page.render_page("T", "S", [{}])
