"""No memory."""

from torch import Tensor

from cl_bench.buffers.base import Buffer, Context, Describe
from cl_bench.core.errors import void
from cl_bench.core.types import Batch, Task


@void("capacity", when=lambda v: v["capacity"] != 0, why="buffer=none keeps nothing")
class NoBuffer(Buffer):
    """Keeps nothing: for methods without rehearsal.

    Args:
        capacity: not used; accepted so that ``buffer=none`` can be said of an experiment that sets a capacity.
    """

    def __init__(self, *, capacity: int, context: Context) -> None:
        super().__init__(capacity=0, context=context)

    def add(self, batch: Batch, **columns: Tensor) -> None:
        """Nothing."""

    def close_task(self, task: Task, describe: Describe, keep: tuple[str, ...] = ()) -> None:
        """Nothing."""
