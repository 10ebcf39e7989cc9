"""What was typed on a command line, and in which configuration files the other values are."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from omegaconf import DictConfig

from cl_bench.config.schema import CONFIGS, compose_config, split_override


class CommandLine:
    """The overrides of a command line, and the configuration files that they choose.

    Args:
        arguments: the words of the command line.

    Attributes:
        folders: where configuration files are searched, in this order.
        overrides: as typed.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        rest = list(arguments)
        self.folders = [CONFIGS]
        self.overrides: list[str] = []
        while rest:
            argument = rest.pop(0)
            if argument in ("--config-dir", "-cd") and rest:
                self.folders.insert(0, Path(rest.pop(0)))
            elif argument.startswith("--config-dir="):
                self.folders.insert(0, Path(argument.partition("=")[2]))
            elif not argument.startswith("-"):
                self.overrides.append(argument)

    def get_typed(self, key: str) -> str | None:
        """The value that was typed for ``key``; None if it was not typed."""
        return next((value for name, value in map(split_override, reversed(self.overrides)) if name == key), None)

    def compose_without(self, key: str) -> DictConfig:
        """The configuration of the other overrides; for a sweep, that of its first job."""
        searched = [f"file://{folder.resolve()}" for folder in self.folders[:-1]]
        others = [_keep_first_value(text) for text in self.overrides if split_override(text)[0] != key]
        try:
            return compose_config([f"hydra.searchpath=[{','.join(searched)}]", *others])
        except Exception:  # something else is wrong as well
            return compose_config([])

    def list_files(self) -> Iterator[tuple[Path, str]]:
        """The chosen files and the files that they choose, each with the part of the configuration that it fills."""
        for text in reversed(self.overrides):  # the last one counts
            group, options = split_override(text)
            for option in options.split(","):
                yield from self._list_file_and_below(group.partition("@")[0], option)

    def _list_file_and_below(self, group: str, option: str) -> Iterator[tuple[Path, str]]:
        file = next((path for folder in self.folders if (path := folder / group / f"{option}.yaml").is_file()), None)
        if file is None:
            return
        text = file.read_text(encoding="utf-8", errors="replace")
        header = re.search(r"^#\s*@package\s+(\S+)", text, flags=re.M)
        yield file, header[1].replace("_global_", "") if header else group.replace("/", ".")
        try:
            content = yaml.safe_load(text)
        except yaml.YAMLError:
            return
        for entry in content.get("defaults", []) if isinstance(content, dict) else []:
            for name, value in entry.items() if isinstance(entry, dict) else [(f"/{group}", entry)]:
                below = name.removeprefix("override").strip().partition("@")[0]
                below = below[1:] if below.startswith("/") else f"{group}/{below}"
                if (below, value) != (group, option):
                    yield from self._list_file_and_below(below, str(value))

    def find_location(self, key: str) -> str:
        """A sentence that says in which file and line ``key`` has its value; empty if it was typed or is in no file."""
        if self.get_typed(key) is not None:
            return ""
        for file, package in self.list_files():
            below = key.removeprefix(f"{package}.") if package else key
            if (not package or below != key) and (number := _find_line(file, below)):
                return _say_location(file, number)
        return ""

    def find_mention(self, pattern: str) -> str:
        """The same for the first line of a chosen file that matches ``pattern``."""
        for file, _ in self.list_files():
            for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
                if re.search(pattern, line.partition("#")[0]):
                    return _say_location(file, number)
        return ""


def _say_location(file: Path, line: int) -> str:
    return f" It is in {shorten_path(file)}, line {line}."


def _keep_first_value(override: str) -> str:
    """An override of a sweep, with only the first of its values."""
    return re.sub(r"^([^=]+=)(?:(?:choice|range|interval)\()?([^\[{'\",]+),.*", r"\1\2", override)


def _find_line(file: Path, key: str) -> int | None:
    """The line of ``key`` in a YAML file; None if it is not there or refers to another key."""
    try:
        node = yaml.compose(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, UnicodeDecodeError):
        return None
    number = None
    for part in key.split("."):
        entries = node.value if isinstance(node, yaml.MappingNode) else []
        found = next(((name, value) for name, value in entries if name.value == part), None)
        if found is None:
            return None
        number, node = found[0].start_mark.line + 1, found[1]
    refers = isinstance(node, yaml.ScalarNode) and re.fullmatch(r"\$\{[\w.]+\}", node.value)
    return None if refers else number


def shorten_path(file: Path) -> str:
    """The path of a file for a message: relative to the working directory if it is inside."""
    return os.path.relpath(file) if file.resolve().is_relative_to(Path.cwd()) else str(file)
