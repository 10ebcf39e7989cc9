"""What was typed and does nothing is refused, in one message that says why."""

import pytest
import yaml
from helpers import DIGITS_INSTEAD, ROOT, configure

from cl_bench.config.build import build
from cl_bench.config.explain import refuse_unread_keys
from cl_bench.config.schema import compose_config, import_allowed
from cl_bench.core.errors import ConfigError, void

ROTATED = ["scenario=rotated_mnist", "scenario.num_tasks=2", *DIGITS_INSTEAD]

L2P = ["backbone=prompt_vit_digits", "method=l2p", "method.prompts=false"]

SLCA = ["method=slca", "method.alignment=false"]

VOID = {
    "scenario.num_tasks": ["scenario.num_tasks=5", "scenario.classes_per_task=[5,5]"],
    "class_order_seed": ["class_order_seed=3"],
    "scenario.class_order_seed": ["scenario.class_order=[9,8,7,6,5,4,3,2,1,0]", "scenario.class_order_seed=3"],
    "data_seed": ["data_seed=3"],
    "scenario.val_choice": ["scenario.val_choice=last"],
    "scenario.data_seed": ["scenario.val_fraction=0.1", "scenario.val_choice=last", "scenario.data_seed=3"],
    "scenario.blurry_classes": ["scenario.blurry_classes=0.5"],
    "scenario.permutation_seed": [*ROTATED, "scenario.permutation_seed=3"],
    "scenario.angles": [*ROTATED, "scenario.change=permuted", "scenario.angles=[0,90]"],
    "buffer.capacity": ["buffer.capacity=20"],
    "method.decay": ["method=ewc", "method.decay=0.5"],
    "method.temperature": ["backbone=lvt_digits", "method.distillation=mse", "method.temperature=1"],
    "method.gamma": ["backbone=lvt_digits", "method.inter_task=false", "method.gamma=1"],
    "method.label_smoothing": ["backbone=dytox_digits", "method.label_smoothing=0.2"],
    "method.finetune_lr": ["backbone=dytox_digits", "method.finetune_epochs=0", "method.finetune_lr=0.1"],
    "method.finetune_steps": ["backbone=dytox_digits", "method.finetune_epochs=0", "method.finetune_steps=3"],
    "method.budget": ["method=supsup", "method.mask=threshold", "method.budget=3"],
    "method.beta": ["backbone=apd_digits", "method.variant=fixed", "method.beta=0.1"],
    "method.clusters": ["backbone=apd_digits", "method.variant=apd1", "method.clusters=1"],
    "method.consolidate_every": ["backbone=apd_digits", "method.variant=apd1", "method.consolidate_every=1"],
    "optimizer.decay_vectors": ["optimizer=adamw", "optimizer.weight_decay=0", "optimizer.decay_vectors=false"],
    "schedule.warmup_factor": ["schedule=cosine", "schedule.warmup_epochs=0", "schedule.warmup_factor=0.1"],
    "schedule.factor": ["schedule=multistep", "schedule.milestones=[]", "schedule.factor=0.5"],
    "method.new_weight": ["backbone=lvt_digits", "method.accumulation_head=false", "method.new_weight=1"],
    "method.new_weight_rule": ["backbone=lvt_digits", "method.accumulation_head=false", "method.new_weight_rule=decay"],
    "trainer.epochs": ["backbone=apd_digits", "method.epochs=2", "trainer.epochs=3"],
    "trainer.evaluate_sample": ["trainer.evaluate_sample=10"],
    "method.warm_up": ["backbone=memory_vit", "backbone.checkpoint=w.pt", "method.warm_up=half"],
    "method.warm_up_epochs": ["backbone=memory_vit", "backbone.pretrained=true", "method.warm_up_epochs=3"],
    "method.warm_up_lr": ["backbone=memory_vit", "backbone.pretrained=true", "method.warm_up_lr=0.1"],
    "method.warm_up_weight_decay": ["backbone=memory_vit", "backbone.checkpoint=w.pt", "method.warm_up_weight_decay=1"],
    "method.rehearsal": ["backbone=memory_vit_digits", "method.rehearsal=new"],
    "method.rehearsal_size": ["backbone=memory_vit_digits", "method.rehearsal_size=8"],
    "method.proposals": ["method=frcl", "buffer=per_task", "buffer.capacity=20", "method.proposals=9"],
    "method.pool": [*L2P, "method.pool=5"],
    "method.top": [*L2P, "method.top=1"],
    "method.length": [*L2P, "method.length=2"],
    "method.pull": [*L2P, "method.pull=1"],
    "method.general_layers": [*L2P[::2], "method=dualprompt", "method.general_layers=[1]"],
    "method.expert_layers": [*L2P[::2], "method=dualprompt", "method.expert_layers=[1]"],
    "method.layers": [*L2P[::2], "method=coda_prompt", "method.layers=[1]"],
    "method.components": [*L2P[::2], "method=coda_prompt", "method.components=2"],
    "method.orthogonality": [*L2P[::2], "method=coda_prompt", "method.orthogonality=1"],
    "backbone.model": ["backbone=memory_vit_digits", "backbone.model=vit_base"],
    "backbone.patch_size": ["backbone=memory_vit", "backbone.checkpoint=w.pt", "backbone.patch_size=2"],
    "backbone.dim": ["backbone=memory_vit", "backbone.pretrained=true", "backbone.dim=64"],
    "backbone.depth": ["backbone=memory_vit", "backbone.pretrained=true", "backbone.depth=3"],
    "backbone.heads": ["backbone=memory_vit", "backbone.pretrained=true", "backbone.heads=3"],
    "method.alignment_epochs": [*SLCA, "method.alignment_epochs=3"],
    "method.alignment_draws": [*SLCA, "method.alignment_draws=8"],
    "method.alignment_lr": [*SLCA, "method.alignment_lr=0.1"],
    "method.alignment_temperature": [*SLCA, "method.alignment_temperature=1"],
    "method.trunk_lr": ["method=slca", "backbone=timm", "backbone.frozen=true", "method.trunk_lr=0.1"],
    "method.replay_current_task": ["method=er", "buffer=herding", "method.replay_current_task=true"],
    "method.balanced_lr": [
        "scenario=detr_shapes",
        "method=detr_replay",
        "backbone=detr_shapes",
        "method.balanced_lr=0.1",
    ],
    "method.tau": ["method=ocs", "buffer=ordered", "buffer.capacity=20", "trainer.batch_size=8", "method.tau=1"],
    "backbone.low_scales": ["backbone=navit", "backbone.low_share=0", "backbone.low_scales=[0.5]"],
    "backbone.mlp_ratio": ["backbone=memory_vit", "backbone.pretrained=true", "backbone.mlp_ratio=3"],
}


@pytest.mark.parametrize("key", VOID)
def test_a_key_that_another_one_makes_void_is_refused(key):
    with pytest.raises(ConfigError) as caught:
        build(configure(*VOID[key]))
    assert caught.value.key == key
    assert caught.value.expected.startswith("no value, since ")
    assert caught.value.fix == "Leave it out."


def test_every_declaration_is_tried():
    declared = set()
    for group in ("backbone", "buffer", "method", "optimizer", "schedule", "scenario", "trainer"):
        for path in (ROOT / "configs" / group).glob("*.yaml"):
            if target := yaml.safe_load(path.read_text()).get("_target_"):
                declared |= {
                    f"{group}.{argument}" for argument, *_ in vars(import_allowed(target, group, [])).get("void", ())
                }
    assert declared == {key if "." in key else f"scenario.{key}" for key in VOID}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fine", "found", "expected"),
    [
        # they say the same
        (["scenario.num_tasks=2", "scenario.classes_per_task=[5,5]"], lambda p: len(p.scenario.tasks), 2),
        # the other one stands in a file
        (["scenario.classes_per_task=[5,5]"], lambda p: len(p.scenario.tasks), 2),
        # its source reads it
        (
            ["scenario=permuted_digits", "scenario.num_tasks=2", "scenario.classes_per_task=[5,10,5]"],
            lambda p: [len(task.classes) for task in p.scenario.tasks],
            [5, 10, 5],
        ),
        (["scenario.class_order=random", "class_order_seed=3"], lambda p: sorted(p.scenario.class_order), [*range(10)]),
        (["scenario.test_per_class=3", "data_seed=3"], lambda p: sum(len(t.test) for t in p.scenario.tasks), 30),
        (["scenario.blurry=0.1", "data_seed=3"], lambda p: p.scenario.recurring, True),
        (["method=ewc", "method.online=true", "method.decay=0.5"], lambda p: p.method.decay, 0.5),
        (["buffer.capacity=0"], lambda p: p.buffer.capacity, 0),
        (["backbone=apd_digits", "trainer.epochs=3"], lambda p: (p.settings.epochs, p.method.epochs), (3, 3)),
        (["backbone=memory_vit_digits", "method.warm_up_epochs=3"], lambda p: p.method.warm_up_epochs, 3),
    ],
)
def test_what_acts_is_taken(fine, found, expected):
    config = configure(*fine)
    refuse_unread_keys(config, fine)
    assert found(build(config)) == expected


def test_a_seed_that_nothing_refers_to_is_refused():
    typed = ["scenario.class_order=random", "class_order_seed=3", "scenario.class_order_seed=5"]
    with pytest.raises(ConfigError, match=r"^class_order_seed: expected no value, since the scenario has"):
        refuse_unread_keys(configure(*typed), typed)


def test_only_arguments_that_there_are_can_be_declared():
    with pytest.raises(AssertionError, match="has no argument"):
        void("y", when=lambda v: True, why="")(lambda x: x)


@pytest.mark.parametrize("typed", ["optimizer.lr=0.1", "schedule=cosine", "trainer.epochs=3"])
def test_what_only_a_step_reads_is_refused_for_a_method_without_one(typed):
    key, _, value = typed.partition("=")
    with pytest.raises(ConfigError) as caught:
        build(configure("method=simplecil", typed))
    expected = (key, "no value, since method=simplecil takes no training step", value, "Leave it out.")
    assert (caught.value.key, caught.value.expected, caught.value.got, caught.value.fix) == expected


def test_what_an_experiment_sets_or_a_method_reads_is_taken_without_a_step(tmp_path):
    typed = ["method=simplecil", "trainer.evaluate_after=last_task", "trainer.evaluate_every=5"]
    assert build(configure("+experiment=quickstart", *typed, "backbone=mlp", "buffer=none")).method.gradient_free
    ranpac = tmp_path / "method" / "ranpac_of_its_own.yaml"
    ranpac.parent.mkdir()
    ranpac.write_text("_target_: cl_bench.methods.ranpac.RanPAC\nprojection: ${trainer.batch_size}\n")
    config = compose_config(["method=ranpac_of_its_own", "trainer.batch_size=30"], tmp_path)
    assert build(config).method.projection.shape[1] == 30
    with pytest.raises(ConfigError, match=r"^trainer\.epochs: expected no value"):
        build(compose_config(["method=ranpac_of_its_own", "trainer.batch_size=30", "trainer.epochs=2"], tmp_path))


def test_the_configuration_of_a_finished_run_was_not_typed_here():
    finished = configure("method=simplecil", "scenario.train_per_class=2")
    finished.choices.method = "simplecil"  # no interpolation, as in config.yaml
    configure("method=finetune", "trainer.epochs=3")  # what was composed last in this process
    assert build(finished).method.gradient_free
