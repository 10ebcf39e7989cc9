"""Leak audit of a finished run: PASS, FAIL or SKIP (it could not fail) a line, and audit.json in the run folder.

python scripts/audit.py RUN
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from cl_bench.config.build import Parts, build
from cl_bench.config.schema import Images, Run
from cl_bench.core.errors import ConfigError, require
from cl_bench.engine.checkpoint import Checkpoint, get_final_state
from cl_bench.engine.evaluate import read_predictions
from cl_bench.runs.audit import audit
from cl_bench.runs.run_dir import read_summary
from cl_bench.system.atomic import write_text
from cl_bench.system.streams import outlive_readers


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0 nothing failed, 1 something did, 2 there is no finished run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished run")
    folder: Path = parser.parse_args(arguments).run
    try:
        checks = audit(*finished(folder))
    except ConfigError as error:
        print(f"cl_bench: {error}", file=sys.stderr)
        return 2
    for check in checks:
        print(f"{check.verdict}  {check.name}: {check.found}")
    write_text(folder / "audit.json", json.dumps([asdict(check) for check in checks], indent=2) + "\n")
    return 1 if any(check.passed is False for check in checks) else 0


def finished(folder: Path) -> tuple:  # of what audit() asks for
    """How to build the run's parts, its learned state and its predictions."""
    summary = read_summary(folder)
    saved = Checkpoint(folder / "checkpoint").load() if summary else None
    if saved is None or saved["task"] < len(summary["tasks"]):
        raise ConfigError(
            "RUN",
            expected="the folder of a finished run, with config.yaml, predictions.npz and checkpoint/",
            got=str(folder),
            fix="Finish it with the command that began it.",
        )
    config = OmegaConf.merge(OmegaConf.structured(Run), OmegaConf.load(folder / "config.yaml"))
    assert isinstance(config, DictConfig)
    config.images = Images.device  # an audit looks at every image, and exchanges some

    def rebuild() -> Parts:
        parts = build(config)
        require(
            summary.get("data", parts.scenario.data) == parts.scenario.data,
            "RUN",
            expected=f"the images that it learned (data {summary.get('data')})",
            got=f"others (data {parts.scenario.data})",
            fix="Put them back where config.yaml says they were.",
        )
        return parts

    return rebuild, get_final_state(saved)["method"], read_predictions(folder / "predictions.npz")


if __name__ == "__main__":
    outlive_readers()
    sys.exit(main())
