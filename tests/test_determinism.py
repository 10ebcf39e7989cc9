"""The same seed twice gives the same bytes; each of the three seeds changes what it governs and nothing else."""

import pytest
import torch
from helpers import TINY, assert_equal_results, configure, find_run, run_in_process

from cl_bench.config.build import Parts, build
from cl_bench.runs import run as run_module

AUGMENTED = ["method=er", "buffer=reservoir", "buffer.capacity=20", "scenario.flip=true", "scenario.crop_padding=1"]


@pytest.mark.slow
def test_the_same_command_twice_gives_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "write_report", lambda place: None)
    runs = []
    for name in ("one", "other"):
        torch.manual_seed(hash(name))  # whatever state the process is in
        arguments = [*TINY, *AUGMENTED, "backbone=resnet18_slim", "backbone.width=4", "logger=none"]
        assert run_in_process(*arguments, f"results_dir={name}", monkeypatch=monkeypatch, cwd=tmp_path) == 0
        runs.append(find_run(tmp_path / name))
    assert_equal_results(*runs)
    for name in ("accuracy_matrix.csv", "metrics.jsonl", "predictions.npz"):
        assert (runs[0] / name).read_bytes() == (runs[1] / name).read_bytes()


GOVERNED = {
    "seed": {"first weights", "order of the stream", "crops and flips", "places in the buffer"},
    "class_order_seed": {"classes of the tasks"},
    "data_seed": {"training images", "validation images", "test images"},
}


@pytest.mark.parametrize("seed", GOVERNED)
def test_a_seed_changes_only_what_it_governs(seed):
    def facts(*overrides: str) -> dict[str, object]:
        return what_a_seed_may_change(
            build(configure(*TINY, *AUGMENTED, "scenario.class_order=random", "scenario.val_fraction=0.2", *overrides))
        )

    base, other = facts(), facts(f"{seed}=5")
    assert {name for name in base if base[name] != other[name]} == GOVERNED[seed]


def what_a_seed_may_change(parts: Parts) -> dict[str, object]:
    scenario, images = parts.scenario, torch.arange(64, dtype=torch.uint8).reshape(1, 1, 8, 8).repeat(8, 1, 1, 1)

    def chosen(split: str) -> list[int]:
        return sorted(int(index) for task in scenario.tasks for index in getattr(task, split).index)

    return {
        "first weights": [p.tolist() for p in parts.method.parameters()],
        "order of the stream": torch.randperm(50, generator=parts.generators["batches"]).tolist(),
        "crops and flips": scenario.transform.augment(images, parts.generators["augment"]).tolist(),
        "places in the buffer": torch.randperm(50, generator=parts.buffer.generator).tolist(),
        "classes of the tasks": [scenario.list_class_ids(task) for task in scenario.tasks],
        "training images": chosen("train"),
        "validation images": chosen("val"),
        "test images": chosen("test"),
    }
