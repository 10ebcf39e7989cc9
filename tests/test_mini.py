"""The mini-scale records of this checkout: tables made of them, and the orders that they are said to show."""

import re
import runpy
import shlex

import pytest
from helpers import ROOT

from cl_bench.report.compare import compare, write
from cl_bench.report.rows import MAIN, find_runs, make_rows

MINI = ROOT / "results" / "mini"
SEEDS = [0, 1, 2]
FINETUNE, JOINT = "finetune-resnet18-none", "joint-resnet18-none"
REHEARSAL = [
    "er-resnet18-reservoir",
    "derpp-resnet18-reservoir",
    "icarl-resnet18-herding",
    "lvt-lvt-confidence_aware",
    "dytox-dytox-herding",
    "er-vit-reservoir",
]
METHODS = {
    "joint",
    "finetune",
    "er",
    "derpp",
    "icarl",
    "lwf",
    "ewc",
    "lvt",
    "dytox",
    "supsup",
    "den",
    "apd",
    "memory_vit",
}


@pytest.fixture(scope="module")
def rows():
    return {row.label: row for row in compare([str(MINI / "records")]).rows}


@pytest.mark.slow
@pytest.mark.parametrize("folder", sorted(str(path.parent.relative_to(MINI)) for path in MINI.rglob("table.md")))
def test_the_committed_table_is_what_the_command_in_it_makes(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    table = (MINI / folder / "table.md").read_text()
    command = table.split("`")[1]
    _, _, *paths, out, _ = shlex.split(command)
    assert out == "--out"
    write(compare(paths), tmp_path, command)
    assert (tmp_path / "table.md").read_text() == table


def test_every_method_has_three_seeds(rows):
    assert {row.runs[0].summary["method"] for row in rows.values()} == METHODS
    assert {
        label: list(row.runs) for label, row in rows.items() if [r.summary["seed"] for r in row.runs] != SEEDS
    } == {}


@pytest.mark.parametrize("method", REHEARSAL)
def test_rehearsal_is_above_finetuning_with_every_seed(method, rows):
    bound = rows["finetune-vit-none"] if "-vit-" in method else rows[FINETUNE]
    assert (rows[method].values(MAIN) > bound.values(MAIN)).all()


def test_derpp_is_below_er_without_the_task_and_above_it_with_it(rows):
    derpp, er, lvt = rows["derpp-resnet18-reservoir"], rows["er-resnet18-reservoir"], rows["lvt-lvt-confidence_aware"]
    assert 2 / 3 < derpp.stat(MAIN).mean / er.stat(MAIN).mean < 1
    assert abs(derpp.stat(MAIN).mean - lvt.stat(MAIN).mean) < 1
    known = [row.stat("task_il.average_accuracy").mean for row in (derpp, er, lvt)]
    assert known == sorted(known, reverse=True)


def test_joint_training_is_the_upper_bound(rows):
    for row in rows.values():
        mean = row.stat(MAIN).mean
        assert row.label == JOINT or mean is None or mean < rows[JOINT].values(MAIN).min()
    assert rows["joint-vit-none"].values(MAIN).min() > rows["er-vit-reservoir"].values(MAIN).max()


def test_networks_that_keep_tasks_apart_do_not_forget(rows):
    forgetting = {row.runs[0].summary["method"]: row.values("task_il.forgetting") for row in rows.values()}
    assert (forgetting["supsup"] == 0).all()
    assert (forgetting["memory_vit"] == 0).all()
    assert (forgetting["apd"] < 2).all()
    assert (forgetting["den"] < rows[FINETUNE].values("task_il.forgetting") / 2).all()


def test_transformers_made_for_it_are_above_rehearsal_on_an_ordinary_one(rows):
    ordinary = rows["er-vit-reservoir"].stat(MAIN).mean
    assert rows["lvt-lvt-confidence_aware"].stat(MAIN).mean > ordinary
    assert rows["dytox-dytox-herding"].stat(MAIN).mean > ordinary


def test_the_picture_of_the_open_ends_has_every_row_that_is_there():
    script = runpy.run_path(str(ROOT / "scripts" / "plot_memory.py"))
    rows = make_rows(find_runs([str(ROOT / path) for path in script["RECORDS"]])[0])
    cells, reads, gain, rehearsal = script["draw"](rows).axes
    labels = {
        axes.get_title(): [label.get_text() for label in axes.get_xticklabels()] for axes in (cells, reads, rehearsal)
    }
    assert set(labels["number of memory tokens"]) >= {"1", "5"}
    assert labels["number of memory tokens"] == sorted(labels["number of memory tokens"], key=int)
    assert labels["top-k reads"][-1] == "all 5"
    assert labels["exemplars beside memory tokens"] == ["none", "100, new tokens", "100, all tokens"]
    assert gain.get_title() == "extension minus concatenation: -3.1 on average"


def test_the_table_of_backbones_has_what_is_finished(tmp_path, rows):
    collect = runpy.run_path(str(ROOT / "scripts" / "backbones.py"))["collect_accuracies"]
    assert collect(tmp_path) == {}
    folder = rows["er-vit-reservoir"].runs[0].folder.parent
    assert collect(folder) == {("vit", "er"): "6.42 ± 1.08 / 31.97 ± 0.68 (3)"}
    (alone,) = collect(folder / "seed0").values()
    assert re.fullmatch(r"\d\.\d\d / \d\d\.\d\d \(1\)", alone)
