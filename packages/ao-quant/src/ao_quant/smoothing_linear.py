"""SmoothQuant by a module that watches its own inputs, as torchao had it.

For a model that is run by hand: swap the linears, run some batches, freeze. ``ao_core.compress_`` does more:
it folds scales into the layer before, searches alpha, and needs one block's memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ao_core import AoError, InputScaledTensor
from ao_quant.int8 import Int8Dynamic
from ao_quant.smoothquant import column_absmax, smoothing_factors


def get_scale(X_absmax: Tensor, W_absmax: Tensor, alpha: float = 0.5) -> Tensor:
    """``X_absmax ** alpha / W_absmax ** (1 - alpha)``, 1 for dead channels: float32 ``[K]``.

    Source: SmoothQuant (arXiv 2211.10438), equation 4.
    """
    return smoothing_factors(X_absmax, W_absmax, alpha)


class SmoothFakeDynamicallyQuantizedLinear(nn.Linear):
    """A linear that records the largest magnitude of each input channel until it is frozen.

    While ``calibrating`` it computes in float and keeps ``x_running_abs_max`` (a buffer, so that it moves
    with the module). :meth:`to_inference` smooths and quantizes the weight to ``int8-dynamic``
    behind an input scale; from then on it is an ordinary linear with a quantized weight.
    """

    x_running_abs_max: Tensor

    def __init__(self, *args: Any, alpha: float = 0.5, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.alpha, self.calibrating, self.debug_skip_scaling = alpha, True, False
        empty = torch.zeros(self.in_features, dtype=torch.float32, device=self.weight.device)
        self.register_buffer("x_running_abs_max", empty, persistent=False)

    @classmethod
    def from_float(cls, mod: nn.Linear, alpha: float = 0.5) -> SmoothFakeDynamicallyQuantizedLinear:
        """The same linear, its parameters shared, ready to calibrate."""
        made = cls(
            mod.in_features, mod.out_features, mod.bias is not None, alpha=alpha, device=mod.weight.device
        )
        made.weight, made.bias = mod.weight, mod.bias
        return made.train(mod.training)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's own name
        """``[..., K]`` to ``[..., N]``."""
        if self.calibrating and input.numel():
            with torch.no_grad():
                seen = input.reshape(-1, self.in_features).abs().amax(0).float()
                torch.maximum(self.x_running_abs_max, seen, out=self.x_running_abs_max)
        return F.linear(input, self.weight, self.bias)

    def to_inference(self) -> None:
        """Smooth and quantize the weight, by what was recorded.

        Raises:
            AoError: no input was recorded.
            RejectedError: the weight holds NaN, or is quantized already.
        """
        if not self.debug_skip_scaling and not bool(self.x_running_abs_max.any()):
            raise AoError(
                "this linear saw no input while calibrating. Run the model on some batches first, or "
                "set debug_skip_calibration=True to quantize without smoothing."
            )
        weight = self.weight.detach()
        s = torch.ones_like(self.x_running_abs_max)
        if not self.debug_skip_scaling:
            s = smoothing_factors(self.x_running_abs_max, column_absmax([weight]), self.alpha)
        base = Int8Dynamic().quantize((weight.float() * s).to(weight.dtype))
        smoothed = InputScaledTensor(base, 1 / s, shape=base.shape, dtype=base.dtype, scheme=base.scheme)
        self.weight = nn.Parameter(smoothed, requires_grad=False)
        self.calibrating = False
        del self.x_running_abs_max  # a frozen one has the state of an ordinary linear


def swap_linear_with_smooth_fq_linear(
    model: nn.Module, skip_fqn_list: Sequence[str] | None = None, cur_fqn: str = "", alpha: float = 0.5
) -> None:
    """Replace the linears of ``model`` by :class:`SmoothFakeDynamicallyQuantizedLinear`, in place.

    Args:
        model: any module that holds linears.
        skip_fqn_list: qualified names to leave alone.
        cur_fqn: prefix of the names in ``skip_fqn_list``.
        alpha: 0 to 1: how much of the difficulty moves from the activations to the weights.

    Raises:
        AoError: ``model`` is itself a linear, or a name in ``skip_fqn_list`` is none of its linears.
    """
    if type(model) is nn.Linear:
        raise AoError(
            "the model is itself a Linear, which can't be replaced in place. Put it into a module, or "
            "call SmoothFakeDynamicallyQuantizedLinear.from_float(model)."
        )
    found = {f"{cur_fqn}.{name}".lstrip("."): name for name, m in _linears(model).items()}
    skipped = set(skip_fqn_list or ())
    if unknown := sorted(skipped - set(found)):
        raise AoError(f"skip_fqn_list names {unknown}, which are no linears of the model: {list(found)[:5]}.")
    for fqn, name in found.items():
        if fqn not in skipped:
            owner, _, attribute = name.rpartition(".")
            module = model.get_submodule(name)
            made = SmoothFakeDynamicallyQuantizedLinear.from_float(module, alpha=alpha)  # type: ignore[arg-type]
            setattr(model.get_submodule(owner), attribute, made)


def smooth_fq_linear_to_inference(model: nn.Module, debug_skip_calibration: bool = False) -> None:
    """Freeze every :class:`SmoothFakeDynamicallyQuantizedLinear` of ``model``.

    Args:
        model: after some batches were run through it.
        debug_skip_calibration: quantize without smoothing, whatever was recorded.

    Raises:
        AoError: one of them saw no input; none is frozen then.
    """
    modules = _smooth(model)
    for name, module in modules.items():
        if not debug_skip_calibration and not bool(module.x_running_abs_max.any()):
            raise AoError(
                f"{name!r} saw no input while calibrating. Run the model on batches that reach it, skip "
                "it when swapping, or set debug_skip_calibration=True. Nothing was changed."
            )
    for module in modules.values():
        module.debug_skip_scaling = debug_skip_calibration
        module.to_inference()


def set_smooth_fq_attribute(model: nn.Module, attribute_name: str, new_attribute_val: Any) -> None:
    """Set an attribute, such as ``alpha``, of every :class:`SmoothFakeDynamicallyQuantizedLinear`.

    Raises:
        AttributeError: they have no such attribute.
    """
    for name, module in _smooth(model).items():
        if not hasattr(module, attribute_name):
            raise AttributeError(f"{name!r} has no attribute {attribute_name!r}.")
        setattr(module, attribute_name, new_attribute_val)


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if type(module) is nn.Linear}


def _smooth(model: nn.Module) -> dict[str, SmoothFakeDynamicallyQuantizedLinear]:
    kind = SmoothFakeDynamicallyQuantizedLinear
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}
