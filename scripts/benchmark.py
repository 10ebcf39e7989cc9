"""How fast cl_bench is, as ratios measured in one run; about ten minutes on two CPU cores.

    python scripts/benchmark.py [--json FILE] [--out DIR] [--only loop,avalanche,...] [--repetitions 5]

Every figure is the median of repetitions in turn (A B A B ...), with the smallest and the largest, because machines are
shared and noisy. A part that fails is reported, and the others are still measured.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))

from speed import avalanche, fast, loop, pieces, profiling, results, sequence, startup
from speed.common import Options, Row, collect_facts

PARTS: dict[str, Callable[[Options], Iterator[Row]]] = {
    "data": pieces.measure_data_path,
    "buffer": pieces.measure_reservoir,
    "loop": loop.measure_loop,
    "avalanche": avalanche.measure_avalanche,
    "sequence": sequence.measure_steps,
    "memory": sequence.measure_memory,
    "start": startup.measure_startup,
    "replicas": fast.measure_replicas,
    "gpu": fast.measure_speeds,
    "profile": profiling.profile_step,
}
"""In the order in which they are measured."""


def main() -> int:
    """Measure, print a table, write what was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="file that gets every repetition")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder that gets benchmark.json, table.md, benchmark.png"
    )
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--repetitions", type=int, default=5, help="counted repetitions of each figure (default: 5)")
    parser.add_argument("--small", action="store_true", help="tiny sizes, only to see that it runs")
    chosen = parser.parse_args()
    unknown = set(chosen.only.split(",")) - set(PARTS)
    if unknown or chosen.repetitions < 1:
        parser.error(f"no part {', '.join(sorted(unknown))}" if unknown else "--repetitions needs 1 or more")
    rows, failures = measure(chosen.only.split(","), chosen.repetitions, chosen.small)
    machine = collect_facts()
    results.show(rows, failures, machine)
    if chosen.json:
        results.write_json(chosen.json, rows, failures, machine)
    if chosen.out:
        results.write_all(chosen.out, rows, failures, machine)
    return 0


def measure(names: list[str], repetitions: int, small: bool) -> tuple[list[Row], dict[str, str]]:
    """The rows of the parts ``names``, and for each part that failed the reason."""
    console = Console(stderr=True)
    rows: list[Row] = []
    failures: dict[str, str] = {}
    with warnings.catch_warnings(), console.status("") as status:
        warnings.simplefilter("ignore")  # of Avalanche and torch, which cannot be changed here
        for name in (name for name in PARTS if name in names):
            began = time.monotonic()

            def tell(what: str, name: str = name) -> None:
                status.update(f"{name}: {what}")

            tell("")
            try:
                for row in PARTS[name](Options(repetitions=repetitions, tell=tell, small=small)):
                    rows.append(row)
                    console.print(" | ".join(filter(None, results.format_cells(row))), highlight=False, soft_wrap=True)
            except Exception as error:  # if one part fails, the others are still measured
                failures[name] = f"{error}" if isinstance(error, RuntimeError) else f"{type(error).__name__}: {error}"
                console.print(f"{name}: {failures[name]}", style="red", highlight=False, soft_wrap=True)
            console.print(f"{name}: {time.monotonic() - began:.0f} s", style="dim", highlight=False)
    return rows, failures


if __name__ == "__main__":
    sys.exit(main())
