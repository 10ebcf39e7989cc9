"""Recorded runs stay in their row: moved modules and later keys change no fingerprint."""

import json

import pytest
from helpers import ROOT, configure

from cl_bench.config.schema import compute_fingerprint, import_allowed, select_comparable, to_plain_dict

RECORDS = sorted((ROOT / "results" / "mini" / "records").glob("*/*/seed0/summary.json"))
OTHERS = {
    "finetune-vit-none": ["method=finetune", "buffer=none"],
    "joint-vit-none": ["method=joint", "buffer=none"],
    "supsup-supsup-none": ["scenario.num_tasks=10"],
}
"""What was typed beside the experiment, see ``make mini``."""


@pytest.mark.slow
@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.parts[-3])
def test_the_command_of_a_recorded_run_still_has_its_fingerprint(path):
    summary = json.loads(path.read_text())
    overrides = [f"+experiment={summary['experiment']}", "+scale=mini", *OTHERS.get(summary["name"], [])]
    settings = select_comparable(to_plain_dict(configure(*overrides)))
    assert settings == {key: value for key, value in summary["comparable"].items() if key != "data"}
    assert compute_fingerprint(settings) == summary["fingerprint"]


def test_records_are_there():
    assert len(RECORDS) == 16


def test_the_old_path_of_a_moved_component_leads_to_it():
    old, new = (
        import_allowed(f"cl_bench.{module}.Settings", "trainer", []) for module in ("trainer", "engine.trainer")
    )
    assert old is new
