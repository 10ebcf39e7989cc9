"""The README's commands and code, executed as they stand there."""

import json
import re
import shlex
from pathlib import Path

import pytest
from helpers import ROOT, TINY, command, configure
from hydra.core.override_parser.overrides_parser import OverridesParser

import cl_bench
import cl_bench.commands
from cl_bench.commands.new import make_method

README = (ROOT / "README.md").read_text()


def find_commands() -> list[list[str]]:
    """Every indented command of the README and of the page about dashboards, split into words."""
    text = (README + (ROOT / "docs" / "dashboards.md").read_text()).replace("\\\n", " ")
    lines = re.findall(r"^    (?=python |cl_bench |make |timeout |source |\.venv)(.*)$", text, flags=re.M)
    return [shlex.split(line, comments=True) for line in lines]


SMALL = ["method=finetune", "buffer=none", "backbone=mlp", "backbone.hidden=[16]"]
COMMANDS = find_commands()
CALLS = [words[words.index("cl_bench") + 1 :] for words in COMMANDS if "cl_bench" in words]
RUNS = [words for words in CALLS if words[0] not in cl_bench.commands.COMMANDS]


def find_files() -> dict[str, str]:
    """The fenced blocks of the README that a file name stands above."""
    return dict(re.findall(r"^`([\w./]+)`:\n\n```\w+\n(.*?)^```$", README, flags=re.M | re.S))


@pytest.mark.slow
def test_the_example_method_works_outside_the_package(tmp_path):
    files = find_files()
    assert list(files) == ["mylab/l2.py", "mylab/configs/method/l2.yaml"]
    (new,) = [words for words in CALLS if words[0] == "new"]
    (words,) = [words for words in RUNS if "method=l2" in words]
    assert "allow_packages" not in " ".join(words)
    make_method(tmp_path, new[-1], "mylab")
    for name, content in files.items():
        assert (tmp_path / name).is_file()
        (tmp_path / name).write_text(content)
    done = command(*words, "trainer.epochs=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("results/**/summary.json")
    assert json.loads(path.read_text())["method"] == "l2"
    events = [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text().splitlines()]
    terms = [set(e["losses"]) for e in events if e["event"] == "epoch"]
    assert terms[0] == {"ce"}
    assert terms[-1] == {"ce", "l2"}

    wrong = command(*words, "method.strenght=1", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "strenght" in wrong.stderr


def test_the_environment_is_activated_before_it_is_used():
    first = next(i for i, words in enumerate(COMMANDS) if words[0] == "python")
    assert ["source", ".venv/bin/activate"] in COMMANDS[:first]


@pytest.mark.parametrize("words", [words for words in RUNS if not {"--help", "--config-dir"} & {*words}], ids=" ".join)
def test_commands_of_the_readme_compose(words):
    parsed = OverridesParser.create().parse_overrides([word for word in words if word != "-m"])
    assert ("-m" in words) == any(override.is_sweep_override() for override in parsed) or "+search=lvt" in words
    chosen = []
    for override in parsed:
        if override.is_sweep_override() and override.is_choice_sweep():
            chosen.append(f"{override.input_line.split('=')[0]}={next(override.sweep_string_iterator())}")
        elif not override.is_sweep_override() and not override.key_or_group.startswith(("hydra", "search")):
            chosen.append(override.input_line)
    configure(*chosen)


def test_other_commands_of_the_readme_are_there():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
    scripts = [["", *words[1:]] for words in COMMANDS if any(word.startswith("scripts/") for word in words)]
    ours = [["", f"scripts/{words[0]}.py", *words[1:]] for words in CALLS if words not in RUNS]
    assert len(scripts) >= 6
    assert len(ours) >= 4
    for words in COMMANDS:
        if words[0] == "make":
            assert words[1] in targets
    for words in [*scripts, *ours]:
        file = ROOT / "cl_bench" / "commands" / Path(words[1]).name
        text = (file if file.is_file() else ROOT / words[1]).read_text()
        for option in words[2:]:
            assert not option.startswith("-") or f'"{option}"' in text, words


@pytest.mark.slow
def test_a_run_from_python_is_made_predicts_and_is_plotted(tmp_path, monkeypatch):
    import matplotlib

    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    make, plot = re.findall(r"^```python\n(.*?)^```$", README.split("## From Python")[1].split("\n## ")[0], re.M | re.S)
    names: dict = {}
    smaller = ", ".join(repr(override) for override in [*TINY, "trainer.epochs=1", "logger=none", *SMALL])
    exec(make.replace('"+experiment=quickstart"', f'"+experiment=quickstart", {smaller}'), names)
    run = names["run"]
    answers = run.predict(names["images"])
    assert answers.shape == (len(names["images"]),)
    exec(plot, names)
    lines = names["plt"].gca().lines
    assert len(lines) == len(run.scenario.tasks)
    names["plt"].close("all")
    again = cl_bench.load(run.run_dir)
    assert (again.predict(names["images"]) == answers).all()
    assert again.summary == run.summary
    for name in re.findall(r"`\.(\w+)`", README.split("## From Python")[1].split("\n## ")[0]):
        assert hasattr(run, name), name
