"""The page of measured claims: its tables are those of the figures, and what is measured is what it says."""

import json

import pytest
import torch
from helpers import load_script

from cl_bench.backbones.navit import lay_out


@pytest.fixture(scope="module")
def script():
    return load_script("vit_family")


def test_the_page_has_the_tables_of_the_figures(script):
    figures, text = json.loads(script.FIGURES.read_text()), script.PAGE.read_text()
    assert set(figures) == set(script.PARTS)
    assert script.fill_page(text, figures) == text
    for name in set(script.PARTS) - {"sampler"}:  # what is not built has a table only
        assert f"images/vit_family_{name}.png" in text
        assert (script.IMAGES / f"vit_family_{name}.png").stat().st_size < 150_000


def test_padding_gives_the_features_of_packing(script, monkeypatch):
    net = script.make_navit(0.5, 2).double().eval()
    net.train()
    x = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.manual_seed(1)
    packed = net.features(x)
    layouts = []

    def pad(*arguments):
        layouts.append((script.pad_to_largest(*arguments), lay_out(*arguments)))
        return layouts[-1][0]

    monkeypatch.setattr(script.navit, "_look_up_layout", pad)
    torch.manual_seed(1)
    torch.testing.assert_close(net.features(x), packed)
    ((padded, tight),) = layouts
    assert (padded.source.shape, tight.source.shape) == ((5, 64), (2, 128))  # three full images, two of 16 tokens


def test_similarity_of_maps_ignores_scale_and_one_measure_the_mean(script):
    maps = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    same = script.compare_neighbours([maps, 2 * maps])
    assert same["cosine"] == pytest.approx([1.0], abs=1e-5)
    shifted = script.compare_neighbours([maps, maps - 0.5])
    assert shifted["correlation"] == pytest.approx([1.0], abs=1e-5)
    assert shifted["cosine"][0] < 0.9


def test_operations_have_their_kind(script):
    def kind(name, *arguments):
        return script.name_kind(name, arguments)

    x, depthwise, pointwise = torch.zeros(1, 8, 4, 4), torch.zeros(8, 1, 3, 3), torch.zeros(8, 8, 1, 1)
    assert kind("convolution", x, depthwise) == "depthwise convolution"
    assert {kind("convolution", x, pointwise), kind("addmm"), kind("bmm")} == {"matrix product"}
    assert {kind("native_layer_norm"), kind("native_batch_norm")} == {"normalisation"}
    assert kind("_softmax") == "softmax"
    assert {kind("copy_"), kind("cat"), kind("clone"), kind("as_strided")} == {"reshape and copy"}
    assert {kind("add"), kind("add_"), kind("mul"), kind("gelu"), kind("clamp_min")} == {"element by element"}


def test_the_time_of_every_operation_of_a_block_is_counted(script):
    _, block, x = next(script.list_blocks())
    with script.Operations() as operations, torch.no_grad():
        block(x[:1])
    spent = {kind for kind, seconds in operations.seconds.items() if seconds > 0}
    assert spent == set(script.KINDS) - {"depthwise convolution"}
