"""Weights & Biases; the only module that imports it."""

import csv
import hashlib
import io
import json
import netrc
import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from cl_bench.core.errors import require
from cl_bench.loggers.base import Logger, RunInfo
from cl_bench.loggers.delivered import Delivered, extract_curves

if TYPE_CHECKING:
    import wandb

MODES = ("auto", "online", "offline", "disabled")
"""The values of ``mode``."""

EXIT_CODES = {"finished": 0, "interrupted": 130, "failed": 1}
"""Status of a run -> exit code that W&B shows."""

_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
_SHORTEST_SECRET = 8  # a shorter one may be an ordinary word or number


class Wandb(Logger):
    """Logs each run folder as one W&B run, which a resumed process continues.

    Curves are drawn over ``step``, the optimizer steps. W&B's own counter is the number of the event: it only grows,
    also after a kill, and W&B ignores a number that it has. Logged events need a while to reach W&B's own process, and
    a kill loses them. So only what was logged before an orderly end counts as delivered; the rest is logged again.

    Args:
        project: W&B project.
        entity: user or team; None uses the default of the account.
        mode: ``auto`` is online if an API key is configured (``WANDB_API_KEY`` or a netrc entry), else offline;
            ``WANDB_MODE`` overrides that.
        tags: shown beside the run.
    """

    def __init__(self, *, project: str, entity: str | None, mode: str, tags: list[str]) -> None:
        require(
            mode in MODES, "mode", expected=f"one of {', '.join(MODES)}", got=mode, fix="Use mode=offline if unsure."
        )
        require(
            mode != "online" or has_api_key(),  # W&B would stop and ask for one
            "mode",
            expected="an API key for mode=online",
            got="none in WANDB_API_KEY or netrc",
            fix="Run wandb login, or use mode=offline.",
        )
        self._project, self._entity, self._tags = project, entity, list(tags)
        self._mode = resolve_mode(mode)
        self._run: wandb.Run | None = None

    def start(self, run: RunInfo) -> None:
        """Open the run, or continue it."""
        if self._mode == "disabled":
            return
        self._folder = run.folder
        self._delivered = Delivered(run.folder, "wandb/delivered.json")
        opened = self._open(run)
        opened.config.update(hide_secrets(run.config), allow_val_change=True)
        opened.define_metric("step")
        opened.define_metric("*", step_metric="step")

    def log_event(self, number: int, event: dict[str, Any]) -> None:
        """Log the event, unless it was delivered."""
        if self._run is None:
            return
        self._log(self._run, self._delivered.list_due(number, event))

    def finish(self, status: str, summary: dict[str, Any] | None) -> None:
        """Add the summary and the accuracy matrix, and close the run."""
        run, self._run = self._run, None
        if run is None:
            return
        try:
            if summary is not None:
                run.summary.update(flatten_summary(summary))
            if status == "finished":
                self._log(run, self._delivered.list_undelivered())
                _log_matrix(run, self._folder / "accuracy_matrix.csv", number=self._delivered.count)
        finally:
            run.finish(exit_code=EXIT_CODES.get(status, 1))
        self._delivered.mark(self._delivered.count)

    def _log(self, run: "wandb.Run", events: list[tuple[int, dict[str, Any]]]) -> None:
        for number, content in events:
            if curves := extract_curves(content):
                run.log({"step": content["step"], **curves}, step=number, commit=True)
            self._delivered.count = number + 1

    def _open(self, info: RunInfo) -> "wandb.Run":
        """Open the run with an id that only this folder has.

        If the server has an id that this folder never used, the run was started again or on another machine. Its curves
        would go backwards in the old run, so it gets the next free id.
        """
        first = compute_run_id(info)
        name, attempt = self._delivered.note.get("id", first), 1
        run = self._run = self._init(info, name)
        while self._delivered.fresh and run.resumed:
            run.finish(exit_code=0)
            attempt += 1
            name = f"{first}-{attempt}"
            run = self._run = self._init(info, name)
        self._delivered.mark(self._delivered.count, id=name)
        self._delivered.count = max(self._delivered.count, run.step)  # what the server got before a kill
        return run

    def _init(self, info: RunInfo, name: str) -> "wandb.Run":
        # W&B reports its own errors over the network, even offline. To allow that, set the variable to true.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        if find_home() is None:  # without one W&B fails, or creates a folder named ~ in the working directory
            os.environ["HOME"] = tempfile.gettempdir()
        import wandb

        return wandb.init(
            project=self._project,
            entity=self._entity,
            mode=self._mode,  # type: ignore[arg-type]  # one of MODES
            tags=self._tags,
            id=name,
            name=make_name(info),
            group=make_group(info),
            job_type=info.name,
            dir=str(info.folder),
            resume="allow",
            reinit="create_new",  # the next job of a multirun gets a run of its own
            # The console is not captured: a progress view makes thousands of lines.
            settings=wandb.Settings(console="off", quiet=True),
        )


def compute_run_id(info: RunInfo) -> str:
    """The W&B id of a run, 32 hexadecimal digits: a hash of what names its folder, so that no two runs share one.

    A folder keeps its first id (``wandb/delivered.json``), even if this function changes.
    """
    identity = json.dumps([info.experiment, info.name, info.fingerprint, info.seed])
    return hashlib.sha256(identity.encode()).hexdigest()[:32]


def make_name(info: RunInfo) -> str:
    """The name of a run in W&B: what was typed, and its seed."""
    return _join(info.name, info.label, end=f"seed {info.seed}")


def make_group(info: RunInfo) -> str:
    """The W&B group of a run: its row, so that W&B averages over seeds."""
    return _join(info.experiment, info.name, info.label, end=info.fingerprint)


def _join(*parts: str, end: str) -> str:
    """A name of at most 128 characters, which is what W&B accepts."""
    return " ".join(filter(None, parts))[: 127 - len(end)] + f" {end}"


def resolve_mode(mode: str) -> str:
    """``online``, ``offline`` or ``disabled``."""
    if mode != "auto":
        return mode
    chosen = os.environ.get("WANDB_MODE", "")
    if chosen in MODES[1:]:
        return chosen
    return "online" if has_api_key() else "offline"


def has_api_key() -> bool:
    """Whether W&B would find an API key without asking for one."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    home = find_home()
    files = [] if home is None else [home / ".netrc", home / "_netrc"]
    for file in [Path(os.environ["NETRC"])] if "NETRC" in os.environ else files:
        try:
            if netrc.netrc(file).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def find_home() -> Path | None:
    """The home folder of this user; None if there is none, as in a container with an unknown user id."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def hide_secrets(value: Any) -> Any:
    """The configuration with ``***`` for secrets of the environment that ``${oc.env:...}`` inserted."""
    if isinstance(value, dict):
        return {key: hide_secrets(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [hide_secrets(item) for item in value]
    if isinstance(value, str):
        for name, secret in os.environ.items():
            if _SECRET_NAME.search(name) and len(secret) >= _SHORTEST_SECRET:
                value = value.replace(secret, "***")
    return value


def flatten_summary(summary: dict[str, Any]) -> dict[str, float]:
    """The known numbers of ``summary.json`` for W&B's table of runs, e.g. ``class_il/forgetting``."""
    return {
        f"{group}/{key}": value
        for group in ("class_il", "task_il", "cost")
        for key, value in (summary.get(group) or {}).items()
        if value is not None
    }


def _log_matrix(run: "wandb.Run", path: Path, number: int) -> None:
    """Log the accuracy matrix as a table and, for each setting, as a picture."""
    if not path.exists():
        return
    import wandb

    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    columns: list[str | int] = list(lines[0]) if lines else []
    content: dict[str, Any] = {
        "accuracy_table": wandb.Table(columns=columns, data=[_convert_line(line) for line in lines])
    }
    for setting in dict.fromkeys(line["setting"] for line in lines):
        entries = {
            (int(line["after_task"]), int(line["task"])): float(line["accuracy"])
            for line in lines
            if line["setting"] == setting and int(line["after_task"]) >= 0  # -1: the untrained network
        }
        if entries:
            content[f"accuracy_matrix/{setting}"] = wandb.Image(_draw_heat_map(entries, setting))
    run.log(content, step=number, commit=True)


def _convert_line(line: dict[str, str]) -> list[str | int | float]:
    return [
        value if column == "setting" else float(value) if column == "accuracy" else int(value)
        for column, value in line.items()
    ]


def _draw_heat_map(entries: dict[tuple[int, int], float], title: str) -> Any:
    """An image of (after task, task) -> accuracy in percent."""
    import numpy as np
    from matplotlib.figure import Figure  # not pyplot: no global state, no display
    from matplotlib.ticker import MaxNLocator
    from PIL import Image

    size = 1 + max(max(entry) for entry in entries)
    matrix = np.full((size, size), np.nan)
    for entry, accuracy in entries.items():
        matrix[entry] = accuracy
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(matrix, vmin=0, vmax=100)
    axes.set(title=title, xlabel="accuracy on task", ylabel="after task")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, label="accuracy [%]")
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150)
    return Image.open(file)
