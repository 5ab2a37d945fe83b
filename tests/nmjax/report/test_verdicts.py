"""Verdicts as text."""

import pytest

from nmjax.report.verdicts import Verdict, Verdicts


def test_text_tells_every_verdict_with_its_claim_and_reason():
    items = [
        Verdict("Packs raise confidence.", "supported", "+0.06 [+0.05, +0.07]"),
        Verdict("A pack does more than a random direction of the same norm.", "contradicted", ""),
    ]
    assert Verdicts(items).text(width=50).splitlines() == [
        "supported     Packs raise confidence.",
        "              +0.06 [+0.05, +0.07]",
        "contradicted  A pack does more than a random",
        "              direction of the same norm.",
    ]


def test_other_verdicts_are_refused():
    with pytest.raises(ValueError, match=r"verdict is 'true' for 'a claim'; wanted one of \['supported', 'contrad"):
        Verdict("a claim", "true", "")
