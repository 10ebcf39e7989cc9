"""Configurations at random: each builds, or is refused with one message; none gives a traceback or hangs.

CL_BENCH_FUZZ=2000 python -m pytest tests/test_fuzz.py    # more of them
"""

import copy
import functools
import math
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import METHODS, configure, list_tiny
from hydra.errors import HydraException
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cl_bench.config.build import build, build_loggers, identify_run
from cl_bench.config.explain import explain
from cl_bench.config.schema import CONFIGS, to_plain_dict
from cl_bench.core.errors import ConfigError
from cl_bench.runs.run import begin_summary, choose_run_dir
from cl_bench.testing import compose_read

EXAMPLES = int(os.environ.get("CL_BENCH_FUZZ", "60"))
GROUPS = ["method", "backbone", "buffer", "scenario", "optimizer", "schedule", "trainer", "metrics", "logger"]
SECONDS = 60  # for one configuration on a busy machine; most take a few tenths
MEMORY = 6 * 2**30  # bytes of address space beyond what the process has: what a huge size may ask for

VALUES = [
    "0", "1", "2", "3", "-1", "-7", "0.5", "1.0", "1e30", "-1e30", "1e-30", "nan", "inf", "-inf", "1000000000000",
    "99999999999999999999999999", "true", "false", "null", "''", "abc", "größe", "'日本語'", "'a b'", "[]", "[1]",
    "[0]",
    "[-1,2]", "[1,[2]]", "[null]", "[a,b]", "[1e30]", "[1000000000000]", "{}", "{a:1}", "{_target_:os.system}",
    "/dev/null/nowhere", "/dev/null", "'../..'", "${seed}", "${nothing}", "${oc.env:HOME}", "${scenario}",
    "cl_bench.runs.run.run",    "cl_bench.methods.finetune.Finetune", "cl_bench.optim.sgd", "'a\0b'",
]  # fmt: skip


def keys() -> list[str]:
    """Every key of the configuration, as on the command line."""

    def below(prefix: str, node: Any) -> Iterator[str]:
        yield prefix
        if isinstance(node, dict):
            for key, value in node.items():
                yield from below(f"{prefix}.{key}", value)

    found = set()
    for path in [CONFIGS / "config.yaml", *(p for group in GROUPS for p in (CONFIGS / group).glob("*.yaml"))]:
        for key, value in yaml.safe_load(path.read_text()).items():
            if key not in ("defaults", "hydra") and "@" not in key:
                found |= set(below(key if path.stem == "config" else f"{path.parent.name}.{key}", value))
    return sorted(found)


CHOICES = {group: sorted(path.stem for path in (CONFIGS / group).glob("*.yaml")) for group in GROUPS}

PLAIN = [
    0, 1, 2, 3, -1, -7, 0.5, 1.0, 1e30, -1e30, 1e-30, math.nan, math.inf, -math.inf, 10**12, 10**26, True, False, None,
    "", "abc", "größe", "日本語", [], [1], [0], [-1, 2], [1, [2]], [None], ["a", "b"], [1e30], [10**12], {}, {"a": 1},
    {"_target_": "os.system"}, "/dev/null/no", "../..", "a\0b", "cl_bench.runs.run.run", "cl_bench.optim.sgd",
]  # fmt: skip

choice = st.sampled_from(GROUPS).flatmap(lambda group: st.sampled_from(CHOICES[group]).map(f"{group}={{}}".format))
setting = st.builds(
    "{}{}={}".format, st.sampled_from(["", "", "", "", "+", "++"]), st.sampled_from(keys()), st.sampled_from(VALUES)
)
removal = st.sampled_from(keys()).map("~{}".format)
noise = st.text(min_size=1, max_size=8)


@contextmanager
def limits() -> Iterator[None]:
    """So much time and memory, then an error."""

    def late(number, frame):
        raise TimeoutError

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + MEMORY, hard))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def fault(make: Callable[[], DictConfig]) -> str:
    """Build what ``make`` composes: what is wrong with it, empty where it is built or refused in one message."""
    with limits():
        try:
            config = make()
        except Exception as error:  # what the command calls a wrong command line, whatever Hydra raises
            refused: Exception = error
        else:
            try:
                values = to_plain_dict(config)
                chosen, scenario = identify_run(config, values)
                folder = choose_run_dir(values, chosen)
                begin_summary(values, chosen)
                build(config, scenario)
                build_loggers(config)
            except (ConfigError, HydraException, OmegaConfBaseException) as error:
                refused = error
            else:
                inside = folder.is_relative_to(values["results_dir"])
                return "" if inside else f"{folder} is outside of {values['results_dir']}"
    message = explain(refused)
    if len(message.split()) <= 3:
        return f"says too little: {message!r}"
    if isinstance(refused, ConfigError) and "\n" in message:
        return f"more than one line: {message!r}"
    return ""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=EXAMPLES // 4, deadline=None, derandomize=True, database=None)
@given(
    choices=st.lists(choice, max_size=3, unique_by=lambda c: c.split("=")[0]),
    changes=st.lists(st.one_of(setting, setting, setting, removal), min_size=1, max_size=3),
    more=st.one_of(st.just([]), st.just([]), st.just([]), noise.map(lambda text: [text])),
)
def test_no_command_line_gives_a_traceback(choices, changes, more):
    assert fault(lambda: configure("data_dir=/dev/null/nowhere", *choices, *changes, *more)) == ""


@functools.cache
def suitable(method: str) -> DictConfig:
    """A configuration of the method that builds."""
    return compose_read(list_tiny(method))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
@given(method=st.sampled_from(METHODS), data=st.data())
def test_no_value_of_a_key_gives_a_traceback(method, data):
    """One or two keys of a configuration that builds get another value."""

    def change() -> DictConfig:
        config = copy.deepcopy(suitable(method))
        for key, value in changed.items():
            OmegaConf.update(config, key, value, merge=False)
        return config

    known = [key for key in flat(suitable(method)) if not key.startswith(("choices", "published"))]
    changed = data.draw(st.dictionaries(st.sampled_from(known), st.sampled_from(PLAIN), min_size=1, max_size=2))
    assert fault(change) == ""


def flat(config: DictConfig) -> list[str]:
    """Every key of a composed configuration."""

    def below(prefix: str, node: Any) -> Iterator[str]:
        for key, value in node.items():
            yield f"{prefix}{key}"
            if isinstance(value, dict):
                yield from below(f"{prefix}{key}.", value)

    return list(below("", OmegaConf.to_container(config)))
