"""Table, order robustness, paired tests, published numbers and pictures over finished runs.

python scripts/compare.py RUN_OR_FOLDER ... [--out DIR]
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from cl_bench.core.errors import ConfigError
from cl_bench.report.compare import compare, show, write
from cl_bench.system.streams import outlive_readers


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, or 2 when there is nothing to compare."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", metavar="RUN_OR_FOLDER", help="a run folder, or a folder of run folders")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="also write table.md, table.csv, pairs.csv, compare.html"
    )
    options = parser.parse_args(arguments)
    try:
        comparison = compare(options.paths)
        if options.out is not None:  # first, so that the files are there even if the terminal goes away
            write(comparison, options.out, shlex.join(["python", "scripts/compare.py", *arguments]))
        show(comparison)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    outlive_readers()
    sys.exit(main())
