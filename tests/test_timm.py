"""Any model of timm as a backbone: under the methods, at small sizes, from a file, frozen."""

import numpy as np
import pytest
import torch
from helpers import TINY, configure, trainer_of

from cl_bench.backbones.base import Backbone
from cl_bench.config.build import build, prepare_component
from cl_bench.core.errors import ConfigError

pytestmark = pytest.mark.arithmetic

SHAPE = (3, 32, 32)
MEAN, STD = [0.5, 0.4, 0.3], [0.25, 0.2, 0.1]
VIT = ["backbone=timm", "backbone.name=test_vit"]
RESNET = ["backbone=timm", "backbone.name=test_resnet", "backbone.size=64"]


def network(*overrides, shape=SHAPE):
    channels = shape[0]
    return prepare_component(configure(*overrides).backbone, "backbone", [], Backbone)(
        num_classes=10, image_shape=shape, image_mean=MEAN[:channels], image_std=STD[:channels]
    )


def parts_of(method, net, *overrides):
    buffers = {"er": "reservoir", "derpp": "reservoir", "icarl": "herding"}
    buffer = [f"buffer={buffers[method]}", "buffer.capacity=20"] if method in buffers else ["buffer=none"]
    return build(configure(*TINY, f"method={method}", *net, *buffer, "trainer.epochs=1", *overrides))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["er", "derpp", "finetune", "lwf", "ewc", "icarl", "joint"])
def test_a_transformer_of_timm_runs_under(method, tmp_path):
    record = trainer_of(parts_of(method, [*VIT, "backbone.size=32"]), tmp_path).run()
    assert record.class_il.count.tolist() == [20, 20]
    assert not np.isnan(record.class_il.accuracy[-1]).any()


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("method", ["er", "lwf", "ewc", "icarl"])
def test_only_the_head_of_a_frozen_network_changes(method, frozen, tmp_path):
    """Under BatchNorm as well: neither weights nor statistics."""
    parts = parts_of(method, RESNET, f"backbone.frozen={frozen}".lower())
    before = {name: value.clone() for name, value in parts.method.net.state_dict().items()}
    trainer_of(parts, tmp_path).run()
    changed = {name for name, value in parts.method.net.state_dict().items() if not torch.equal(value, before[name])}
    trunk = {name for name in changed if name.startswith("trunk.")}
    assert changed - trunk == {"head.weight", "head.bias"}
    assert bool(trunk) != frozen
    names = {name for name, _ in parts.method.net.named_parameters()}
    assert (names == {"head.weight", "head.bias"}) == frozen


@pytest.mark.parametrize(
    ("name", "found"),
    [("resnet81", "Did you mean resnet18"), ("vit_tinny_patch16_224", "Did you mean vit_tiny_patch16_224"),
     ("resnet18.a9_in1k", "Did you mean resnet18"), ("hf-hub:someone/model", "lists them"),
     ("local-dir:weights", "lists them"), ("./weights.pt", "lists them")],
)  # fmt: skip
def test_a_wrong_name_is_told_the_nearest(name, found):
    with pytest.raises(ConfigError, match=r"^backbone\.name: expected one of the \d+ models of timm") as error:
        network("backbone=timm", f"backbone.name='{name}'")
    assert found in error.value.fix


@pytest.mark.slow
def test_a_map_that_would_collapse_is_refused_with_a_way_out():
    with pytest.raises(ConfigError, match=r"^backbone\.name: .*32 x 32; got test_resnet \(a last map of 1 x 1\)") as e:
        network(*RESNET[:2])
    assert "backbone.size=64 or more" in e.value.fix
    assert "output_stride=8" in e.value.fix
    for way in (["backbone.size=64"], ["+backbone.options.output_stride=8"]):
        assert network(*RESNET[:2], *way).features(torch.zeros(2, *SHAPE)).ndim == 2
    with pytest.raises(ConfigError, match=r"^backbone\.name: .*got inception_v3 \(RuntimeError"):  # no map at all
        network("backbone=timm", "backbone.name=inception_v3")


def test_a_model_with_positions_is_built_for_its_images():
    assert network(*VIT).trunk.patch_embed.grid_size == (2, 2)
    assert network(*VIT, "+backbone.options.patch_size=4").trunk.patch_embed.grid_size == (8, 8)
    assert network(*VIT, "backbone.size=model").trunk.patch_embed.grid_size == (10, 10)  # 160 pixels, patches of 16
    assert network(*VIT, "backbone.size=48", shape=(1, 28, 28)).trunk.patch_embed.grid_size == (3, 3)


def test_a_network_of_convolutions_keeps_its_channels_innermost():
    last = network(*RESNET).trunk.forward_features(torch.rand(2, 3, 64, 64))
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert not last.is_contiguous()


def test_pixels_are_normalised_as_the_model_was_trained():
    """From the scenario's mean and deviation to the model's; both are of pixels in [0, 1]."""
    net = network(*VIT, "backbone.normalisation=model")
    mean, std = (torch.tensor(net.trunk.pretrained_cfg[key]) for key in ("mean", "std"))
    pixels = torch.rand(3, *SHAPE)
    given = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    expected = (pixels - mean[:, None, None]) / std[:, None, None]
    seen = []
    net.trunk.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    net.eval().features(given)
    torch.testing.assert_close(seen[0], expected)
    plain = network(*VIT)
    plain.trunk.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    plain.eval().features(given)
    assert torch.equal(seen[1], given)
    with pytest.raises(ConfigError, match=r"^backbone\.normalisation: expected scenario, since test_vit has"):
        network(*VIT, "backbone.normalisation=model", shape=(1, 32, 32))


def published_weights(folder, kind):
    """A file like those of timm: with the classifier of 1,000 classes; at the images' size."""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(5)
    state = timm.create_model("test_vit", num_classes=1000, img_size=32).state_dict()
    file = folder / f"weights.{kind}"
    save_file(state, file) if kind == "safetensors" else torch.save(state, file)
    return file, state


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_the_weights_of_a_file_are_taken_without_its_classifier(kind, tmp_path):
    file, state = published_weights(tmp_path, kind)
    net = network(*VIT, f"backbone.checkpoint={file}")
    own = net.trunk.state_dict()
    assert set(state) - set(own) == {"head.weight", "head.bias"}
    assert all(torch.equal(state[name], value) for name, value in own.items())
    larger = network(*VIT, f"backbone.checkpoint={file}", "backbone.size=64").trunk.state_dict()
    assert larger["pos_embed"].shape[1] == 4 * 4 + 1  # resampled, as timm does it
    assert torch.equal(larger["blocks.0.mlp.fc1.weight"], state["blocks.0.mlp.fc1.weight"])


def test_a_file_that_does_not_fit_is_refused(tmp_path):
    file, state = published_weights(tmp_path, "pth")
    del state["blocks.0.mlp.fc1.weight"]
    torch.save(state, tmp_path / "half.pth")
    torch.save({"weights": torch.nn.Identity()}, tmp_path / "pickle.pth")  # code, which weights_only refuses
    for name, why in (("half.pth", "no blocks.0.mlp.fc1.weight"), ("pickle.pth", "Error"), ("absent.pth", "Error")):
        with pytest.raises(
            ConfigError, match=r"^backbone\.checkpoint: expected a file with the weights of test_vit"
        ) as e:
            network(*VIT, f"backbone.checkpoint={tmp_path / name}")
        assert why in e.value.got
    with pytest.raises(ConfigError, match=r"^backbone\.checkpoint: expected a file"):
        network(*RESNET, f"backbone.checkpoint={file}")
    with pytest.raises(ConfigError, match=r"^backbone\.checkpoint: expected null with pretrained=true"):
        network(*VIT, f"backbone.checkpoint={file}", "backbone.pretrained=true")


@pytest.mark.parametrize(
    "override",
    ["+backbone.options.checkpoint_path=w.pt", "+backbone.options.pretrained_cfg={file:w.pt}",
     "+backbone.options.norm_layer=x", "+backbone.options.num_classes=3", "+backbone.options.scriptable=true",
     "+backbone.options.patches=4", "backbone.size=0", "backbone.size=big", "backbone.size=true"],
)  # fmt: skip
def test_an_option_names_no_file_and_is_one_of_the_model(override):
    key = override.removeprefix("+").split("=")[0]
    with pytest.raises(ConfigError) as error:
        network(*VIT, override)
    assert error.value.key == ("backbone.options" if "options" in key else "backbone.size")
