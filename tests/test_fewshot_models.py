import pytest
import torch
from torch import nn

from mirror_opt.errors import InputError
from mirror_opt.fewshot import MLP, Conv4


def test_mlp_is_1_40_40_1():
    shapes = [tuple(p.shape) for p in MLP().parameters()]
    assert shapes == [(40, 1), (40,), (40, 40), (40,), (1, 40), (1,)]


@pytest.mark.parametrize(
    ("shape", "features"), [((1, 28, 28), 1), ((3, 32, 32), 4), ((3, 84, 84), 25), ((2, 16, 50), 3)]
)
@pytest.mark.parametrize("filters", [7, 64])
def test_conv4_takes_channels_and_size_from_the_data(shape, features, filters):
    model = Conv4(shape, outputs=5, filters=filters)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert [m.in_channels for m in convolutions] == [shape[0], filters, filters, filters]
    assert {m.out_channels for m in convolutions} == {filters}
    assert model.head.in_features == filters * features
    assert model(torch.rand(6, *shape)).shape == (6, 5)


def test_conv4_uses_the_statistics_of_its_batch():
    model = Conv4((1, 28, 28), outputs=5, filters=4)
    assert not list(model.buffers())
    images = torch.rand(10, 1, 28, 28)
    trained = model.train()(images)
    assert torch.equal(trained, model.eval()(images))
    assert not torch.allclose(trained[:5], model(images[:5]))


def test_a_model_is_drawn_from_the_global_generator():
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(Conv4((1, 16, 16), outputs=2, filters=2).head.weight)
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_models_refuse():
    with pytest.raises(InputError, match=r"images are 8 x 28: .* at least 16"):
        Conv4((1, 8, 28), outputs=5)
    with pytest.raises(InputError, match="filters is 0"):
        Conv4((1, 28, 28), outputs=5, filters=0)
    with pytest.raises(InputError, match=r"hidden is \(\)"):
        MLP(hidden=())
    with pytest.raises(InputError, match=r"hidden is \(40, 0\)"):
        MLP(hidden=(40, 0))


def test_a_block_of_conv4():
    block = Conv4((1, 28, 28), outputs=5, filters=8).body[0]
    assert [type(m) for m in block] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d]
