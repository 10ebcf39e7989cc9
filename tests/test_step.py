"""The ways to perform a step: each against the eager one, as far as a CPU can."""

import pytest
import torch
from test_methods import METHODS, parts_of, trainer_of

from cl_bench.methods.base import FunctionalMethod
from cl_bench.methods.er import ER
from cl_bench.step import Graphs, Speed, state_of

pytestmark = pytest.mark.arithmetic

FUNCTIONAL = [name for name in METHODS if isinstance(parts_of(name).method, FunctionalMethod)]


def trained(method, folder, speed=None, *overrides):
    """The trainer of a tiny run after its end."""
    trainer = trainer_of(parts_of(method, *overrides), folder)
    if speed is not None:
        trainer.speed = speed(trainer)
    trainer.run()
    return trainer


def largest_difference(first, second):
    ours, theirs = first.method.state_dict(), second.method.state_dict()
    tensors = [name for name, value in ours.items() if isinstance(value, torch.Tensor)]
    assert len(tensors) > 2
    return max(float((ours[name].double() - theirs[name].double()).abs().max()) for name in tensors)


def replayed(trainer, counts):
    """A capture as CUDA makes it, played by hand: nothing is computed at once, and results keep their places."""

    def capture(compute):
        counts["captured"] += 1
        state = {name: tensor.clone() for name, tensor in state_of(trainer.method).items()}
        rng = torch.get_rng_state()
        results = compute()
        for name, tensor in state_of(trainer.method).items():
            tensor.copy_(state[name])
        torch.set_rng_state(rng)

        def replay():
            counts["replayed"] += 1
            losses, columns, gradients = results
            new_losses, new_columns, new_gradients = compute()
            for places, values in ((losses, new_losses), (columns, new_columns)):
                for name, value in values.items():
                    places[name].data.copy_(value)
            for place, value in zip(gradients, new_gradients):
                assert (place is None) == (value is None)
                if place is not None:
                    place.copy_(value)

        return results, replay

    return capture


def test_the_methods_that_can_be_cut_are_known():
    assert set(FUNCTIONAL) == {"finetune", "joint", "er", "derpp", "lvt", "lwf", "ewc", "icarl", "dytox", "memory_vit"}


@pytest.mark.parametrize("method", FUNCTIONAL)
def test_a_graph_that_is_captured_and_replayed_trains_as_eager_does(method, tmp_path):
    counts = {"captured": 0, "replayed": 0}

    def speed(trainer):
        return Speed("graph", torch.device("cpu"), capture=replayed(trainer, counts))

    graph = trained(method, tmp_path / "graph", speed, "trainer.epochs=5")
    eager = trained(method, tmp_path / "eager", None, "trainer.epochs=5")
    assert eager.speed.used == "eager"
    assert graph.speed.used == "graph", graph.speed.why
    assert counts["captured"] > 0
    assert counts["replayed"] > 4 * counts["captured"]
    assert graph.record.to_json()["class_il"] == eager.record.to_json()["class_il"]
    # a CPU adds up the loss terms' gradients in the same order either way
    assert largest_difference(graph, eager) == 0.0


def test_a_method_with_an_observe_of_its_own_is_performed_by_it(tmp_path):
    class Own(ER):
        def observe(self, batch):
            return {name: 2 * loss for name, loss in super().observe(batch).items()}

    trainer = trainer_of(parts_of("er"), tmp_path)
    trainer.method = Own(net=trainer.method.net, buffer=trainer.method.buffer, replay_size=4)
    task = trainer.scenario.tasks[0]
    step = next(trainer.phase_course(task, 0, next(trainer.method.learn(task)), None))
    assert step.functional is None


def test_results_of_a_graph_lie_in_the_same_places(tmp_path):
    graphs = Graphs(lambda compute: (compute(), lambda: None))
    trainer = trainer_of(parts_of("er"), tmp_path)
    course = trainer.phase_course(
        trainer.scenario.tasks[0], 0, next(trainer.method.learn(trainer.scenario.tasks[0])), None
    )
    step = next(course)
    inputs = trainer.method.inputs(step.batch)
    places = [graphs.terms(step, trainer.method, inputs)[0]["ce"] for _ in range(Graphs.WARM_UP + 3)]
    assert places[-1] is places[-2]
    assert places[0] is not places[1]


def test_a_compiled_step_trains_as_eager_does_within_rounding(tmp_path):
    speed = lambda trainer: Speed("compile", torch.device("cpu"))  # noqa: E731
    few_shapes = ["trainer.batch_size=10", "buffer.capacity=10"]  # each is compiled
    compiled, eager = (
        trained("derpp", tmp_path / name, s, *few_shapes) for name, s in (("compiled", speed), ("eager", None))
    )
    assert compiled.speed.used == "compile", compiled.speed.why
    assert largest_difference(compiled, eager) < 1e-4
    stored = compiled.method.buffer.columns["logits"] - eager.method.buffer.columns["logits"]
    assert float(stored.abs().max()) < 1e-4


def test_a_compiler_that_fails_is_left_and_recorded_and_changes_nothing(tmp_path, monkeypatch):
    def compile(terms, dynamic):
        raise RuntimeError("no compiler\nhere")

    monkeypatch.setattr(torch, "compile", compile)
    fallen = trained("er", tmp_path / "fallen", lambda trainer: Speed("compile", torch.device("cpu")))
    eager = trained("er", tmp_path / "eager")
    assert fallen.speed.facts() == {
        "asked": "compile", "used": "eager", "why": "compile failed: RuntimeError: no compiler here",
    }  # fmt: skip
    assert largest_difference(fallen, eager) == 0.0


def test_an_error_of_the_method_itself_is_not_hidden(tmp_path, monkeypatch):
    trainer = trainer_of(parts_of("er", "trainer.speed=compile"), tmp_path)

    def terms(inputs, task):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    monkeypatch.setattr(trainer.method, "terms", terms)
    with pytest.raises(ZeroDivisionError, match="ours"):
        trainer.run()


@pytest.mark.parametrize(
    ("method", "choice", "why"),
    [("er", "auto", "on a CPU"), ("er", "graph", "CUDA device"), ("supsup", "compile", "not a function of tensors")],
)
def test_what_cannot_be_sped_up_is_eager_and_says_why(method, choice, why, tmp_path):
    trainer = trained(method, tmp_path, None, f"trainer.speed={choice}", "trainer.epochs=1")
    assert why in trainer.speed.facts()["why"]


def test_a_step_does_not_read_the_contents_of_the_rehearsal_buffer():
    method = parts_of("icarl").method
    names = set(state_of(method))
    assert "means" in names
    assert any(name.startswith("teacher.") for name in names)
    assert not any(name.startswith("buffer.") for name in names)
