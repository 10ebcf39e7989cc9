"""Tasks that share their labels (domain-incremental): the c-th class of every task is label c.

This is the third scenario of van de Ven and Tolias 2019: "which digit", for any permutation, in permuted MNIST; "first
or second class of its task" in split MNIST. Wortsman et al. 2020 call it "s".
"""

from dataclasses import replace
from functools import partial

from cl_bench.core.errors import require
from cl_bench.core.types import Data
from cl_bench.data.base import fixed_by_settings
from cl_bench.scenarios.base import Scenario


@fixed_by_settings
class SharedLabels(Scenario):
    """The tasks of another scenario under one set of l labels, so that K = l.

    Class-IL (task id unknown) is Domain-IL here: the label must be right, for an image of any task.

    Args:
        disjoint: the scenario of the tasks, each with l classes of its own.
    """

    shared_labels = True

    def __init__(self, *, disjoint: Scenario) -> None:
        sizes = sorted({len(task.classes) for task in disjoint.tasks})
        require(
            len(sizes) == 1,
            "disjoint",
            expected="tasks with equally many classes, since they will share their labels",
            got=f"tasks of {' and '.join(map(str, sizes))} classes",
            fix="Set scenario.disjoint.classes_per_task=null and a scenario.disjoint.num_tasks.",
        )
        require(
            not disjoint.recurring,
            "disjoint",
            expected="tasks without images of other tasks' classes, since they will share their labels",
            got="tasks that share classes",
            fix="Leave scenario.disjoint.blurry and scenario.disjoint.repeat at 0.",
        )
        self.data = disjoint.data
        self.class_order = list(range(sizes[0]))
        self.class_names = [f"label {c}" for c in self.class_order]
        self.image_shape, self.transform = disjoint.image_shape, disjoint.transform
        self.pretrain, self.pretrain_order = disjoint.pretrain, disjoint.pretrain_order
        self.tasks = [
            replace(task.change_data(partial(_relabel, first=task.classes.start)), classes=range(sizes[0]))
            for task in disjoint.tasks
        ]


def _relabel(data: Data, first: int) -> Data:
    return replace(data, labels=data.labels - first)
