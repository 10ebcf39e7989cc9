"""What the papers of the Vision Transformer family claim, measured at a small scale; about ten minutes on one thread.

    python scripts/vit_family.py [--only length,packing,collapse,sandwich,sampler] [--again]

A part that ``results/vit_family/figures.json`` has is not measured again without ``--again``. From this file the
command draws the plots in ``docs/images`` and writes the tables in ``docs/vit_family.md``. Times are CPU seconds of one
thread, measured in turn (A B A B ...); the page shows their ratios only.
"""

import argparse
import functools
import itertools
import json
import math
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.layers import Attention
from timm.models import efficientvit_msra as msra
from timm.models.mobilevit import LinearSelfAttention
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from cl_bench.backbones import navit
from cl_bench.backbones.layers.memory_format import put_channels_innermost
from cl_bench.config.build import build
from cl_bench.config.schema import CONFIGS, compose_config
from cl_bench.testing import make_trainer

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "results" / "vit_family" / "figures.json"
PAGE = ROOT / "docs" / "vit_family.md"
IMAGES = ROOT / "docs" / "images"

Figures = dict[str, Any]
"""What a part measured, as plain JSON values."""

REPETITIONS = 7

# -- time --------------------------------------------------------------------------------------------------------------


def time_in_turn(works: Mapping[str, Callable[[], object]], least: float = 0.05) -> dict[str, list[float]]:
    """CPU seconds of one call of each work, :data:`REPETITIONS` times; a repetition calls it for ``least`` seconds."""
    calls: dict[str, int] = {}
    for name, work in works.items():
        work()
        began = time.process_time()
        work()
        calls[name] = max(1, math.ceil(least / max(time.process_time() - began, 1e-6)))
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(REPETITIONS):
        for name, work in works.items():
            began = time.process_time()
            for _ in range(calls[name]):
                work()
            taken[name].append((time.process_time() - began) / calls[name])
    return taken


def compute_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median over repetitions of the ratio of two times."""
    return statistics.median(a / b for a, b in zip(above, below))


# -- cost against the length of a sequence -----------------------------------------------------------------------------

LENGTHS = (64, 128, 256, 512, 1024, 2048)
WIDTH, HEADS = 64, 4


@torch.no_grad()
def measure_length() -> Figures:
    """Seconds of one layer of attention and of separable attention (MobileViTv2), projections included."""
    torch.manual_seed(0)
    plain: Any = Attention(WIDTH, HEADS)
    fused: Any = Attention(WIDTH, HEADS)
    separable = LinearSelfAttention(WIDTH)
    plain.fused_attn, fused.fused_attn = False, True
    works: dict[str, Callable[[], object]] = {}
    for length in LENGTHS:
        tokens = torch.randn(1, length, WIDTH)
        grid = tokens.movedim(2, 1).unsqueeze(2).contiguous()  # one pixel in each of `length` patches
        works[f"attention {length}"] = functools.partial(plain, tokens)
        works[f"attention, fused {length}"] = functools.partial(fused, tokens)
        works[f"separable attention {length}"] = functools.partial(separable, grid)
    return {"width": WIDTH, "heads": HEADS, "seconds": time_in_turn(works)}


def read_lengths(figures: Figures) -> dict[str, list[float]]:
    """For each kind of attention, its time at each length relative to the first."""
    seconds = figures["seconds"]
    kinds = ("attention", "attention, fused", "separable attention")
    return {
        kind: [compute_ratio(seconds[f"{kind} {n}"], seconds[f"{kind} {LENGTHS[0]}"]) for n in LENGTHS]
        for kind in kinds
    }


# -- packing -----------------------------------------------------------------------------------------------------------

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
PER_SEQUENCE = (1, 2, 4, 8)
BATCH = 32


def pad_to_largest(sizes: Sequence[int], length: int, device: torch.device) -> navit.Layout:
    """One sequence for each image, as long as the largest: what packing is compared with."""
    tables = [navit.lay_out([size], size, device) for size in sizes]
    begins = [sum(sizes[:i]) for i in range(len(sizes))]
    source = torch.full((len(sizes), sizes[0]), sum(sizes), device=device)
    owner = torch.full_like(source, -1)
    for i, (table, begin) in enumerate(zip(tables, begins)):
        source[i, : sizes[i]], owner[i, : sizes[i]] = table.source[0] + begin, i
    images = torch.arange(len(sizes), device=device)
    return navit.Layout(source, owner, images[:, None], images)


def make_navit(share: float, per_sequence: int) -> navit.NaViT:
    """Two blocks of the full width, at 32 pixels: 64 tokens of a full image, 16 of one at half its side."""
    torch.manual_seed(0)
    return navit.NaViT(
        patch_size=4,
        dim=192,
        depth=2,
        heads=3,
        mlp_ratio=4.0,
        images_per_sequence=per_sequence,
        low_share=share,
        low_scales=[0.5],
        token_drop=0.0,
        num_classes=100,
        image_shape=(3, 32, 32),
    ).train()


def measure_packing() -> Figures:
    """Seconds of a training step on 32 images of mixed resolutions, packed and padded."""
    x = torch.randn(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    packed, padded = navit._look_up_layout, functools.cache(pad_to_largest)

    def step(net: navit.NaViT, layout: Any) -> Tensor:
        torch.manual_seed(1)  # the same images are lowered
        navit._look_up_layout = layout
        try:
            features = net.features(x)
        finally:
            navit._look_up_layout = packed
        net.zero_grad()
        features.square().mean().backward()
        return features.detach()

    works: dict[str, Callable[[], object]] = {}
    apart = []
    for share in SHARES:
        net = make_navit(share, 2)
        apart.append(float((step(net, packed) - step(net, padded)).abs().max() / step(net, packed).abs().max()))
        works[f"packed {share}"] = functools.partial(step, net, packed)
        works[f"padded {share}"] = functools.partial(step, net, padded)
    for number in PER_SEQUENCE:
        works[f"sequences of {number}"] = functools.partial(step, make_navit(0.5, number), packed)
    return {"difference": max(apart), "seconds": time_in_turn(works, least=0.2)}


def count_tokens(share: float) -> int:
    """Tokens of a batch that are no padding."""
    low = round(share * BATCH)
    return 64 * (BATCH - low) + 16 * low


# -- similarity of attention maps --------------------------------------------------------------------------------------

NETWORK = ["patch_size=8", "dim=64", "depth=16", "heads=4", "mlp_ratio=3.0"]
TRAINING = [
    *("scenario=cifar100", "scenario.num_tasks=1", "scenario.test_per_class=10", "method=finetune", "buffer=none"),
    *("optimizer=adamw", "optimizer.lr=0.001", "trainer.epochs=1", "trainer.batch_size=64", "device=cpu"),
]
STEPS = 250


@torch.no_grad()
def collect_maps(net: Any, x: Tensor) -> list[Tensor]:
    """The attention maps (B, h, n, n) of every block, after re-attention where there is one."""
    maps: list[Tensor] = []

    def read(attention: Any, arguments: tuple[Tensor, ...]) -> None:
        if hasattr(attention, "compute_maps"):
            maps.append(attention.compute_maps(arguments[0])[1])
            return
        qkv = attention.qkv(arguments[0]).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        maps.append((qkv[0] * attention.scale @ qkv[1].transpose(-2, -1)).softmax(dim=-1))

    handles = [block.attn.register_forward_pre_hook(read) for block in net.net.blocks]
    net.eval().features(x)
    for handle in handles:
        handle.remove()
    return maps


def compare_neighbours(maps: Sequence[Tensor]) -> dict[str, list[float]]:
    """Mean similarity of each block's maps to those of the block before it, over images, heads and tokens.

    ``cosine`` is Eq. 1 of DeepViT: of the columns, what a token gives to every other. ``correlation`` is the cosine
    after the mean of each column is subtracted: it compares maps after BatchNorm, whose mean is another, with softmax.
    """
    found: dict[str, list[float]] = {"cosine": [], "correlation": []}
    for one, other in itertools.pairwise(maps):
        found["cosine"].append(float(torch.cosine_similarity(one, other, dim=2).mean()))
        one, other = (part - part.mean(dim=2, keepdim=True) for part in (one, other))
        found["correlation"].append(float(torch.cosine_similarity(one, other, dim=2).mean()))
    return found


def measure_collapse(seed: int = 0) -> Figures:
    """Similarity of the maps of a deep ViT and of one with re-attention, before and after some steps on CIFAR-100."""
    result: Figures = {"steps": STEPS, "network": NETWORK}
    for backbone in ("vit", "deepvit"):
        keys = [f"backbone={backbone}", *(f"backbone.{key}" for key in NETWORK)]
        limit = [f"trainer.max_steps={STEPS}", "trainer.evaluate_after=last_task", f"seed={seed}"]
        parts = build(compose_config([*TRAINING, *keys, *limit]))
        test = parts.scenario.tasks[0].test
        x = parts.scenario.transform.normalise(test.images[:256])
        net: Any = parts.method.get_submodule("net")
        before = compare_neighbours(collect_maps(net, x))
        with tempfile.TemporaryDirectory() as folder:
            record = make_trainer(parts, Path(folder)).run()
        after = compare_neighbours(collect_maps(net, x))
        result[backbone] = {"before": before, "after": after, "accuracy": float(record.class_il.accuracy[-1, 0])}
    return result


# -- where the time of a block goes ------------------------------------------------------------------------------------

KINDS = {
    "matrix product": ("mm", "bmm", "addmm", "baddbmm", "convolution", "_scaled_dot_product"),
    "depthwise convolution": (),
    "normalisation": ("native_batch_norm", "native_layer_norm"),
    "softmax": ("_softmax",),
    "reshape and copy": ("copy_", "cat", "clone", "empty", "as_strided", "slice", "view", "permute", "transpose"),
    "element by element": ("add", "mul", "gelu", "relu", "clamp_min", "hardswish", "sigmoid"),
}
"""Kinds of operations, by the first letters of their names in torch. All except the first are bound by memory."""


def name_kind(name: str, arguments: Sequence[Any]) -> str:
    """The kind of an operation of torch, e.g. ``addmm``; what is none of the others makes another view of a tensor."""
    if name == "convolution" and arguments[1].shape[1] == 1:  # weights (channels, channels of a group, height, width)
        return "depthwise convolution"
    for kind, names in KINDS.items():
        if any(name == known or (len(known) > 3 and name.startswith(known)) for known in names):
            return kind
    return "element by element" if name.rstrip("_") in ("add", "mul", "relu") else "reshape and copy"


class Operations(TorchDispatchMode):
    """Inside, CPU seconds of the operations of each kind are added up."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = dict.fromkeys(KINDS, 0.0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute an operation and count its time."""
        began = time.process_time()
        result = func(*args, **(kwargs or {}))
        self.seconds[name_kind(func.overloadpacket.__name__, args)] += time.process_time() - began
        return result


@torch.no_grad()
def measure_shares(module: nn.Module, x: Tensor) -> dict[str, float]:
    """The share of each kind of operation in the time of a forward pass, in percent; a median over repetitions."""
    shares: list[dict[str, float]] = []
    for repetition in range(REPETITIONS + 1):
        with Operations() as operations:
            for _ in range(3):
                module(x)
        totals = operations.seconds
        if repetition:  # the first one also warms up
            shares.append({kind: 100 * total / sum(totals.values()) for kind, total in totals.items()})
    medians = {kind: statistics.median(share[kind] for share in shares) for kind in KINDS}
    return {kind: 100 * median / sum(medians.values()) for kind, median in medians.items()}


def fold_norms(module: nn.Module) -> nn.Module:
    """The same function with each BatchNorm folded into the convolution before it, as for inference."""
    for name, child in module.named_children():
        setattr(module, name, child.fuse() if isinstance(child, msra.ConvNorm) else fold_norms(child))
    return module


def list_blocks() -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Blocks of width 192 on a map of 14 x 14: DeiT-Tiny's, and EfficientViT-M0's with its parts, in our layout."""
    torch.manual_seed(0)
    tokens, image = torch.randn(16, 196, 192), torch.randn(16, 192, 14, 14)
    image = image.to(memory_format=torch.channels_last)
    blocks: list[Any] = [Block(192, 3, 4.0, qkv_bias=True).eval() for _ in range(2)]
    plain, fused = blocks
    plain.attn.fused_attn, fused.attn.fused_attn = False, True
    yield "ViT block", plain, tokens
    yield "ViT block, fused attention", fused, tokens
    for title, change in (("", lambda block: block), (", BatchNorm folded", fold_norms)):
        block: Any = msra.EfficientVitBlock(192, 16, 4, attn_ratio=3, resolution=14, window_resolution=7)
        for module in block.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.weight)
        block = change(block.eval())
        put_channels_innermost(block)
        yield f"EfficientViT block{title}", block, image
        yield f"its attention{title}", block.mixer, image
        yield f"its first FFN{title}", block.ffn0, image


def measure_sandwich() -> Figures:
    """Shares of time, multiplications and CPU seconds of each block."""
    result: Figures = {"shares": {}, "macs": {}}
    works: dict[str, Callable[[], object]] = {}
    for name, module, x in list_blocks():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            if isinstance(module, Block):  # the fused operation is not counted
                attention: Any = module.attn
                attention.fused_attn, before = False, attention.fused_attn
                module(x)
                attention.fused_attn = before
            else:
                module(x)
        result["macs"][name] = counter.get_total_flops() / 2 / len(x)
        result["shares"][name] = measure_shares(module, x)
        works[name] = torch.no_grad()(functools.partial(module, x))
    return result | {"seconds": time_in_turn(works)}


# -- a resolution and a number of images for each step -----------------------------------------------------------------

SIDES = (16, 24, 32, 40, 48)
MIXES = ((24, 32, 40), (16, 24, 32))
"""Sides that are drawn with equal probability."""
NETWORKS = [
    *("resnet18", "vit", "deepvit", "navit", "cvt", "cct", "efficientvit", "mobilevit", "mobilevitv2", "levit"),
    *("coat", "lvt", "dytox"),
]


def count_images(side: int) -> int:
    """Images of this side with about as many pixels as :data:`BATCH` images of 32 x 32."""
    return round(BATCH * (32 / side) ** 2)


def build_net(name: str) -> Any:
    """The network at mini scale, for 100 classes of 32 x 32 pixels that are never read."""
    keys = (f"backbone={name}", "+scale=mini", "scenario.train_per_class=1", "scenario.test_per_class=1", "device=cpu")
    torch.manual_seed(0)
    return build(compose_config(["scenario=cifar100", *keys])).method.get_submodule("net")


def measure_sampler() -> Figures:
    """Seconds of a training step of MobileViT at each side, and which networks take another side than their own."""
    taken = []
    for name in NETWORKS:
        net = build_net(name).eval()
        try:
            with torch.no_grad():
                net.features(torch.zeros(2, 3, 24, 24))
            taken.append(name)
        except Exception as error:  # positions or biases of another size: each network in words of its own
            print(f"{name}: {type(error).__name__}")
    net = build_net("mobilevit").train()

    def step(x: Tensor) -> None:
        net.zero_grad()
        net.features(x).square().mean().backward()

    works = {str(side): functools.partial(step, torch.randn(count_images(side), 3, side, side)) for side in SIDES}
    return {"taken": taken, "refused": sorted({*NETWORKS} - {*taken}), "seconds": time_in_turn(works)}


# -- plots and tables --------------------------------------------------------------------------------------------------


def draw_all(figures: Figures) -> None:
    """Write the plots of the parts that were measured."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style: Any = {
        "font.size": 12,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.constrained_layout.use": True,
    }
    IMAGES.mkdir(exist_ok=True)
    with plt.rc_context(style):
        for name, draw in {
            "length": draw_length,
            "packing": draw_packing,
            "collapse": draw_collapse,
            "sandwich": draw_sandwich,
        }.items():
            if name in figures:
                figure = draw(plt, figures[name])
                figure.savefig(IMAGES / f"vit_family_{name}.png", dpi=130, metadata={"Software": None})
                plt.close(figure)


def draw_length(plt: Any, figures: Figures) -> Any:
    """Time relative to that at the smallest length, both axes logarithmic."""
    figure, axes = plt.subplots(figsize=(5.4, 4.2))
    for (kind, ratios), marker in zip(read_lengths(figures).items(), "os^"):
        axes.plot(LENGTHS, ratios, marker=marker, label=kind)
    for power, name in ((1, "linear"), (2, "quadratic")):
        axes.plot(LENGTHS, [(n / LENGTHS[0]) ** power for n in LENGTHS], ":", color="0.5", lw=1)
        axes.annotate(name, (LENGTHS[-2], (LENGTHS[-2] / LENGTHS[0]) ** power), color="0.4", ha="right", va="bottom")
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=f"time, relative to {LENGTHS[0]} tokens")
    axes.set_xticks(LENGTHS, [str(n) for n in LENGTHS])
    axes.minorticks_off()
    axes.legend(frameon=False)
    return figure


def draw_packing(plt: Any, figures: Figures) -> Any:
    """Tokens a second of packing relative to padding, and the ratio that would be if only the places counted."""
    figure, axes = plt.subplots(figsize=(5.4, 4.2))
    percent = [100 * share for share in SHARES]
    axes.plot(percent, [row["speed"] for row in read_packing(figures)], "o-", label="measured")
    places = [row["places"] for row in read_packing(figures)]
    axes.plot(percent, places, ":", color="0.5", label="places padded / places packed")
    axes.set(xlabel="images at half their side, %", ylabel="tokens a second, packed / padded", ylim=(0, None))
    axes.legend(frameon=False)
    return figure


def draw_collapse(plt: Any, figures: Figures) -> Any:
    """Similarity of neighbouring blocks' maps after training, both measures one above the other."""
    figure, rows = plt.subplots(2, 1, figsize=(5.4, 6.4), sharex=True)
    for axes, measure in zip(rows, ("cosine", "correlation")):
        for backbone, name, colour in (("vit", "plain ViT", "C0"), ("deepvit", "re-attention", "C1")):
            for when, line in (("after", "o-"), ("before", ":")):
                values = figures[backbone][when][measure]
                axes.plot(range(2, len(values) + 2), values, line, color=colour, ms=4, label=f"{name}, {WHEN[when]}")
        axes.set(ylabel=f"{measure} with the block before")
    rows[0].legend(frameon=False, fontsize=10, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    rows[1].set(xlabel="block")
    return figure


WHEN = {"before": "untrained", "after": "trained"}


def draw_sandwich(plt: Any, figures: Figures) -> Any:
    """Stacked shares of time."""
    figure, axes = plt.subplots(figsize=(5.4, 5.6))
    names = list(figures["shares"])
    labels = [name.replace(", BatchNorm", ",") for name in names]
    left = [0.0] * len(names)
    for i, kind in enumerate(KINDS):
        values = [figures["shares"][name][kind] for name in names]
        axes.barh(labels, values, left=left, label=kind, color=f"C{i}" if i else "0.75")
        left = [a + b for a, b in zip(left, values)]
    axes.set(xlabel="share of the time, %", xlim=(0, 100))
    axes.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=10)
    return figure


def read_packing(figures: Figures) -> list[dict[str, float]]:
    """For each share of low images: tokens a second packed / padded, places padded / packed, time / that at share 0."""
    seconds, rows = figures["seconds"], []
    for share in SHARES:
        packed, padded = seconds[f"packed {share}"], seconds[f"padded {share}"]
        low = round(share * BATCH)
        sizes = [64] * (BATCH - low) + [16] * low
        layout = navit.lay_out(sizes, 2 * sizes[0], torch.device("cpu"))
        rows.append(
            {
                "tokens": count_tokens(share),
                "speed": compute_ratio(padded, packed),
                "places": BATCH * sizes[0] / layout.source.numel(),
                "step": compute_ratio(packed, seconds[f"packed {SHARES[0]}"]),
            }
        )
    return rows


def write_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def make_tables(figures: Figures) -> dict[str, str]:
    """The tables of the page, by part."""
    tables = {}
    if part := figures.get("length"):
        rows = []
        for kind, ratios in read_lengths(part).items():
            slope = math.log2(ratios[-1] / ratios[-2])
            rows.append([kind, *(f"{ratio:.1f}" for ratio in ratios), f"{slope:.2f}"])
        tables["length"] = write_table(["tokens", *map(str, LENGTHS), "exponent at the end"], rows)
    if part := figures.get("packing"):
        rows = [
            [
                f"{share:.0%}",
                f"{row['tokens']:.0f}",
                f"{row['speed']:.2f}",
                f"{row['places']:.2f}",
                f"{row['step']:.2f}",
            ]
            for share, row in zip(SHARES, read_packing(part))
        ]
        heads = ["images at half their side", "tokens of 32 images", "tokens a second, packed / padded"]
        tables["packing"] = write_table([*heads, "places, padded / packed", "time of a step / that at 0 %"], rows)
        seconds = part["seconds"]
        row = [f"{compute_ratio(seconds[f'sequences of {n}'], seconds['sequences of 1']):.2f}" for n in PER_SEQUENCE]
        heads = ["images of full resolution in a sequence", *map(str, PER_SEQUENCE)]
        tables["packing"] += "\n\n" + write_table(heads, [["time of a step at 50 %, relative to 1", *row]])
    if part := figures.get("collapse"):
        rows = []
        for backbone, name in (("vit", "plain ViT"), ("deepvit", "re-attention")):
            for when in ("before", "after"):
                cells = []
                for measure in ("cosine", "correlation"):
                    values = part[backbone][when][measure]
                    cells += [f"{statistics.mean(half):.3f}" for half in (values[:7], values[7:])]
                accuracy = f"{part[backbone]['accuracy']:.1f}" if when == "after" else "-"
                rows.append([f"{name}, {WHEN[when]}", *cells, accuracy])
        heads = ["", "cosine, blocks 2 to 8", "blocks 9 to 16", "correlation, blocks 2 to 8", "blocks 9 to 16"]
        tables["collapse"] = write_table([*heads, "accuracy, %"], rows)
    if part := figures.get("sandwich"):
        rows, seconds = [], part["seconds"]
        for name, shares in part["shares"].items():
            ratio = compute_ratio(seconds[name], seconds["ViT block"])
            macs = part["macs"][name] / part["macs"]["ViT block"]
            cells = [f"{shares[kind]:.0f}" for kind in KINDS]
            rows.append(
                [name.replace(", BatchNorm", ","), *cells, f"{macs:.2f}", f"{ratio:.2f}", f"{ratio / macs:.2f}"]
            )
        heads = ["% of the time", *KINDS, "multiplications / ViT's", "time / ViT's", "time per multiplication / ViT's"]
        tables["sandwich"] = write_table(heads, rows)
    if part := figures.get("sampler"):
        rows, full = [], part["seconds"]["32"]
        for side in SIDES:
            images, time_ratio = count_images(side), compute_ratio(part["seconds"][str(side)], full)
            rows.append([str(side), str(images), f"{time_ratio:.2f}", f"{images / BATCH / time_ratio:.2f}"])
        heads = ["side", "images of a step", "time of a step / that at 32", "images a second / those at 32"]
        tables["sampler"] = write_table(heads, rows)
        cells = []
        for mix in MIXES:
            larger = statistics.mean(count_images(side) / BATCH for side in mix)
            slower = statistics.mean(compute_ratio(part["seconds"][str(side)], full) for side in mix)
            cells.append(f"{slower / larger:.2f}")
        heads = ["sides drawn for the steps of an epoch", *(", ".join(map(str, mix)) for mix in MIXES)]
        tables["sampler"] += "\n\n" + write_table(heads, [["time of the epoch / that at 32 alone", *cells]])
    return tables


def fill_page(text: str, figures: Figures) -> str:
    """The page with the tables of these figures."""
    for name, table in make_tables(figures).items():
        begin, end = f"<!-- figures: {name} -->\n", "\n<!-- end -->"
        text = re.sub(
            re.escape(begin) + ".*?" + re.escape(end), (begin + table + end).replace("\\", r"\\"), text, flags=re.S
        )
    return text


PARTS: dict[str, Callable[[], Figures]] = {
    "length": measure_length,
    "packing": measure_packing,
    "collapse": measure_collapse,
    "sandwich": measure_sandwich,
    "sampler": measure_sampler,
}


def main() -> int:
    """Measure what is missing, then draw and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--again", action="store_true", help="measure parts again that the file has")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    figures: Figures = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    for name in chosen.only.split(","):
        if name in figures and not chosen.again:
            continue
        if name == "collapse" and not (CONFIGS / "backbone" / "deepvit.yaml").exists():
            print("collapse: there is no backbone=deepvit here")
            continue
        print(f"{name} ...", flush=True)
        figures[name] = PARTS[name]()
        FIGURES.parent.mkdir(parents=True, exist_ok=True)
        FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
    draw_all(figures)
    PAGE.write_text(fill_page(PAGE.read_text(), figures))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
