"""For W&B: a sweep file from a search space of Hydra's; a workspace that compares the rows of a project.

cl_bench wandb sweep [--config-dir DIR] +experiment=NAME +search=NAME [KEY=VALUE ...] > sweep.yaml
cl_bench wandb workspace ENTITY/PROJECT [--print]

`wandb sweep sweep.yaml` then starts the sweep, and `wandb agent ID` runs it.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cl_bench.config.build import find_measure
from cl_bench.config.explain import to_config_error
from cl_bench.config.packages import find_installed
from cl_bench.config.schema import CONFIGS, compose_config, split_override
from cl_bench.core.errors import ConfigError, require
from cl_bench.core.labels import format_value
from cl_bench.core.record import TITLES, name_measure
from cl_bench.runs.sweep import check_searched_values, refuse_test_images

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

OBJECTIVE = "class_il/average_accuracy"
"""What a search maximises, as Hydra's does; in the word of the scenario's measure."""

COMPARED = ("average_accuracy", "forgetting", "backward_transfer", "learning_accuracy")
"""Metrics that have a panel over tasks in the workspace, in each setting."""

COMPARED_IN_DETECTION = ("average_AP", "AP_all", "AP_old", "AP_new")
"""Those of a section of its own, closed at first, in Class-IL."""


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit status: 0, or 2 if the space, a key or a name is wrong."""
    parser = argparse.ArgumentParser(
        prog="cl_bench wandb", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    sweep = kinds.add_parser("sweep", help="print a sweep file")
    sweep.add_argument("--config-dir", "-cd", metavar="DIR", help="YAML files of your own")
    sweep.add_argument("overrides", nargs="+", metavar="KEY=VALUE", help="as for python -m cl_bench -m")
    page = kinds.add_parser("workspace", help="create a workspace that compares the rows of a project")
    page.add_argument("project", metavar="ENTITY/PROJECT")
    page.add_argument("--print", action="store_true", help="print what would be created, and create nothing")
    options = parser.parse_args(arguments)
    if options.kind == "sweep":
        print(yaml.safe_dump(make_sweep(options.overrides, options.config_dir), sort_keys=False), end="")
        return 0
    workspace = make_workspace(options.project)
    if options.print:
        print(json.dumps(json.loads(workspace._to_model().model_dump_json(by_alias=True, exclude_none=True)), indent=2))
    else:
        print(workspace.save().url)
    return 0


def make_sweep(overrides: Sequence[str], config_dir: str | None = None) -> dict[str, Any]:
    """The content of a W&B sweep file.

    Args:
        overrides: as for ``python -m cl_bench -m``. Lists, ``choice``, ``range`` and ``interval`` are searched, beside
            the space of ``+search=NAME``; the others go into the command of every run.
        config_dir: a folder with YAML files of one's own; the command of every run names it as it is named here.

    Raises:
        ConfigError: there is no such folder or no space, or the runs would be measured on test images.
    """
    require(
        config_dir is None or Path(config_dir).is_dir(),
        "--config-dir",
        expected="a folder with YAML files",
        got=config_dir,
        fix="Type it as seen from here.",
    )
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        names = [split_override(t.input_line or "")[1] for t in parsed if t.key_or_group == "search"]
        found, choices = _read_search(names[-1], config_dir) if names else ({}, {})
        hydra = found.pop("hydra", {}).get("sweeper", {})
        space = [f"{key}={value}" for key, value in (hydra.get("params") or {}).items()]
        given = {
            t.key_or_group: t for t in [*OverridesParser.create().parse_overrides(space), *parsed]
        }  # the later counts
        parameters = {key: _convert(t) for key, t in given.items() if t.is_sweep_override() and key != "search"}
        fixed = [t.input_line or "" for key, t in given.items() if key not in {"search", *parameters}]
        kept = [text for text in fixed if not text.startswith(("hydra.", "hydra/"))]
        logger = [] if "logger" in given else ["logger=wandb"]
        kept = [*(f"{group}={name}" for group, name in choices.items() if group not in given), *kept]
        settings = _resolve(found, kept, config_dir)
        config = compose_config([*settings, *kept, *logger], config_dir)
    except (ConfigError, HydraException, OmegaConfBaseException) as error:
        raise to_config_error(error, overrides) from error
    refuse_test_images(config.trainer.get("evaluate_on"), "a W&B sweep")
    require(
        "wandb" in config.logger,
        "logger",
        expected="one that logs to W&B, which chooses by what it is told",
        got=", ".join(config.logger) or "none",
        fix="Leave it out, or take logger=wandb or many.",
    )
    require(
        bool(parameters),
        "+search",
        expected="a search space",
        got="none",
        fix="Add +search=NAME, or e.g. 'optimizer.lr=interval(0.01,0.3)'.",
    )
    own = [] if config_dir is None else [f"--config-dir={config_dir}"]
    return {
        "method": "bayes",
        "metric": {"name": name_measure(OBJECTIVE, find_measure(config)), "goal": "maximize"},
        **({"run_cap": hydra["n_trials"]} if "n_trials" in hydra else {}),
        "parameters": parameters,
        "command": ["${env}", "python", "-m", "cl_bench", *own, *settings, *kept, *logger, "${args_no_hyphens}"],
    }


def make_workspace(project: str) -> "Workspace":
    """A workspace that is not saved yet: metrics over tasks, runs grouped into rows.

    There is no report beside it: wandb-workspaces asks the server about the runs of a report while it builds one.

    Raises:
        ConfigError: no ``ENTITY/PROJECT``, or the package is not installed.
    """
    entity, _, name = project.partition("/")
    require(bool(entity and name), "ENTITY/PROJECT", expected="two names", got=project, fix="e.g. me/cl_bench.")
    try:
        from wandb_workspaces.reports.v2 import LinePlot
        from wandb_workspaces.workspaces import Metric, RunsetSettings, Section, Workspace
    except ModuleNotFoundError as error:
        raise ConfigError(
            "workspace", expected="the package wandb-workspaces", got="none", fix="pip install 'cl-bench[dashboards]'"
        ) from error

    def make_plot(setting: str, metric: str) -> LinePlot:
        return LinePlot(x="task", y=[f"{setting}/{metric}"], title=metric.replace("_", " "))

    sections = [
        Section(name=title, panels=[make_plot(setting, metric) for metric in COMPARED], is_open=True)
        for setting, title in TITLES.items()
    ]
    panels = [make_plot("class_il", metric) for metric in COMPARED_IN_DETECTION]
    sections.append(Section(name="Detection", panels=panels, is_open=False))
    rows = RunsetSettings(groupby=[Metric("Group")])
    return Workspace(entity=entity, project=name, name="Comparison of rows", sections=sections, runset_settings=rows)


def _read_search(name: str, config_dir: str | None) -> tuple[dict[str, Any], dict[str, str]]:
    """The content of ``search/NAME.yaml``, and its choices by group; its sweeper need not be installed."""
    folders: list[str | Path] = [CONFIGS, *find_installed().values(), *([] if config_dir is None else [config_dir])]
    files = [Path(folder) / "search" / f"{name}.yaml" for folder in folders]
    known = sorted(path.stem for file in files for path in file.parent.glob("*.yaml"))
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise ConfigError(
            "search", expected=f"one of {', '.join(known)}", got=name, fix="Or type the space: key=choice(a,b)."
        )
    content = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    assert isinstance(content, dict)
    entries = [pair for entry in content.pop("defaults", []) if isinstance(entry, dict) for pair in entry.items()]
    choices = {group.removeprefix("override").strip().removeprefix("/"): chosen for group, chosen in entries}
    return {str(key): value for key, value in content.items()}, {
        group: chosen for group, chosen in choices.items() if not group.startswith("hydra/")
    }


def _resolve(found: dict[str, Any], kept: Sequence[str], config_dir: str | None) -> list[str]:
    """The settings of a search file as overrides, without interpolations, which W&B would take for its own."""
    config = compose_config(kept, config_dir)
    OmegaConf.set_struct(config, False)
    merged = OmegaConf.merge(config, found)
    return [f"{key}={format_value(OmegaConf.select(merged, key))}" for key in _list_keys(found)]


def _list_keys(tree: dict[str, Any], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key, value in tree.items():
        keys += _list_keys(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]
    return keys


def _convert(override: Override) -> dict[str, Any]:
    """One parameter of a W&B sweep."""
    check_searched_values(override)
    value = override.value()
    if not isinstance(value, IntervalSweep):
        return {"values": [_read_number(text) for text in override.sweep_string_iterator()]}
    assert value.start is not None
    assert value.end is not None
    whole, log = isinstance(value.start, int), "log" in value.tags
    names = {(0, 0): "uniform", (0, 1): "log_uniform_values", (1, 0): "int_uniform", (1, 1): "q_log_uniform_values"}
    return {"distribution": names[whole, log], "min": value.start, "max": value.end}


def _read_number(text: str) -> str | int | float:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
