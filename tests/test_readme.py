"""The README's example of a method, executed as it stands there."""

import json
import re
import shutil

import pytest
from conftest import ROOT, command


def blocks() -> dict[str, str]:
    """The fenced blocks of the README that a file name stands above."""
    text = (ROOT / "README.md").read_text()
    return dict(re.findall(r"^`([\w./]+)`:\n\n```\w+\n(.*?)^```$", text, flags=re.M | re.S))


@pytest.mark.slow
def test_the_example_method_works_from_one_file_and_one_yaml(tmp_path):
    for folder in ("cl_bench", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    files = blocks()
    assert list(files) == ["cl_bench/methods/l2.py", "configs/method/l2.yaml"]
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    line = re.search(r"python -m cl_bench (method=l2 .*)", (ROOT / "README.md").read_text())
    done = command(*line[1].split(), "trainer.epochs=2", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("results/**/summary.json")
    assert json.loads(path.read_text())["method"] == "l2"
    events = [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text().splitlines()]
    terms = [set(e["losses"]) for e in events if e["event"] == "epoch"]
    assert terms[0] == {"ce"}
    assert terms[-1] == {"ce", "l2"}

    wrong = command("method=l2", "method.strenght=1", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert wrong.returncode == 2
    assert "strenght" in wrong.stderr


def test_commands_of_the_readme_compose():
    from conftest import configure

    text = (ROOT / "README.md").read_text()
    lines = re.findall(r"python -m cl_bench (?!--|-m )(.*?)(?:\s+#.*)?$", text, flags=re.M)
    runs = [line for line in lines if "l2" not in line]
    assert len(runs) >= 5
    for line in runs:
        configure(*line.split())


def test_what_holds_a_promise_is_there():
    """Every test file that docs/reliability.md names, and every test, in the file that is named before it."""
    named = re.findall(r"`(?:tests/)?(test_\w+\.py|test_\w+)`", (ROOT / "docs" / "reliability.md").read_text())
    assert len(named) > 60
    text = ""
    for name in named:
        if name.endswith(".py"):
            text = (ROOT / "tests" / name).read_text()
        else:
            assert f"\ndef {name}(" in text, name
