"""Audit a finished run: the same as ``cl_bench audit``."""

import sys

from cl_bench.commands.audit import main
from cl_bench.system.streams import outlive_readers

if __name__ == "__main__":
    outlive_readers()
    sys.exit(main())
