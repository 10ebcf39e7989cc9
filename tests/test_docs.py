"""Every command and every piece of code on a page: README, CONTRIBUTING, docs, examples.

A shell executes the command lines of each page as they stand, with its loops, variables and quotes. What they call is
not started but written down, and then checked, in one of these ways:

- EXECUTED: really run, on the runs of the shortened first hour (:func:`hour`), see :data:`EXECUTED`;
- composed: a command that would train or search. Its configuration is composed, and the parts that it names are
  prepared: every key, type and choice is checked. Nothing is trained, no data set is read. Sweeps: the first choice of
  each key;
- parsed: a command or script of ours whose options are read by its own parser, and no more;
- ``make`` says what it would do (``make -n``);
- named: programs of others, and what needs an account, :data:`NAMED`.

Files that pages show are written into one package and used by one run; Python code is executed.
"""

import argparse
import contextlib
import dataclasses
import io
import itertools
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, TINY, find_run, run_in_process
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from markdown_it import MarkdownIt

import cl_bench.commands
from cl_bench.commands.new import make_method
from cl_bench.config.build import KINDS, load_metric, prepare_component
from cl_bench.config.schema import CONFIGS, compose_config
from cl_bench.core.errors import ConfigError

PAGES = ["README.md", "CONTRIBUTING.md", *(str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("docs/**/*.md")))]
PAGES = [page for page in PAGES if not page.startswith("docs/generated/")]  # what `make docs` made
PAGES += [str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("examples/*/README.md"))]

NAMED = {
    "cd": "a folder that is there",
    "source": "the environment that make makes",
    "pip": "the extras that it names are in pyproject.toml; nothing is installed here",
    "wandb": "needs an account, or a terminal to look at",
    **dict.fromkeys(["cp", "mkdir", "cat", "tar"], "files of a visit to a GPU"),
    **dict.fromkeys(["tensorboard", "mlflow", "trackio"], "programs that show a page"),
}
"""Programs whose calls are only known to be there, and why that is enough."""

PRELUDE = r"""
set -e
record() { local line; printf -v line '%s\x1f' "$@"; printf '%s\x1e' "$line" >> "$CALLS"; }  # at once: pipes
python() { if [ "$1" = -c ]; then "$PYTHON" -SE "$@"; else record python "$@"; fi; }
python3() { python "$@"; }
timeout() { shift; "$@"; }
tr() { "$TR" "$@"; }
for name in cl_bench make pip wandb tensorboard mlflow trackio cp mkdir cat tar source; do
    eval "$name() { record $name \"\$@\"; }"
done
command_not_found_handle() { echo "$1 is not known to this test"; exit 127; }
PATH=
"""
"""What the shell finds in place of programs."""


@dataclasses.dataclass(frozen=True)
class Call:
    """A command of a page, as the shell would start it."""

    page: str
    words: tuple[str, ...]

    @property
    def arguments(self) -> list[str] | None:
        """What follows ``cl_bench`` or ``python -m cl_bench``; None if it is another program."""
        if self.words[0] == "cl_bench":
            return list(self.words[1:])
        return list(self.words[3:]) if self.words[:3] == ("python", "-m", "cl_bench") else None

    @property
    def kind(self) -> str:
        """run, command, script, pytest, make or named."""
        if self.arguments is not None:
            return "command" if self.arguments[0] in cl_bench.commands.COMMANDS else "run"
        if self.words[0] == "python":
            return "pytest" if self.words[1:3] == ("-m", "pytest") else "script"
        if self.words[0] == "make":
            return "make"
        return "named"


def read_blocks(page: str) -> list[str]:
    """The command lines of a page: its indented blocks, and blocks marked bash."""
    tokens = MarkdownIt().parse((ROOT / page).read_text())
    return [t.content for t in tokens if (t.type == "code_block" and t.level == 0) or t.info == "bash"]


def find_calls(page: str, folder: Path) -> list[Call]:
    """Let a shell execute the command lines of a page in ``folder``; returns what it would have started."""
    script, calls = PRELUDE + "\n".join(read_blocks(page)), folder / "calls"
    calls.touch()
    environment = {"CALLS": str(calls), "PYTHON": sys.executable, "TR": "/usr/bin/tr"}
    done = subprocess.run(["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{page}: {done.stdout}{done.stderr}"
    return [Call(page, tuple(call.split("\x1f")[:-1])) for call in calls.read_text().split("\x1e")[:-1]]


@pytest.fixture(scope="module")
def calls(tmp_path_factory) -> list[Call]:
    found = []
    for page in PAGES:
        folder = tmp_path_factory.mktemp("page")
        (folder / "examples").symlink_to(ROOT / "examples")
        found += find_calls(page, folder)
    return found


def select(calls: list[Call], kind: str) -> list[Call]:
    return list({call.words: call for call in calls if call.kind == kind}.values())


def test_the_shell_sees_every_command(calls):
    """Loops and variables included: five orders of APD, and two in one sweep."""
    assert len(calls) > 200
    apd = [call.words for call in calls if call.page.endswith("apd.md")]
    assert sum("scenario.class_order=[" in word for words in apd for word in words) == 6
    assert any(word.count("[") == 2 for words in apd for word in words)
    assert {"python", "cl_bench", "make"} < {call.words[0] for call in calls}


def test_programs_of_others_are_known(calls):
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for call in select(calls, "named"):
        assert call.words[0] in NAMED, call
        if call.words[0] == "cd":
            assert (ROOT / call.words[1]).is_dir(), call
        if call.words[0] == "pip":
            assert set(re.findall(r"\[(.+)\]", call.words[-1])) <= set(extras), call
        if call.words[0] == "source":
            assert call.words[1] == ".venv/bin/activate", call


def test_make_knows_every_target(calls):
    targets = sorted({word for call in select(calls, "make") for word in call.words[1:]})
    assert {"quickstart", "test", "docs", "first_hour"} <= set(targets)
    done = subprocess.run(["make", "-n", *targets], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Parsed(Exception):
    """The options were read."""


@pytest.fixture
def parse_only(monkeypatch):
    """A parser of options ends the command, once they are read."""
    original = argparse.ArgumentParser.parse_args

    def parse_args(self, *arguments):
        original(self, *arguments)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)


def test_options_of_commands_are_read_by_their_parsers(calls, parse_only):
    commands = select(calls, "command")
    assert {call.arguments[0] for call in commands} >= set(cl_bench.commands.COMMANDS) - {"reproduce"}
    for call in commands:
        with pytest.raises(Parsed):
            cl_bench.commands.run_command(call.arguments)


@pytest.mark.slow
def test_options_of_scripts_are_read_by_their_parsers(calls, parse_only, monkeypatch):
    """But for one script, whose imports take five seconds: its options are looked for in its text."""
    scripts = select(calls, "script")
    assert len({call.words[1] for call in scripts}) >= 6
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    for file, group in itertools.groupby(sorted(scripts, key=lambda call: call.words[1]), lambda call: call.words[1]):
        if file == "scripts/benchmark.py":
            text = (ROOT / file).read_text()
            assert all(f'"{word}"' in text for call in group for word in call.words if word.startswith("--"))
            continue
        names = runpy.run_path(str(ROOT / file))
        for call in group:
            monkeypatch.setattr(sys, "argv", list(call.words[1:]))
            with pytest.raises(Parsed):
                names["main"]()


def test_tests_that_pages_name_are_there(calls):
    made = {"tests/test_l2.py"}  # by `cl_bench new method l2`
    for call in select(calls, "pytest"):
        for path in call.words[3:]:
            assert path in made or (ROOT / path).exists() or (ROOT / call.page).parent.joinpath(path).exists(), call


# ---- what would train: composed


def find_files() -> dict[str, str]:
    """The fenced blocks of all pages that the name of a file stands above."""
    pages = "\n".join((ROOT / page).read_text() for page in PAGES)
    return dict(re.findall(r"^`(mylab/[\w./]+)`:\n\n```\w+\n(.*?)^```$", pages, flags=re.M | re.S))


@pytest.fixture(scope="module")
def mylab(tmp_path_factory) -> Path:
    """The files of all pages in one package, made by the command that pages name, beside the example's."""
    folder = tmp_path_factory.mktemp("mylab")
    make_method(folder, "l2", "mylab")
    example = ROOT / "examples" / "own_package" / "mylab"
    files = {
        f"mylab/{p.relative_to(example)}": p.read_text() for p in example.rglob("*") if p.suffix in (".py", ".yaml")
    }
    for name, text in (files | find_files()).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def beside_mylab(mylab, monkeypatch) -> Path:
    """The working directory is beside that package; it is forgotten afterwards."""
    monkeypatch.chdir(mylab)
    monkeypatch.syspath_prepend(str(mylab))
    yield mylab
    for name in [name for name in sys.modules if name.split(".")[0] == "mylab"]:
        del sys.modules[name]


def choose(words: list[str]) -> tuple[list[str], bool]:
    """The overrides of a sweep's first job, without those of the search itself; and whether it is a sweep."""
    chosen, sweeps = [], False
    for override in OverridesParser.create().parse_overrides(words):
        key, text = override.key_or_group, override.input_line
        if override.is_sweep_override():
            sweeps = True
            if override.is_choice_sweep():
                chosen.append(f"{text.split('=')[0]}={next(override.sweep_string_iterator())}")
        elif key.startswith(("hydra", "search")):
            sweeps |= key == "search"
        elif key != "experiment" or override.value() != "NAME":
            chosen.append(text)
    return chosen, sweeps


@pytest.mark.slow
def test_commands_that_train_compose_and_their_parts_are_prepared(calls, beside_mylab):
    composed, wrong = 0, []
    for call in select(calls, "run"):
        try:
            composed += compose(call, beside_mylab)
        except (AssertionError, ConfigError, HydraException) as error:
            wrong.append(f"{call.page}: {' '.join(call.words)}\n    {error}")
    assert not wrong, "\n".join(wrong)
    assert composed > 60


def compose(call: Call, folder: Path) -> bool:
    """Compose what the command would run, unless another test does; returns whether it was done.

    Args:
        folder: its working directory.
    """
    words = [word for word in call.arguments if word not in ("--help", "--cfg", "job", "-m")]
    if "-sc" in words or not words:
        return False
    config_dir = None
    if "--config-dir" in words:
        at = words.index("--config-dir")
        config_dir = folder / words[at + 1]
        del words[at : at + 2]
    elif "method=feature_pull" in words:
        config_dir = folder / "mylab" / "configs"  # as if the example were installed
    chosen, sweeps = choose(words)
    assert ("-m" in call.arguments) == sweeps
    if all(re.fullmatch(r"\+experiment=\w+|\+scale=mini", word) for word in words):
        # test_architecture.py composes every experiment
        name = words[0].split("=")[1]
        assert name == "NAME" or (CONFIGS / "experiment" / f"{name}.yaml").is_file()
        return False
    config = compose_config(chosen, config_dir)
    allow = list(config.allow_packages)
    for group in ("trainer", "schedule", "optimizer", "backbone", "buffer", "method"):
        if any(re.match(rf"[+~]?{group}[.=]", word) for word in chosen):
            prepare_component(config[group], group, allow, KINDS[group])
    for name, path in config.metrics.items():
        load_metric(path, f"metrics.{name}", allow)
    return True


# ---- what is executed

TINY_RUN = [*TINY, "trainer.epochs=1", "logger=none", "backbone.hidden=[16]"]


@pytest.mark.slow
def test_a_method_data_a_metric_and_a_logger_of_the_pages_work_in_one_run(calls, beside_mylab, monkeypatch, capsys):
    """The README's command for its method, with what the other pages add."""
    (call,) = [call for call in select(calls, "run") if call.page == "README.md" and "method=l2" in call.words]
    assert "allow_packages" not in " ".join(call.words)
    words = [word for word in call.arguments if word != "scenario=digits"]
    words += ["scenario=bars", "metrics=lowest", "logger=accuracy_file", *TINY_RUN[-1:]]
    words += ["trainer.epochs=1"]
    assert run_in_process(*words, monkeypatch=monkeypatch, cwd=beside_mylab) == 0
    run = find_run(beside_mylab / "results")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["method"] == "l2"
    assert summary["class_names"][3] == "row 3"
    assert len(summary["tasks"]) == 4
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    terms = [set(event["losses"]) for event in events if event["event"] == "epoch"]
    assert terms == [{"ce"}, *[{"ce", "l2"}] * 3]
    assert summary["task_il"]["lowest_task"] == cl_bench.load(run).record.get_matrix("task_il").accuracy[-1].min()
    lines = [line.split() for line in (run / "accuracy.txt").read_text().splitlines()]
    assert len(lines) == 4
    assert float(lines[-1][0]) == pytest.approx(summary["class_il"]["average_accuracy"])
    capsys.readouterr()
    assert cl_bench.commands.run_command(["compare", "results", "--metrics", "lowest_task", "--format", "csv"]) == 0
    assert "lowest_task" in capsys.readouterr().out

    assert run_in_process(*words, "method.strenght=1", monkeypatch=monkeypatch, cwd=beside_mylab) == 2
    assert "strenght" in capsys.readouterr().err


def make_small(code: str) -> str:
    """Code of a page with the quickstart as a run of a second."""
    small = ["+experiment=quickstart", "method=er", "buffer=reservoir", "backbone=mlp", *TINY_RUN]
    return code.replace('"+experiment=quickstart"', ", ".join(map(repr, small)))


def read_code(text: str) -> list[str]:
    return [make_small(code) for code in re.findall(r"^```python\n(.*?)^```$", text, flags=re.M | re.S)]


@pytest.mark.slow
def test_the_code_about_python_and_the_notebook_are_executed(tmp_path, monkeypatch):
    import matplotlib

    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    section = (ROOT / "README.md").read_text().split("## From Python")[1].split("\n## ")[0]
    make, plot = read_code(section)
    names: dict = {}
    exec(make, names)
    run = names["run"]
    answers = run.predict(names["images"])
    assert answers.shape == (len(names["images"]),)
    exec(plot, names)
    assert len(names["plt"].gca().lines) == len(run.scenario.tasks)
    names["plt"].close("all")
    again = cl_bench.load(run.run_dir)
    assert (again.predict(names["images"]) == answers).all()
    assert again.summary == run.summary
    for name in re.findall(r"`\.(\w+)`", section):
        assert hasattr(run, name), name

    code = read_code((ROOT / "docs" / "python.md").read_text())
    assert len(code) == 4
    names = {}
    for block in code:
        exec(block, names)
    assert list(names["table"]["seed"]) == [0, 1]
    assert names["matrix"].shape == (2, 2)

    notebook = json.loads((ROOT / "examples" / "first_notebook.ipynb").read_text())
    assert len(notebook["cells"]) <= 10
    assert not any(cell.get("outputs") for cell in notebook["cells"])
    cells = [make_small("".join(cell["source"])) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names = {}
    for cell in cells:
        exec(cell, names)
    assert eval(cells[-1].splitlines()[-1], names) is True  # what the last cell shows
    assert len(names["plt"].gca().lines) == len(names["run"].scenario.tasks)
    names["plt"].close("all")
    assert len([*tmp_path.glob("results/**/summary.json")]) == 2  # seeds 0 and 1; all else was loaded


def test_the_environment_is_activated_before_it_is_used(calls):
    words = [call.words for call in calls if call.page == "README.md"]
    first = next(i for i, call in enumerate(words) if call[0] == "python")
    assert ("source", ".venv/bin/activate") in words[:first]


EXECUTED = [
    "cl_bench compare results/quickstart",
    "cl_bench status results",
    "cl_bench export tensorboard RUN_OR_FOLDER ...",
    "cl_bench metrics RUN --add forgetting_clipped",
    "cl_bench wandb sweep +experiment=lvt_cifar100_10split +search=lvt",
    "python scripts/compare.py results/quickstart --where method=er --group capacity --sort forgetting",
]
"""Commands of pages, beside those of the first hour, that are really run, on its results."""


@pytest.fixture(scope="module")
def hour(tmp_path_factory):
    """The first hour's commands, executed in this process with the smallest runs; returns its folder and its steps.

    Each run is a tenth of a second of training, of one seed, and only the first one gets a report. Runs of a sweep
    follow each other.
    """
    first_hour = runpy.run_path(str(ROOT / "examples" / "first_hour.py"))
    folder, patch = tmp_path_factory.mktemp("hour"), pytest.MonkeyPatch()

    def execute(words: list[str], cwd: Path) -> str:
        words = words[words.index("cl_bench") + 1 :]
        if not {*cl_bench.commands.COMMANDS} & {words[0]}:
            words = [word for word in words if not word.startswith(("hydra", "threads"))]
            words = [*(word.replace("seed=0,1,2", "seed=0").replace(",0.3", "") for word in words), *TINY_RUN]
            if "backbone=mlp" not in words:
                words.pop()
        with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(printed):
            status = run_in_process(*words, monkeypatch=patch, cwd=cwd, report=True)
        assert status == 0, printed.getvalue()
        patch.setattr("cl_bench.runs.run.write_report", lambda run_dir: None)
        return printed.getvalue()

    yield folder, list(first_hour["follow"](folder, execute)), first_hour
    patch.undo()


@pytest.mark.slow
def test_the_first_hour_ends_with_a_comparison_and_exports(hour):
    folder, steps, first_hour = hour
    results = folder / "results"
    assert len([*results.glob("rates/*/*/seed*/summary.json")]) == 4  # two methods, two rates
    assert all(json.loads(p.read_text())["evaluate_on"] == "val" for p in results.glob("rates/*/*/*/summary.json"))
    assert len([*results.glob("quickstart/*/seed*/report.html")]) == 1
    made = [*results.glob("quickstart/*/seed*/summary.json")]
    assert len(made) >= 3  # the first one, one of each method; and those with the best rate, if it is another one
    assert {*first_hour["METHODS"]} <= {json.loads(p.read_text())["method"] for p in made}
    assert (folder / "comparison" / "compare.html").is_file()
    assert len([*results.glob("quickstart/*/seed*/tensorboard/events*")]) == len(made)
    assert any(r"\toprule" in step.output for step in steps)
    page = " ".join(first_hour["make_page"](steps).replace("\\\n", " ").split())
    assert all(step.step.command in page for step in steps)


def test_the_page_of_the_first_hour_is_that_of_its_script(hour, calls):
    """Its commands are those of the script; only the chosen rates may differ."""
    _, steps, _ = hour
    page = [" ".join(call.words) for call in calls if call.page == "docs/first_hour.md" and call.words[0] != "make"]
    scripted = [step.step.command for step in steps]
    assert [re.sub(r"lr=[\d.]+ ", "lr= ", line) for line in page] == [
        re.sub(r"lr=[\d.]+ ", "lr= ", c) for c in scripted
    ]


@pytest.mark.slow
def test_commands_after_runs_are_executed(hour, calls, monkeypatch, capsys):
    folder, _, _ = hour
    monkeypatch.chdir(folder)
    lines = {" ".join(call.words): call for call in calls}
    run = str(find_run(*(folder / "results" / "quickstart").glob("lvt-*")))
    for line in EXECUTED:
        words = list(lines[line].words)
        words = words[1:] if words[0] == "cl_bench" else [Path(words[1]).stem, *words[2:]]
        filled = [{"RUN": run, "RUN_OR_FOLDER": "results/rates"}.get(word, word) for word in words if word != "..."]
        assert cl_bench.commands.run_command(filled) == 0, line
        assert capsys.readouterr().out.strip(), line
