"""A stranger's plugin: an op that can be measured, one that can't, a right kernel and three that are not."""

import torch

import ao_core as ao


def reference(x, weight):
    return (x.float() @ weight.float().t()).to(x.dtype)


def fake(x, weight):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def samples(device):
    yield torch.randn(3, 8, device=device), torch.randn(5, 8, device=device)


def problem(x, n, seed):
    generator = torch.Generator(x.device).manual_seed(seed)
    return x, torch.randn(n, x.shape[1], generator=generator, device=x.device).to(x.dtype)


def broken(x, weight):
    raise OSError("no such instruction")


PLAIN = ao.Op(
    "stranger_linear",
    "(Tensor x, Tensor weight) -> Tensor",
    reference=reference,
    fake=fake,
    samples=samples,
    problem=problem,
)
SILENT = ao.Op(
    "stranger_silent", "(Tensor x, Tensor weight) -> Tensor", reference=reference, fake=fake, samples=samples
)


@ao.hookimpl
def ao_register_ops():
    return [PLAIN, SILENT]


@ao.hookimpl
def ao_register_kernels():
    return [
        ao.Kernel("stranger_linear", "right", lambda x, weight: x @ weight.t()),
        ao.Kernel("stranger_linear", "wrong", lambda x, weight: x @ weight.t() * 1.1),
        ao.Kernel("stranger_linear", "broken", broken),
        ao.Kernel("stranger_linear", "picky", broken, rejects=lambda key: "it wants a full moon"),
    ]
