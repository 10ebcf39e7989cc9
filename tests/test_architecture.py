"""The rules of docs/architecture.md that a machine can check."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import HEAVY, ROOT, configure
from omegaconf import OmegaConf

from cl_bench.config.build import RUNTIME
from cl_bench.config.schema import import_allowed, import_target, read_arguments, to_plain_dict

PACKAGE = ROOT / "cl_bench"
GROUPS = {"backbone": "backbones", "buffer": "buffers", "method": "methods"}

FLOORS = [
    {"core", "system"},
    {"optim", "metrics", "data", "backbones"},
    {"loggers", "buffers", "scenarios"},
    {"methods"},
    {"engine"},
    {"config", "report"},
    {"runs", "testing"},
    {"commands"},
    {"__main__"},
]
"""From the ground up. A file imports only from lower floors, and from its own folder only as :data:`ORDER` says."""

ORDER = {
    "core": ["boxes errors images", "avalanche types"],
    "engine": ["detection", "checkpoint evaluate probe step", "trainer", "replicas"],
    "config": ["packages", "schema", "build command_line", "explain"],
    "report": [
        "folders labels plots published statistics svg trials",
        "page",
        "imports",
        "rows",
        "selection",
        "tables",
        "compare",
        "reproduction",
    ],
    "runs": ["run_dir sweep timing", "dry_run audit ray_jobs search", "run", "load"],
}
"""Inside these folders a file imports from the earlier ones."""

SHARED = {"base", "layers", "dashboard", "delivered", "jsonl", "cache", "decoded", "pictures", "picture_files"}
SHARED |= {"official_files", "pixel_maps", "recurring", "selection", "frozen_trunk", "detection"}
"""In the other folders a variant does not import another variant, only these shared files: the other loggers catch up
from metrics.jsonl; modules of their own decode and store pictures, fetch published files, permute pixels, select
images, spread them over the tasks, train the trunk of a frozen ViT, and hold what all data sets and methods for
detection share."""


def imports(path: Path) -> set[str]:
    """The modules of ours that a file imports, as ``package.module``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cl_bench"):
            inside = (ROOT / node.module.replace(".", "/")).is_dir()  # from a package: its modules
            found |= {f"{node.module}.{a.name}" if inside else node.module for a in node.names}
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.startswith("cl_bench")}
    return {name.removeprefix("cl_bench.") for name in found if name != "cl_bench"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    floors = {name: i for i, floor in enumerate(FLOORS) for name in floor}
    room, *rest = path.relative_to(PACKAGE).with_suffix("").parts
    if room == "__init__":
        return
    for name in imports(path):
        other, _, file = name.partition(".")
        if other != room:
            assert floors[other] < floors[room], f"{path} may not import {name}"
        elif room in ORDER:
            ranks = {file: i for i, files in enumerate(ORDER[room]) for file in files.split()}
            assert ranks.get(file.split(".")[0], 99) < ranks.get(rest[0], 50), f"{path} may not import {name}"
        else:
            assert file.split(".")[0] in SHARED or rest[-1] == "group", f"{path} imports its sibling {name}"


def test_the_page_shows_these_floors_and_every_file():
    page = (ROOT / "docs" / "architecture.md").read_text()
    floors, order, tree = re.findall(r"^```\n(.*?)^```$", page, flags=re.M | re.S)[:3]
    shown = [set(line.split(maxsplit=1)[1].split(", ")) for line in floors.splitlines()]
    assert shown == [{"scripts"}, *reversed(FLOORS)]
    lines = dict(line.split(maxsplit=1) for line in order.splitlines())
    assert {room: files.replace(",", "").split(" < ") for room, files in lines.items()} == ORDER
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0]
        name = path.name if room in {*ORDER, "system"} or path.parent == PACKAGE else f"{room}/"
        assert path.name == "__init__.py" or re.search(rf"\s{re.escape(name)}\s", tree), path


def test_every_decision_is_in_the_index():
    folder = ROOT / "docs" / "decisions"
    index = (folder / "README.md").read_text()
    lines = re.findall(r"^- \[(\d+)\]\((.*)\): .+\.$", index, flags=re.M)
    assert [file for _, file in lines] == [path.name for path in sorted(folder.glob("0*.md"))]
    for number, file in lines:
        assert (folder / file).read_text().startswith(f"# {number}. ")
    for page in ("docs/architecture.md", "CONTRIBUTING.md", "README.md"):
        assert "decisions/README.md" in (ROOT / page).read_text(), page


@pytest.mark.parametrize(
    "module",
    ["avalanche", "wandb", "mlflow", "trackio", "matplotlib", "torchvision", "sklearn", "tensorboard", "pandas"],
)
def test_heavy_packages_are_imported_where_they_are_chosen(module):
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in tree.body:  # module level only
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == module for name in names):
                assert path.parent.name == "report", f"{path} imports {module} at once"


@pytest.mark.slow
def test_only_a_run_that_chooses_a_heavy_package_imports_it():
    modules = "cl_bench.runs.run, cl_bench.core.avalanche, cl_bench.methods.avalanche, cl_bench.scenarios.avalanche"
    code = f"import sys, {modules}; from cl_bench.config.build import build; "
    code += "from cl_bench.config.schema import compose_config; build(compose_config(['device=cpu'])); "
    code += f"print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_an_optimizer_is_stepped_in_one_place():
    stepping = [
        p.name for p in PACKAGE.rglob("*.py") if re.search(r"optimizer\w*\.step\(|\bopt\.step\(", p.read_text())
    ]
    assert stepping == ["step.py"]


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_every_variant_has_its_yaml_and_builds_from_it(group):
    for path in sorted((ROOT / "configs" / group).glob("*.yaml")):
        text = path.read_text()
        config = configure(f"{group}={path.stem}")
        built = import_target(config[group], group, [])
        assert built.__module__.startswith(f"cl_bench.{GROUPS[group]}."), path
        assert read_arguments(config[group], group, built, RUNTIME[group]).keys() == set(config[group]) - {
            "_target_"
        }, text


def test_every_metric_loads():
    for path in (ROOT / "configs" / "metrics").glob("*.yaml"):
        config = configure(f"metrics={path.stem}")
        for name, dotted in config.metrics.items():
            assert import_allowed(dotted, name, []).__name__ == name


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "experiment").glob("*.yaml")), ids=lambda p: p.stem)
def test_experiments_say_what_they_are(path):
    text = path.read_text()
    assert text.startswith("# @package _global_\n")
    for heading in ("# Paper:", "# Command:", "# Hardware:"):
        assert heading in text, heading
    assert f"+experiment={path.stem}" in text
    config = configure(f"+experiment={path.stem}")
    assert config.experiment == path.stem
    for group in GROUPS:
        built = import_target(config[group], group, [])
        read_arguments(config[group], group, built, RUNTIME[group])
    if config.published is not None:
        assert {"tolerance", "source"} < set(config.published)
    values = to_plain_dict(config)
    OmegaConf.resolve(config)  # what --cfg job --resolve prints, lists of ${by_scale:...} among it
    assert OmegaConf.to_container(config, enum_to_str=True) == values


def test_the_backbone_brings_its_method_and_the_command_line_wins():
    assert configure("backbone=lvt").choices == {
        "method": "lvt", "backbone": "lvt", "scenario": "digits", "buffer": "confidence_aware",
    }  # fmt: skip
    assert configure("backbone=lvt", "method=er", "buffer=reservoir").choices.method == "er"
    assert configure("+experiment=lvt_cifar100_10split", "buffer=fixed_memory").choices.buffer == "fixed_memory"
    assert configure("+experiment=lvt_cifar100_10split", "backbone=resnet18").choices.method == "finetune"


@pytest.mark.slow
def test_mini_is_smaller_and_never_held_to_a_published_number():
    from cl_bench.config.schema import select_comparable, to_plain_dict
    from cl_bench.runs.run import begin_summary

    for name, full, mini in (("lvt", 64, 16), ("resnet18", 64, 20)):
        assert configure(f"backbone={name}").backbone.width == full
        assert configure(f"backbone={name}", "+scale=mini").backbone.width == mini
        assert configure(f"backbone={name}", "+scale=mini", "backbone.width=8").backbone.width == 8

    def published(*overrides):
        values = to_plain_dict(configure("+experiment=resnet18_derpp_cifar100_10split", *overrides))
        return begin_summary(values, select_comparable(values))["published"]

    for changed in ("buffer.capacity=200", "trainer.epochs=1", "class_order_seed=3", "optimizer=adamw"):
        assert published(changed) is None
    for neutral in ("seed=3", "device=cpu", "logger=none", "results_dir=elsewhere"):
        assert published(neutral) is not None

    assert published()["class_il_average_accuracy"] == 38.25
    assert published("+scale=mini") is None
    assert published("trainer.evaluate_on=val") is None


def test_nothing_names_the_workplace():
    """No host of a registry and no path of a machine in what is committed."""
    import subprocess

    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    # Put together from pieces, so that this file is held to its own rule.
    paths = [r"\.\./" + "shared", *(f"/{folder}/" for folder in ("work", "root"))]
    hosts = "|".join(["py" + "pi", "python" + "hosted", "npm" + "js", "deb" + "ian"])
    wrong = re.compile("|".join([*paths, rf"https?://[^\s]*({hosts})\."]))
    allowed = {".ci/run"}
    found = [
        f
        for f in files
        if f not in allowed and not f.endswith((".png", ".npz")) and wrong.search((ROOT / f).read_text())
    ]
    assert len(files) > 100
    assert found == []


def test_no_placeholder_is_left():
    texts = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "configs").rglob("*.yaml")]
    for path in texts:
        shouted = set(re.findall(r"\b(?:[A-Z]{6,}|HOURS|TODO|FIXME)\b", path.read_text()))
        assert not shouted - {"README", "CHANGELOG", "CONTRIBUTING", "PYTHONPATH", "SIGINT", "SIGKILL", "SIGTERM"}, path


ABLATIONS = sorted(p for p in (ROOT / "configs" / "ablation").glob("*.yaml") if p.stem != "none")


@pytest.mark.slow
@pytest.mark.parametrize("path", ABLATIONS, ids=lambda p: p.stem)
def test_an_ablation_changes_its_experiment_and_its_name_only(path):
    from cl_bench.config.schema import select_comparable, to_plain_dict

    method = path.stem.split("_without_")[0]
    (experiment,) = [p.stem for p in (ROOT / "configs" / "experiment").glob(f"{method}_cifar100_10s*.yaml")]
    whole, without = (
        to_plain_dict(configure(f"+experiment={experiment}", f"+ablation={name}")) for name in ("none", path.stem)
    )
    assert whole["name"] == to_plain_dict(configure(f"+experiment={experiment}"))["name"]
    assert without["name"] == path.stem.replace("_", "-")
    before, after = select_comparable(whole), select_comparable(without)
    changed = {key for key in before | after if before.get(key) != after.get(key)}
    assert 1 <= len(changed) <= 2
    assert {key.split(".")[0] for key in changed} <= {"method", "backbone", "buffer"}
    for group in GROUPS:
        config = configure(f"+experiment={experiment}", f"+ablation={path.stem}")
        read_arguments(config[group], group, import_target(config[group], group, []), RUNTIME[group])
