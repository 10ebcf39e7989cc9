"""Detection: shapes and COCO files, matching and losses beside numpy, average precision, methods, whole runs."""

import contextlib
import io
import itertools
import json
import os
import re
import shutil
import signal
import sys
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
import torch
from helpers import (
    DETECTION,
    DETECTION_BUFFERS,
    ROOT,
    SEED,
    assert_equal_results,
    configure,
    find_run,
    list_logged,
    list_tiny,
    read_points,
    run_in_process,
    select_kind,
    softmax,
    trainer_of,
    wandb_files,
    wandb_records,
)
from omegaconf import OmegaConf
from PIL import Image

from cl_bench.commands import run_command
from cl_bench.commands.export import export
from cl_bench.commands.wandb import make_sweep
from cl_bench.config.build import build, build_component, identify_run
from cl_bench.config.schema import select_comparable, to_plain_dict
from cl_bench.core.boxes import compute_overlaps
from cl_bench.core.errors import ConfigError
from cl_bench.core.record import name_measure
from cl_bench.core.types import Data
from cl_bench.data.coco import coco
from cl_bench.data.shapes import MASKS, shapes
from cl_bench.engine.detection import compute_precision
from cl_bench.engine.trainer import Trainer
from cl_bench.loggers.dashboard import Series, flatten_summary
from cl_bench.loggers.jsonl import read_events
from cl_bench.methods.detection import SetLoss
from cl_bench.metrics.average_precision import THRESHOLDS, average_precision, compute_iou
from cl_bench.report.compare import compare, make_tables
from cl_bench.report.page import Run
from cl_bench.report.selection import Selection
from cl_bench.runs.load import load
from cl_bench.runs.run_dir import write_predictions
from cl_bench.scenarios.base import Scenario
from cl_bench.scenarios.detection import Detection
from cl_bench.testing import check_resumption

pytestmark = pytest.mark.arithmetic

compose = cache(configure)  # composing takes longer than these runs


def build_small(method, *overrides):
    return build(compose(*list_tiny(method), *overrides))


# -- images ------------------------------------------------------------------------------------------------------------


def test_shapes_touch_the_sides_of_their_boxes_and_come_again():
    drawn = shapes(kinds=list(MASKS), train_images=30, test_images=3, size=64, draw_seed=1)
    assert drawn.train_images.shape == (30, 3, 64, 64)
    assert drawn.train_objects.shape == (30, 4, 5)
    for image, objects in zip(drawn.train_images, drawn.train_objects):
        own = objects[objects[:, 0] >= 0]
        assert len(own) >= 1
        ground = np.median(image.astype(int), axis=(1, 2))[:, None, None]  # most pixels are ground
        for number, (_, x, y, width, height) in enumerate(64 * own * [1 / 64, 1, 1, 1, 1]):
            left, top, right, bottom = x - width / 2, y - height / 2, x + width / 2, y + height / 2
            assert (np.array([left, top, right, bottom]) == np.rint([left, top, right, bottom])).all()
            assert min(left, top) >= 0
            assert max(right, bottom) <= 64
            others = np.delete(own, number, axis=0)
            if (
                others.size
                and (compute_overlaps(torch.tensor(own[number, 1:]), torch.tensor(others[:, 1:]))[0] > 0).any()
            ):
                continue  # another object may cover a side
            box = np.abs(image.astype(int) - ground).sum(axis=0)[int(top) : int(bottom), int(left) : int(right)] > 150
            assert all(side.any() for side in (box[0], box[-1], box[:, 0], box[:, -1]))
    again = shapes(kinds=list(MASKS), train_images=20, test_images=3, size=64, draw_seed=1)
    np.testing.assert_array_equal(again.train_images, drawn.train_images[:20])
    assert again.digest != drawn.digest


def make_scenario(**keys):
    source = shapes(kinds=["disc", "square", "ring"], train_images=30, test_images=9, size=32, draw_seed=0)
    defaults = {"classes_per_task": [2, 1], "class_order": [2, 0, 1], "class_order_seed": 0, "data_seed": 0}
    return source, Detection(source=source, **(defaults | {"val_fraction": 0.0} | keys))


def test_tasks_have_images_of_their_own_and_only_their_labels():
    source, scenario = make_scenario()
    rows = [task.train.index for task in scenario.tasks]
    assert sorted(torch.cat(rows).tolist()) == list(range(30))
    assert [len(own) for own in rows] == [20, 10]
    for task, own, labels in zip(scenario.tasks, rows, scenario.all_labels):
        for image, row in enumerate(own.tolist()):
            np.testing.assert_array_equal(task.train.images[image].numpy(), source.train_images[row])
            there = source.train_objects[row, :, 0] >= 0
            expected = [[2, 0, 1].index(int(c)) for c in source.train_objects[row, there, 0]]
            assert labels[image, torch.tensor(there), 0].tolist() == expected
            kept = task.train.labels[image]
            seen = [c for c in expected if c in task.classes]
            assert kept[kept[:, 0] >= 0, 0].tolist() == seen
        assert task.test is scenario.tasks[0].test
    assert len(scenario.tasks[0].train.list_classes()) == int((scenario.tasks[0].train.labels[..., 0] >= 0).sum())


def test_validation_images_are_held_out_of_training_with_every_label():
    source, scenario = make_scenario(val_fraction=0.4)
    val = scenario.tasks[0].val
    assert scenario.tasks[1].val is val
    assert len(val) == 12
    assert sorted(torch.cat([val.index, *(task.train.index for task in scenario.tasks)]).tolist()) == list(range(30))
    for image, labels, row in zip(val.images, val.labels, val.index):
        np.testing.assert_array_equal(image.numpy(), source.train_images[row])
        ids = source.train_objects[row, :, 0]
        assert labels[:, 0].tolist() == [[2, 0, 1].index(int(c)) if c >= 0 else -1 for c in ids]
    with pytest.raises(ConfigError, match=r"^val_fraction: expected validation images that show every class"):
        make_scenario(val_fraction=0.01)
    with pytest.raises(ConfigError, match=r"^val_fraction: expected at least one training image per task, 2; got 1\."):
        make_scenario(val_fraction=0.96)


def test_a_run_on_validation_images_does_not_see_the_test_images(tmp_path):
    def run(name, change):
        parts = build_small("detr_finetune", "scenario.val_fraction=0.5", "trainer.evaluate_on=val")
        parts.scenario.tasks = [replace(task, test=change(task.test)) for task in parts.scenario.tasks]
        trainer = trainer_of(parts, tmp_path / name)
        return trainer, trainer.run()

    trainer, record = run("own", lambda test: test)
    _, without = run("without", lambda test: test.take(slice(0)))
    np.testing.assert_array_equal(record.class_il.correct, without.class_il.correct)
    assert record.class_il.count.tolist() == [12, 12]
    (tmp_path / "p").mkdir()
    write_predictions(tmp_path / "p", trainer.answers, trainer.scenario)
    stored, val = np.load(tmp_path / "p" / "predictions.npz"), trainer.scenario.tasks[0].val
    assert stored["index"].tolist() == val.index.tolist()  # each shows something
    np.testing.assert_array_equal(stored["examples"], val.images[:8].numpy())


def test_a_configuration_from_before_validation_images_is_read():
    config = OmegaConf.create(OmegaConf.to_container(compose(*DETECTION, "method=detr_finetune"), resolve=True))
    del config.scenario["val_fraction"]
    assert len(build_component(config.scenario, "scenario", [], Scenario).tasks[0].val) == 0


# -- matching and losses -----------------------------------------------------------------------------------------------


def overlaps_of(a, b):
    """IoU and GIoU of two boxes (centre x, centre y, width, height), by hand."""
    (ax, ay, aw, ah), (bx, by, bw, bh) = a, b
    left, right = max(ax - aw / 2, bx - bw / 2), min(ax + aw / 2, bx + bw / 2)
    top, bottom = max(ay - ah / 2, by - bh / 2), min(ay + ah / 2, by + bh / 2)
    inside = max(0.0, right - left) * max(0.0, bottom - top)
    union = aw * ah + bw * bh - inside
    hull = (max(ax + aw / 2, bx + bw / 2) - min(ax - aw / 2, bx - bw / 2)) * (
        max(ay + ah / 2, by + bh / 2) - min(ay - ah / 2, by - bh / 2)
    )
    return inside / union, inside / union - (hull - union) / hull


def draw_answers(seed=0):
    """Logits (2, 3, 4, 3), boxes (2, 3, 4, 4), and labels (3, 3, 5) with 2, 0 and 1 objects; double precision."""
    draw = np.random.default_rng(seed)
    logits, boxes = draw.normal(size=(2, 3, 4, 3)), draw.uniform(0.2, 0.6, (2, 3, 4, 4))
    labels = np.concatenate([draw.integers(0, 2, (3, 3, 1)).astype(float), draw.uniform(0.2, 0.6, (3, 3, 4))], axis=2)
    labels[0, 1, 0] = labels[1, :, 0] = labels[2, :2, 0] = -1  # between others, everywhere, before others
    return logits, boxes, labels


def test_boxes_overlap_as_computed_by_hand():
    draw = np.random.default_rng(0).uniform(0.1, 0.9, (20, 2, 4))
    iou, giou = compute_overlaps(torch.tensor(draw[:, 0]), torch.tensor(draw[:, 1]))
    for i, (a, b) in enumerate(draw):
        np.testing.assert_allclose((iou[i], giou[i]), overlaps_of(a, b))
    iou, giou = compute_overlaps(torch.zeros(4), torch.zeros(4))
    assert iou == 0
    assert torch.isfinite(giou)


@pytest.mark.parametrize("auxiliary", [True, False])
def test_matching_and_each_term_are_those_of_numpy(auxiliary):
    logits, boxes, labels = draw_answers()
    loss = SetLoss(class_weight=1.5, box_weight=5, giou_weight=2, no_object_weight=0.1, auxiliary=auxiliary)
    match = loss.match(*map(torch.tensor, (logits, boxes, labels)))
    expected = {"classes": 0.0, "boxes": 0.0, "giou": 0.0}
    count = (labels[..., 0] >= 0).sum()
    for layer in range(2):
        entropy = weights = 0.0
        for image in range(3):
            p = softmax(logits[layer, image])
            own = np.flatnonzero(labels[image, :, 0] >= 0)

            def cost(query, row, p=p, layer=layer, image=image):
                c, *box = labels[image, row]
                answer = boxes[layer, image, query]
                giou = overlaps_of(answer, box)[1]
                return -1.5 * p[query, int(c)] + 5 * np.abs(answer - box).sum() - 2 * giou

            best = min(
                itertools.permutations(range(4), len(own)), key=lambda qs: sum(map(cost, qs, own))
            )  # every assignment
            assert match[layer, image, own].tolist() == list(best)
            assert (np.delete(match[layer, image].numpy(), own) == 4).all()
            if layer == 0 and not auxiliary:
                continue
            target = np.full(4, 2)
            for query, row in zip(best, own):
                target[query] = labels[image, row, 0]
                answer, box = boxes[layer, image, query], labels[image, row, 1:]
                expected["boxes"] += 5 * np.abs(answer - box).sum() / count
                expected["giou"] += 2 * (1 - overlaps_of(answer, box)[1]) / count
            weight = np.where(target == 2, 0.1, 1.0)
            entropy += (weight * -np.log(p[range(4), target])).sum()
            weights += weight.sum()
        if weights:
            expected["classes"] += 1.5 * entropy / weights
    found = loss(*map(torch.tensor, (logits, boxes, labels)))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(float(found[name]), value, rtol=1e-5)


def test_no_step_waits_for_an_import(monkeypatch):
    loss = SetLoss(class_weight=1, box_weight=5, giou_weight=2, no_object_weight=0.1, auxiliary=True)
    answers = [torch.tensor(answer) for answer in draw_answers()]
    before = loss.match(*answers)
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)  # an import would fail; a dry run would time it
    assert torch.equal(loss.match(*answers), before)


def test_more_objects_than_queries_and_none_at_all():
    loss = SetLoss(class_weight=1, box_weight=5, giou_weight=2, no_object_weight=0.1, auxiliary=True)
    logits, boxes, _ = map(torch.tensor, draw_answers())
    labels = torch.tensor([0.0, 0.5, 0.5, 0.2, 0.2]).expand(3, 6, 5)
    match = loss.match(logits, boxes, labels)
    assert all(sorted(row.tolist()) == [0, 1, 2, 3, 4, 4] for row in match.flatten(0, 1))
    assert all(torch.isfinite(term) for term in loss(logits, boxes, labels).values())
    empty = torch.tensor([-1.0, 0, 0, 0, 0]).expand(3, 6, 5)
    terms = loss(logits, boxes, empty)
    assert float(terms["boxes"]) == float(terms["giou"]) == 0
    assert float(terms["classes"]) > 0


# -- average precision -------------------------------------------------------------------------------------------------


def test_average_precision_of_a_case_by_hand():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 10], [20, 20, 30, 30], [0, 0, 10, 6]], dtype=float)
    image, score = np.array([0, 0, 0, 1]), np.array([0.9, 0.8, 0.7, 0.6])
    true_image, true = np.array([0, 1]), np.array([[0, 0, 10, 10], [0, 0, 10, 10]], dtype=float)
    found = average_precision(image, score, boxes, true_image, true)
    # right, doubled, beside, right from IoU 0.5 to 0.6: precision 1 up to recall 1/2, then 2/4 or none
    at = np.where(THRESHOLDS < 0.601, (51 + 50 * 0.5) / 101, 51 / 101)
    np.testing.assert_allclose(found, at)
    assert np.isnan(average_precision(image, score, boxes, true_image[:0], true[:0])).all()
    np.testing.assert_array_equal(average_precision(image[:0], score[:0], boxes[:0], true_image, true), np.zeros(10))
    np.testing.assert_allclose(compute_iou(boxes[3], boxes), [0.6, 0.6, 0, 1])


def test_average_precision_equals_pycocotools_to_five_digits(capsys):
    coco, evaluation = pytest.importorskip("pycocotools.coco"), pytest.importorskip("pycocotools.cocoeval")
    draw = np.random.default_rng(0)
    images, classes, queries = 60, 3, 16
    labels = np.full((images, 4, 5), -1.0)
    for own in labels:
        count = draw.integers(0, 5)
        own[:count, 0] = draw.integers(0, classes, count)
        own[:count, 1:] = np.concatenate(
            [draw.uniform(0.3, 0.7, (count, 2)), draw.uniform(0.1, 0.5, (count, 2))], axis=1
        )
    answer = draw.integers(0, classes, (images, queries))
    boxes = np.concatenate(
        [draw.uniform(0.2, 0.8, (images, queries, 2)), draw.uniform(0.1, 0.5, (images, queries, 2))], 2
    )
    boxes[:, :4] = labels[..., 1:] + draw.normal(0, 0.015, (images, 4, 4))
    boxes[..., 2:] = np.abs(boxes[..., 2:]) + 0.01
    answer[:, :4] = np.where(labels[..., 0] >= 0, labels[..., 0], answer[:, :4])
    scores = np.round(draw.uniform(size=(images, queries)), 2)  # with ties
    scores[:, :4] += np.where(labels[..., 0] >= 0, 0.6, 0)
    ours = compute_precision(*map(torch.tensor, (labels, answer, scores, boxes)), classes, classes)

    def to_coco(box):
        x, y, width, height = 1000 * box
        return [x - width / 2, y - height / 2, width, height]

    truth = coco.COCO()
    annotations = [
        {
            "image_id": i,
            "category_id": int(row[0]),
            "bbox": to_coco(row[1:]),
            "area": 1,
            "iscrowd": 0,
            "id": 4 * i + j + 1,
        }
        for i in range(images)
        for j, row in enumerate(labels[i])
        if row[0] >= 0
    ]
    truth.dataset = {"images": [{"id": i} for i in range(images)], "annotations": annotations}
    truth.dataset["categories"] = [{"id": c} for c in range(classes)]
    truth.createIndex()
    answers = [
        {"image_id": i, "category_id": int(answer[i, q]), "bbox": to_coco(boxes[i, q]), "score": float(scores[i, q])}
        for i in range(images)
        for q in range(queries)
    ]
    judge = evaluation.COCOeval(truth, truth.loadRes(answers), "bbox")
    judge.evaluate()
    judge.accumulate()
    theirs = judge.eval["precision"][:, :, :, 0, 2].mean(axis=1).T  # (K, 10), all areas, 100 detections
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert 0.2 < ours.mean() < 0.9


# -- methods -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queries", ["plain", "anchors"])
def test_a_step_reaches_the_parameters(queries, tmp_path):
    parts = build_small("detr_finetune", f"backbone.queries={queries}", "backbone.decoder_layers=2")
    data = parts.scenario.tasks[0].train
    batch = trainer_of(parts, tmp_path).make_batch(data.images[:6], data.labels[:6], parts.scenario.tasks[0])
    logits, boxes = parts.method.net.detect(batch.x)
    assert logits.shape == (2, 6, 9, 7)
    assert boxes.shape == (2, 6, 9, 4)
    sum(parts.method.observe(batch).values()).backward()
    without = {name for name, p in parts.method.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    # the first layer's content is 0, as in the released code: its values are its bias
    expected = {"net.decoder.0.among.value.weight"}
    if queries == "plain":
        assert without == expected
    else:  # the box head begins at 0, so nothing before its last layer learns from boxes yet; classes still reach it
        assert without <= expected | {f"net.box_head.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    assert parts.method.predict(batch.x, None).shape == (6, 6)
    assert parts.method.net.features(batch.x).shape == (6, 16)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["detr_pseudo_labels", "detr_replay"])  # the others have no further state
def test_resumes_bit_equal_wherever_it_is_stopped(method, tmp_path):
    bf16 = method == "detr_replay"
    check_resumption(partial(build_small, method, *["precision=bf16"] * bf16), tmp_path, few=bf16)


def test_pseudo_labels_are_the_sure_boxes_of_old_classes_beside_new_objects():
    parts = build_small("detr_pseudo_labels", "method.threshold=0.5", "method.most=3", "method.overlap=0.7")
    method = parts.method
    labels = torch.tensor([[[3.0, 0.5, 0.5, 0.4, 0.4], [-1, 0.2, 0.2, 0.2, 0.2]]])
    data = Data(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), labels, torch.zeros(1, dtype=torch.int64))
    scores = torch.zeros(1, 4, 6)
    scores[0, 0, 1] = 0.9  # sure, but on the new object
    scores[0, 1, 2] = 0.8  # sure, on an empty row of the labels
    scores[0, 2, 0] = 0.3  # unsure
    scores[0, 3, 4] = 1.0  # a new class
    boxes = torch.tensor([[[0.5, 0.5, 0.4, 0.42], [0.2, 0.2, 0.2, 0.2], [0.8, 0.8, 0.1, 0.1], [0.1, 0.1, 0.1, 0.1]]])
    method.detect = lambda x: (scores, boxes)
    added = method.add_boxes(data, old_classes=3)
    assert added.labels.shape == (1, 5, 5)
    torch.testing.assert_close(added.labels[:, :2], labels)
    assert added.labels[0, 2:, 0].tolist() == [-1, 2, -1]
    torch.testing.assert_close(added.labels[0, 3, 1:], boxes[0, 1])
    method.threshold = None  # the released rule
    assert method.add_boxes(data, old_classes=3).labels[0, 2:, 0].tolist() == [-1, 2, 0]


def test_joint_has_all_labels_and_no_answer_before(tmp_path):
    parts = build_small("detr_joint")
    [phase] = parts.method.learn(parts.scenario.tasks[1])
    assert len(phase.data) == 24
    torch.testing.assert_close(phase.data.labels, torch.cat(parts.scenario.all_labels))
    record = trainer_of(build_small("detr_joint"), tmp_path).run()
    assert np.isnan(record.class_il.correct[0]).all()
    assert np.isfinite(record.class_il.correct[1]).all()


def test_replay_offers_each_image_once_and_draws_old_ones(tmp_path):
    parts = build_small("detr_replay", "buffer.capacity=40", "method.replay_size=2")
    trainer = trainer_of(parts, tmp_path)
    trainer.run()
    stored = parts.buffer.data()
    trained = Data.concatenate(task.train for task in parts.scenario.tasks)
    assert len(stored) == 24
    assert stored.labels.shape == (24, 4, 5)
    assert {image.numpy().tobytes() for image in stored.images} == {i.numpy().tobytes() for i in trained.images}


@pytest.mark.skipif("CL_BENCH_TEST_LONG" not in os.environ, reason="CL_BENCH_TEST_LONG=1 runs it: half a minute each")
@pytest.mark.parametrize(("queries", "steps"), [("plain", 600), ("anchors", 300)])
def test_ten_images_are_learned(queries, steps, tmp_path):
    """AP50 above 95 on the images themselves."""
    parts = build(configure(
        "+experiment=detr_shapes_finetune", "scenario.source.kinds=[disc,square,triangle,cross]",
        "scenario.classes_per_task=[4]", "scenario.source.train_images=10", "scenario.source.test_images=2",
        f"backbone.queries={queries}", "schedule.warmup_epochs=50", "trainer.batch_size=10", f"trainer.epochs={steps}",
        "trainer.evaluate_after=last_task", "device=cpu", f"seed={SEED}",
    ))  # fmt: skip
    trainer = trainer_of(parts, tmp_path)
    parts.scenario.tasks = [replace(task, test=task.train) for task in parts.scenario.tasks]
    trainer.run()
    [found] = [row for row in trainer.record.average_precision if row["classes"] == "all"]
    print(queries, found)
    assert found["AP50"] > 95


# -- whole runs --------------------------------------------------------------------------------------------------------


REPLAY = [
    *DETECTION,
    "method=detr_replay",
    *DETECTION_BUFFERS["detr_replay"],
    "trainer.evaluate_every=4",
    "results_dir=r",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a finished run in r/, and what it wrote on the console and to TensorBoard."""
    folder = tmp_path_factory.mktemp("detection")
    told = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(told):
        assert run_in_process(*REPLAY, "logger=tensorboard", monkeypatch=patch, cwd=folder, report=True) == 0
    return folder, told.getvalue()


@pytest.mark.slow
def test_a_run_measures_ap_in_its_files_and_words(finished):
    tmp_path, told = finished
    assert re.search(r"task 2/2 done: Class-IL AP +\d+\.\d\d %, Task-IL AP +- ", told)
    run = find_run(tmp_path / "r")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["measure"] == "AP"
    assert all(value is None for value in summary["task_il"].values())
    assert {f"{key}_{of}" for key in ("AP", "AP50", "AP75") for of in ("all", "old", "new")} < set(summary["class_il"])
    lines = (run / "average_precision.csv").read_text().splitlines()
    assert lines[0] == "after_task,classes,AP,AP50,AP75"
    assert [line.rsplit(",", 3)[0] for line in lines[1:]] == ["0,all", "0,new", "1,all", "1,old", "1,new"]
    assert "task_il" not in (run / "accuracy_matrix.csv").read_text()
    page = (run / "report.html").read_text()
    page = page.split("config.yaml</summary>")[0]
    words = re.sub("<[^>]*>", " ", page)
    assert "AP" in words
    assert "ccurac" not in words
    assert (run / "plots" / "boxes.png").exists()
    assert "Class-IL AP old" in words
    assert "Task-IL is not defined for boxes" in words
    assert "ROC" not in words
    boxes = page[page.index('id="boxes-figure"') :]
    boxes = boxes[: boxes.index("</svg>")]
    assert "stroke: #fefefe" in boxes  # the objects; white itself is the page's paper
    assert "filter" not in boxes  # photographs stay as they are on a dark page
    stored = np.load(run / "predictions.npz")
    assert stored["boxes"].shape == (len(stored["index"]), 9, 4)
    assert stored["examples"].dtype == np.uint8

    comparison = compare([str(tmp_path / "r")])
    texts = [text for table in make_tables(comparison, interval=True) for text in (table.title, *table.header)]
    assert "Class-IL AP [%]" in texts
    assert "AP of old classes [%]" in texts
    assert not [text for text in texts if "Task-IL" in text]
    assert not [text for text in texts if "ccurac" in text]
    asked = compare([str(tmp_path / "r")], Selection(metrics=["AP_old", "AP50_new"]))
    assert [column.key for column in asked.columns] == ["class_il.AP_old", "class_il.AP50_new"]

    series = Series(run)
    points = [series.extract(number, event) for number, event in enumerate(read_events(run, 0, 999))]
    names = {name for point in points if point for name in point.values} | flatten_summary(summary).keys()
    assert {"class_il/average_AP", "class_il/AP_old", "class_il/AP50_new", "losses/giou"} < names
    assert not [name for name in names if "ccurac" in name]

    loaded = load(run, device="cpu")
    assert set(loaded.predict(loaded.scenario.tasks[0].test.images)) <= set(range(6))


DASHBOARD = {
    "average_AP",
    "average_incremental_AP",
    "learning_AP",
    "anytime_average_AP",
    "forgetting",
    "AP_old",
    "AP75_new",
}


@pytest.mark.slow
def test_dashboards_say_ap_and_have_the_boxes(finished, monkeypatch, tmp_path):
    run = find_run(finished[0] / "r")
    live = read_points(run / "tensorboard")
    assert {f"class_il/{name}" for name in DASHBOARD} < live.keys()
    assert not [name for name in live if "ccurac" in name or "task_il" in name]
    assert export(Run.read(run), "tensorboard", again=True)
    assert read_points(run / "tensorboard") == live

    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    assert export(Run.read(run), "wandb", ["mode=offline"])
    [file] = wandb_files(run)
    records = wandb_records(file)
    logged = {name.removesuffix("/path"): value for row in list_logged(records) for name, value in row.items()}
    assert {f"class_il/{name}" for name in DASHBOARD} < logged.keys()
    assert {f"plots/{name}" for name in ("AP_matrix", "over_tasks", "curve", "boxes", "losses")} < logged.keys()
    assert (file.parent / "files" / logged["plots/boxes"]).read_bytes() == (run / "plots" / "boxes.png").read_bytes()
    table = json.loads((file.parent / "files" / logged["buffer_by_class_table"]).read_text())
    assert table["columns"] == ["class", "objects"]
    summary = {i.key: json.loads(i.value_json) for s in select_kind(records, "summary") for i in s.update if i.key}
    assert summary["class_il/AP_all"] == Run.read(run).value("class_il", "AP_all")
    assert not [name for name in (*logged, *summary) if "ccurac" in name or "task_il" in name]
    config = {i.key: json.loads(i.value_json) for c in select_kind(records, "config") for i in c.update}
    assert config["scenario"]["classes_per_task"] == [3, 3]
    assert (file.parent / "files" / "cl_bench" / "average_precision.csv").is_file()


@pytest.mark.slow
def test_commands_take_a_run_of_detection_or_say_why_not(finished, capsys, monkeypatch, tmp_path):
    run = str(shutil.copytree(find_run(finished[0] / "r"), tmp_path / "run" / "seed0"))
    for arguments, status, said in (
        (["status", run], 0, r"Class-IL AP \d+\.\d\d"),
        (["metrics", run, "--add", "stability_gap"], 0, r"stability_gap: Class-IL -?\d+\.\d\d, Task-IL -"),
        (["audit", run], 2, "expected a run of classification; got one of detection"),
    ):
        assert run_command(arguments) == status, arguments
        assert re.search(said, "".join(capsys.readouterr()).replace("\n", " ")), arguments
    monkeypatch.setattr("cl_bench.runs.dry_run.SECONDS", 2.0)
    assert run_in_process(*REPLAY[:-1], "dry_run=true", "results_dir=none", monkeypatch=monkeypatch, cwd=tmp_path) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["status"], told["measure"]) == ("dry_run", "AP")
    assert told["expected_hours"] > 0


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_equal(finished, monkeypatch, tmp_path):
    """The process ends by SIGKILL in mid-phase of the second task."""
    typed = [*REPLAY, "trainer.checkpoint_steps=2", "logger=none"]
    child = os.fork()
    if not child:
        try:
            count = itertools.count(1)
            counted = Trainer.count_step

            def kill_at_nine(trainer, images):
                counted(trainer, images)
                if next(count) == 9:
                    os.kill(os.getpid(), signal.SIGKILL)

            Trainer.count_step = kill_at_nine
            run_in_process(*typed, monkeypatch=monkeypatch, cwd=tmp_path)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    [last] = tmp_path.glob("r/**/last.pt")
    assert torch.load(last, weights_only=True)["now"]["step"] == 2
    assert run_in_process(*typed, monkeypatch=monkeypatch, cwd=tmp_path) == 0
    straight, killed = (find_run(folder / "r") for folder in (finished[0], tmp_path))
    assert (straight / "average_precision.csv").read_text() == (killed / "average_precision.csv").read_text()
    assert_equal_results(straight, killed)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["method=er", "buffer=reservoir", "backbone=resnet18_slim"], "method"),
        (["method=detr_replay", "buffer=class_balanced", "buffer.capacity=9"], "buffer"),
        (["method=detr_replay", "buffer=herding", "buffer.capacity=9"], "buffer"),
        (["method=detr_finetune", "trainer.linear_probe=true"], "trainer.linear_probe"),
        (["method=detr_finetune", "trainer.evaluate_on=val"], "trainer.evaluate_on"),
        (["method=detr_finetune", "backbone=mlp"], "backbone"),
        (["method=detr_finetune", "scenario.classes_per_task=[3,2]"], "scenario.classes_per_task"),
        (["method=detr_finetune", "scenario.source.kinds=[disc,dog]"], "scenario.source.kinds"),
        (["method=detr_finetune", "backbone.num_queries=10"], "backbone.num_queries"),
        (["method=detr_replay", "buffer=reservoir", "method.replay_size=0"], "method.replay_size"),
        (["method=detr_replay", "buffer=reservoir", "method.balanced_lr=0.1"], "method.balanced_lr"),
        (["method=detr_pseudo_labels", "method.overlap=0"], "method.overlap"),
        (["method=detr_pseudo_labels", "method.threshold=1"], "method.threshold"),
        (
            ["method=detr_finetune", *(f"method.set_loss.{of}_weight=0" for of in ("class", "box", "giou"))],
            "method.set_loss.class_weight",
        ),
        (["method=detr_finetune", "scenario.class_order=5"], "scenario.class_order"),
        (["method=detr_finetune", "scenario.class_order=[0.0,1,2,3,4,5]"], "scenario.class_order"),
        (["method=detr_finetune", "scenario.class_order=[[0],1,2,3,4,5]"], "scenario.class_order"),
        (["method=detr_finetune", "scenario.classes_per_task=[6]", "data_seed=3"], "data_seed"),
        (["method=detr_finetune", "class_order_seed=3"], "class_order_seed"),
    ],
)
def test_what_does_not_fit_detection_is_refused(overrides, key):
    small = ["scenario=detr_shapes", "scenario.source.train_images=4", "scenario.source.test_images=2"]
    with pytest.raises(ConfigError) as caught:
        build(configure(*small, "backbone=detr_shapes", *overrides))
    assert caught.value.key == key


def test_a_sweep_of_wandb_maximises_ap():
    keys = ["scenario.val_fraction=0.1", "trainer.evaluate_on=val", "optimizer.lr=choice(0.1,0.2)"]
    sweep = make_sweep(["scenario=detr_shapes", "method=detr_finetune", "backbone=detr_shapes", *keys])
    assert sweep["metric"] == {"name": "class_il/average_AP", "goal": "maximize"}


def test_there_is_no_small_version(monkeypatch, tmp_path, capsys):
    typed = ["+experiment=detr_shapes_replay", "+scale=mini"]
    assert run_in_process(*typed, monkeypatch=monkeypatch, cwd=tmp_path) == 2
    assert "Leave +scale out, since this scenario has no small version. It is in " in capsys.readouterr().err


def test_words_for_accuracy():
    assert name_measure("Average accuracy, Accuracies in percent", "AP") == "Average AP, AP in percent"
    assert name_measure("Accuracy", "accuracy") == "Accuracy"


# -- COCO's format -----------------------------------------------------------------------------------------------------


def write_coco(folder, change=lambda content: content):
    """Two pictures for training and one for testing; ``change`` edits the content of the training file."""
    for split, count in (("train", 2), ("test", 1)):
        (folder / split).mkdir(parents=True)
        for number in range(count):
            pixels = np.full((20, 40, 3), 100 * number, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / split / f"{number}.png")
        boxes = [(0, 9, [10, 5, 20, 10]), (count - 1, 4, [30, 10, 40, 40]), (0, 4, [50, 5, 3, 3])]
        content = {
            "images": [
                {"id": i, "file_name": f"{i}.png", "width": 40, "height": 20, "name": "any"} for i in range(count)
            ],
            "categories": [{"id": 9, "name": "dog"}, {"id": 4, "name": "cat"}],
            "annotations": [
                {"id": i, "image_id": image, "category_id": c, "bbox": box} for i, (image, c, box) in enumerate(boxes)
            ]
            + [{"id": 7, "image_id": 0, "category_id": 9, "bbox": [0, 0, 9, 9], "iscrowd": 1}],
        }
        content = change(content) if split == "train" else content
        (folder / "annotations").mkdir(exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / "annotations" / f"instances_{split}.json").write_text(text)
    return str(folder)


def test_a_coco_file_is_read(tmp_path, capsys):
    found = coco(root=write_coco(tmp_path), train="train", test="test", size=16)
    assert found.class_names == ["cat", "dog"]  # by id
    assert found.train_images.shape == (2, 3, 16, 16)
    assert found.train_images[1].max() == 100
    first, second = found.train_objects
    nothing = [-1, 0, 0, 0, 0]
    np.testing.assert_allclose(first, [[1, 0.5, 0.5, 0.5, 0.5], nothing])
    np.testing.assert_allclose(second, [[0, 0.875, 0.75, 0.25, 0.5], nothing])  # cut at the border
    assert found.test_objects.shape == (1, 2, 5)
    assert "left out: 2 crowds, 2 boxes without area" in capsys.readouterr().err


def drop(key):
    return lambda content: {name: value for name, value in content.items() if name != key}


def spoil(key, **values):
    return lambda content: content | {key: [content[key][0] | values, *content[key][1:]]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: json.dumps(content)[:-9], "text that is damaged"),
        (drop("categories"), "lists images, annotations and categories"),
        (spoil("annotations", bbox=[1, 2, 3]), r"1 wrong: annotation 0: bbox \[1, 2, 3\]"),
        (spoil("annotations", bbox=[1, 2, -3, 4]), r"1 wrong: annotation 0: bbox"),
        (spoil("annotations", image_id=77), "no such image or category"),
        (spoil("annotations", category_id=None), r"1 wrong: annotations\[0\]: category_id"),
        (spoil("images", file_name="gone.png"), "gone.png"),
        (spoil("images", width=30), r"0.png has \(40, 20\) pixels"),
        (spoil("images", id=1), r"images\[1\]: id 1 again"),
        (spoil("images", width=0), r"images\[0\]: width"),
        (spoil("images", file_name="1.png"), r"images\[1\]: file_name 1.png again"),
        (spoil("annotations", id=2), r"1 wrong: annotations\[2\]: id 2 again"),
        (spoil("annotations", bbox=[0, 0, 10**400, 1]), r"1 wrong: annotation 0: bbox"),
        (spoil("annotations", iscrowd="0"), "1 wrong: annotation 0: iscrowd '0'"),
        (spoil("categories", name="cat"), r"categories\[1\]: name cat again"),
        (lambda content: content | {"annotations": content["annotations"][2:]}, "1 wrong: no object"),
        (lambda content: "[" * 100_000, "text that is damaged"),
        (spoil("categories", name="bird"), "the categories of train"),
    ],
)
def test_damaged_annotations_give_one_message(change, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        coco(root=write_coco(tmp_path, change), train="train", test="test", size=16)


def test_pictures_are_shown_as_the_file_of_annotations_has_them(tmp_path, capsys):
    root = write_coco(tmp_path, spoil("annotations", category_id=4))
    place = tmp_path / "train" / "0.png"
    read = partial(coco, root=root, train="train", test="test", size=16)
    Image.fromarray(np.full((20, 40), 30_000, dtype=np.uint16)).save(place)
    assert read().train_images[0].max() == 117  # of 16 bits
    turned = Image.Exif()
    turned[0x0112] = 6  # by a quarter
    for sides in ((20, 40), (40, 20)):  # as it is stored, or as it is shown
        Image.fromarray(np.full((*sides, 3), 9, dtype=np.uint8)).save(place, exif=turned)
        assert read().train_images[0].max() == 9
    assert "in train there is no box of dog" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"^test: expected other pictures than train; got train\."):
        coco(root=root, train="train", test="train", size=16)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"annotations/instances_train\.json; got No such file"):
        coco(root=str(tmp_path), train="train", test="test", size=16)


def test_other_pictures_are_another_run(tmp_path):
    def identify(folder):
        typed = ["scenario=coco", f"data_dir={write_coco(folder)}", "scenario.source.train=train"]
        typed += ["scenario.source.test=test", "scenario.source.size=32", "scenario.classes_per_task=[1,1]"]
        config = configure(*typed, "method=detr_finetune", "backbone=detr_shapes")
        return identify_run(config, to_plain_dict(config))[0]

    first = identify(tmp_path / "a")
    assert identify(tmp_path / "b") == first
    pixels = np.full((20, 40, 3), 7, dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "b" / "train" / "0.png")
    config = configure(
        "scenario=coco", f"data_dir={tmp_path / 'b'}", "scenario.source.train=train", "scenario.source.test=test",
        "scenario.source.size=32", "scenario.classes_per_task=[1,1]", "method=detr_finetune", "backbone=detr_shapes",
    )  # fmt: skip
    assert identify_run(config, to_plain_dict(config))[0] != first


def test_a_detector_on_classes_is_refused():
    with pytest.raises(
        ConfigError, match=r"^method: expected one for classification, as scenario=digits is; got detr_"
    ):
        build(configure("method=detr_finetune", "backbone=detr_shapes", "backbone.channels=[]"))


# -- recorded runs -----------------------------------------------------------------------------------------------------


def test_recorded_runs_show_what_the_page_says():
    rows = {row.runs[0].summary["experiment"]: row for row in compare([str(ROOT / "results/detection/records")]).rows}
    old, new = (
        {name.removeprefix("detr_shapes_"): row.values(f"class_il.{key}") for name, row in rows.items()}
        for key in ("AP_old", "AP_new")
    )
    assert (old["finetune"] < 10).all()
    for method in ("pseudo_labels", "replay"):
        assert (old[method] > 50).all()  # 55 is the lowest of three seeds each
        assert (new[method] > 60).all()
    assert "<h2>Final AP</h2>" in (ROOT / "results/detection/compare.html").read_text()
    for row in rows.values():
        run = row.runs[0]
        settings = select_comparable(to_plain_dict(configure(f"+experiment={run.summary['experiment']}")))
        assert settings == run.summary["comparable"]
