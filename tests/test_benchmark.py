"""The benchmark runs, and compares like with like. How fast anything is, is not tested here."""

import json
import sys

import pytest
import torch
from helpers import ROOT, load_script
from torch.utils.flop_counter import FlopCounterMode

from cl_bench.engine import evaluate
from cl_bench.engine.checkpoint import Checkpoint
from cl_bench.loggers.group import Loggers

sys.path.insert(0, str(ROOT / "scripts"))

from speed import common, fast, loop, pieces, results, sequence, startup
from speed.clock import Clock, read_step_seconds
from speed.common import Options, Row

TINY = Options(repetitions=2, tell=lambda what: None, small=True)


@pytest.fixture(scope="module")
def benchmark():
    """scripts/benchmark.py as a module."""
    return load_script("benchmark")


def test_repetitions_are_in_turn_and_the_first_does_not_count():
    calls = []

    def work(name):
        calls.append(name)
        return float(len(calls))

    values = common.measure_in_turn({"a": lambda: work("a"), "b": lambda: work("b")}, 2)
    assert calls == ["a", "b"] * 3
    assert values == {"a": [3.0, 5.0], "b": [4.0, 6.0]}
    assert common.compute_ratio(values, "b", "a") == [4 / 3, 6 / 5]


@pytest.mark.parametrize(
    ("values", "least", "most", "reached"),
    [
        ([1.0, 3.0, 2.0], 2.0, None, True),
        ([1.0, 3.0, 1.0], 2.0, None, False),
        ([1.0, 3.0, 2.0], None, 2.0, True),
        ([9.0, 3.0, 2.0], None, 2.0, False),
        ([1.0], None, None, None),
    ],
)
def test_the_median_is_held_to_what_is_wanted(values, least, most, reached):
    assert Row("part", "what", "x", values, least=least, most=most).reached is reached


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear", "lvt"])
def test_the_bare_step_does_the_arithmetic_of_the_methods_step(name):
    overrides = ["+scale=mini"] if name == "lvt" else []
    parts = common.build_parts(
        *common.choose_random_pixels(2), *loop.CASES[name][0], *overrides, "scenario.num_tasks=2"
    )
    first, second = parts.scenario.tasks
    with common.open_loop(parts) as trainer:
        common.close_task(parts, first)
        phase = common.get_first_phase(parts, common.shorten(second, common.BATCH))
        trainer.run_phase(second, 0, phase, None)  # ER's reservoir is filled
        with FlopCounterMode(display=False) as ours:
            trainer.run_phase(second, 0, phase, None)
    bare = loop.make_bare_step(parts)
    with FlopCounterMode(display=False) as theirs:
        bare()
    assert ours.get_total_flops() == theirs.get_total_flops() > 0


def test_pieces_are_measured_against_image_by_image():
    rows = [*pieces.measure_data_path(TINY), *pieces.measure_reservoir(TINY)]
    assert [row.part for row in rows] == ["data", "buffer", "buffer"]
    assert all(len(row.values) == TINY.repetitions and min(row.values) > 0 for row in rows)


def test_both_data_paths_normalise_alike():
    source = common.make_random_pixels(per_class=1)
    steps = pieces.make_per_sample_transform(source.mean, source.std).transforms[2:]  # without the draws
    theirs = pieces.Pictures(torch.from_numpy(source.train_images), torch.arange(100), None)[7][0]
    for step in steps:
        theirs = step(theirs)
    ours = common.build_parts(*common.choose_random_pixels(1), "scenario.num_tasks=2").scenario.transform
    torch.testing.assert_close(ours.normalise(torch.from_numpy(source.train_images[7:8]))[0], theirs)


@pytest.mark.slow
def test_a_twin_in_mid_sequence_is_the_method_itself(monkeypatch):
    monkeypatch.setattr(sequence, "CASES", {"er": sequence.Case(sequence.CASES["er"].overrides, steps=2)})
    step, evaluation = sequence.measure_steps(TINY)
    assert list(step.sides) == list(evaluation.sides) == ["task 1", "task 2", "task 4"]
    assert len(step.values) == TINY.repetitions


def test_memory_is_noted_after_each_task():
    before = evaluate.MAX_BATCH, torch.get_num_threads()
    held = sequence._measure_held_bytes("er", tasks=4)
    assert (evaluate.MAX_BATCH, torch.get_num_threads()) == before  # else later tests measure with batches of 12 images
    assert list(held) == [1, 2, 3, 4]
    assert all(2**20 < size < 2**36 for size in held.values())


def test_the_clock_leaves_the_first_epoch_out(tmp_path):
    parts = common.build_parts(
        *common.choose_random_pixels(2), *loop.CASES["linear"][0], "scenario.num_tasks=2", "trainer.epochs=3"
    )
    clock = Clock()
    clock.start(common.make_run_info(tmp_path, 2))
    parts.build_trainer(Loggers([clock]), Checkpoint(tmp_path), stop=lambda: False).run()
    clock.finish("finished", None)
    assert len(read_step_seconds(tmp_path)) == 2
    assert all(0 < seconds < 60 for seconds in read_step_seconds(tmp_path))


def test_no_gpu_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="no GPU"):
        list(fast.measure_speeds(TINY))


def test_a_run_that_fails_says_why():
    with pytest.raises(RuntimeError, match="experiment"):
        startup._time_first_step(["+experiment=none_such"])


def test_one_part_that_fails_takes_no_other_along(benchmark, monkeypatch, tmp_path, capsys):
    def works(options):
        yield Row("loop", "a|b", "x", [0.5, 0.75, 1.0], least=0.9, sides={"bare step": [1.0, 2.0, 3.0]})

    def fails(options):
        yield Row("memory", "before it", "x", [1.0], most=1.1)
        raise ValueError("broken")

    monkeypatch.setattr(benchmark, "PARTS", {"memory": fails, "loop": works})
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--out", str(tmp_path), "--only", "loop,memory"])
    assert benchmark.main() == 0
    assert "ValueError: broken" in capsys.readouterr().out
    content = json.loads((tmp_path / "benchmark.json").read_text())
    assert [(row["part"], row["median"], row["reached"]) for row in content["rows"]] == [
        ("memory", 1.0, True),
        ("loop", 0.75, False),
    ]
    assert content["not_measured"] == {"memory": "ValueError: broken"}
    assert torch.__version__.startswith(content["facts"]["packages"]["torch"])
    table = (tmp_path / "table.md").read_text()
    assert "| 0.75 x | 0.5 - 1 | at least 0.9 | NO | bare step 2000 ms |" in table
    assert "a\\|b" in table
    assert (tmp_path / "benchmark.png").stat().st_size > 1000


def test_an_unknown_part_is_refused(benchmark, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--only", "lopp"])
    with pytest.raises(SystemExit) as caught:
        benchmark.main()
    assert caught.value.code == 2


def test_numbers_are_short():
    assert [results._format_number(value) for value in (1234.5, 12.345, 0.01234)] == ["1234", "12.3", "0.0123"]
