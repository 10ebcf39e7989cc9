"""Energy of a run, by a fake of NVML."""

import sys
import types

import pytest
import torch
from helpers import TINY, configure

from cl_bench.config.build import build
from cl_bench.engine.checkpoint import Checkpoint
from cl_bench.engine.trainer import Interrupted
from cl_bench.loggers.group import Loggers
from cl_bench.system.energy import Meter

CUDA = torch.device("cuda", 1)


class FakeNvml(types.ModuleType):
    """Counts 2.5 J more at every reading of the card that torch calls cuda:1."""

    NVMLError = RuntimeError

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.millijoules = 7_000_000

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != "GPU-cuda:1":
            raise self.NVMLError(uuid)
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        self.millijoules += 2500
        return self.millijoules


@pytest.fixture
def nvml(monkeypatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid=f"cuda:{device.index}")
    )
    return fake


def test_joules_since_the_last_call(nvml):
    meter = Meter(CUDA)
    assert meter.start() == 0.0
    assert meter.add(0.0) == 2.5
    nvml.millijoules += 100_000
    assert meter.add(2.5) == 2.5 + 102.5


def test_energy_is_unknown_where_it_cannot_be_read(nvml, monkeypatch):
    assert Meter(torch.device("cpu")).start() is None
    assert Meter(torch.device("cuda", 0)).start() is None  # NVML does not know the card
    assert Meter(CUDA).add(None) is None  # a part of the run was not measured
    meter = Meter(CUDA)
    monkeypatch.setattr(nvml, "nvmlDeviceGetTotalEnergyConsumption", lambda handle: (_ for _ in ()).throw(RuntimeError))
    assert meter.add(5.0) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert Meter(CUDA).start() is None
    assert Meter(CUDA).add(5.0) is None


@pytest.fixture
def metered(nvml, monkeypatch):
    """The run's device is the CPU; its energy is that of the fake card."""
    monkeypatch.setattr("cl_bench.engine.trainer.Meter", lambda device: Meter(CUDA))


def run(folder, stop=lambda: False) -> float | None:
    parts = build(configure("backbone=mlp", *TINY))
    return parts.build_trainer(Loggers([]), Checkpoint(folder), stop).run().cost.energy_joules


@pytest.mark.slow
def test_a_resumed_run_keeps_the_joules_of_before(metered, nvml, tmp_path):
    calls = iter(range(1000))
    with pytest.raises(Interrupted):
        run(tmp_path, stop=lambda: next(calls) == 6)
    nvml.millijoules += 1_000_000  # used by others while this run was not there
    assert run(tmp_path / "whole") == 3 * 2.5  # read when two tasks began and at the end
    assert run(tmp_path) == 4 * 2.5  # and at the stop


def test_without_a_counter_there_is_none(tmp_path):
    assert run(tmp_path) is None
