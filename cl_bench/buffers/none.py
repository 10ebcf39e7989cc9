"""No buffer."""

from torch import Tensor

from cl_bench.buffers.base import Buffer, Context, Describe
from cl_bench.core.errors import void
from cl_bench.core.types import Batch, Task


@void("capacity", when=lambda v: v["capacity"] != 0, why="buffer=none stores nothing")
class NoBuffer(Buffer):
    """Stores nothing: for methods without rehearsal.

    Args:
        capacity: not used; it exists so that ``buffer=none`` works with an experiment that sets a capacity.
    """

    def __init__(self, *, capacity: int, context: Context) -> None:
        super().__init__(capacity=0, context=context)

    def add(self, batch: Batch, **columns: Tensor) -> None:
        """Do nothing."""

    def close_task(self, task: Task, describe: Describe, keep: tuple[str, ...] = ()) -> None:
        """Do nothing."""
