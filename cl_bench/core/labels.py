"""Short texts for settings: what the labels of runs are made of."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

_LONGEST = 24  # characters of a value
_OVERRIDE = re.compile(r"(?:^|\s+)[+~]*([\w./@-]+)=")


def shorten_keys(keys: Iterable[str], among: Iterable[str] = ()) -> dict[str, str]:
    """For each key its last part, or the whole key if another key, also of ``among``, has the same last part."""
    keys = list(keys)
    counts = Counter(map(_get_last_part, {*keys, *among}))
    return {key: _get_last_part(key) if counts[_get_last_part(key)] == 1 else key for key in keys}


def format_settings(settings: Mapping[str, Any], among: Iterable[str] = (), most: int = _LONGEST) -> str:
    """``capacity=100, lr=0.05``; ``among`` as in :func:`shorten_keys`, ``most`` characters of each value."""
    short = shorten_keys(settings, among)
    return ", ".join(f"{short[key]}={shorten_text(format_value(value), most)}" for key, value in settings.items())


def format_value(value: Any) -> str:
    """A value as it is typed on a command line."""
    return value if isinstance(value, str) else json.dumps(value)


def shorten_text(text: str, most: int = _LONGEST) -> str:
    """The first characters of a text, in one line."""
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"


def parse_overrides(text: str | None) -> dict[str, str]:
    """Key and value of each override in a ``label`` of ``summary.json``; nothing if it is a text of the user's own."""
    found = list(_OVERRIDE.finditer(text or ""))
    if not found or found[0].start():
        return {}
    ends = [match.start() for match in found[1:]] + [None]
    return {match[1]: (text or "")[match.end() : end] for match, end in zip(found, ends)}


def shorten_label(text: str | None) -> str:
    """A ``label`` of ``summary.json`` with short keys, without what the name of a run says already."""
    settings = parse_overrides(text)
    for key in ("method", "backbone", "buffer"):
        settings.pop(key, None)
    return format_settings(settings) if parse_overrides(text) else text or ""


def _get_last_part(key: str) -> str:
    return key.rpartition(".")[2]
