"""What every method promises; each is found by its YAML, so a new one is tested without a line here."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import METHODS, SEED, parts_of, trainer_of

from cl_bench.config.build import Parts
from cl_bench.core.record import SETTINGS
from cl_bench.engine.trainer import Interrupted

EASIER = {
    "gdumb": ["buffer.capacity=500", "method.cutmix=0"],  # nothing but the buffer is learned
    "scr": ["buffer.capacity=200"],  # the stored images' means answer
    "ewc": ["trainer.clip_norm=1"],  # without it one seed in ten diverges, on every instruction set
    "lvt": ["optimizer.lr=0.03"],  # at 0.1 one seed in ten learns half of the second task, on one instruction set
    # a trunk that has seen seven digits, for longer, tells three new ones apart; with five it stays near the bound
    "memory_vit": ["scenario.classes_per_task=[7,3]", "method.warm_up_epochs=15"],
}
"""What makes learning sure over ten seeds and three instruction sets."""


def needs_id(parts: Parts) -> bool:
    return parts.method.task_id == "needed"


@pytest.mark.slow
@pytest.mark.arithmetic
@pytest.mark.parametrize("method", METHODS)
def test_losses_are_finite_and_named_and_reach_exactly_the_trained_parameters(method, tmp_path):
    parts = parts_of(method)
    trainer = trainer_of(parts, tmp_path)
    phases = 0
    for task in parts.scenario.tasks:
        parts.method.eval()
        for phase in parts.method.learn(task):
            phases += 1
            params = list(phase.params)
            trained = {id(p) for p in params}
            assert trained
            trainer.run_phase(task, 0, replace(phase, params=params), None)
            parts.method.train()
            before = {name: p.detach().clone() for name, p in parts.method.named_parameters()}
            parts.method.zero_grad()
            batch = trainer.make_batch(phase.data.images[:12], phase.data.labels[:12], task)
            losses = phase.observe(batch)
            assert losses
            for name, loss in losses.items():
                assert name.isidentifier()
                assert loss.shape == ()
                assert torch.isfinite(loss)
            sum(losses.values()).backward()
            parts.method.after_backward()
            for name, p in parts.method.named_parameters():
                has_gradient = p.grad is not None and bool(p.grad.abs().sum() > 0)
                assert has_gradient == (id(p) in trained), name
            (phase.optimizer or parts.optimizer)(params).step()
            if phase.after_step:
                phase.after_step()
            for name, p in parts.method.named_parameters():
                assert id(p) in trained or torch.equal(p, before[name]), name
            parts.method.eval()
    assert phases >= 1


@pytest.mark.slow
@pytest.mark.arithmetic
@pytest.mark.parametrize("method", METHODS)
def test_predict_has_a_score_a_class(method):
    parts = parts_of(method)
    x = parts.scenario.transform.normalise(parts.scenario.tasks[0].test.images)
    with torch.no_grad():
        scores = parts.method.eval().predict(x, torch.zeros(len(x), dtype=torch.int64) if needs_id(parts) else None)
    assert scores.shape == (len(x), 10)
    assert not scores.isnan().any()


@pytest.mark.slow
@pytest.mark.arithmetic
@pytest.mark.parametrize("method", METHODS)
def test_learns_two_toy_tasks(method, tmp_path):
    more = ["scenario.train_per_class=100", "scenario.test_per_class=20", "trainer.epochs=8", f"seed={SEED}"]
    parts = parts_of(method, *more, *EASIER.get(method, []))
    record = trainer_of(parts, tmp_path).run()
    last_row = record.task_il.accuracy[-1]
    assert last_row[-1] > 70  # five classes, or three: chance is 20 or 33
    assert last_row.mean() > 45
    if not needs_id(parts):
        assert record.class_il.accuracy[-1, -1] > 35  # ten classes: chance is 10


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_resumes_bit_equal_wherever_it_is_stopped(method, precision, tmp_path):
    def state(parts):
        return {name: v for name, v in parts.method.state_dict().items() if isinstance(v, torch.Tensor)}

    straight = parts_of(method, f"precision={precision}")
    trainer = trainer_of(straight, tmp_path / "straight")
    record = trainer.run()
    total = trainer.steps_done
    assert total > 3
    for stop_after in sorted({1, 2, 4, total // 2, total // 2 + 1, total - 1, total}):
        folder = tmp_path / f"stop{stop_after}"
        calls = iter(range(1, 10**6))
        torch.manual_seed(1234)  # whatever state the first process is in
        parts = parts_of(method, f"precision={precision}")
        with pytest.raises(Interrupted):
            trainer_of(parts, folder, stop=lambda at=stop_after, calls=calls: next(calls) == at).run()
        parts = parts_of(method, f"precision={precision}", "seed=0")
        torch.manual_seed(4321)  # a new process knows nothing of the old one's generators
        for generator in parts.generators.values():
            generator.manual_seed(99)
        resumed = trainer_of(parts, folder)
        again = resumed.run()
        for setting in SETTINGS:
            np.testing.assert_array_equal(again.get_matrix(setting).correct, record.get_matrix(setting).correct)
        assert resumed.steps_done == total
        expected = state(straight)
        for name, tensor in state(parts).items():
            assert torch.equal(tensor, expected[name]), (stop_after, name)
        assert torch.equal(resumed.answers.confidence.nan_to_num(), trainer.answers.confidence.nan_to_num())
