"""Run published settings: the same as ``cl_bench reproduce``."""

import sys

from cl_bench.commands.reproduce import main
from cl_bench.system.streams import outlive_readers

if __name__ == "__main__":
    outlive_readers()
    sys.exit(main())
