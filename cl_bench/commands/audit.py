"""Leak audit of a finished run: one line per check, PASS, FAIL or SKIP (it could not fail); writes RUN/audit.json.

cl_bench audit RUN
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from cl_bench.core.errors import ConfigError, require
from cl_bench.core.record import get_measure
from cl_bench.runs.audit import audit
from cl_bench.runs.load import load
from cl_bench.system.atomic import write_text


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0 nothing failed, 1 something did, 2 there is no finished run."""
    parser = argparse.ArgumentParser(
        prog="cl_bench audit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished run")
    folder: Path = parser.parse_args(arguments).run
    try:
        run = load(folder)
        require(
            get_measure(run.summary) == "accuracy",
            "RUN",
            expected="a run of classification",
            got="one of detection, where an image has no single answer",
            fix="There is no audit of detection yet.",
        )
        checks = audit(run.build_parts, run.state, run.predictions)
    except ConfigError as error:
        print(f"cl_bench: {error}", file=sys.stderr)
        return 2
    for check in checks:
        print(f"{check.verdict}  {check.name}: {check.found}")
    write_text(folder / "audit.json", json.dumps([asdict(check) for check in checks], indent=2) + "\n")
    return 1 if any(check.passed is False for check in checks) else 0
