"""The type hints are what the code does: mypy, as mypy.ini sets it, finds nothing."""

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_types(monkeypatch, tmp_path):
    mypy = pytest.importorskip("mypy.api")
    monkeypatch.chdir(ROOT)
    report, broken, status = mypy.run(["--cache-dir", str(tmp_path)])
    assert not status, report + broken
