"""Table, order robustness, paired tests, published numbers and pictures over finished runs.

cl_bench compare RUN_OR_FOLDER ... [--out DIR] [--format markdown] [--where method=er] [--metrics forgetting]

cl_bench compare [RUN_OR_FOLDER ...] --import [NAME=]PATH [--import ...]

A KEY is any key of the configuration (its last part is enough if no other key ends so), or experiment, name, method,
backbone, scenario, buffer, scale, seed, fingerprint or label.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from cl_bench.core.errors import ConfigError, require
from cl_bench.report.compare import FORMATS, compare, show, write
from cl_bench.report.selection import Selection


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, or 2 when there is nothing to compare."""
    program = ["python", "scripts/compare.py"] if arguments is None else ["cl_bench", "compare"]
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="cl_bench compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="*", metavar="RUN_OR_FOLDER", help="a run folder, or a folder of run folders")
    parser.add_argument(
        "--import",
        dest="imports",
        metavar="[NAME=]PATH",
        action="append",
        default=[],
        help="rows of other programs: Mammoth's logs.pyd, Avalanche's eval_results.csv, or a CSV file with an accuracy "
        "matrix in percent; may be repeated",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="also write table.md, table.csv, pairs.csv, compare.html"
    )
    parser.add_argument("--format", choices=["text", *FORMATS], default="text", help="of what is printed")
    parser.add_argument(
        "--where", metavar="KEY=VALUE[,VALUE]", action="append", default=[], help="only such runs; may be repeated"
    )
    parser.add_argument("--group", metavar="KEY", help="group the rows by this key, and mark the best of each group")
    parser.add_argument(
        "--metrics", metavar="NAME[,NAME]", action="append", default=[], help="the columns, e.g. class_il.forgetting"
    )
    parser.add_argument("--reference", metavar="ROW", help="show differences from this row: its label or its number")
    parser.add_argument("--sort", metavar="METRIC_OR_KEY", help="by a metric, best first, or by a key")
    options = parser.parse_args(arguments)
    metrics = [name for text in options.metrics for name in text.split(",")]
    try:
        require(
            bool(options.paths or options.imports),
            "RUN_OR_FOLDER",
            expected="a run folder or a folder of runs",
            got="none",
            fix="Name one, e.g. results.",
        )
        selection = Selection(options.where, options.group, metrics, options.reference, options.sort)
        comparison = compare(options.paths, selection, options.imports)
        if options.out is not None:  # first, so that the files are there even if the terminal goes away
            write(comparison, options.out, shlex.join([*program, *arguments]))
        show(comparison, options.format)
    except ConfigError as error:
        print(f"cl_bench: {error}", file=sys.stderr)
        return 2
    return 0
