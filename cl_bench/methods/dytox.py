"""DyTox and DyTox+ (Douillard, Rame, Couairon, Cord, CVPR 2022), the learning rule.

A task is learned in two phases. The main phase trains on the task's images and the exemplars together, on a network
with a new token and a new classifier; the teacher is a frozen copy of the network before. With a = C_old / C_all,

    L = (1 - a) L_clf + a L_kd + lambda L_div
    L_clf = mean over images and all C_all classes of BCE(logit, one-hot target)
    L_kd  = T^2 / (B C_old) sum of q log(q / p),  q, p = softmax of teacher's and student's logits of old classes / T
    L_div = the same BCE of an auxiliary classifier on the newest embedding only: 0 = any old class, 1..C_new

Old tokens and old classifiers are frozen. Then the buffer takes images of the new classes (herding on the embeddings of
all tasks), the auxiliary classifier is removed, and the fine-tuning phase minimises L_clf on the exemplars, which are
balanced, with the encoder frozen and all tokens and classifiers trained. The first task has L_clf only, and no
fine-tuning. Predictions are logits: the sigmoid of each class changes no order.

DyTox+ applies mixup to each batch: x' = l x + (1 - l) flipped(x), the same for the targets, which are smoothed,
l ~ Beta(mixup, mixup) once per batch, in both phases. An epoch of repeated augmentation is the first floor(N / 256) 256
entries of a shuffled list in which every image stands three times in a row (Hoffer et al. 2020; DeiT's sampler).

Departures from the release, all in docs/methods/dytox.md: one buffer of M images in total, chosen by un-augmented
images (the release chose with augmented ones, separately on every GPU); fine-tuning shuffles the exemplars, and has
fewer steps unless ``finetune_steps`` is given.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from cl_bench.backbones.dytox import Classifier, DyTox
from cl_bench.buffers.base import Columns, PerClassBuffer
from cl_bench.core.errors import require_fraction, require_nonnegative, require_positive, void
from cl_bench.core.types import Batch, Data, Losses, Phase, Task
from cl_bench.methods.base import Inputs, RehearsalMethod, Teacher, Terms, distillation_loss, repeat_passes

REPEATED_UNIT = 256
"""The length of an epoch of repeated augmentation is a multiple of this number of images (DeiT)."""


@void("temperature", when=lambda v: not v["distillation"], why="method.distillation is false")
@void("finetune_steps", "finetune_lr", when=lambda v: not v["finetune_epochs"], why="method.finetune_epochs is 0")
@void("label_smoothing", when=lambda v: not v["mixup"], why="only mixup smooths targets, and method.mixup is 0")
class DyToxRule(RehearsalMethod):
    """Token expansion, independent classifiers, distillation, divergence head, balanced fine-tuning.

    Args:
        divergence: lambda; 0 is the ablation without the auxiliary classifier.
        distillation: ablation switch of the teacher; without it a = 0.
        temperature: T of the distillation.
        finetune_epochs: passes over the exemplars after the main phase; 0 is the ablation without fine-tuning.
        finetune_steps: batches in each of these passes, which may visit an exemplar several times; None for every
            exemplar once.
        finetune_lr: its constant learning rate.
        mixup: parameter of the Beta distribution; 0 for none. 0.8 is DyTox+.
        label_smoothing: probability that targets spread over all classes; acts with ``mixup`` only.
        repeated_augmentation: how often an image drawn into an epoch is visited in it; 1 visits every image once.
        batch_size: the trainer's.
    """

    self_contained = False

    net: DyTox
    teacher_bytes: Tensor

    def __init__(
        self,
        *,
        net: DyTox,
        buffer: PerClassBuffer,
        divergence: float,
        distillation: bool,
        temperature: float,
        finetune_epochs: int,
        finetune_steps: int | None,
        finetune_lr: float,
        mixup: float,
        label_smoothing: float,
        repeated_augmentation: int,
        batch_size: int,
    ) -> None:
        super().__init__(net=net, buffer=buffer)
        require_nonnegative(
            fix="0 switches it off.", divergence=divergence, finetune_epochs=finetune_epochs, mixup=mixup
        )
        require_positive(fix="See configs/method/dytox.yaml.", temperature=temperature, finetune_lr=finetune_lr)
        require_fraction(fix="Try 0.1.", below_one=True, label_smoothing=label_smoothing)
        require_positive(fix="1 switches it off, DeiT has 3.", repeated_augmentation=repeated_augmentation)
        require_positive(
            fix="The release has 15 batches, null visits every image once; method.finetune_epochs=0 is no fine-tuning.",
            finetune_steps=finetune_steps,
        )
        net.clear()
        self.divergence, self.distillation, self.temperature = divergence, distillation, temperature
        self.finetune_epochs, self.finetune_lr = finetune_epochs, finetune_lr
        self.finetune_visits = finetune_steps * batch_size if finetune_steps else None
        self.mixup, self.label_smoothing = mixup, label_smoothing
        self.repeated_augmentation = repeated_augmentation
        self.auxiliary: Classifier | None = None
        self.teacher: Callable[[Tensor], Tensor] | None = None  # a function, not a module: it is not part of the state
        self.register_buffer("teacher_bytes", torch.tensor(0))

    def learn(self, task: Task) -> Iterator[Phase]:
        """The main phase, then the buffer's update, then, from the second task on, the fine-tuning phase."""
        later = task.id > 0
        data = Data.concatenate([task.train, self.buffer.data()]) if later else task.train
        if later and self.distillation:
            self.teacher = Teacher(self.net).forward
            self.teacher_bytes.fill_(sum(p.nbytes for p in self.net.parameters()))
        self.net.grow(len(task.classes))
        if later and self.divergence:
            self.auxiliary = Classifier(self.net.dim, 1 + len(task.classes)).to(data.labels.device)
        order = (
            partial(repeat_images, len(data), self.repeated_augmentation) if self.repeated_augmentation > 1 else None
        )
        yield Phase(data, self.observe, self._freeze(self.net.list_old_parameters()), order=order)

        self.auxiliary = self.teacher = None
        self.buffer.close_task(task, self.describe)
        if later and self.finetune_epochs:
            exemplars = self.buffer.data()
            yield Phase(
                exemplars,
                self.observe,
                self._freeze(self.net.list_encoder_parameters()),
                epochs=self.finetune_epochs,
                lr=self.finetune_lr,
                schedule=lambda epoch, epochs: 1.0,
                order=partial(repeat_passes, len(exemplars), self.finetune_visits) if self.finetune_visits else None,
            )
        self._freeze([])

    def inputs(self, batch: Batch) -> Inputs:
        """Images and targets."""
        x, targets = self.apply_mixup(batch)
        return {"x": x, "targets": targets}

    def terms(self, inputs: Inputs, task: int) -> Terms:
        """The weighted terms; the fine-tuning phase has no teacher and no auxiliary classifier, so L_clf only."""
        x, targets = inputs["x"], inputs["targets"]
        embeddings = self.net.compute_embeddings(x)
        logits = self.net.classify(embeddings).float()
        new = self.net.sizes[-1]
        old = logits.shape[1] - new
        share = old / logits.shape[1] if self.teacher is not None else 0.0  # a
        losses: Losses = {"clf": (1 - share) * F.binary_cross_entropy_with_logits(logits, targets)}
        if self.teacher is not None:
            answers = self.teacher(x)[:, :old].float()
            kd = distillation_loss(logits[:, :old], answers, self.temperature, mean_over_classes=True)
            losses["kd"] = share * kd
        if self.auxiliary is not None:
            merged = torch.cat([targets[:, :old].sum(dim=1, keepdim=True), targets[:, old:]], dim=1)
            guesses = self.auxiliary(embeddings[-1]).float()
            losses["div"] = self.divergence * F.binary_cross_entropy_with_logits(guesses, merged)
        return losses, {}

    def apply_mixup(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) images and (B, C_all) targets, after mixup unless ``mixup`` is 0."""
        targets = F.one_hot(batch.y, sum(self.net.sizes)).float()
        if not self.mixup:
            return batch.x, targets
        part = float(torch.distributions.Beta(self.mixup, self.mixup).sample())  # on the CPU
        targets = targets * (1 - self.label_smoothing) + self.label_smoothing / targets.shape[1]
        x, targets = (part * t + (1 - part) * t.flip(0) for t in (batch.x, targets))
        return x, targets

    def describe(self, x: Tensor, y: Tensor) -> Columns:
        """The embeddings of all tasks, for herding, and the confidence, which other per-class buffers rank by."""
        embeddings = self.net.compute_embeddings(x)
        probabilities = self.net.classify(embeddings).float().sigmoid()
        return {
            "features": torch.cat(embeddings, dim=1),
            "confidence": probabilities.gather(1, y[:, None]).squeeze(1),
        }

    def memory_bytes(self) -> int:
        """The teacher, a copy of the network while a later task is learned."""
        return int(self.teacher_bytes)

    def _freeze(self, frozen: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """Freeze these parameters and no others; return the others."""
        held = {id(p) for p in frozen}
        for p in self.parameters():
            p.requires_grad_(id(p) not in held)
        return [p for p in self.parameters() if id(p) not in held]


def repeat_images(size: int, times: int, generator: Generator) -> Tensor:
    """Positions of an epoch of repeated augmentation over ``size`` images: each one drawn stands ``times`` times."""
    visits = size // REPEATED_UNIT * REPEATED_UNIT or size
    return torch.randperm(size, generator=generator).repeat_interleave(times)[:visits]
