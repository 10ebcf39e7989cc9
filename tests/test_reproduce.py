"""Published settings: their files, their tables, and the command that runs them."""

import json
import stat
import sys
import time
from pathlib import Path

import pytest
import yaml
from helpers import FIVE_TASKS, ROOT, configure, make_run
from omegaconf import OmegaConf

from cl_bench.commands import reproduce
from cl_bench.config.build import RUNTIME
from cl_bench.config.schema import import_target, read_arguments, select_comparable, to_plain_dict
from cl_bench.core.errors import ConfigError
from cl_bench.report import reproduction
from cl_bench.report.published import Group, Kind, choose_rows, read_groups
from cl_bench.report.reproduction import fill_text, make_lines, make_tables, read_records, write_all

GROUPS = read_groups(reproduce.ROWS)
ROWS = [(group, name) for group in GROUPS.values() for name in group.rows]

TOY = """
title: Toy
orders:
  A: []
  B: ["scenario.class_order=[1,0]"]
rows:
  er:
    what: replay
    experiment: digits
    seeds: 1
    numbers:
      - {metric: class_il.average_accuracy, published: 60.0, spread: SD 1.1, n: 3, tolerance: 2.0, kind: gate,
         source: a table}
      - {metric: task_il.average_accuracy, published: 94.6, source: a table}
      - {metric: class_il.first_task_accuracy}
  finetune:
    what: nothing
    experiment: digits
    reduced: 3 of 50 epochs
    numbers: [{metric: class_il.average_accuracy, published: 60.0, tolerance: 2.0}]
  ordered:
    what: two orders
    experiment: digits
    orders: [A, B]
    numbers: [{metric: task_il.AOPD, published: 1.0, kind: soft, source: a table}]
claims:
  - {above: er, below: finetune}
"""


@pytest.fixture
def toy(tmp_path) -> dict[str, Group]:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "toy.yaml").write_text(TOY)
    return read_groups(tmp_path / "rows")


def cells(groups: dict[str, Group], records: Path) -> list[list[str]]:
    """row, published, ours, difference, verdict of every line."""
    found = make_lines(groups["toy"], read_records(groups, records))
    return [[line.cells[i] for i in (0, 4, 5, 6, 8)] for line in found]


# ---- the files


@pytest.mark.slow
@pytest.mark.parametrize(("group", "name"), ROWS, ids=[name for _, name in ROWS])
def test_a_row_composes_and_agrees_with_its_experiment(group, name):
    row = group.rows[name]
    config = configure(*group.variants(row)[0], f"name={name}")
    assert config.experiment == row.experiment
    assert config.trainer.evaluate_on == row.evaluate_on
    for key in ("scenario", "method", "backbone", "buffer", "optimizer", "schedule", "trainer"):
        read_arguments(config[key], key, import_target(config[key], key, []), RUNTIME.get(key, ()))
    assert row.numbers
    for number in row.numbers:
        assert number.published is None or number.source
        assert number.tolerance is None or number.published is not None
        assert (number.kind is None) == (number.published is None)
    alone = configure(f"+experiment={row.experiment}") if config.published else None
    if alone and select_comparable(to_plain_dict(config)) == select_comparable(
        to_plain_dict(alone)
    ):  # the row may state what the experiment has
        mine = {n.metric.replace(".", "_", 1): n for n in row.numbers if n.kind is Kind.gate}
        values = {key: value for key, value in config.published.items() if key not in ("tolerance", "source")}
        assert {key: mine[key].published for key in values} == values
        assert {mine[key].tolerance for key in values} == {config.published.tolerance}


SETTINGS = {
    "derpp500": {"method.alpha": 0.3, "method.beta": 0.5, "optimizer.lr": 0.03, "schedule.factor": 0.2},
    "der500": {"method.alpha": 0.3, "method.beta": 0, "optimizer.lr": 0.03, "schedule.factor": 0.2},
    "derpp2000": {"method.alpha": 0.1, "method.beta": 0.5, "optimizer.lr": 0.03, "buffer.capacity": 2000},
    "derpp500_constant": {"method.alpha": 0.1, "method.beta": 0.5, "optimizer.lr": 0.1},
    "icarl2000": {"method.mean_over": "all", "optimizer.lr": 2, "optimizer.weight_decay": 2e-5, "trainer.epochs": 70},
    "icarl500_constant": {"method.mean_over": "seen", "optimizer.weight_decay": 1e-5},
    "finetune": {"optimizer.lr": 0.03},
    "joint": {"optimizer.lr": 0.03},
    "finetune_constant": {"optimizer.lr": 0.1},
} | {name: {"method.finetune_steps": 15, "method.finetune_epochs": 20} for name in GROUPS["dytox"].rows}
"""What the sources of the published numbers ran with, where a default might say something else one day."""


@pytest.mark.parametrize("name", SETTINGS)
def test_a_row_has_the_settings_of_its_source(name):
    [(group, row)] = [(group, group.rows[name]) for group in GROUPS.values() if name in group.rows]
    config = configure(*group.variants(row)[0])
    assert {key: OmegaConf.select(config, key) for key in SETTINGS[name]} == SETTINGS[name]


def test_capacities_are_counted_as_the_published_ones():
    metrics = [[number.metric for number in row.numbers] for row in GROUPS["apd"].rows.values()]
    assert all("method_facts.capacity_as_released" in row and "cost.capacity" not in row for row in metrics)


def test_orders_are_permutations():
    orders = [override for group in GROUPS.values() for order in group.orders.values() for override in order]
    assert len(orders) == 6
    for override in orders:
        key, _, ids = override.partition("=")
        assert key == "scenario.class_order"
        assert sorted(json.loads(ids)) == list(range(100))


def test_task_orders_keep_their_tasks():
    assert GROUPS["apd"].orders == GROUPS["den"].orders
    for (override,) in (GROUPS["apd"].orders["B"], GROUPS["apd"].orders["C"]):
        ids = json.loads(override.partition("=")[2])
        assert all(ids[i : i + 10] == list(range(ids[i], ids[i] + 10)) for i in range(0, 100, 10))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (("what: replay", "waht: replay"), "waht"),
        (("published: 60.0", "published: many"), "many"),
        (("kind: gate", "kind: sure"), "sure"),
        (("orders: [A, B]", "orders: [A, C]"), "orders A, B"),
        (("    seeds: 1", "    evaluate_on: train"), "evaluate_on: test or val; got train"),
        (("below: finetune", "below: joint"), "joint"),
        (("  finetune:", "  toy:"), "toy"),
        (("title: Toy", "title: [Toy"), "toy.yaml"),
    ],
)
def test_mistakes_in_a_file_are_told(tmp_path, wrong, said):
    (tmp_path / "toy.yaml").write_text(TOY.replace(*wrong).replace("below: toy", "below: finetune"))
    with pytest.raises(ConfigError, match=said.replace("[", r"\[")):
        read_groups(tmp_path)


def test_names_of_rows_and_groups(toy):
    assert [name for _, name in choose_rows(toy, ["toy"])] == ["er", "finetune", "ordered"]
    assert [name for _, name in choose_rows(toy, ["ordered", "er"])] == ["ordered", "er"]
    assert len(choose_rows(GROUPS, ["all", "lvt500"])) == len(ROWS)
    with pytest.raises(ConfigError, match="a group"):
        choose_rows(toy, ["derp"])


@pytest.mark.slow
def test_the_search_is_of_keys_that_lvt_has():
    search = OmegaConf.load(ROOT / "configs" / "search" / "lvt.yaml")
    assert search.trainer.evaluate_on == "val"
    assert search.scenario.val_fraction == 0.1
    config = configure("+experiment=lvt_cifar100_10split")
    for key, choices in search.hydra.sweeper.params.items():
        assert key.startswith("method.")
        assert OmegaConf.select(config, key) is not None
        for value in yaml.safe_load(choices.replace("choice(", "[").replace(")", "]")):
            OmegaConf.update(config, key, value)
            read_arguments(config.method, "method", import_target(config.method, "method", []), RUNTIME["method"])


# ---- the tables


def test_verdicts(toy, tmp_path):
    none = [["er", "60.00 (SD 1.1, n = 3)", "-", "-", "not run"]]
    assert cells(toy, tmp_path / "records")[:1] == none
    for accuracy, difference, verdict in (
        (61.9, "+1.90", "PASS"),
        (57.5, "-2.50", "FAIL (below)"),
        (68.6, "+8.60", "FAIL (above)"),
    ):
        records = tmp_path / verdict
        make_run(records, accuracy=accuracy)
        main, beside, first = cells(toy, records)[:3]
        assert main == ["er", "60.00 (SD 1.1, n = 3)", f"{accuracy:.2f} (1)", difference, verdict]
        assert beside == ["er", "94.60", "94.60 (1)", "+0.00", "not judged"]
        assert first == ["er", "-", "95.00 (1)", "-", "-"]  # GOLDEN[0][0]


def test_a_verdict_before_the_last_run_says_so(toy, tmp_path):
    make_run(tmp_path, accuracy=61.0)
    toy["toy"].rows["er"].seeds = 3
    assert cells(toy, tmp_path)[0][4] == "PASS so far, 1 of 3 runs"
    for seed in (1, 2):
        make_run(tmp_path, accuracy=61.0, seed=seed)
    assert cells(toy, tmp_path)[0][4] == "PASS"


def test_a_recalled_number_is_not_judged(toy, tmp_path):
    make_run(tmp_path, accuracy=61.0)
    toy["toy"].rows["er"].numbers[0].kind = Kind.recalled
    assert cells(toy, tmp_path)[0] == ["er", "60.00 (SD 1.1, n = 3)", "61.00 (1)", "+1.00", "not judged (recalled)"]


def test_what_was_cut_down_is_held_to_nothing(toy, tmp_path):
    make_run(tmp_path, accuracy=60.0, scale="mini")
    make_run(tmp_path, name="finetune", accuracy=60.0)
    mini, *_, reduced = cells(toy, tmp_path)[:4]
    assert mini == ["er", "-", "60.00 (1)", "-", "not comparable (scale=mini)"]
    assert reduced == ["finetune", "-", "60.00 (1)", "-", "not comparable (reduced: 3 of 50 epochs)"]


def test_a_row_is_compared_on_the_images_of_its_source(toy, tmp_path):
    make_run(tmp_path, accuracy=61.0, evaluate_on="val")
    assert cells(toy, tmp_path)[0] == ["er", "-", "61.00 (1)", "-", "not comparable (measured on val images)"]
    toy["toy"].rows["er"].evaluate_on = "val"
    assert cells(toy, tmp_path)[0] == ["er", "60.00 (SD 1.1, n = 3)", "61.00 (1)", "+1.00", "PASS"]
    make_run(tmp_path / "test", accuracy=61.0)
    assert cells(toy, tmp_path / "test")[0][4] == "not comparable (measured on test images)"


def test_a_row_is_the_mean_over_its_orders_and_seeds(toy, tmp_path):
    for place, order in enumerate((FIVE_TASKS, FIVE_TASKS[::-1])):
        if place:
            assert cells(toy, tmp_path)[-1] == ["ordered", "1.00", "-", "-", "not measured"]  # one order says nothing
        for seed in (0, 1):
            kept = {"scenario.class_order": place, "trainer.epochs": 3}
            ids = [c for task in order for c in task]
            changed = {"tasks": order, "class_order": ids, "comparable": kept, "fingerprint": f"f{place}"}
            make_run(tmp_path, name="ordered", seed=seed, **changed)
    runs = read_records(toy, tmp_path)["ordered"]
    assert len(runs) == 4
    assert reproduction.compute_stat(runs, "class_il.average_accuracy").n == 4
    disparity = reproduction.compute_stat(runs, "task_il.AOPD")  # 91 93 95 96 98 in one order, reversed in the other
    assert (disparity.n, disparity.mean) == (2, pytest.approx((7 + 3 + 0 + 3 + 7) / 5))
    assert cells(toy, tmp_path)[-1] == ["ordered", "1.00", "4.00 ± 0.00 (2)", "+3.00", "not judged"]


def test_runs_that_do_not_belong_together_are_refused(toy, tmp_path):
    make_run(tmp_path)
    make_run(tmp_path, fingerprint="f1", seed=1, comparable={"trainer.epochs": 3, "method.alpha": 0.6})
    with pytest.raises(ConfigError, match=r"method\.alpha.*out of date"):
        read_records(toy, tmp_path)


def test_one_seed_in_two_folders_is_refused(toy, tmp_path):
    make_run(tmp_path)
    make_run(tmp_path, fingerprint="f1")
    with pytest.raises(ConfigError, match="same seed and order"):
        read_records(toy, tmp_path)


def test_claims_are_judged_by_the_seeds_interval(toy, tmp_path):
    def verdict(above: list[float], below: list[float], **summary) -> list[str]:
        records = tmp_path / f"{above}{below}{summary}"
        for name, accuracies in (("er", above), ("finetune", below)):
            for seed, accuracy in enumerate(accuracies):
                make_run(records, name=name, seed=seed, accuracy=accuracy, **summary)
        return make_tables(toy["toy"], read_records(toy, records))[1].lines[0][2:]

    metric = "Class-IL average accuracy"
    assert verdict([], [50.0]) == [metric, "0", "-", "not run"]
    assert verdict([60.0], [50.0]) == [metric, "1", "+10.00", "not judged (too few runs)"]
    holds = verdict([60.0, 61.0, 62.0], [50.0, 51.5, 51.5])
    assert (holds[1], holds[3]) == ("3", "holds")
    assert holds[2].startswith("+10.00 [+8.")
    assert verdict([60.0, 50.0, 62.0], [50.0, 51.5, 51.5])[3] == "does not hold"
    assert verdict([50.0, 51.5, 51.5], [60.0, 61.0, 62.0])[3] == "does not hold"
    assert verdict([60.0, 61.0, 62.0], [50.0, 51.5, 51.5], scale="mini")[3] == "not judged (scale=mini)"
    assert verdict([60.0, 61.0, 62.0], [50.0, 51.5, 51.5], evaluate_on="val")[3] == "holds"
    for seed in range(3):
        make_run(tmp_path / "both", seed=seed, accuracy=60.0 + seed)
        make_run(tmp_path / "both", name="finetune", seed=seed, accuracy=50.0, evaluate_on="val")
    both = make_tables(toy["toy"], read_records(toy, tmp_path / "both"))[1].lines[0]
    assert both[-1] == "not judged (measured on test images)"


def test_files_and_pages(toy, tmp_path):
    records, out = tmp_path / "out" / "records", tmp_path / "out"
    before = "a\n<!-- reproduction: toy -->\nold\n<!-- end of reproduction -->\nb\n"
    empty = fill_text(before, toy, read_records(toy, records))
    assert empty == before.replace("old", "No full-size run has been recorded yet.")
    make_run(records, accuracy=61.0)
    found = read_records(toy, records)
    page = fill_text(empty, toy, found)
    assert (
        "| er | replay | Class-IL average accuracy | gate | 60.00 (SD 1.1, n = 3) | 61.00 (1) | +1.00 | ± 2.00 | PASS |"
        in page
    )
    assert "ordered" not in page  # not run
    assert page.startswith("a\n")
    assert page.endswith("\n<!-- end of reproduction -->\nb\n")
    assert fill_text(page, toy, found) == page
    assert fill_text(page.replace(": toy", ": all"), toy, found) == page.replace(": toy", ": all")

    write_all(toy, found, out, "python scripts/reproduce.py")
    text = (out / "table.md").read_text()
    assert "ordered | two orders | Task-IL AOPD | soft | 1.00 | - | - | - | not run | - | a table" in text
    assert (out / "toy" / "compare.html").is_file()


def test_the_projects_pages_are_what_the_command_makes():
    records = read_records(GROUPS, ROOT / "results" / "reproduction" / "records")
    marked = 0
    for page in [ROOT / "README.md", *(ROOT / "docs" / "methods").glob("*.md")]:
        text = page.read_text()
        marked += "<!-- reproduction: " in text
        assert fill_text(text, GROUPS, records) == text, f"python scripts/reproduce.py brings {page.name} up to date"
    assert marked == 12


def test_the_projects_table_is_what_the_command_makes(tmp_path):
    out = ROOT / "results" / "reproduction"
    write_all(GROUPS, read_records(GROUPS, out / "records"), tmp_path, "python scripts/reproduce.py")
    assert (tmp_path / "table.md").read_text() == (out / "table.md").read_text(), "python scripts/reproduce.py"


# ---- the command

FAKE = """#!/bin/sh
# Stands in for python -m cl_bench: the last argument is the folder, the one before says what it does.
shift 2
folder=${4#results_dir=}
case $1 in
  long) mkdir -p "$folder/checkpoint"; trap 'exit 143' TERM; while :; do sleep 0.05; done ;;
  deaf) mkdir -p "$folder/checkpoint"; trap '' TERM; while :; do sleep 0.05; done ;;
  fail) exit 1 ;;
esac
mkdir -p "$folder"; echo "$OMP_NUM_THREADS" > "$folder/threads"; echo '{"status": "finished"}' > "$folder/summary.json"
"""


@pytest.fixture
def command(tmp_path, monkeypatch):
    """The script, whose runs are those of a stand-in for the command."""
    fake = tmp_path / "python"
    fake.write_text(FAKE)
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(fake))
    return reproduce


def jobs(command, folder: Path, *kinds: str) -> list:
    return [
        command.Job(kind, [kind, "seed=0", "name=x", f"results_dir={folder / str(i)}"], folder / str(i))
        for i, kind in enumerate(kinds)
    ]


def test_finished_runs_are_passed_over_and_failures_do_not_stop_the_others(command, tmp_path, capfd):
    todo = jobs(command, tmp_path, "short", "fail", "short")
    assert command.run(todo, time.monotonic() + 60) == 1
    assert [job.state for job in todo] == ["finished", "not begun", "finished"]
    assert "Failed with exit status 1" in capfd.readouterr().err
    assert command.run([todo[0], todo[2]], time.monotonic() + 60) == 0
    assert capfd.readouterr().out == ""


def test_runs_side_by_side_have_one_thread_each(command, tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    todo = jobs(command, tmp_path, "long", "short", "fail", "short", "long", "short")
    assert (
        command.run(todo, time.monotonic() + 3, at_once=2) == command.STOPPED
    )  # the second place goes on to the fifth
    assert [job.state for job in todo] == ["begun", "finished", "not begun", "finished", "begun", "not begun"]
    assert (tmp_path / "1" / "threads").read_text() == "1\n"
    said = capfd.readouterr()
    assert said.out.count("the same command continues") == 2
    assert "Failed with exit status 1" in said.err
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert command.run([todo[1], todo[5]], time.monotonic() + 60, at_once=2) == 0
    assert (tmp_path / "5" / "threads").read_text() == "3\n"


def test_a_slice_ends_by_a_signal_and_the_next_goes_on(command, tmp_path, capfd):
    todo = jobs(command, tmp_path, "long", "short")
    assert command.run(todo, time.monotonic() + 0.3) == command.STOPPED
    assert [job.state for job in todo] == ["begun", "not begun"]
    assert "the same command continues" in capfd.readouterr().out
    assert command.run(todo, time.monotonic()) == command.STOPPED  # no time at all: nothing is started


@pytest.mark.slow
def test_a_run_that_does_not_leave_is_killed_after_the_grace(command, tmp_path):
    todo = jobs(command, tmp_path, "deaf")
    began = time.monotonic()
    assert command.run(todo, began + 0.3, grace=0.3) == command.STOPPED
    assert time.monotonic() - began < 30  # a minute is what it would be given


@pytest.mark.slow
def test_the_plan_begins_every_row_before_it_repeats_one(tmp_path):
    module = reproduce
    rows = choose_rows(GROUPS, ["finetune", "apd_fixed"])
    plan = module.plan(rows, 2, "mini", ["device=cpu"], tmp_path)
    seeds = [next(o for o in job.overrides if o.startswith("seed=")) for job in plan]
    assert [job.name for job in plan] == (["finetune"] + ["apd_fixed"] * 3) * 2
    assert seeds == ["seed=0"] * 4 + ["seed=1"] * 4
    assert len({job.folder for job in plan}) == 8
    first = plan[0]
    assert first.folder.parent.parent == tmp_path / "resnet18_finetune_cifar100_10split"
    assert first.folder.parent.name.startswith("finetune-")
    assert {"+scale=mini", "device=cpu", "name=finetune", f"results_dir={tmp_path}"} <= set(first.overrides)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["derp"], "NAME"),
        (["finetune", "--set", "trainer.epochs=1"], "--set"),
        (["finetune", "--set", "trainer.epoch=1"], "trainer.epoch"),
        (["finetune", "--seeds", "0"], "--seeds"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, said, capsys):
    assert reproduce.main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_without_a_name_the_tables_are_made(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("<!-- reproduction: all -->\n<!-- end of reproduction -->\n")
    assert reproduce.main([]) == 0
    assert "not run" in (tmp_path / "results" / "reproduction" / "table.md").read_text()
    assert "No full-size run" in (tmp_path / "README.md").read_text()
