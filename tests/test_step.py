"""The ways to perform a step: each against the eager one, as far as a CPU can."""

import pytest
import torch
from helpers import FUNCTIONAL, METHODS, largest_difference, parts_of, trainer_of
from stand_ins import CUDA, LowestCalls, Played

from cl_bench.core.errors import ConfigError, RunError
from cl_bench.engine.replicas import run_together
from cl_bench.engine.step import Graphs, StepExecutor, find_obstacle_to_graphs, get_state
from cl_bench.engine.trainer import Interrupted, run_alone
from cl_bench.methods.base import FunctionalMethod
from cl_bench.methods.er import ER

pytestmark = pytest.mark.arithmetic


def trained(method, folder, speed=None, *overrides):
    """The trainer of a tiny run after its end."""
    trainer = trainer_of(parts_of(method, *overrides), folder)
    if speed is not None:
        trainer.executor = speed(trainer)
    trainer.run()
    return trainer


@pytest.mark.slow
def test_the_methods_that_can_be_cut_are_known():
    assert [name for name in METHODS if isinstance(parts_of(name).method, FunctionalMethod)] == FUNCTIONAL


def watched(steps):
    """The steps of a run, which must give loss terms without an autograd graph."""
    request = next(steps)
    while True:
        losses = yield request
        assert losses
        assert not any(loss.requires_grad for loss in losses.values())
        try:
            request = steps.send(losses)
        except StopIteration:
            return


@pytest.mark.parametrize("way", ["eager", "compile", "graph", "joint", "a step of its own"])
def test_losses_and_columns_leave_a_step_without_their_autograd_graph(way, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    runs, columns = [], []
    for seed in range(2 if way == "joint" else 1):
        parts = parts_of("den" if way == "a step of its own" else "derpp", f"seed={seed}", "trainer.epochs=1")
        trainer = trainer_of(parts, tmp_path / str(seed))
        if way in ("compile", "graph"):
            trainer.executor = StepExecutor(
                way, torch.device("cpu"), Played(trainer.method) if way == "graph" else None
            )
        if way != "a step of its own":
            remember = trainer.method.remember
            trainer.method.remember = lambda batch, c, remember=remember: (columns.append(c), remember(batch, c))
            trainer.method.terms = attached(trainer.method)
        runs.append(watched(trainer.generate_steps()))
    run_together(runs) if way == "joint" else run_alone(runs[0])
    if way in ("compile", "graph", "joint"):  # an eager step hands them on from within the method; a buffer detaches
        assert columns
        assert not any(column.requires_grad for of_step in columns for column in of_step.values())


def attached(method):
    """Its terms with columns that have not been detached."""
    terms = method.terms

    def changed(inputs, task):
        losses, columns = terms(inputs, task)
        return losses, columns | {"logits": method.net(inputs["x"])}

    return changed


@pytest.mark.slow
@pytest.mark.parametrize("method", FUNCTIONAL)
def test_at_a_capture_no_parameter_belongs_to_an_earlier_step(method, tmp_path):
    """A parameter's node in an autograd graph is made anew in each step, and with it the stream that it waits for."""
    stale, steps = [], []
    trainer = trainer_of(parts_of(method, "trainer.epochs=4"), tmp_path)
    capture = Played(trainer.method)
    capture.before = lambda: stale.extend(node.metadata["step"] for node in nodes() if "step" in node.metadata)
    trainer.executor = StepExecutor("graph", torch.device("cpu"), capture)
    terms = trainer.method.terms

    def nodes():
        trained = [p for p in trainer.method.parameters() if p.requires_grad]
        return [p.view_as(p).grad_fn.next_functions[0][0] for p in trained]

    def marked(inputs, task):
        results = terms(inputs, task)  # which holds the nodes, as long as it lives
        steps.append(len(steps))
        for node in nodes():
            node.metadata["step"] = steps[-1]
        return results

    trainer.method.terms = marked
    trainer.run()
    assert capture.captured > 0
    assert not stale


def test_warm_up_and_capture_run_on_a_stream_of_their_own_and_replays_on_the_asking_one(tmp_path, monkeypatch):
    cuda, streams = LowestCalls(monkeypatch), []
    trainer = trainer_of(parts_of("er"), tmp_path)
    terms = trainer.method.terms
    trainer.method.terms = lambda inputs, task: (streams.append(cuda.stream.name), terms(inputs, task))[1]
    trainer.executor = StepExecutor("graph", CUDA)
    task = trainer.scenario.tasks[0]
    steps = trainer.generate_phase_steps(task, 0, next(trainer.method.learn(task)), None)
    step, _ = next(steps)
    inputs = trainer.method.inputs(step.batch)
    for _ in range(Graphs.WARM_UP + 2):
        cuda.log.append("step")
        trainer.executor.perform(step, inputs)
        assert cuda.stream is cuda.default
    assert streams == ["side 1"] * (Graphs.WARM_UP + 1)
    aside = ["side 1 waits for default", "default waits for side 1"]
    capture = [aside[0], "begin thread_local on side 1", "end", aside[1]]
    replay = ["replay on default"]
    assert cuda.log == [*(["step", *aside] * Graphs.WARM_UP), "step", *capture, *replay, "step", *replay]


def test_a_capture_lets_other_threads_pin_memory(tmp_path, monkeypatch):
    """The thread that looks images up ahead does; the mode of torch's own choice forbids it to all of them."""
    cuda = LowestCalls(monkeypatch)
    trainer = trainer_of(parts_of("er"), tmp_path)
    trainer.executor = StepExecutor("graph", CUDA)
    trainer.run()
    begun = [line.split()[1] for line in cuda.log if line.startswith("begin")]
    assert begun
    assert set(begun) == {"thread_local"}


class Uncapturable:
    """A run that cannot be captured: its terms ask for a value, and the capture's end fails of it. Its steps draw."""

    def __init__(self, folder, monkeypatch, choice, draws=True):
        self.cuda = LowestCalls(monkeypatch)
        self.cuda.capture_fails = True
        self.trainer = trainer_of(parts_of("er"), folder)
        self.trainer.executor = StepExecutor(choice, CUDA)
        terms = self.trainer.method.terms

        def asking(inputs, task):
            if self.cuda.log and self.cuda.log[-1].startswith("begin"):
                raise RuntimeError("operation not permitted when stream is capturing")
            if draws:
                torch.rand(1, device=CUDA)  # as dropout
            return terms(inputs, task)

        self.trainer.method.terms = asking


def test_a_graph_that_was_asked_for_by_name_and_cannot_be_is_an_error(tmp_path, monkeypatch):
    run = Uncapturable(tmp_path, monkeypatch, "graph")
    with pytest.raises(RunError, match=r"trainer.speed=graph.*not permitted when stream is capturing.*speed=eager"):
        run.trainer.run()
    assert run.cuda.stream is run.cuda.default


def test_auto_goes_on_eagerly_from_a_clean_stream_and_generator_and_says_so(tmp_path, monkeypatch, capsys):
    run = Uncapturable(tmp_path / "auto", monkeypatch, "auto")
    run.trainer.run()
    assert run.cuda.stream is run.cuda.default
    assert run.cuda.drawing
    assert run.cuda.log.count("_cuda_endAllocateToPool") == 1  # not tried again
    assert run.trainer.executor.used == "eager"
    assert "not permitted when stream is capturing" in run.trainer.executor.describe()["why"]
    (line,) = capsys.readouterr().err.splitlines()
    assert "could not be captured" in line
    assert "eager from here on" in line
    assert largest_difference(run.trainer, trained("er", tmp_path / "eager")) == 0.0


def test_where_a_failed_capture_spoils_cuda_nothing_goes_on(tmp_path, monkeypatch):
    run = Uncapturable(tmp_path, monkeypatch, "auto")
    monkeypatch.setattr(type(torch.cuda.default_generators[0]), "graphsafe_set_state", lambda self, state: None)
    with pytest.raises(RunError, match=r"cannot be used in this process.*trainer.speed=eager"):
        run.trainer.run()


def test_a_fallback_is_not_kept_when_a_run_goes_on(tmp_path, monkeypatch):
    """With another driver the same command may do what was asked for."""
    run = Uncapturable(tmp_path, monkeypatch, "auto", draws=False)
    run.trainer.stop = lambda: run.trainer.steps_done == 7
    with pytest.raises(Interrupted):
        run.trainer.run()
    assert run.trainer.executor.used == "eager"
    again = trainer_of(parts_of("er"), tmp_path)
    again.executor = StepExecutor("auto", CUDA)
    again._restore(again.checkpoint.load())
    assert again.executor.used == "graph"


def test_a_step_looks_for_parameters_in_no_module(tmp_path, monkeypatch):
    """Which of them there are is listed once a phase."""
    trainer = trainer_of(parts_of("er"), tmp_path)
    task = trainer.scenario.tasks[0]
    steps = trainer.generate_phase_steps(task, 0, next(trainer.method.learn(task)), None)
    step, _ = next(steps)
    monkeypatch.setattr(torch.nn.Module, "named_modules", None)
    for choice in ("eager", "graph"):
        speed = StepExecutor(choice, torch.device("cpu"), Played())
        for _ in range(Graphs.WARM_UP + 1):
            speed.perform(step)
    assert len(step.context.all_params) == 4


def test_a_method_with_an_observe_of_its_own_is_performed_by_it(tmp_path):
    class Own(ER):
        def observe(self, batch):
            return {name: 2 * loss for name, loss in super().observe(batch).items()}

    trainer = trainer_of(parts_of("er"), tmp_path)
    trainer.method.__class__ = Own
    task = trainer.scenario.tasks[0]
    step, _ = next(trainer.generate_phase_steps(task, 0, next(trainer.method.learn(task)), None))
    assert step.context.functional is None


def test_results_of_a_graph_lie_in_the_same_places(tmp_path):
    trainer = trainer_of(parts_of("er"), tmp_path)
    steps = trainer.generate_phase_steps(
        trainer.scenario.tasks[0], 0, next(trainer.method.learn(trainer.scenario.tasks[0])), None
    )
    step, _ = next(steps)
    inputs = trainer.method.inputs(step.batch)
    speed = StepExecutor("graph", torch.device("cpu"), Played(trainer.method))
    places = [speed.perform(step, inputs)["ce"].data_ptr() for _ in range(Graphs.WARM_UP + 3)]
    assert places[-1] == places[-2]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch 2.11 itself calls it
def test_a_compiled_step_trains_as_eager_does_within_rounding(tmp_path):
    speed = lambda trainer: StepExecutor("compile", torch.device("cpu"))  # noqa: E731
    few_shapes = ["trainer.batch_size=10", "buffer.capacity=10"]  # each is compiled
    compiled, eager = (
        trained("derpp", tmp_path / name, s, *few_shapes) for name, s in (("compiled", speed), ("eager", None))
    )
    assert compiled.executor.used == "compile", compiled.executor.why
    assert largest_difference(compiled, eager) < 1e-4
    stored = compiled.method.buffer.columns["logits"] - eager.method.buffer.columns["logits"]
    assert float(stored.abs().max()) < 1e-4


def test_a_compiler_that_fails_is_left_and_recorded_and_changes_nothing(tmp_path, monkeypatch, capsys):
    def compile(terms, dynamic):
        raise RuntimeError("no compiler\nhere")

    monkeypatch.setattr(torch, "compile", compile)
    fallen = trained("er", tmp_path / "fallen", lambda trainer: StepExecutor("compile", torch.device("cpu")))
    eager = trained("er", tmp_path / "eager")
    assert fallen.executor.describe() == {
        "asked": "compile", "used": "eager", "why": "compile failed: RuntimeError: no compiler here",
    }  # fmt: skip
    assert largest_difference(fallen, eager) == 0.0
    (line,) = capsys.readouterr().err.splitlines()
    assert "no compiler here" in line


def test_an_error_of_the_method_itself_is_not_hidden(tmp_path, monkeypatch):
    trainer = trainer_of(parts_of("er", "trainer.speed=compile"), tmp_path)

    def terms(inputs, task):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    monkeypatch.setattr(trainer.method, "terms", terms)
    with pytest.raises(ZeroDivisionError, match="ours"):
        trainer.run()


@pytest.mark.parametrize(
    ("method", "choice", "why"), [("er", "auto", "on a CPU"), ("supsup", "compile", "not a function of tensors")]
)
def test_what_cannot_be_sped_up_is_eager_and_says_why(method, choice, why, tmp_path):
    trainer = trained(method, tmp_path, None, f"trainer.speed={choice}", "trainer.epochs=1")
    assert why in trainer.executor.describe()["why"]


def test_auto_is_a_graph_on_cuda_and_eager_elsewhere():
    assert StepExecutor("auto", CUDA).describe() == {"asked": "auto", "used": "graph", "why": None}
    for device in ("cpu", "mps"):
        assert StepExecutor("auto", torch.device(device)).used == "eager"


def test_a_graph_by_name_is_refused_where_there_can_be_none(monkeypatch):
    with pytest.raises(ConfigError, match=r"trainer.speed: expected .* since a graph needs a CUDA device.*speed=auto"):
        parts_of("er", "trainer.speed=graph")
    assert "function of tensors" in find_obstacle_to_graphs(parts_of("supsup").method, CUDA)
    assert find_obstacle_to_graphs(parts_of("er").method, CUDA) is None


def test_a_step_does_not_read_the_contents_of_the_rehearsal_buffer():
    method = parts_of("icarl").method
    names = set(get_state(method))
    assert "means" in names
    assert any(name.startswith("teacher.") for name in names)
    assert not any(name.startswith("buffer.") for name in names)
