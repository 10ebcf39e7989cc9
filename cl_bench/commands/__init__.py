"""The commands beside runs: ``cl_bench NAME ...``, one file each, imported only if it is chosen.

A word without ``=`` in the first place is a command; all else is Hydra's.
"""

import difflib
import importlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from cl_bench.core.errors import ConfigError

COMMANDS = {
    "compare": "tables, tests, plots and a page over finished runs",
    "status": "all runs below a folder: finished, running, interrupted, failed and why",
    "report": "report.html and plots of finished runs",
    "audit": "whether a finished run leaks task ids, labels or test images",
    "metrics": "other metrics for a finished run, without training",
    "export": "finished runs to W&B, TensorBoard, MLflow or Trackio",
    "wandb": "a W&B sweep file from a search space; a W&B workspace that compares runs",
    "reproduce": "run published settings and compare with the published numbers",
    "completion": "a script for tab completion in bash or zsh",
    "new": "a method of your own to start from, with a test",
}
"""Name -> what it does. The module ``cl_bench.commands.NAME`` has ``main(arguments) -> exit status``, which may raise
ConfigError."""


def run_command(words: Sequence[str]) -> int | None:
    """Run the command that ``words`` begin with; returns its exit status, or None if they are Hydra's."""
    if not words or "=" in words[0] or words[0].startswith(("-", "+", "~")):
        return None
    name, *arguments = words
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    if name not in COMMANDS and not close:
        return None  # perhaps a setting without its key, which Hydra's part explains
    try:
        if name not in COMMANDS:
            raise _explain_unknown(name, close[0])
        return importlib.import_module(f"{__name__}.{name}").main(arguments)
    except ConfigError as error:
        print(f"cl_bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def complete(line: str) -> tuple[list[str], bool]:
    """The words that a shell may offer at the end of a command line, and whether Hydra knows more of them.

    Args:
        line: as typed so far; its first word is the program.
    """
    words = line.split()[1:]
    begun = words.pop() if words and not line.endswith(" ") else ""
    if not words:
        return [name for name in COMMANDS if name.startswith(begun)], True
    if words[0] not in COMMANDS:
        return [], True
    # read from the text: to import the command would take seconds at each press of the key
    text = (Path(__file__).parent / f"{words[0]}.py").read_text(encoding="utf-8")
    options = sorted({"--help", *re.findall(r'"(--[a-z][a-z-]*)"', text)})
    return [option for option in options if begun.startswith("-") and option.startswith(begun)], False


def _explain_unknown(name: str, close: str) -> ConfigError:
    return ConfigError(
        "command line",
        expected=f"a command ({', '.join(COMMANDS)}) or settings such as key=value",
        got=name,
        fix=f"Did you mean {close}?",
    )
