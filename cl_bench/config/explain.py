"""One message for each error of a command line or configuration file, like that of a ``ConfigError``.

Hydra's own messages do not know what the user meant. Here each kind of its errors becomes: key, expected, got, fix.
The fix names the nearest key, with the value that was typed.
"""

import difflib
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from cl_bench.config.command_line import CommandLine, shorten_path
from cl_bench.config.schema import CONFIGS, Run, split_override
from cl_bench.core.errors import ConfigError, RunError, find_config_error

ANYWHERE = "--cfg job prints every key."


def choose_exit_status(error: Exception) -> int | None:
    """The exit status of an error: 2 wrong configuration or data, 1 another error with a message, None a bug."""
    if isinstance(error, (ConfigError, HydraException, OmegaConfBaseException)) or find_missing_plugin(error):
        return 2
    return 1 if isinstance(error, (FloatingPointError, RunError)) else None


def explain(error: Exception, arguments: Sequence[str] = ()) -> str:
    """One message for an error: key, expected, got, fix.

    Args:
        error: why the command failed.
        arguments: the command line. If a wrong value was not typed there, the message names its file and line.
    """
    if isinstance(error, (FloatingPointError, RunError)):
        return str(error)
    line = CommandLine(arguments)
    if missing := find_missing_plugin(error):
        return str(missing)
    if isinstance(error, ConfigError):
        location = line.find_location(error.key)
        if "configs/scale/" in location and str(error.got).startswith("the unknown key"):
            way = "Leave +scale out, since this scenario has no small version."
            error = ConfigError(error.key, expected=error.expected, got=error.got, fix=way)
        return f"{error}{location}"
    return _explain_hydra(error, line)


def find_missing_plugin(error: Exception) -> ConfigError | None:
    """What Hydra's error for a launcher or sweeper without its package means; None if it is another error."""
    found = re.search(r"Unknown plugin class : 'hydra_plugins\.hydra_(\w+)_(launcher|sweeper)\.", str(error))
    return explain_missing(found[2], found[1]) if isinstance(error, RuntimeError) and found else None


def explain_missing(kind: str, package: str) -> ConfigError:
    """The error for a launcher or sweeper whose package is not installed."""
    return ConfigError(
        f"hydra/{kind}",
        expected=f"a {kind} whose package is installed",
        got=f"{package}, which is not installed",
        fix="pip install 'cl-bench[sweep]'.",
    )


def to_config_error(error: Exception, arguments: Sequence[str] = ()) -> ConfigError:
    """The message of :func:`explain` as an error with its four parts, for programs."""
    key, _, rest = explain(error, arguments).partition(": expected ")
    expected, _, rest = rest.partition("; got ")
    got, _, fix = rest.partition(". ")
    return ConfigError(key, expected=expected, got=got, fix=fix)


def refuse_unread_keys(config: DictConfig, arguments: Sequence[str]) -> None:
    """Refuse typed top-level keys that nothing reads: Hydra accepts any key with a plus."""
    line, known = CommandLine(arguments), [f.name for f in fields(Run)]
    hydras = [f.name for f in fields(HydraConf)]
    for text in HydraConfig.get().overrides.hydra:
        name = split_override(text)[0].removeprefix("hydra.").partition(".")[0]
        if text.startswith("+") and name not in hydras:
            way = _suggest_keys([f"hydra.{key}" for key in difflib.get_close_matches(name, hydras, n=1)], None)
            raise ConfigError(f"hydra.{name}", expected="a key of Hydra's", got=f"the unknown key {name}", fix=way)
    for key in map(str, config):
        if key not in known:
            raise ConfigError(
                key,
                expected="a key of the configuration",
                got=f"the unknown key {key}",
                fix=_suggest_keys(_find_nearest(key, OmegaConf.masked_copy(config, known)), line.get_typed(key)),
            )
    for key in ("class_order_seed", "data_seed"):
        if line.get_typed(key) is not None and f"${{{key}}}" not in OmegaConf.to_yaml(config.scenario):
            raise ConfigError(
                key,
                expected=f"no value, since the scenario has a {key} of its own",
                got=config[key],
                fix="Leave it out.",
            )


# -- Hydra's errors ------------------------------------------------------------------------------------------------


def _explain_hydra(error: Exception, line: CommandLine) -> str:
    if isinstance(error, InterpolationResolutionError) and error.full_key:
        if ours := find_config_error(error):  # raised by a resolver, which does not know its key
            expected, got, fix = ours.expected, ours.got, ours.fix
        else:
            expected, got, fix = "a value that can be resolved", str(error).splitlines()[0], "Correct the value."
        return f"{error.full_key}: expected {expected}; got {got}. {fix}{line.find_location(error.full_key)}"
    if isinstance(error, OverrideParseException):
        return _explain_unreadable(error.override)
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        what = " ".join(filter(None, [error.problem, error.context]))
        where = f"{shorten_path(Path(mark.name))}, line {mark.line + 1}"
        return f"{where}: expected YAML; got something else ({what}). Correct it."
    text = str(error)
    chain = f"{text}\n{error.__cause__ or ''}"
    if found := re.search(r"Could not find '(.+)/([^/']*)'", text):
        listed = re.search(r"Available options in '[^']*':\s*(.*?)(?:Config search path|\Z)", text, flags=re.S)
        return _explain_unknown_choice(found[1], found[2], sorted(listed[1].split()) if listed else [], line)
    if found := re.search(r"Ambiguous value for argument '(.*?)=(.*)'|Sweep parameters '(.*?)=(.*)' requires", text):
        key, values = (found[1] or found[3]).lstrip("+"), found[2] or found[4]
        way = f"Add -m for a run with each of them{_suggest_one_value(key, values, line)}."
        return f"{key}: expected one value; got {values}. {way}"
    if found := re.search(r"Could not append to config. An item is already at '(.+?)'", text):
        return f"{found[1]}: expected no plus before a key that exists; got +{found[1]}. Leave it out."
    if found := re.search(r"Multiple values for (\S+)\. To override a value use 'override \S+ (\S+)'", text):
        return (
            f"{found[1]}: expected no plus before a group with a default; got +{found[1]}. Write {found[1]}={found[2]}."
        )
    found = re.search(r"In '(\w+/[^']+)': Could not override '\w+@(\w+)\.", text)
    if found and found[2] not in _list_default_groups():
        return _explain_missing_package(found[1])
    if found := re.search(r"Could not override '([^']+)'", text):
        return _explain_unknown_key(found[1], line)
    if found := re.search(r"Could not delete from config\. '(.+?)'", text):
        return _explain_unknown_key(found[1], line)
    if found := re.search(r"Error merging override (\S+?)=(\S*)", text):
        return _explain_wrong_type(found[1].lstrip("+"), found[2], chain)
    if found := re.search(r"In '([^']+)': \w+ raised while composing config:", text):
        return _explain_wrong_file(found[1], text, line)
    if found := re.search(r"Cannot find primary config '(.+?)'|irectory '(.+?)' (?:not found|exists)", text):
        which = "--config-name" if found[1] else "--config-dir"
        return f"{which}: expected one that exists; got {found[1] or found[2]}. Correct the path."
    if "Unexpected type for root" in text:
        below = next((key for key, _ in map(split_override, line.overrides) if "." in key), "a key")
        return f"{below}: expected no key below one without a value; got {below}. {ANYWHERE}"
    words = " ".join(text.split())
    return (
        f"command line: expected group=NAME and key=VALUE; got something that Hydra cannot read ({words}). See --help."
    )


def _suggest_one_value(key: str, values: str, line: CommandLine) -> str:
    """How to write several values as one value; empty if that is not possible."""
    if key in _list_groups(line.folders) or re.match(r"\w+\(", values):
        return ""
    if re.fullmatch(r"[-+.\deE, ]+", values):
        return f"; {key}=[{values}] is a list"
    return f"; {_quote(key, values)} is a value with a comma"


def _quote(key: str, value: str) -> str:
    """An override, quoted for the shell and for Hydra."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return shlex.quote(f'{key}="{escaped}"')


def _explain_unreadable(override: str) -> str:
    """A message for an override that Hydra's grammar does not accept, and how to quote it."""
    key, value = split_override(override)
    whole = f"command line: expected group=NAME and key=VALUE; got {override}."
    if "=" not in override:
        known = (CONFIGS / "experiment" / f"{key}.yaml").is_file()
        return f"{whole} {f'Did you mean +experiment={key}?' if known else 'See --help.'}"
    if value.startswith("="):
        return f"{whole} Did you mean {key}={value.lstrip('=')}?"
    if not re.fullmatch(r"[\w./@:-]+", key, flags=re.ASCII) or re.match(r"[\[{'\"]|\$\{|\w+\(", value):
        return f"{whole} See --help."
    home = os.path.expanduser(value)
    way = "Quote it twice, for the shell and for Hydra:" if home == value else "No ~ stands for a folder here; write"
    signs = override[: len(override) - len(override.lstrip("+~"))]
    simple = re.fullmatch(r"[\w./-]+", home, flags=re.ASCII)
    write = f"{signs}{key}={home}" if simple else _quote(f"{signs}{key}", home)
    return f"{key}: expected a value that Hydra can read; got {value}. {way} {write}"


def _explain_unknown_choice(group: str, name: str, options: list[str], line: CommandLine) -> str:
    close = difflib.get_close_matches(name, options, n=1)
    sign = "" if group in _list_default_groups() or line.get_typed(group) is None else "+"
    way = f"Did you mean {sign}{group}={close[0]}?" if close else "Choose one of them."
    if group in ("hydra/launcher", "hydra/sweeper"):
        way = "More come with pip install -e '.[sweep]'."
    if group == "experiment" and not close:
        way = f"Choose one of them; label={name} marks a run as yours."
    location = "" if line.get_typed(group) else line.find_mention(rf"\b{re.escape(group)}\s*:\s*{re.escape(name)}\b")
    return f"{group}: expected one of {', '.join(options)}; got {name}. {way}{location}"


def _explain_unknown_key(key: str, line: CommandLine) -> str:
    value = line.get_typed(key)
    if key in _list_groups(line.folders) and key not in _list_default_groups():
        options = sorted(path.stem for folder in line.folders for path in (folder / key).glob("*.yaml"))
        if value and not set(value.split(",")) <= set(options):
            return _explain_unknown_choice(key, value, options, line)
        return f"{key}: expected a plus before a group without a default; got none. Write +{key}={value or 'NAME'}."
    known = line.compose_without(key)
    parent, _, leaf = key.rpartition(".")
    has_keys = parent and isinstance(_select(known, parent), DictConfig)
    expected = f"a key that {parent} has" if has_keys else "a key of the configuration"
    nearest = _find_nearest(key, known)
    way = _suggest_keys(nearest, value) if nearest or not parent else _suggest_other_choices(parent, leaf)
    location = line.find_mention(rf"(^|[\s/.]){re.escape(leaf)}\s*:") if value is None else ""
    return f"{key}: expected {expected}; got the unknown key {leaf}. {way}{location}"


def _explain_missing_package(name: str) -> str:
    """A message for a file without a header: Hydra takes its keys for keys of its group."""
    return f"{name}.yaml: expected # @package _global_ at its top, since its keys are top-level keys; got none. Add it."


def _explain_wrong_file(name: str, text: str, line: CommandLine) -> str:
    """A message for the content of a file that Hydra names as ``group/option``."""
    key = (re.search(r"full_key: (\S+)", text) or ["", ""])[1]
    location = line.find_location(key) or f" It is in {name}.yaml."
    if "/" in name and key == name.partition("/")[0] and key not in _list_default_groups():
        return _explain_missing_package(name)
    if "not in 'Run'" in text or "not in struct" in text:
        way = _suggest_keys(_find_nearest(key, line.compose_without("")), None)
        return f"{key}: expected a key of the configuration; got the unknown key {key}. {way}{location}"
    if key in _list_default_groups():
        way = f"Choose in the list of defaults: - override /{key}: NAME."
        return f"{key}: expected the keys of the {key} that is chosen; got something else. {way}{location}"
    value = (re.search(r"[Vv]alue '(.*?)'", text) or ["", "another one"])[1]
    return f"{_explain_wrong_type(key, value, text)}{location}"


def _explain_wrong_type(key: str, value: str, text: str) -> str:
    kinds = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false", "String": "text"}
    expected = next((words for kind, words in kinds.items() if f"to {kind}" in text), None)
    if found := re.search(r"expected one of (\[[^\]]*\])", text):
        expected = f"one of {found[1]}"
    return f"{key}: expected {expected or 'a value of another type'}; got {value}. Correct the value."


# -- the nearest key -----------------------------------------------------------------------------------------------


def _suggest_keys(keys: Sequence[str], value: str | None) -> str:
    given = f"={value}" if value else ""
    return f"Did you mean {' or '.join(f'{key}{given}' for key in keys)}?" if keys else ANYWHERE


def _suggest_other_choices(group: str, leaf: str) -> str:
    """The choices of a group that have a key which the chosen one lacks."""
    content = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in (CONFIGS / group).glob("*.yaml")}
    keys = {name: list(keys.get(group, keys) or ()) for name, keys in content.items() if isinstance(keys, dict)}
    close = difflib.get_close_matches(leaf, {key for own in keys.values() for key in own}, n=1)
    if not close:
        return ANYWHERE
    return f"{group}={' or '.join(sorted(name for name in keys if close[0] in keys[name]))} has {close[0]}."


def _find_nearest(key: str, config: DictConfig) -> list[str]:
    """Existing keys with a similar name, as they are typed: in the same group, else with the same name elsewhere."""
    parent, _, leaf = key.rpartition(".")
    leaf = leaf.lower()
    every = list(_list_keys(config))
    beside = _select(config, parent)
    names = [str(name) for name in beside if name != "_target_"] if parent and isinstance(beside, DictConfig) else []
    if close := difflib.get_close_matches(leaf, names, n=1):
        return [f"{parent}.{close[0]}"]
    if same := [name for name in every if name.rpartition(".")[2] == leaf and "." in name]:
        return same[:3]
    if parent:
        return [] if names else difflib.get_close_matches(key, every, n=1, cutoff=0.75)
    groups = _list_groups([CONFIGS])
    names = [*(f.name for f in fields(Run)), *groups, *(["hydra/launcher", "hydra/sweeper"] if "/" in key else [])]
    if close := difflib.get_close_matches(leaf, names, n=1):
        return [f"+{close[0]}" if close[0] in groups and close[0] not in _list_default_groups() else close[0]]
    leaves = {name.rpartition(".")[2]: name for name in reversed(every)}
    return [leaves[close] for close in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.75)]


def _select(config: DictConfig, key: str) -> Any:
    try:
        return OmegaConf.select(config, key) if key else config
    except OmegaConfBaseException:
        return None


def _list_keys(config: DictConfig) -> Iterator[str]:
    """Every key with its own value; no key that refers to another one."""

    def walk(prefix: str, node: Any) -> Iterator[str]:
        for name, value in node.items():
            if isinstance(value, dict):
                yield from walk(f"{prefix}{name}.", value)
            elif name != "_target_" and not re.fullmatch(r"\$\{[\w.]+\}", str(value)):
                yield f"{prefix}{name}"

    plain = OmegaConf.to_container(config, resolve=False)
    yield from walk("", {name: value for name, value in plain.items() if name != "choices"})  # type: ignore[union-attr]


def _list_groups(folders: Sequence[Path]) -> list[str]:
    return sorted({path.name for folder in folders if folder.is_dir() for path in folder.iterdir() if path.is_dir()})


def _list_default_groups() -> set[str]:
    """The groups that have a default choice."""
    entries = yaml.safe_load((CONFIGS / "config.yaml").read_text(encoding="utf-8"))["defaults"]
    return {str(name) for entry in entries if isinstance(entry, dict) for name in entry}
