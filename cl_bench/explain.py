"""Hydra's and OmegaConf's errors in the words of :class:`~cl_bench.errors.ConfigError`."""

import difflib
import re

from hydra.errors import HydraException
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from cl_bench.config import CONFIGS
from cl_bench.errors import ConfigError, RunError, within


def status_of(error: Exception) -> int | None:
    """The exit status of an error that one message tells of: 2 wrong configuration or data, 1 else; None for a bug."""
    if isinstance(error, (ConfigError, HydraException, OmegaConfBaseException)):
        return 2
    return 1 if isinstance(error, (FloatingPointError, RunError)) else None


def explain(error: Exception) -> str:
    """One message: key, expected, got, way out."""
    if isinstance(error, (ConfigError, FloatingPointError, RunError)):
        return str(error)
    return explain_hydra(error)


def explain_hydra(error: Exception) -> str:
    """One message: key, expected, got, way out; Hydra's own words where none of the known kinds fits."""
    if isinstance(error, InterpolationResolutionError) and error.full_key:
        if ours := within(error):  # of a resolver, which does not know where it stands
            return f"{error.full_key}: expected {ours.expected}; got {ours.got}. {ours.fix}"
        got = str(error).splitlines()[0]
        return f"{error.full_key}: expected what can be resolved; got {got}. Correct the value."
    text = str(error)
    chain = f"{text}\n{error.__cause__ or ''}"
    if found := re.search(r"Could not find '(.+)/([^/']+)'", text):
        listed = re.search(r"Available options in '[^']*':\s*(.*?)(?:Config search path|\Z)", text, flags=re.S)
        return _unknown_choice(found[1], found[2], sorted(listed[1].split()) if listed else [])
    if found := re.search(r"Could not override '([^']+)'", text):
        return _unknown_key(found[1], chain)
    if found := re.search(r"[Nn]o match in the defaults list|Could not override '([\w/@.]+)'\.\s*No match", text):
        return f"{text.strip().splitlines()[0]} List the groups with --help."
    if found := re.search(r"Error merging override (\S+?)=(\S*)", text):
        return _wrong_type(found[1].lstrip("+"), found[2], chain)
    words = " ".join(text.split())
    return f"command line: expected group=NAME and key=VALUE; got what Hydra cannot read ({words}). See --help."


def _unknown_choice(group: str, name: str, options: list[str]) -> str:
    close = difflib.get_close_matches(name, options, n=1)
    way = f"Did you mean {group}={close[0]}?" if close else "Choose one of them."
    if group in ("hydra/launcher", "hydra/sweeper"):
        way = "More come with pip install -e '.[sweep]'."
    return f"{group}: expected one of {', '.join(options)}; got {name}. {way}"


def _unknown_key(key: str, text: str) -> str:
    group = key.split(".")[0].split("/")[0]
    groups = sorted(path.name for path in CONFIGS.iterdir() if path.is_dir())
    if group in groups and "." not in key:
        return f"{key}: expected a group with a default; got one without. Write +{key}=NAME."
    parent, _, leaf = key.rpartition(".")
    known = _top_level_keys() + groups if not parent else []
    close = difflib.get_close_matches(leaf, known, n=1)
    expected = "a key of the configuration" if not parent else f"a key that {parent} has"
    way = f"Did you mean {close[0]}?" if close else "--cfg job prints every key."
    return f"{key}: expected {expected}; got the unknown key {leaf}. {way}"


def _wrong_type(key: str, value: str, text: str) -> str:
    kinds = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false", "String": "text"}
    expected = next((words for kind, words in kinds.items() if f"to {kind}" in text), None)
    if found := re.search(r"expected one of (\[[^\]]*\])", text):
        expected = f"one of {found[1]}"
    return f"{key}: expected {expected or 'a value of another type'}; got {value}. Correct the value."


def _top_level_keys() -> list[str]:
    from dataclasses import fields

    from cl_bench.config import Run

    return [f.name for f in fields(Run)]
