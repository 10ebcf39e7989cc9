"""Compare finished runs: the same as ``cl_bench compare``."""

import sys

from cl_bench.commands.compare import main
from cl_bench.system.streams import outlive_readers

if __name__ == "__main__":
    outlive_readers()
    sys.exit(main())
