"""Tasks that share their labels (domain-incremental): the c-th class of every task is label c.

van de Ven and Tolias 2019 derive their third scenario from the other two in this way: "which digit" whatever the
permutation in permuted MNIST, "first or second class of its task" in split MNIST. Wortsman et al. 2020 call it "s".
"""

from dataclasses import replace

from cl_bench.core.errors import require
from cl_bench.core.types import Data, Task
from cl_bench.data.base import fixed_by_settings
from cl_bench.scenarios.base import Scenario


@fixed_by_settings
class SharedLabels(Scenario):
    """The tasks of another scenario under one set of l labels, so that K = l.

    Class-IL (task id unknown) is Domain-IL here: the label must be right, whatever the task.

    Args:
        disjoint: where the tasks come from; each has l classes of its own there.
    """

    shared_labels = True

    def __init__(self, *, disjoint: Scenario) -> None:
        sizes = sorted({len(task.classes) for task in disjoint.tasks})
        require(
            len(sizes) == 1,
            "disjoint",
            expected="tasks of equally many classes, since they are to share their labels",
            got=f"tasks of {' and '.join(map(str, sizes))} classes",
            fix="Set scenario.disjoint.classes_per_task=null and a scenario.disjoint.num_tasks.",
        )
        self.data = disjoint.data
        self.class_order = list(range(sizes[0]))
        self.class_names = [f"label {c}" for c in self.class_order]
        self.image_shape, self.transform = disjoint.image_shape, disjoint.transform
        self.pretrain, self.pretrain_order = disjoint.pretrain, disjoint.pretrain_order
        self.tasks = [
            replace(
                task,
                classes=range(sizes[0]),
                train=_relabel(task.train, task),
                val=_relabel(task.val, task),
                test=_relabel(task.test, task),
            )
            for task in disjoint.tasks
        ]


def _relabel(data: Data, task: Task) -> Data:
    return replace(data, labels=data.labels - task.classes.start)
