"""Runs suites one after the other: what was seen is kept unit by unit, and a suite that is done is not run again."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from experiments.introspecting.subjects import Suite
from nmjax.report import results


@dataclasses.dataclass(frozen=True)
class Battery:
    """Suites by name, in the order in which they run.

    Attributes:
      plans: by suite, everything that decides its numbers, strict JSON; records of another plan are not mixed in.
      folder: gets `<suite>_<hash of plan>.jsonl`, what was seen, and `.json`, the findings, which is written last.
    """

    suites: Mapping[str, Suite]
    plans: Mapping[str, Mapping[str, Any]]
    folder: pathlib.Path

    def run(self, progress: bool = True) -> dict[str, dict[str, Any]]:
        """Findings by suite."""
        return {name: self._run(name, suite, progress) for name, suite in self.suites.items()}

    def _run(self, name: str, suite: Suite, progress: bool) -> dict[str, Any]:
        plan = {"suite": name, **self.plans[name]}
        stem = f"{name}_{results.content_hash(plan)[:12]}"
        done, partial, whole = (self.folder / f"{stem}{end}" for end in (".json", ".partial.jsonl", ".jsonl"))
        if done.exists():
            if partial.exists():  # killed after the findings were written
                os.replace(partial, whole)
            return results.load_json(done)
        with results.JsonlLog(partial, plan) as log:
            with tqdm(total=suite.units, initial=len(log.done), unit="unit", desc=name, disable=not progress) as bar:
                for unit in range(suite.units):
                    if unit not in log.done:
                        log.append(unit, suite.ask(unit))
                        bar.update()
            findings = results.jsonable(suite.analyse([log.done[unit] for unit in range(suite.units)]))
            results.write_json(done, findings)
            log.finish(whole)
        return findings
