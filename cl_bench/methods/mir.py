"""MIR: maximally interfered retrieval (Aljundi, Caccia, Belilovsky, Caccia, Lin, Charlin, Tuytelaars, NeurIPS 2019,
ER-MIR, Eq. 1).

    theta_v = theta - lr grad CE(f_theta(x), y),                                a virtual step on the stream
    s(x') = CE(f_theta_v(x'), y') - CE(f_theta(x'), y'),                for each of C candidates from the buffer
    L = CE(f(x), y) + CE( f(x'), y' ),   one mean each, over the stream and the candidates with the largest s

All forward passes are in training mode, so BatchNorm normalises the candidates by their own statistics. Those of
f_theta move the running statistics, those of f_theta_v do not. If there are no more candidates than images to replay,
nothing is scored, and the method is ER with ``loss=summed``.

Departures: the gradient of the virtual step comes from a forward pass of its own, which moves no running statistics;
the released code takes it from the pass of the loss. The candidates are scored as they are replayed, i.e. augmented if
the scenario augments.
"""

import torch
from torch import Tensor
from torch.func import functional_call

from cl_bench.backbones.base import Backbone
from cl_bench.buffers.base import Buffer
from cl_bench.core.errors import require, require_positive, void
from cl_bench.core.types import Batch
from cl_bench.methods.base import (
    ClassLoss,
    Inputs,
    LossClasses,
    RehearsalMethod,
    Terms,
    check_draws,
    check_replay_size,
    compute_gradients,
    copy_buffers,
    is_filled_between_tasks,
)
from cl_bench.scenarios.base import Scenario


@void("replay_current_task", when=is_filled_between_tasks, why="this buffer takes its images at the end of a task")
class MIR(RehearsalMethod):
    """Replays the stored images that the coming step would harm most.

    Args:
        replay_size: images that are replayed.
        candidates: C, images that are drawn and scored.
        virtual_lr: learning rate of the virtual step, as a rule the optimizer's.
        loss_classes: the outputs that all losses compare.
        replay_current_task: whether images of the current task are candidates, too.
    """

    shared_labels = True

    def __init__(
        self,
        *,
        net: Backbone,
        buffer: Buffer,
        scenario: Scenario,
        replay_size: int,
        candidates: int,
        virtual_lr: float,
        loss_classes: LossClasses,
        replay_current_task: bool,
    ) -> None:
        super().__init__(net=net, buffer=buffer)
        check_replay_size(replay_size)
        check_draws(net, buffer, replay_size)
        require(
            candidates >= replay_size,
            "candidates",
            expected=f"at least method.replay_size={replay_size}",
            got=candidates,
            fix="50 for 10 is usual.",
        )
        require_positive(fix="Leave it at ${optimizer.lr}.", virtual_lr=virtual_lr)
        self.replay_size, self.candidates, self.virtual_lr = replay_size, candidates, virtual_lr
        self.replay_current_task, self.classify = replay_current_task, ClassLoss(scenario, loss_classes)

    def inputs(self, batch: Batch) -> Inputs:
        """(x, y) of the stream, and (x', y') of the candidates with the largest scores."""
        found = {"x": batch.x, "y": batch.y}
        drawn = self.draw(self.candidates, batch.task)
        if drawn is None:
            return found
        if len(drawn) <= self.replay_size:
            return found | {"x'": drawn.x, "y'": drawn.y}
        best = self.score(batch, drawn).topk(self.replay_size).indices
        return found | {"x'": drawn.x.index_select(0, best), "y'": drawn.y.index_select(0, best)}

    def score(self, batch: Batch, drawn: Batch) -> Tensor:
        """(C,) how much a step on the stream's ``batch`` raises the loss of each candidate."""
        task, net = batch.task, self.net

        def stream_loss(logits: Tensor) -> Tensor:
            return self.classify(logits, batch.y, task)

        def loss(logits: Tensor) -> Tensor:
            return self.classify(logits, drawn.y, task, reduction="none")

        gradients = compute_gradients(net, batch.x, stream_loss, keep_statistics=True)
        with torch.no_grad():
            moved = {name: p - self.virtual_lr * gradients[name] for name, p in net.named_parameters()}
            after = loss(functional_call(net, {**moved, **copy_buffers(net)}, (drawn.x,)))
            return after - loss(net(drawn.x))

    def terms(self, inputs: Inputs, task: int) -> Terms:
        """Cross-entropy of the stream and of the replayed images."""
        losses = {"ce": self.classify(self.net(inputs["x"]), inputs["y"], task)}
        if "x'" in inputs:
            losses["replay_ce"] = self.classify(self.net(inputs["x'"]), inputs["y'"], task)
        return losses, {}
