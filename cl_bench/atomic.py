"""Files that are there whole or not at all."""

from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a whole UTF-8 file or nothing, whenever the process is killed."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
