"""Weights & Biases; the only module that imports it."""

import hashlib
import json
import netrc
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from cl_bench.core.errors import require
from cl_bench.core.record import get_measure
from cl_bench.loggers.base import Logger, RunInfo
from cl_bench.loggers.dashboard import (
    AXES,
    SERIES,
    Series,
    flatten_summary,
    list_pictures,
    make_config,
    make_group,
    make_name,
    write_files,
)
from cl_bench.loggers.delivered import Delivered, Event

if TYPE_CHECKING:
    import wandb

MODES = ("auto", "online", "offline", "disabled")
"""The values of ``mode``."""

EXIT_CODES = {"finished": 0, "interrupted": 130, "failed": 1}
"""Status of a run -> exit code that W&B shows."""

COPIES = "cl_bench"
"""Folder of a run's files that gets those of the run folder; W&B has a ``config.yaml`` of its own beside it."""


@contextmanager
def forget_dead_service() -> Iterator[None]:
    """Inside, W&B forgets its own process if that turns out to have died, so that the next run starts another one.

    Otherwise no later run of this process, such as the next job of a sweep, could be logged, and W&B would print a
    traceback at the end.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ConnectionError) or type(error).__name__ == "MailboxClosedError":
            import wandb

            with suppress(Exception, SystemExit):  # it says goodbye to that process first
                wandb.teardown()
        raise


class Wandb(Logger):
    """Logs each run folder as one W&B run, which a resumed process continues.

    Losses are drawn over ``step``, accuracies over ``task`` (:data:`~cl_bench.loggers.dashboard.SERIES`), and every row
    has all axes, so that another one can be chosen. W&B's own counter is the number of the event: it only grows, also
    after a kill, and W&B ignores a number that it has. Logged events need a while to reach W&B's own process, and a
    kill loses them. So only what was logged before an orderly end counts as delivered; the rest is logged again.

    Args:
        project: W&B project.
        entity: user or team; None uses the default of the account.
        mode: ``auto`` is online if an API key is configured (``WANDB_API_KEY`` or a netrc entry), else offline;
            ``WANDB_MODE`` overrides that.
        tags: shown beside the run.
        notes: a text about the run.
        job_type: None uses the name of the run: method, network and buffer.
    """

    def __init__(
        self,
        *,
        project: str,
        entity: str | None,
        mode: str,
        tags: list[str],
        notes: str | None,
        job_type: str | None,
    ) -> None:
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
        self._project, self._entity = project, entity
        self._tags, self._notes, self._job_type = list(tags), notes, job_type
        self.mode = resolve_mode(mode)
        self._run: wandb.Run | None = None

    @forget_dead_service()
    def start(self, run: RunInfo) -> None:
        """Open the run, or continue it."""
        if self.mode == "disabled":
            return
        self._folder = run.folder
        self._delivered = Delivered(run.folder, "wandb/delivered.json")
        self._series = Series(run.folder)
        opened = self._open(run)
        opened.config.update(make_config(run), allow_val_change=True)
        for axis in AXES:
            opened.define_metric(axis, hidden=True)  # an axis needs no panel of its own
        for name, axis in SERIES.items():
            opened.define_metric(name, step_metric=axis)

    @forget_dead_service()
    def log_event(self, number: int, event: Event) -> None:
        """Log the event, unless it was delivered."""
        if self._run is None:
            return
        self._log(self._run, self._delivered.list_due(number, event))

    @forget_dead_service()
    def finish(self, status: str, summary: dict[str, Any] | None) -> None:
        """Add the summary, the pictures of the report and the files, and close the run."""
        run, self._run = self._run, None
        if run is None:
            return
        try:
            if status == "finished":
                self._log(run, self._delivered.list_undelivered())
            if summary is not None:
                run.summary.update(flatten_summary(summary))
                if end := _draw_end(self._folder, summary):
                    run.log(end, step=self._delivered.count, commit=True)
                for path in write_files(self._folder, Path(run.dir) / COPIES):
                    run.save(str(path), base_path=run.dir, policy="now")
        finally:
            run.finish(exit_code=EXIT_CODES.get(status, 1))
        self._delivered.mark(self._delivered.count, finished=status == "finished")

    def _log(self, run: "wandb.Run", events: list[tuple[int, Event]]) -> None:
        for number, content in events:
            if point := self._series.extract(number, content):
                run.log({**point.axes, **point.values}, step=number, commit=True)
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
        self._delivered.mark(self._delivered.count, id=run.id)  # a W&B sweep chooses the id itself
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
            mode=self.mode,  # type: ignore[arg-type]  # one of MODES
            tags=self._tags,
            notes=self._notes,
            id=name,
            name=make_name(info),
            group=make_group(info),
            job_type=self._job_type or info.name,
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


def _draw_end(folder: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """The pictures of the report, and what the buffer holds."""
    import wandb

    pictures = list_pictures(folder, summary)
    content: dict[str, Any] = {f"plots/{name}": wandb.Image(str(path)) for name, path in pictures.items()}
    if counts := summary.get("buffer_by_class"):
        counted = "images" if get_measure(summary) == "accuracy" else "objects"
        names: list[str | int] = ["class", counted]
        table = wandb.Table(columns=names, data=[list(pair) for pair in zip(summary["class_names"], counts)])
        content["buffer_by_class"] = wandb.plot.bar(table, "class", counted, title=f"{counted} in the buffer")
    return content
