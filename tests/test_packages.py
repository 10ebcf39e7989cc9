"""Packages of one's own: beside the data, installed, newly made; and what they may not do."""

import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from helpers import ROOT, TINY, command, command_environment, configure, find_run, run_in_process

import cl_bench
from cl_bench.commands.new import make_method
from cl_bench.config import packages, schema
from cl_bench.config.build import build
from cl_bench.config.packages import find_beside, find_installed
from cl_bench.config.schema import compose_config, import_allowed
from cl_bench.core.errors import ConfigError

EXAMPLE = ROOT / "examples" / "own_package"
RUN = ["backbone=mlp", "backbone.hidden=[16]", *TINY, "trainer.epochs=1", "logger=none"]


@pytest.fixture(autouse=True)
def forget_packages(monkeypatch):
    """No test leaves a folder to import from, a module or an installed package behind."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    find_installed.cache_clear()
    yield
    find_installed.cache_clear()
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("mylab", "theirlab"):
            del sys.modules[name]


def make_package(folder: Path, name: str = "mylab", target: str | None = None) -> Path:
    """A package with one method; importing it leaves a file. Returns its folder ``configs``."""
    configs = folder / name / "configs"
    (configs / "method").mkdir(parents=True)
    (folder / name / "__init__.py").write_text(
        "from pathlib import Path\nPath(__file__).with_name('imported').touch()\n"
    )
    (folder / name / "mine.py").write_text(
        "from cl_bench.methods.finetune import Finetune\nclass Mine(Finetune):\n    pass\n"
    )
    (configs / "method" / "mine.yaml").write_text(f"_target_: {target or f'{name}.mine.Mine'}\nloss_classes: all\n")
    return configs


def announce(folder: Path, value: str) -> None:
    """What an installer leaves of a distribution with one entry point."""
    info = folder / f"{value.partition('.')[0]}_dist-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {value.partition('.')[0]}-dist\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[cl_bench]\nany = {value}\n")


# -- beside the user's data ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_package_beside_the_data_runs_by_its_folder_of_yaml_files(tmp_path):
    make_package(tmp_path)
    # the installed command does not look for packages in the working directory by itself
    code = "import sys; sys.path[:] = [p for p in sys.path if p]; from cl_bench.__main__ import main; main()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, "--config-dir", "mylab/configs", "method=mine", *RUN],
        cwd=tmp_path, env=command_environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = find_run(tmp_path / "results")
    assert yaml.safe_load((run / "config.yaml").read_text())["allow_packages"] == ["mylab"]


@pytest.mark.slow
def test_a_sweep_runs_it_too(tmp_path, monkeypatch):
    make_package(tmp_path)
    sweep = ["-m", "--config-dir", "mylab/configs", "method=mine", *RUN, "seed=0,1"]
    assert run_in_process(*sweep, monkeypatch=monkeypatch, cwd=tmp_path) == 0
    assert len(list(tmp_path.glob("results/**/summary.json"))) == 2


@pytest.mark.slow
def test_a_run_from_python_takes_the_same_folder_and_is_loaded_later(tmp_path, monkeypatch):
    configs = make_package(tmp_path)
    monkeypatch.chdir(tmp_path)
    run = cl_bench.run([*RUN, "method=mine"], config_dir="mylab/configs")
    assert type(run.method).__name__ == "Mine"
    assert run.summary["method"] == "mine"
    assert configs.is_dir()
    assert type(cl_bench.load(run.run_dir).method).__name__ == "Mine"


def test_only_the_package_of_the_folder_is_allowed_and_nothing_is_imported_before(tmp_path):
    """A file there that names another package is refused, and so is one that only the same name would allow."""
    make_package(tmp_path, "theirlab")
    configs = make_package(tmp_path, target="theirlab.mine.Mine")
    config = compose_config(["method=mine", *RUN], configs)
    assert list(config.allow_packages) == ["mylab"]
    with pytest.raises(ConfigError, match=r"^method\._target_: expected something in one of the packages .*mylab; got"):
        build(config)
    assert not list(tmp_path.glob("*/imported"))
    assert not {"mylab", "theirlab"} & set(sys.modules)


def test_what_is_no_package_beside_its_yaml_files_allows_nothing(tmp_path, monkeypatch):
    configs = make_package(tmp_path)
    assert find_beside(configs) == "mylab"
    monkeypatch.chdir(tmp_path)
    assert find_beside("mylab/configs") == "mylab"
    assert find_beside(configs / "method") is None  # not the folder itself
    assert find_beside(tmp_path / "mylab") is None
    (tmp_path / "configs").mkdir()
    assert find_beside(tmp_path / "configs") is None  # beside no code
    inner = make_package(tmp_path / "mylab", "inner")
    assert find_beside(inner) is None  # a part of another package


@pytest.mark.parametrize("name", ["torch", "json", "cl_bench", "hydra", "os"])
def test_a_folder_of_the_name_of_another_package_does_not_allow_that(name, tmp_path):
    configs = make_package(tmp_path, name)
    assert find_beside(configs) is None
    config = compose_config(["method=mine", "method._target_=torch.load"], configs)
    assert list(config.allow_packages) == []
    with pytest.raises(ConfigError, match=r"^method\._target_: expected something in one of the packages"):
        build(config)


def test_a_file_cannot_allow_the_package_beside_it(tmp_path):
    """Only what is typed counts: a search path in a file finds YAML files, as Hydra does, but allows no package."""
    configs = make_package(tmp_path)
    config = configure(f"hydra.searchpath=[file://{configs}]", "method=mine")
    assert list(config.allow_packages) == []
    with pytest.raises(ConfigError, match="expected something in one of the packages"):
        build(config)
    assert not list(tmp_path.glob("*/imported"))


# -- installed -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_installed_package_adds_its_choices_and_is_allowed(tmp_path, monkeypatch, capsys):
    """Also in --help, and without being imported there."""
    site, work = tmp_path / "site", tmp_path / "work"
    make_package(site)
    announce(site, "mylab")
    work.mkdir()
    path = f"{ROOT}:{site}"
    shown = command("--help", cwd=work, PYTHONPATH=path)
    (line,) = [line for line in shown.stdout.splitlines() if line.strip().startswith("method: ")]
    assert "mine" in line.replace(",", "").split()
    assert not (site / "mylab" / "imported").exists()
    monkeypatch.syspath_prepend(site)
    assert run_in_process("method=mine", *RUN, monkeypatch=monkeypatch, cwd=work) == 0
    assert yaml.safe_load((find_run(work / "results") / "config.yaml").read_text())["allow_packages"] == []
    capsys.readouterr()
    assert run_in_process("method=mine", "method.loss_clases=all", monkeypatch=monkeypatch, cwd=work) == 2
    assert "method.loss_clases" in capsys.readouterr().err


def test_an_installed_package_replaces_no_choice_of_ours(tmp_path, monkeypatch):
    configs = make_package(tmp_path)
    shutil.copy(configs / "method" / "mine.yaml", configs / "method" / "finetune.yaml")
    announce(tmp_path, "mylab")
    monkeypatch.syspath_prepend(tmp_path)
    assert configure("method=finetune").method._target_ == "cl_bench.methods.finetune.Finetune"
    assert configure("method=mine").method._target_ == "mylab.mine.Mine"


@pytest.mark.parametrize("value", ["os", "torch", "json", "mylab.mine", "no_such_package", "torch.hub"])
def test_an_entry_point_allows_only_a_package_with_files_of_its_own(value, tmp_path, monkeypatch):
    """The name of another package is not taken."""
    make_package(tmp_path)
    announce(tmp_path, value)
    monkeypatch.syspath_prepend(tmp_path)
    assert find_installed() == {}
    with pytest.raises(ConfigError, match="expected something in one of the packages"):
        import_allowed("torch.load", "method._target_", [])
    assert not (tmp_path / "mylab" / "imported").exists()


def test_what_an_installed_package_only_imports_is_refused(tmp_path, monkeypatch):
    make_package(tmp_path)
    (tmp_path / "mylab" / "more.py").write_text("from subprocess import run\nfrom torch import load\n")
    announce(tmp_path, "mylab")
    monkeypatch.syspath_prepend(tmp_path)
    assert import_allowed("mylab.mine.Mine", "method._target_", []).__name__ == "Mine"
    for name in ("run", "load"):
        with pytest.raises(ConfigError, match="defines itself"):
            import_allowed(f"mylab.more.{name}", "method._target_", [])


def test_packages_are_found_without_torch():
    code = "import sys, cl_bench.config.packages as p; p.find_installed(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=command_environment())
    assert done.stdout.strip() == "False", done.stderr
    assert schema.find_installed is packages.find_installed


# -- new -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_new_method_runs_and_its_test_passes(tmp_path, monkeypatch, capsys):
    assert run_in_process("new", "method", "my_method", monkeypatch=monkeypatch, cwd=tmp_path) == 0
    test, yaml_file = "tests/test_my_method.py", "mylab/configs/method/my_method.yaml"
    written = ["mylab/__init__.py", yaml_file, "mylab/my_method.py", test]
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == written
    out = capsys.readouterr().out
    assert all(name in out for name in written)
    (line,) = [line for line in out.splitlines() if line.startswith("Run it: ")]
    words = line.removeprefix("Run it: ").split()
    assert words[0] == "cl_bench"
    assert run_in_process(*words[1:], *RUN, monkeypatch=monkeypatch, cwd=tmp_path) == 0
    run_tests(tmp_path / test, 1)


def run_tests(file: Path, count: int) -> None:
    """Call the tests of a file as pytest would."""
    tests = [value for name, value in runpy.run_path(str(file)).items() if name.startswith("test_")]
    assert len(tests) == count
    for test in tests:
        test()


def test_new_code_keeps_the_rules_of_this_repository(tmp_path):
    code = make_method(tmp_path, "my_method", "mylab")[1]
    assert code.name == "my_method.py"
    for how in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *how, "--config", str(ROOT / "pyproject.toml"), str(code)]
        done = subprocess.run(ruff, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


WRONG_NAMES = {
    "a method of ours": (["er"], "NAME: expected a name that no method has; got er."),
    "a word of Python": (["class"], "NAME: expected lower-case letters, .* got class."),
    "no name of Python": (["my-method"], "NAME: expected lower-case letters, .* got my-method."),
    "a path": (["../x"], "NAME: expected lower-case letters"),
    "a package of ours": (["mine", "--package", "cl_bench"], "--package: expected a name that no other package has"),
    "an installed package": (["mine", "--package", "torch"], "--package: expected a name that no other package has"),
    "a package of Python": (["mine", "--package", "json"], "--package: expected a name that no other package has"),
}


@pytest.mark.parametrize("case", WRONG_NAMES)
def test_a_name_that_cannot_be_taken_writes_nothing(case, tmp_path, monkeypatch, capsys):
    arguments, message = WRONG_NAMES[case]
    assert run_in_process("new", "method", *arguments, monkeypatch=monkeypatch, cwd=tmp_path) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error), error
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_there_is_never_replaced(tmp_path):
    first = make_method(tmp_path, "one", "mylab")
    first[0].write_text("# mine\n")
    assert first[0] not in make_method(tmp_path, "two", "mylab")
    assert first[0].read_text() == "# mine\n"
    (tmp_path / "tests" / "test_three.py").write_text("")
    with pytest.raises(ConfigError, match=r"expected no file .*test_three\.py yet"):
        make_method(tmp_path, "three", "mylab")
    assert not (tmp_path / "mylab" / "three.py").exists()


# -- the example ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_example_passes_its_tests_and_runs_as_its_page_says(tmp_path, monkeypatch):
    package = tmp_path / "own_package"
    shutil.copytree(EXAMPLE, package, ignore=shutil.ignore_patterns("__pycache__", "results"))
    run_tests(package / "tests" / "test_feature_pull.py", 2)
    (line,) = [line for line in (package / "README.md").read_text().splitlines() if "--config-dir" in line]
    words = line.partition("#")[0].split()
    assert words[:3] == ["python", "-m", "cl_bench"]
    assert run_in_process(*words[3:], *RUN, monkeypatch=monkeypatch, cwd=package) == 0
    project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    assert project["entry-points"][packages.GROUP] == {"mylab": "mylab"}
