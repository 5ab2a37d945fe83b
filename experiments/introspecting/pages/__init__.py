"""What the page shows of each suite's findings."""

from __future__ import annotations

import importlib
from typing import Any

from nmjax.report.page import Block


def section(suite: str, findings: dict[str, Any]) -> list[Block]:
    """The blocks of a suite's section, without its heading."""
    return importlib.import_module(f"{__name__}.{suite}").section(findings)
