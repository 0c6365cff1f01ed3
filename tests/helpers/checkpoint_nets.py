"""A model with every kind of tensor, quantized in part; what a checkpoint of it holds."""

from __future__ import annotations

import torch
from torch import nn

import ao_core as ao

SCHEME = "int8-weight-only"


class Net(nn.Module):
    """Odd sizes, a tied head, and buffers of both kinds."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(33, 100)
        self.body = nn.Sequential(nn.Linear(100, 63), nn.ReLU(), nn.Linear(63, 100, bias=False))
        self.head = nn.Linear(100, 33)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(33)
        self.register_buffer("table", torch.arange(100.0), persistent=False)
        self.register_buffer("nothing", None)

    def forward(self, indices):
        x = self.embed(indices) + self.table / 100
        return self.norm(self.head(x + self.body(x)))


def make(seed=0, scheme=SCHEME):
    torch.manual_seed(seed)
    net = Net().eval()
    net.norm.running_mean.normal_()
    net.table.mul_(1 + seed)
    if scheme:
        ao.quantize_(net, scheme)
    return net


INDICES = torch.tensor([0, 32, 5, 17])


def tensors_of(model):
    """Everything that the model holds, by name, quantized weights taken apart."""
    held = {}
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers()):
        parts = tensor.stored() if isinstance(tensor, ao.QuantizedTensor) else {"": tensor}
        held |= {f"{name}:{part}": data.detach() for part, data in parts.items()}
    return held


def assert_same(first, second):
    """Bit for bit, in what they hold, how it is made and what they compute."""
    one, other = tensors_of(first), tensors_of(second)
    assert one.keys() == other.keys()
    for name, data in one.items():
        assert (data.dtype, data.shape) == (other[name].dtype, other[name].shape), name
        assert torch.equal(data, other[name]), name
    for name, weight in first.named_parameters():
        again = second.get_parameter(name)
        assert type(again) is type(weight)
        if isinstance(weight, ao.QuantizedTensor):
            assert again.attributes() == weight.attributes()
            assert (again.scheme, again.provider, again.dtype) == (
                weight.scheme,
                weight.provider,
                weight.dtype,
            )
        assert again.requires_grad == weight.requires_grad
    assert torch.equal(first(INDICES), second(INDICES))


def shard_files(path):
    return sorted(file.name for file in path.glob("*.safetensors"))
