"""What the run folder says of the code that ran."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from cl_bench.runs import run_dir as files


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Another project under git, with this package inside it -> a function that calls git there."""
    package = tmp_path / ".venv" / "site-packages" / "cl_bench"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (tmp_path / "mine.py").touch()
    monkeypatch.setattr(files, "PACKAGE", package)
    who = ["-c", "user.name=n", "-c", "user.email=e"]

    def git(*arguments: str) -> str:
        done = ["git", "-C", str(tmp_path), *who, *arguments]
        return subprocess.run(done, capture_output=True, text=True, check=True).stdout.strip()

    git("init")
    git("add", "mine.py")
    git("commit", "-m", "mine")
    return git


def test_the_commit_of_another_project_is_not_taken_for_that_of_this_code(repository, tmp_path, monkeypatch):
    assert files.find_commit() is None
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))  # as in a hook
    assert files.find_commit() is None


def test_the_commit_of_a_checkout_and_whether_it_was_changed(repository, tmp_path):
    repository("add", ".")
    repository("commit", "-m", "with this package")
    head = repository("rev-parse", "HEAD")
    assert files.find_commit() == head
    (Path(files.PACKAGE) / "__init__.py").write_text("changed")
    assert files.find_commit() == f"{head}+changes"


def test_no_commit_outside_of_git(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PACKAGE", tmp_path)
    assert files.find_commit() is None
    monkeypatch.setenv("PATH", "")  # nor without git
    assert files.find_commit() is None


def test_where_there_is_no_checkout_the_commit_is_what_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PACKAGE", tmp_path)
    monkeypatch.setenv("CL_BENCH_COMMIT", "c0ffee")
    files.write_environment(tmp_path, torch.device("cpu"))
    assert json.loads((tmp_path / "env.json").read_text())["commit"] == "c0ffee"
