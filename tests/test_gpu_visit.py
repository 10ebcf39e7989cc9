"""A visit to a lent GPU, as far as a CPU can go: stages, time limits, results at once, what is brought home."""

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, load_script

sys.path.insert(0, str(ROOT / "scripts"))

from speed import visit as parts

from cl_bench.runs.run_dir import find_commit

SCRIPT = ROOT / "scripts" / "gpu_visit.py"


gpu_visit = load_script("gpu_visit")


@pytest.fixture
def visit(tmp_path):
    return gpu_visit.Visit(tmp_path / "work", tmp_path / "out", "cpu")


def options(*words: str):
    return gpu_visit.read_options(["pack", *words])


def item(code: str, limit: float = 60, **more):
    return gpu_visit.Item("stage", ["-c", code], limit, **more)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "visit.jsonl").read_text().splitlines()]


# -- stages


def test_stages_take_their_arguments():
    words = ["setup", "w", "decode", "first", "probe", "full", "first,lvt500", "480", "pack"]
    assert gpu_visit.parse_stages(words) == [
        ("setup", ["w"]),
        ("decode", ["first"]),
        ("probe", []),
        ("full", ["first,lvt500", "480"]),
        ("pack", []),
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("steup w", "no stage steup"),
        ("decode", "decode needs 1 arguments"),
        ("setup decode first", "setup needs 1 arguments"),
        ("full er500", "full needs 2 arguments"),
        ("full er500 soon", "ROW[,ROW] SECONDS"),
        ("full er500 pack", "full needs 2 arguments"),
    ],
)
def test_wrong_stages_are_told_before_anything_is_done(words, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        gpu_visit.main([*words.split(), "--work", str(tmp_path / "work")])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("measured", "row"),
    [
        ([], "er500"),
        ([("derpp graph", "ok", 6.4)], "derpp500"),
        ([("derpp graph", "ok", 6.6)], "er500"),
        ([("derpp graph", "ok", None)], "er500"),  # a rehearsal on the CPU
        ([("derpp eager", "ok", 6.4), ("er graph", "ok", 3.0)], "er500"),
        ([("derpp graph", "ok", 6.4), ("derpp graph", "failed", None)], "derpp500"),
        ([("derpp graph", "timeout", 6.4)], "derpp500"),  # the loop was measured, the bare step was not
        ([("derpp graph", "ok", 9.0), ("derpp graph", "ok", 6.0)], "derpp500"),
    ],
)
def test_the_first_row_is_the_one_that_fits(measured, row):
    results = [{"stage": "rates", "item": name, "status": status, "ms": ms} for name, status, ms in measured]
    assert gpu_visit.choose_first_row([{"stage": "probe", "item": "", "status": "ok"}, *results]) == row


@pytest.mark.slow
def test_rows_are_run_by_the_command_that_reproduces(tmp_path, capsys):
    built = gpu_visit.train_rows(["derpp500", "lvt500"], 480, tmp_path, options("--device=cpu", "--speed=eager"))
    assert built.command[0] == "scripts/reproduce.py"
    assert built.limit > 480 + gpu_visit.GRACE_SECONDS
    assert load_script("reproduce").main([*built.command[1:], "--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split("name=")[1].split()[0] for line in listed] == ["derpp500", "lvt500"]
    assert "method.alpha=0.3 method.beta=0.5 optimizer.lr=0.03 schedule.factor=0.2" in listed[0]
    default = {"device=cuda:0", "trainer.speed=graph", "trainer.checkpoint_seconds=600"}
    assert default < set(gpu_visit.train_rows(["er500"], 480, tmp_path, options()).command)
    rehearsal = gpu_visit.train_rows(["er500"], 9, tmp_path, options("--device=cpu", "--speed=eager", "--scale=mini"))
    assert load_script("reproduce").main([*rehearsal.command[1:], "--list"]) == 0
    assert "+scale=mini" in capsys.readouterr().out


def test_results_of_earlier_calls_choose_the_row(visit, tmp_path):
    visit.tell({"stage": "rates", "item": "derpp graph", "status": "ok", "ms": 5.0})
    later = gpu_visit.Visit(visit.work, tmp_path / "other", "cpu")
    [full] = gpu_visit.list_items("full", ["first,lvt500", "10"], later, options())
    assert full.name == "derpp500,lvt500"


# -- items


def ended(pid: int) -> bool:
    """Whether a process is gone within ten seconds: a killed one is there until init has taken note of it."""
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.slow
def test_an_item_past_its_limit_is_killed_with_what_it_started_and_the_next_goes_on(visit, tmp_path):
    child = (
        "import os, time; open('PID', 'w').write(str(os.getpid())); print('{\"kept\": 1}', flush=True); time.sleep(99)"
    )
    child = child.replace("PID", str(tmp_path / "pid"))
    starts = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    began = time.monotonic()
    visit.run(item(starts, 3.0))
    assert time.monotonic() - began < 30
    assert ended(int((tmp_path / "pid").read_text()))
    visit.run(item("print('{\"ms\": 2}')", name="next"))
    late, following = lines(visit.out)
    assert (late["status"], late["kept"]) == ("timeout", 1)
    assert (following["item"], following["status"], following["ms"]) == ("next", "ok", 2)
    assert visit.failed


def test_nothing_goes_on_after_the_seconds_of_the_call(tmp_path):
    visit = gpu_visit.Visit(tmp_path, tmp_path / "out", "cpu", seconds=0.0)
    visit.run(item(f"open({str(tmp_path / 'made')!r}, 'w'); import time; time.sleep(99)"))
    assert lines(visit.out)[0]["status"] == "timeout"


def test_failures_say_why_and_a_run_that_is_stopped_is_none(visit):
    visit.run(item("raise SystemExit(143)"))
    assert not visit.failed
    visit.run(item("import sys; print('{\"ms\": 1}'); print('{\"cut'); sys.exit('out of memory')"))
    stopped, failed = lines(visit.work)
    assert stopped["status"] == "stopped"
    assert (failed["status"], failed["exit"], failed["why"], failed["ms"]) == ("failed", 1, "out of memory", 1)
    assert visit.failed
    assert "out of memory" in (visit.out / "visit.log").read_text()


def test_items_know_the_folders_the_device_and_the_commit(visit):
    (visit.work / "commit").write_text("0123abc\n")
    names = ("CL_BENCH_DATA", "CL_BENCH_TEST_DEVICE", "CL_BENCH_COMMIT")
    visit.run(item(f"import os, json, speed.visit, cl_bench; print(json.dumps([os.environ[n] for n in {names}]))"))
    assert json.loads((visit.out / "visit.log").read_text()) == [str(visit.work / "data"), "cpu", "0123abc"]


def test_items_keep_what_python_compiled(visit, monkeypatch):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    visit.run(item("import sys; sys.exit(sys.dont_write_bytecode)"))
    assert not visit.failed


def test_each_result_is_out_before_the_next_item_ends(tmp_path):
    for half in ("first", "second"):
        (tmp_path / half).mkdir()
    (tmp_path / "second" / "slow.py").write_text("import time; time.sleep(99)")
    call = [sys.executable, str(SCRIPT), "decode", "first", "decode", "second", "--work", "work"]
    with subprocess.Popen(call, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = json.loads(process.stdout.readline())
            assert process.poll() is None  # the second item sleeps
        finally:
            process.kill()
    assert (line["stage"], line["item"], line["status"]) == ("decode", "first", "ok")
    assert lines(tmp_path / "work" / "out") == lines(tmp_path / "work") == [line]


# -- what travels


JOIN = """
import hashlib, pathlib, sys
here = pathlib.Path(__file__).parent
whole = b"".join(file.read_bytes() for file in sorted((here / "strips").iterdir()))
if hashlib.md5(whole).hexdigest() != "MD5":
    sys.exit("the strips are damaged")
out = pathlib.Path(sys.argv[2])
out.mkdir()
(out / "train").write_bytes(whole)
"""


@pytest.fixture
def carried(tmp_path, monkeypatch):
    """What carry makes of six strips, without wheels, and the whole of the strips."""
    import hashlib

    strips = tmp_path / "strips"
    strips.mkdir()
    whole = b""
    for number in range(6):
        (strips / f"{number}.webp").write_bytes(bytes([number]) * 1000 * (1 + number % 2))
        whole += bytes([number]) * 1000 * (1 + number % 2)
    (tmp_path / "join.py").write_text(JOIN.replace("MD5", hashlib.md5(whole).hexdigest()))
    run = subprocess.run
    made = []

    def no_wheels(command, **more):
        if "wheel" not in command:
            return run(command, **more)
        made.append(command)
        Path(command[command.index("--wheel-dir") + 1]).mkdir(parents=True)
        return None

    with monkeypatch.context() as patch:
        patch.setattr(parts.subprocess, "run", no_wheels)
        parts.carry(str(tmp_path / "join.py"), str(strips), str(tmp_path / "carried"))
    assert made[0][-3:] == list(parts.WHEELS)
    return tmp_path / "carried", whole


def test_the_halves_are_about_equal_and_become_the_data_when_both_are_there(carried, visit):
    folder, whole = carried
    sizes = {half: sum(f.stat().st_size for f in (folder / half / "strips").iterdir()) for half in ("first", "second")}
    assert sizes == {"first": 6000, "second": 3000}
    assert (folder / "wheels" / "commit").exists() == bool(find_commit())
    for half in ("first", "second"):
        [one] = gpu_visit.list_items("decode", [str(folder / half)], visit, options())
        visit.run(one)
        assert (visit.work / "data" / "train").exists() == (half == "second")
    assert [line["status"] for line in lines(visit.out)] == ["ok", "ok"]
    assert (visit.work / "data" / "train").read_bytes() == whole


def test_damaged_strips_are_told(carried, visit):
    folder, _ = carried
    (folder / "first" / "strips" / "0.webp").write_bytes(b"0" * 1000)
    for half in ("first", "second"):
        [one] = gpu_visit.list_items("decode", [str(folder / half)], visit, options())
        visit.run(one)
    assert [line["status"] for line in lines(visit.out)] == ["ok", "failed"]
    assert "the strips are damaged" in (visit.out / "visit.log").read_text()
    assert not (visit.work / "data").exists()


def test_what_is_packed_is_cut_into_parts_and_whole_again_when_they_are_joined(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PART_BYTES", 40_000)
    records, out, home = tmp_path / "work" / "records", tmp_path / "out", tmp_path / "home"
    out.mkdir()
    for name, finished in (("a", True), ("b", False), ("c", False)):
        run = records / "experiment" / name / "seed0"
        (run / "checkpoint").mkdir(parents=True)
        (run / "metrics.jsonl").write_text(f'{{"run": "{name}"}}\n')
        (run / ".lock").touch()
        (run / "checkpoint" / "last.pt").write_bytes(b"last")
        torch.save(torch.randn(25_000), run / "checkpoint" / "boundary.pt")
        os.utime(run / "checkpoint" / "boundary.pt", (1, {"a": 3, "b": 2, "c": 1}[name]))
        if finished:
            (run / "summary.json").write_text("{}")
    found = parts.pack(str(records.parent), str(out))
    assert found["run"] == "records/experiment/b/seed0"  # the newest one that is not finished
    assert len(found["checkpoint"]) == 3
    assert max(found["checkpoint"]) <= 40_000
    assert max(found["checkpoint"]) - min(found["checkpoint"]) <= 1
    assert sorted(p.name for p in out.iterdir()) == [*(f"checkpoint.part.{n}" for n in range(3)), "records.part.0"]

    for archive in ("records", "checkpoint"):  # cat ARCHIVE.part.* | tar xz -C home
        joined = tmp_path / f"{archive}.tar.gz"
        joined.write_bytes(b"".join(part.read_bytes() for part in sorted(out.glob(f"{archive}.part.*"))))
        with tarfile.open(joined) as packed:
            packed.extractall(home, filter="data")
    brought = {str(p.relative_to(home)) for p in home.rglob("*") if p.is_file()}
    runs = {f"records/experiment/{name}/seed0" for name in "abc"}
    assert brought == {f"{run}/metrics.jsonl" for run in runs} | {
        "records/experiment/a/seed0/summary.json",
        "records/experiment/b/seed0/checkpoint/boundary.pt",
    }
    for path in brought:
        assert (home / path).read_bytes() == (records.parent / path).read_bytes()


def test_a_resnet18_with_its_memory_is_three_parts():
    memory = 500 * (3 * 32 * 32 + 4 * 100 + 8)
    assert len(list(parts.cut(44_919_122 + memory))) == 3
    assert list(parts.cut(0)) == [0]
    assert list(parts.cut(parts.PART_BYTES)) == [parts.PART_BYTES]
    assert parts.PART_BYTES < 16 * 2**20  # what is brought back of one file


# -- what is measured


PLAIN = """
tests/test_cuda.py::test_a[er-graph mode] PASSED                         [ 25%]
tests/test_cuda.py::test_b FAILED                                        [ 50%]
tests/test_cuda.py::test_c SKIPPED (no second device)                    [ 75%]
tests/test_cuda.py::test_d
"""
XDIST = """
scheduling tests via LoadScheduling
[gw0] [ 25%] PASSED tests/test_cuda.py::test_a[er-graph]
[gw1] [ 50%] FAILED tests/test_cuda.py::test_b
[gw0] [ 75%] SKIPPED tests/test_cuda.py::test_c
FAILED tests/test_cuda.py::test_b - AssertionError
"""


@pytest.mark.parametrize("printed", [PLAIN, XDIST])
def test_tests_are_counted_even_if_they_are_cut_short(printed):
    found = {"passed": 1, "failed": 1, "error": 0, "skipped": 1, "bad": ["tests/test_cuda.py::test_b"]}
    assert gpu_visit.read_tests(printed) == found


def test_rates_of_the_loop_and_of_the_bare_step():
    found = parts.rates("derpp", "eager", "3", "cpu", "backbone=mlp", "backbone.hidden=[8]")
    assert found["exemplars"] == 2 * 3 * 32
    assert len(found["thirds_ms"]) == 3
    assert found["ms"] == pytest.approx(sum(found["thirds_ms"]) / 3, abs=0.01)
    assert found["bare_ms"] > 0
    assert found["used"] == "eager"
    assert parts.rates("derpp", "graph", "3", "cpu")["ms"] is None


def test_the_probe_and_the_versions_are_json():
    probed = parts.probe("cpu")
    assert probed["pageable"]["waits"] is None
    assert probed["pageable"]["queue_ms"] > probed["pageable"]["copy_ms"] > 0
    found = parts.versions("cpu")
    assert found["versions"]["torch"] == torch.__version__.split("+")[0] or "+" in found["versions"]["torch"]
    json.dumps([probed, found])


def test_progress_of_runs(tmp_path):
    for name in ("a", "b"):
        run = tmp_path / "records" / "experiment" / name / "seed0"
        run.mkdir(parents=True)
        event = {"event": "epoch", "task": 3, "epoch": 7, "step": 99, "loss": 1.0}
        (run / "metrics.jsonl").write_text('{"event": "task"}\n' + json.dumps(event) + "\n")
    summary = {"class_il": {"average_accuracy": 38.0}, "task_il": {"average_accuracy": 75.0}}
    summary |= {"speed": {"used": "graph"}, "cost": {"train_seconds": 400.0}}
    (run / "summary.json").write_text(json.dumps(summary))
    begun, finished = gpu_visit.read_progress(tmp_path)
    assert begun == {"run": "experiment/a/seed0", "task": 3, "epoch": 7, "step": 99}
    assert (finished["class_il"], finished["speed"]) == (38.0, {"used": "graph"})
