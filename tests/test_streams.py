"""A run outlives whoever reads what it says, in any locale, with or without a home folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, TINY, command_environment, find_run, run_in_process

RUN = [*TINY, "backbone.hidden=[4]", "results_dir=r"]
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def unread(*call: str, cwd: Path, both: bool = False, **environment: str) -> tuple[int, str]:
    """A command whose output nobody reads -> its exit status and what it said on stderr, if that was read."""
    reader, writer = os.pipe()
    os.close(reader)
    error = subprocess.STDOUT if both else subprocess.PIPE
    with open(writer, "w") as nobody:
        done = subprocess.run(
            [sys.executable, *call], cwd=cwd, stdout=nobody, stderr=error, env=command_environment(**environment),
            text=True, timeout=300,
        )  # fmt: skip
    return done.returncode, done.stderr or ""


@pytest.mark.slow
def test_a_run_that_nobody_reads_finishes(tmp_path):
    assert unread("-m", "cl_bench", *RUN, cwd=tmp_path, both=True) == (0, "")
    run = find_run(tmp_path / "r")
    assert json.loads((run / "summary.json").read_text())["status"] == "finished"
    assert (run / "report.html").exists()
    status, error = unread("-m", "cl_bench", *RUN, cwd=tmp_path)  # the table again
    assert status == 0
    assert error.count("\n") == 1
    assert unread(str(ROOT / "scripts" / "compare.py"), "r", cwd=tmp_path) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), (["--cfg", "job"], 0), (["seed=abc"], 2)])
def test_what_is_printed_for_nobody_changes_no_status(arguments, status, tmp_path):
    assert unread("-m", "cl_bench", *arguments, cwd=tmp_path, both=True) == (status, "")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full device")
def test_no_room_for_the_table_is_one_message(tmp_path):
    with open("/dev/full", "w") as full:
        call = [sys.executable, "-m", "cl_bench", *RUN, "logger=none"]
        done = subprocess.run(
            call, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, env=command_environment(), text=True
        )
    assert done.returncode == 1
    assert "the run is finished, but its table could not be written: No space left on device." in done.stderr
    assert "Traceback" not in done.stderr
    assert find_run(tmp_path / "r")


@pytest.mark.slow
def test_a_locale_that_cannot_write_a_sign_writes_another(tmp_path):
    """And a name that it cannot write is refused before anything is made."""
    code = "from cl_bench.system.streams import outlive_readers; outlive_readers(); print('\\xe4 \\xb1')"
    environment = command_environment(**ASCII)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "\\xe4 \\xb1\n")
    file = tmp_path / "mine" / "experiment" / "mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("# @package _global_\nname: größe\n", encoding="utf-8")
    call = [sys.executable, "-m", "cl_bench", "--config-dir", "mine", "+experiment=mine", *RUN]
    done = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(
        "cl_bench: name: expected a name that this locale can write (ascii); got 'gr\\xf6\\xdfe'"
    )
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "r").exists()


@pytest.mark.slow
def test_wandb_without_a_home_folder(tmp_path, monkeypatch, capsys):
    """As in a container under an unknown number: nothing fails, and no folder named ~ is made."""
    for name in ("HOME", "WANDB_API_KEY", "NETRC", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")

    def unknown(number):
        raise KeyError(number)

    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.raises(RuntimeError):
        Path.home()
    before = dict(os.environ)
    try:
        assert run_in_process(*RUN, "logger=wandb", "~logger.console", monkeypatch=monkeypatch, cwd=tmp_path) == 0
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
    assert "failed" not in capsys.readouterr().err
    assert list(find_run(tmp_path / "r").glob("wandb/offline-run-*/run-*.wandb"))
    assert {path.name for path in tmp_path.iterdir()} <= {"r", "outputs"}
