"""Twelve kills at random moments; ``make soak`` makes some hundred."""

import json
import subprocess
import sys

import pytest
from helpers import ROOT, command_environment


@pytest.mark.slow
def test_runs_killed_at_random_moments_end_as_if_nothing_had_happened(tmp_path):
    figures = tmp_path / "soak.json"
    call = [sys.executable, str(ROOT / "tests" / "soak.py"), "--kills", "12", "--json", str(figures)]
    done = subprocess.run(call, env=command_environment(), capture_output=True, text=True, timeout=590)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    found = json.loads(figures.read_text())
    assert found["kills"] >= 12
    assert found["failures"] == 0
    assert len(found["moments"]) >= 3
