"""What the layers of a model see: which rows, how often, and a sample of the activations themselves."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ao_autoquant.modules import Call
from ao_core import Layer, ModelError, OptionError, find_layers
from ao_core.calibrate import as_batches, tensors
from ao_core.numerics.hessian import finite

SAMPLE_ROWS = 256
_MOST_SIZES = 4  # of calls of a module whose inputs are kept whole


@dataclass
class Seen:
    """What one layer saw.

    Attributes:
        layer: the layer.
        calls: rows of a call → how often, each call counted with the weight of its example.
        parts: samples of its inputs, ``[r, K]`` each.
        dtype: of its inputs.
        bias: of the module that was called first, or None.
        inputs: rows of a call → such a call, of weights that are measured with their module.
    """

    layer: Layer
    calls: dict[int, float] = field(default_factory=dict)
    parts: list[torch.Tensor] = field(default_factory=list)
    dtype: torch.dtype = torch.float32
    bias: torch.Tensor | None = None
    inputs: dict[int, Call] = field(default_factory=dict)
    _held: int = 0

    @property
    def by_module(self) -> bool:
        """Whether the weight is measured by running the module that holds it."""
        return self.layer.kind != "linear"

    def keep(self, call: Call, rows: int, weight: float) -> None:
        """Count a call of the module; one of each number of rows is kept, of at most ``_MOST_SIZES``."""
        if rows not in self.inputs and len(self.inputs) >= _MOST_SIZES:
            rows = min(self.inputs, key=lambda known: abs(known - rows))
        self.calls[rows] = self.calls.get(rows, 0.0) + weight
        if rows not in self.inputs:
            self.inputs[rows] = Call(
                call.module, detached(call.args, copy=True), detached(call.kwargs, copy=True)
            )

    def add(self, x: torch.Tensor, weight: float) -> None:
        """Count a call with input ``x`` ``[..., K]``."""
        rows = x.detach().reshape(-1, x.shape[-1])
        if len(rows) == 0:
            return
        known = len(rows) in self.calls
        self.calls[len(rows)] = self.calls.get(len(rows), 0.0) + weight
        self.dtype = x.dtype
        room = SAMPLE_ROWS - self._held
        if room > 0 and (not known or self._held < SAMPLE_ROWS // 2):
            step = math.ceil(len(rows) / room)
            self.parts.append(rows[::step].clone())
            self._held += len(self.parts[-1])

    @property
    def sample(self) -> torch.Tensor:
        """Inputs that it saw, at most ``SAMPLE_ROWS`` of them: ``[rows, K]``; none of a module's."""
        if self.by_module:
            return self.layer.weight.new_zeros(0, self.layer.weight.shape[-1])
        return torch.cat(self.parts)


@dataclass(frozen=True)
class Profile:
    """What was seen.

    Attributes:
        seen: layer → what it saw, for the layers that can be searched.
        left: layer → why it is left alone.
    """

    seen: dict[str, Seen]
    left: dict[str, str]


class Recorder:
    """Hooks on the linears of ``model`` that keep what they see, until :meth:`close`.

    Raises:
        ModelError: the model lies on the meta device, has no layer to search, or one with NaN or infinity.
    """

    def __init__(self, model: nn.Module, wanted: Callable[[nn.Module, str], bool] | None = None) -> None:
        found = find_layers(model)
        self.weight = 1.0
        self.left = dict(found.left)
        self.seen: dict[str, Seen] = {}
        self._hooks: list[Any] = []
        for name, layer in found.replaceable.items():
            reason = _unsearchable(layer)
            if reason is None and wanted is not None and not wanted(layer.owners[0][0], name):
                reason = "the filter leaves it out"
            if reason is None:
                self.seen[name] = Seen(layer)
            else:
                self.left[name] = reason
        if any(seen.layer.weight.device.type == "meta" for seen in self.seen.values()):
            raise ModelError(
                "the model lies on the meta device and has no values to measure. Load its weights first."
            )
        if not self.seen:
            why = "; ".join(f"{name}: {reason}" for name, reason in list(self.left.items())[:3])
            raise ModelError(f"{type(model).__name__} has no layer to search: {why or 'it has none'}.")
        for name, seen in self.seen.items():
            if not finite(seen.layer.weight.detach()):
                dtype = str(seen.layer.weight.dtype).removeprefix("torch.")
                raise ModelError(
                    f"the weight of {name!r} holds NaN or infinity in {dtype}, and nothing was measured. "
                    "Look for a damaged file, or for a cast that overflowed."
                )
        for seen in self.seen.values():
            for module in {id(module): module for module, _ in seen.layer.owners}.values():
                self._hooks.append(module.register_forward_pre_hook(self._hook(seen), with_kwargs=True))

    def _hook(self, seen: Seen) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if seen.by_module:
                first = next(iter(tensors((args, kwargs))), None)
                if first is not None and first.numel():
                    rows = first.numel() // (first.shape[-1] if first.is_floating_point() else 1)
                    seen.keep(Call(module, args, kwargs), rows, self.weight)
                return
            x = args[0] if args else kwargs.get("input")
            if isinstance(x, torch.Tensor):
                if not seen.calls:
                    bias = getattr(module, "bias", None)
                    seen.bias = None if bias is None else bias.detach()
                seen.add(x, self.weight)

        return look

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def profile(self) -> Profile:
        """What was seen so far; layers that were never called, or saw NaN, are left alone."""
        left, seen = dict(self.left), {}
        for name, each in self.seen.items():
            if not each.calls:
                left[name] = "the example inputs never reached it"
            elif not all(bool(torch.isfinite(x).all()) for x in _inputs(each)):
                left[name] = "its inputs hold NaN or infinity"
            else:
                seen[name] = each
        return Profile(seen, left)


def profile(
    model: nn.Module,
    examples: Any,
    *,
    weights: Sequence[float] | None = None,
    wanted: Callable[[nn.Module, str], bool] | None = None,
) -> Profile:
    """Run ``model`` on ``examples`` without gradients, in evaluation mode, and say what its layers saw.

    Args:
        model: any module; it is left as it was.
        examples: a tensor, a tuple of positional arguments, a mapping of keyword arguments, or a list of
            these.
        weights: how often each example runs, such as 1 for a prefill and 128 for a decoded token; 1 each by
            default.
        wanted: ``wanted(module, name)``: which linears to search; all by default.

    Raises:
        OptionError: no example, or weights that don't fit.
        ModelError: nothing to search, see :class:`Recorder`.
    """
    batches = as_examples(examples)
    counts = example_weights(weights, len(batches))
    recorder = Recorder(model, wanted)
    try:
        with evaluating(model), torch.no_grad():
            for batch, count in zip(batches, counts, strict=True):
                recorder.weight = count
                run(model, batch)
    finally:
        recorder.close()
    return recorder.profile()


def as_examples(examples: Any) -> list[Any]:
    """The examples as a list of batches.

    Raises:
        OptionError: there is none, or one of another type.
    """
    single = isinstance(examples, (torch.Tensor, tuple, Mapping))
    return as_batches([examples] if single else examples)


def run(model: nn.Module, batch: Any) -> Any:
    """Call ``model`` on one batch, moved to where its first parameter lies; without a key-value cache."""
    first = next(model.parameters(), None)
    device = torch.device("cpu") if first is None else first.device
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    if isinstance(batch, Mapping):
        return model(**{**options, **{key: _moved(value, device) for key, value in batch.items()}})
    arguments = batch if isinstance(batch, (tuple, list)) else (batch,)
    return model(*(_moved(each, device) for each in arguments), **options)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode; each is put back as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def detached(tree: Any, *, copy: bool = False) -> Any:
    """``tree`` with its tensors, or copies of them, without gradients."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().clone() if copy else tree.detach()
    if isinstance(tree, Mapping):
        return {key: detached(value, copy=copy) for key, value in tree.items()}
    if type(tree) in (tuple, list):
        return type(tree)(detached(each, copy=copy) for each in tree)
    return tree


def _moved(value: Any, device: torch.device) -> Any:
    return value.detach().to(device) if isinstance(value, torch.Tensor) else value


def example_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """How often each of ``count`` examples runs; once by default.

    Raises:
        OptionError: another number of weights, or one that is not positive.
    """
    if weights is None:
        return [1.0] * count
    found = [float(each) for each in weights]
    if len(found) != count or not all(math.isfinite(each) and each > 0 for each in found):
        raise OptionError(
            f"weights needs a positive number for each of {count} examples, and was given {list(weights)}."
        )
    return found


def _inputs(seen: Seen) -> list[torch.Tensor]:
    if not seen.by_module:
        return [seen.sample]
    return tensors([[call.args, call.kwargs] for call in seen.inputs.values()])


def _unsearchable(layer: Layer) -> str | None:
    if layer.kind == "convolution":
        return "it is a convolution; the search does not time these. Give it a scheme by a rule"
    if layer.shared:
        return f"its weight is tied to {', '.join(layer.shared)}; name it in a rule to convert both"
    return None
