"""Results of other programs as rows of a comparison."""

import numpy as np
import pytest
from helpers import CLASS_IL, ROOT, TASK_IL, make_run

from cl_bench.commands import run_command
from cl_bench.core.errors import ConfigError
from cl_bench.report.compare import compare, make_frame, make_tables, write
from cl_bench.report.imports import read_imports
from cl_bench.report.selection import Selection

MAMMOTH = ROOT.parent / "shared" / "data" / "peers" / "mammoth"
GOLDEN = {"forgetting": 28.25, "backward_transfer": -28.25, "average_accuracy": 68.6}
RISING = [[60.0], [70.0, 60.0], [80.0, 90.0, 90.0]]
"""Forgetting: -20 by Chaudhry's and -25 by Avalanche's definition, 0 by Mammoth's."""


def line_of(rows: list, job: str = "a", **arguments) -> str:
    """A line as Mammoth writes it, with what is no literal: numbers of numpy and a device."""
    entries = {"model": "er", "dataset": "seq-toy", "lr": 0.1, "conf_jobnum": job, "ckpt_name": f"of {job}"} | arguments
    cells = {f"accuracy_{j + 1}_task{i + 1}": value for i, row in enumerate(rows) for j, value in enumerate(row)}
    means = ", ".join(f"'accmean_task{i + 1}': np.float64({np.mean(row)})" for i, row in enumerate(rows))
    return f"{str(entries | cells)[:-1]}, {means}, 'device': device(type='cpu'), 'noise': nan}}\n"


def write_avalanche(folder, rows: list, lost: list | None = None) -> str:
    """``eval_results.csv`` in CSVLogger's format, every task after every task; ``lost``: forgetting after the last."""
    lines = ["eval_exp,training_exp,eval_accuracy,eval_loss,forgetting"]
    lines += [f"{task},None,0.1000,2.3,0" for task in range(len(rows))]
    for after, row in enumerate(rows):
        full = [*row, *[0.0] * (len(rows) - len(row))]
        forgotten = lost if lost and after == len(rows) - 1 else [0] * len(rows)
        lines += [f"{task},{after},{value / 100:.4f},1.0,{forgotten[task]}" for task, value in enumerate(full)]
    folder.mkdir(parents=True)
    (folder / "eval_results.csv").write_text("\n".join(lines) + "\n")
    return str(folder)


def write_matrix(path, rows: list) -> str:
    path.write_text("".join(",".join(map(str, row)) + "\n" for row in rows))
    return str(path)


def test_mammoths_lines_are_runs_and_both_settings_are_joined(tmp_path):
    for setting, rows in (("class-il", CLASS_IL), ("task-il", TASK_IL)):
        folder = tmp_path / setting / "seq-toy" / "er"
        folder.mkdir(parents=True)
        lines = [line_of(rows, str(seed), seed=seed, forgetting=29.5) for seed in (0, 1)]
        lines += [line_of(rows, "2", seed=0, lr=0.2), line_of(rows, "3", seed=0, loadcheck="last.pt")]
        (folder / "logs.pyd").write_text("".join(lines))
    runs, left_out = read_imports([str(tmp_path)])
    assert left_out == []
    assert [(run.summary["seed"], run.summary["comparable"]["lr"]) for run in runs] == [
        (0, 0.1),
        (1, 0.1),
        (0, 0.2),
        (0, 0.1),
    ]
    for run in runs:
        assert run.summary["class_il"].items() >= GOLDEN.items()
        assert run.summary["task_il"]["average_accuracy"] == 94.6
        assert set(run.summary["comparable"]) == {"model", "dataset", "lr", "noise", "num_tasks", "resumed"}
        np.testing.assert_allclose(run.record.class_il.accuracy[4], CLASS_IL[4])
    rows = compare([], imports=[str(tmp_path)]).rows
    labels = [
        "er (Mammoth) lr=0.1, resumed=false",
        "er (Mammoth) lr=0.1, resumed=true",
        "er (Mammoth) lr=0.2, resumed=false",
    ]
    assert sorted(row.label.removeprefix("er (Mammoth) ") for row in rows) == [
        label.removeprefix("er (Mammoth) ") for label in labels
    ]


def test_holes_and_repeated_seeds_are_left_out_and_named(tmp_path):
    path = tmp_path / "logs.pyd"
    path.write_text(
        line_of(RISING, "a", seed=0) + line_of([[18.5], [12.0, 13.0], [26.0]], "b", seed=1) + "\n"
        + line_of(CLASS_IL, "c", seed=None) + line_of(CLASS_IL, "e", seed=None) + line_of(RISING, "d", seed=0)
    )  # fmt: skip
    runs, left_out = read_imports([str(path)])
    assert [(len(run.summary["tasks"]), run.summary["seed"]) for run in runs] == [(3, 0), (5, 0), (5, 1)]
    assert [(run.state, run.why) for run in left_out] == [
        ("incomplete", "line 2: after task 3 there are 1 of 3 accuracies"),
        ("repeated", "line 1: seed 0 again in line 6"),
    ]
    write(compare([], imports=[str(path)]), tmp_path / "out", "command")
    assert "1 incomplete" in (tmp_path / "out" / "compare.html").read_text()


def test_three_definitions_of_forgetting_stand_beside_what_was_reported(tmp_path):
    make_run(tmp_path / "ours", name="ours")
    (tmp_path / "logs.pyd").write_text(line_of(RISING, seed=0, forgetting=0.0))
    imports = [str(tmp_path / "logs.pyd"), f"replay={write_avalanche(tmp_path / 'csvlogs', RISING, [-0.2, -0.3, 0])}"]
    imports += [f"mine={write_matrix(tmp_path / 'matrix.csv', RISING)}"]
    comparison = compare([str(tmp_path / "ours")], imports=imports)
    tables = {table.title: table for table in make_tables(comparison, interval=False)}
    lines = {line[1]: line[2:] for line in tables["Imported runs"].lines}
    computed = ["Class-IL", "3", "-20.00 (1)", "-25.00 (1)", "0.00 (1)"]
    assert lines == {
        "er (Mammoth)": [*computed, "0.00 (1)", "Mammoth: logs.pyd"],
        "replay (Avalanche)": [*computed, "-25.00 (1)", "Avalanche: eval_results.csv"],
        "mine (matrix)": [*computed, "", "matrix: matrix.csv"],
    }
    assert "Mammoth and PyCIL" in tables["Imported runs"].note
    accuracy = {line[1]: line for line in tables["Accuracy"].lines}
    assert accuracy["er (Mammoth)"][3:6] == ["86.67 (1)", "70.56 (1)", "-20.00 (1)"]
    assert accuracy["ours"][-1] == "reference"
    frame = make_frame(comparison).set_index("label")
    assert frame["imported"].to_dict()["replay (Avalanche)"] == "Avalanche: eval_results.csv"


def test_several_files_of_one_name_are_seeds_and_are_not_paired_with_ours(tmp_path):
    for seed in range(3):
        make_run(tmp_path / "ours", name="ours", seed=seed, accuracy=60.0 + seed)
    files = [write_matrix(tmp_path / f"matrix{i}.csv", [[50.0], [20.0 + i, 60.0]]) for i in range(3)]
    files += [write_matrix(tmp_path / f"task_il{i}.csv", [[90.0], [80.0, 70.0]]) for i in range(3)]
    comparison = compare([str(tmp_path / "ours")], Selection(reference="ours"), [f"theirs={file}" for file in files])
    theirs = comparison.rows[1]
    assert [run.summary["seed"] for run in theirs.runs] == [0, 1, 2]
    assert (theirs.stat("class_il.average_accuracy").mean, theirs.stat("class_il.average_accuracy").n) == (40.5, 3)
    assert (theirs.stat("task_il.forgetting").mean, theirs.stat("task_il.forgetting").n) == (10.0, 3)
    assert comparison.pairs.empty
    difference = make_tables(comparison, interval=False)[1]
    assert [line[2:4] for line in difference.lines][1] == ["0", ""]
    with pytest.raises(ConfigError, match="seeds of another program"):
        compare([str(tmp_path / "ours")], Selection(reference="theirs (matrix)"), [f"theirs={files[0]}"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("logs.pyd", "{'model': 'er', 'x': <object at 0x1>}", "line 1: expected a dictionary of plain values"),
        ("logs.pyd", "{'model': 'er', 'x': open('a')}\n", "no accuracy"),
        ("logs.pyd", "{'x': [" + "(" * 300 + "\n", "line 1: expected a dictionary of plain values"),
        ("logs.pyd", "{'x': " + "-" * 20_000 + "1}\n", "line 1: expected a dictionary of plain values"),
        ("logs.pyd", "{1, 2}", "line 1: expected a dictionary, as Mammoth writes it; got set"),
        ("logs.pyd", "{'accuracy_1_task1': 'high'}", "accuracy_1_task1: expected an accuracy from 0 to 100"),
        ("logs.pyd", "{'accuracy_1_task1': 101.0}", "expected an accuracy from 0 to 100; got 101.0"),
        ("eval_results.csv", "eval_exp,training_exp\n0,x\n", "line 2: expected eval_exp and training_exp"),
        ("eval_results.csv", "eval_exp,training_exp,eval_accuracy\n0,1,0.5\n", "after task 1 there are 0 of 1"),
        ("m.csv", "", "no accuracy"),
        ("m.csv", "90\n80\n", "after task 2 there are 1 of 2 accuracies"),
        ("m.csv", "0.9\n0.8,0.7\n", "expected accuracies in percent; got none above 1"),
        ("m.csv", "task,accuracy\n1,90\n", "line 1, column 1: expected an accuracy from 0 to 100; got 'task'"),
        ("m.csv", "\0\x01\n", "expected an accuracy from 0 to 100"),
    ],
)  # fmt: skip
def test_a_wrong_file_gives_one_message_and_status_2(tmp_path, capsys, name, content, message):
    (tmp_path / name).write_text(content)
    assert run_command(["compare", "--import", str(tmp_path / name)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "RUN_OR_FOLDER: expected a run folder or a folder of runs; got none."),
        (["--import", "nowhere.csv"], "--import: expected a file of another program"),
        (["--import", "a=nowhere.csv"], "got 'nowhere.csv', which is not there"),
        (["--import", "."], "expected eval_results.csv (Avalanche) or logs.pyd (Mammoth) in a folder"),
    ],
)
def test_nothing_to_import_gives_one_message_and_status_2(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert run_command(["compare", *words]) == 2
    assert message in (said := capsys.readouterr().err)
    assert said.count("\n") == 1


def test_nothing_in_a_line_is_called(tmp_path):
    line = f"{{'accuracy_1_task1': 50.0, 'x': __import__('pathlib').Path({str(tmp_path / 'made')!r}).touch()}}\n"
    (tmp_path / "logs.pyd").write_text(line)
    (run,), _ = read_imports([str(tmp_path / "logs.pyd")])
    assert run.summary["comparable"] == {"x": None, "num_tasks": 1, "resumed": False}
    assert not (tmp_path / "made").exists()


@pytest.mark.skipif(not MAMMOTH.is_dir(), reason="the sample files of Mammoth are not here")
def test_the_files_that_mammoth_wrote():
    runs, left_out = read_imports([str(MAMMOTH)])
    told = {(run.summary["method"], run.summary["comparable"]["resumed"]): run.summary for run in runs}
    assert {key: len(summary["tasks"]) for key, summary in told.items()} == {
        ("derpp", False): 10,
        ("er", False): 3,
        ("er", True): 3,
    }
    means = {key: (s["class_il"]["average_accuracy"], s["task_il"]["average_accuracy"]) for key, s in told.items()}
    assert means["er", True] == (10.0, 22.0)  # accmean_task3 of the file
    assert means["er", False] == pytest.approx((8.333333, 18.666667))
    assert means["derpp", False][0] == pytest.approx(8.15)
    assert [(run.state, run.why) for run in left_out] == [
        ("incomplete", "line 3: after task 3 there are 1 of 3 accuracies")
    ] * 2
