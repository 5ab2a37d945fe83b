"""What the tests of the experiments share."""

import pytest

from experiments.calibration.report import Report as CalibrationReport
from experiments.monitoring.report import Report as MonitoringReport


@pytest.fixture
def without_figures(monkeypatch):
    """Reports draw nothing: for runs whose figures no one looks at, as drawing takes longer than all the rest."""
    for report in (CalibrationReport, MonitoringReport):
        monkeypatch.setattr(report, "figures", lambda self: {})
