"""1×1 convolutions as linears, so that every scheme for linears applies to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from ao_core import AoError


class PointwiseConv2d(nn.Linear):
    """A ``nn.Conv2d`` with a 1×1 kernel and one group, computed by ``F.linear``.

    Its weight is ``[O, I]``. Stride and padding are the convolution's; dilation means nothing to a single
    tap. Made by :func:`swap_conv2d_1x1_to_linear`.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(conv.in_channels, conv.out_channels, bias=False, device="meta")
        weight = conv.weight
        self.weight = nn.Parameter(weight.detach().flatten(1), requires_grad=weight.requires_grad)
        self.bias = cast("nn.Parameter", conv.bias)
        self.stride: tuple[int, int] = conv.stride  # type: ignore[assignment]
        self.padding = [0, 0, 0, 0]  # left, right, top, bottom, as F.pad wants it
        if not isinstance(conv.padding, str):  # "same" and "valid" add nothing to a 1×1 kernel
            down, across = conv.padding
            self.padding = [across, across, down, down]
        self.padding_mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        self.train(conv.training)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's own name
        """``[B, I, H, W]`` or ``[I, H, W]`` to ``[B, O, H', W']`` or ``[O, H', W']``."""
        if any(self.padding):
            input = F.pad(input, self.padding, self.padding_mode)  # noqa: A001
        taps = input[..., :: self.stride[0], :: self.stride[1]]
        out = F.linear(taps.movedim(-3, -1), self.weight, self.bias)  # [B, H', W', O]
        return out.movedim(-1, -3)

    def extra_repr(self) -> str:
        """With stride and padding."""
        return f"{super().extra_repr()}, stride={self.stride}, padding={tuple(self.padding)}"


@dataclass(frozen=True)
class SwapReport:
    """What :func:`swap_conv2d_1x1_to_linear` did.

    Attributes:
        swapped: names of the modules that are linears now.
        refused: names of 1×1 convolutions that were left alone → why.
    """

    swapped: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


def swap_conv2d_1x1_to_linear(
    model: nn.Module, filter_fn: Callable[[nn.Module, str], bool] | None = None
) -> SwapReport:
    """Replace the 1×1 convolutions of ``model`` by linears that compute the same, in place.

    Args:
        model: any module that holds ``nn.Conv2d`` ones.
        filter_fn: ``filter_fn(module, name)`` says which of the 1×1 convolutions; all by default.

    Returns:
        What was swapped, and what was left alone and why.

    Raises:
        AoError: ``model`` is itself a convolution, which can't be replaced in place.
    """
    if isinstance(model, nn.Conv2d):
        raise AoError(
            "the model is itself a Conv2d, which can't be replaced in place. Put it into a module, "
            "such as nn.Sequential, or make ao_quant.pointwise.PointwiseConv2d(model)."
        )
    report = SwapReport()
    found = [
        (name, module)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)
    ]
    made: dict[nn.Conv2d, PointwiseConv2d] = {}  # a module used in two places stays one module
    for name, module in found:
        if filter_fn is not None and not filter_fn(module, name):
            continue
        if reason := _refusal(module):
            report.refused[name] = reason
            continue
        owner, _, attribute = name.rpartition(".")
        made.setdefault(module, PointwiseConv2d(module))
        setattr(model.get_submodule(owner), attribute, made[module])
        report.swapped.append(name)
    return report


def _refusal(conv: nn.Conv2d) -> str | None:
    if conv.groups != 1:
        return f"it has {conv.groups} groups, and a linear mixes all channels"
    if type(conv) is not nn.Conv2d:
        return f"it is a {type(conv).__name__}, whose forward may do more than a Conv2d's"
    if hasattr(conv, "parametrizations"):
        return "it is parametrized; call torch.nn.utils.parametrize.remove_parametrizations first"
    return None
