"""Write report.html and plots of finished runs, e.g. of runs with report=false.

cl_bench report RUN_OR_FOLDER ...
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cl_bench.core.errors import ConfigError, require
from cl_bench.report.folders import LeftOut, scan


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit status: 0, 1 if a report could not be made, 2 if there is no finished run."""
    parser = argparse.ArgumentParser(
        prog="cl_bench report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "paths", type=Path, nargs="+", metavar="RUN_OR_FOLDER", help="a run folder, or a folder of runs"
    )
    parser.add_argument("--again", action="store_true", help="also where there is a report")
    options = parser.parse_args(arguments)
    found = [scan(path) for path in options.paths]
    finished = [run for runs, _ in found for run in runs]
    require(
        bool(finished),
        "RUN_OR_FOLDER",
        expected="a folder with finished runs",
        got=", ".join(map(str, options.paths)),
        fix="Finish a run first: the same command resumes it.",
    )
    from cl_bench.report.page import write_report  # pandas and matplotlib only now

    failed = False
    for run in finished:
        if (run / "report.html").exists() and not options.again:
            print(f"{run}: has a report (--again makes it again)", file=sys.stderr)
            continue
        try:
            print(write_report(run))
        except Exception as error:  # the others get theirs, whatever is wrong with the files of this one
            why = error if isinstance(error, ConfigError) else f"{run}: {type(error).__name__}: {error}"
            print(f"cl_bench: {' '.join(str(why).split())}", file=sys.stderr)
            failed = True
    for left in (LeftOut.of(run) for _, begun in found for run in begun):
        print(f"{left.state}, skipped: {left.folder}", file=sys.stderr)
    return int(failed)
