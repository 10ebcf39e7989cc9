"""What a configuration, a file of a run or the environment cannot do."""

import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY, configure, find_run, load_script, run_in_process

from cl_bench.config.build import build, build_loggers
from cl_bench.core.errors import ConfigError
from cl_bench.engine.checkpoint import Checkpoint
from cl_bench.report.page import write_report

# -- targets -------------------------------------------------------------------------------------------------------

FOREIGN = {
    "a method": ["method._target_=evil.Evil"],
    "a data set": ["scenario.source._target_=evil.Evil"],
    "a data set inside another": ["scenario=permuted_digits", "scenario.source.digits._target_=evil.Evil"],
    "a logger": ["+logger.mine._target_=evil.Evil"],
    "a metric": ["+metrics.mine=evil.evil"],
    "a package that begins like ours": ["method._target_=cl_benchmark.Evil"],
    "a package that begins like torch.optim": ["optimizer._target_=torch.optimizers.Evil"],
}


@pytest.mark.slow
@pytest.mark.parametrize("case", FOREIGN)
def test_a_foreign_target_is_refused_before_anything_is_imported(case, tmp_path, monkeypatch):
    for name in ("evil", "cl_benchmark"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    config = configure(*FOREIGN[case])
    with pytest.raises(ConfigError, match="expected something in one of the packages"):
        build(config), build_loggers(config)
    assert not {"evil", "cl_benchmark"} & set(sys.modules)


DANGEROUS = [
    "torch.load", "torch.hub.load", "torch.distributed.run.main", "torch.utils.cpp_extension.load_inline",
    "torch.os.system", "torchvision.datasets.utils.download_url", "timm.models.load_checkpoint", "builtins.eval",
    # of the allowed packages: what they import themselves, and what is no part of a run
    "cl_bench.runs.run_dir.subprocess.run", "cl_bench.runs.run_dir.os.system", "cl_bench.runs.run.shutil",
    "cl_bench.runs.run_dir.importlib",
    "cl_bench.runs.run_dir.contextmanager", "cl_bench.__main__.main", "cl_bench.runs.run.run",
    "cl_bench.runs.run._empty",
    "cl_bench.system.atomic.write_text", "cl_bench.loggers.wandb.Path", "cl_bench.config.schema.OmegaConf",
    "torch.optim.optimizer.warnings.warn", "torch.optim.lr_scheduler.LambdaLR",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("path", DANGEROUS)
def test_nothing_dangerous_can_be_named(path, monkeypatch):
    """As a part, as a part of a part and as a metric: it is never called."""
    for name in ("load", "hub.load"):
        monkeypatch.setattr(f"torch.{name}", lambda *a, **k: pytest.fail("called"))
    for key in ("method._target_", "backbone._target_", "optimizer._target_", "scenario.source._target_"):
        with pytest.raises(ConfigError, match=r"_target_: "):
            build(configure(f"{key}={path}"))
    with pytest.raises(ConfigError, match=r"metrics\.mine: "):
        build(configure(f"+metrics.mine={path}"))


@pytest.mark.slow
def test_a_part_of_another_kind_is_refused():
    for key, path in {
        "backbone": "cl_bench.methods.finetune.Finetune",
        "method": "cl_bench.backbones.mlp.MLP",
        "trainer": "cl_bench.optim.Constant",
        "scenario.source": "cl_bench.buffers.none.NoBuffer",
        "optimizer": "cl_bench.optim.Constant",
    }.items():
        with pytest.raises(ConfigError, match=rf"{key}\._target_: expected something that builds"):
            build(configure(f"{key}._target_={path}"))


def test_a_trusted_package_is_asked_for_by_name(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from cl_bench.methods.finetune import Finetune\n"
        "class Mine(Finetune): pass\n"
        "def share(matrix: 'Matrix') -> float: return 0.0\n"
        "from cl_bench.core.record import Matrix\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    parts = build(configure("method._target_=mine.Mine", "+metrics.share=mine.share", "allow_packages=[mine]"))
    assert type(parts.method).__name__ == "Mine"
    assert "share" in parts.metrics


# -- pickles -------------------------------------------------------------------------------------------------------


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, sign: Path) -> None:
        self.sign = sign

    def __reduce__(self):
        return os.mkdir, (str(self.sign),)


def test_a_malicious_checkpoint_is_refused(tmp_path, capsys):
    sign = tmp_path / "executed"
    checkpoint = Checkpoint(tmp_path / "checkpoint")
    checkpoint.save({"task": 0})
    checkpoint.save({"task": 1})
    torch.save({"task": 2, "buffer": Malicious(sign)}, checkpoint.folder / "last.pt")
    assert checkpoint.load() == {"task": 0}
    (checkpoint.folder / "previous.pt").write_bytes(pickle.dumps(Malicious(sign)))
    with pytest.raises(ConfigError, match="expected a whole checkpoint"):
        checkpoint.load()
    assert not sign.exists()


@pytest.mark.slow
def test_malicious_predictions_are_refused(tmp_path, monkeypatch, capsys):
    sign = tmp_path / "executed"
    assert run_in_process(*TINY, "results_dir=r", "logger=none", monkeypatch=monkeypatch, cwd=tmp_path) == 0
    run = find_run(tmp_path / "r")
    columns = dict(np.load(run / "predictions.npz"))
    columns["label"] = np.array([Malicious(sign)] * len(columns["label"]), dtype=object)
    np.savez(run / "predictions.npz", **columns)
    with pytest.raises(ConfigError, match=r"predictions\.npz: expected the arrays of a finished run"):
        write_report(run)
    audit = load_script("audit")
    capsys.readouterr()
    assert audit.main([str(run)]) == 2
    assert "predictions.npz: expected the arrays" in capsys.readouterr().err
    assert not sign.exists()


# -- secrets and paths ---------------------------------------------------------------------------------------------

SECRET = "sentinel-8c6f1d0b"


@pytest.mark.slow
def test_no_secret_of_the_environment_reaches_a_file_or_a_message(tmp_path, monkeypatch, capfd):
    for name in ("MY_API_KEY", "PGPASSWORD", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, SECRET)
    arguments = [*TINY, "results_dir=r", "logger=tensorboard"]
    assert run_in_process(*arguments, monkeypatch=monkeypatch, cwd=tmp_path, report=True) == 0
    refused = ["name=${oc.env:MY_API_KEY}", "data_dir=${oc.env:PGPASSWORD}", "+published.of=${oc.env:HF_TOKEN}"]
    refused += ["scenario.train_per_class=${oc.env:MY_API_KEY}", "+logger.x=${oc.env:AWS_SECRET_ACCESS_KEY}"]
    for argument in refused:
        assert run_in_process(*arguments, argument, monkeypatch=monkeypatch, cwd=tmp_path) == 2, argument
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 10
    for path in written:
        assert SECRET.encode() not in path.read_bytes(), path
    said = capfd.readouterr()
    assert SECRET not in said.out + said.err
    assert "name: expected an environment variable whose name begins with CL_BENCH_; got MY_API_KEY." in said.err


OUTSIDE = [
    "experiment=../x",
    "name=../x",
    "name=/tmp/x",
    "name=..",
    "name=.",
    "name=a/b",
    "experiment=",
    'name="a\\0b"',
]


@pytest.mark.slow
@pytest.mark.parametrize("argument", OUTSIDE)
def test_no_name_leads_out_of_the_results_folder(argument, tmp_path, monkeypatch, capsys):
    inner = tmp_path / "inner"
    inner.mkdir()
    key, _, value = argument.partition("=")
    argument = f"{key}='{value}'" if "\\0" not in value else "name='a\0b'"
    assert run_in_process(*TINY, argument, "results_dir=r", monkeypatch=monkeypatch, cwd=inner) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(f"cl_bench: {key}: expected")
    assert list(tmp_path.iterdir()) == [inner]
    assert not list(inner.iterdir())
