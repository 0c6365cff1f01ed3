"""torchao's autoquant of April 2024: change the import, keep the calls.

As there, time alone decides, and the model is changed in place. Unlike there: activations are the model's
own, not random; every call's rows count as often as it came; tied weights stay tied; a scheme that fails is
skipped with its reason; a CPU will do; and what was measured is kept for the next time.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from ao_autoquant.exploration import measured
from ao_autoquant.profile import Recorder, evaluating, run
from ao_core import ModelError, OptionError, apply_, parse_scheme

M = TypeVar("M", bound=nn.Module)
Filter = Callable[[nn.Module, str], bool]

DEFAULT_SCHEMES = ("int8-dynamic", "int8-weight-only")
"""What torchao measured beside float."""

_recorders: weakref.WeakKeyDictionary[nn.Module, tuple[Recorder, tuple[str, ...], dict[str, Any]]] = (
    weakref.WeakKeyDictionary()
)


def autoquant(
    model: M,
    example_input: Any,
    schemes: Sequence[str] = DEFAULT_SCHEMES,
    filter_fn: Filter | None = None,
    **options: Any,
) -> M:
    """Run ``model`` on ``example_input``, measure, and convert each linear to what is fastest; in place.

    Args:
        model: any module.
        example_input: a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments.
        schemes: texts of what to measure beside float.
        filter_fn: ``filter_fn(module, name)``: which linears; all by default.
        **options: ``isolate``, ``limit_s``, ``compiled``, ``remeasure``, ``progress`` of
            :func:`ao_autoquant.explore`, and ``error_on_unseen``.

    Returns:
        The model itself.
    """
    error_on_unseen = options.pop("error_on_unseen", True)
    change_linears_to_autoquantizable(model, schemes, filter_fn, **options)
    try:
        batch = tuple(example_input) if isinstance(example_input, list) else example_input
        if not isinstance(batch, (torch.Tensor, tuple, Mapping)):
            raise OptionError(
                f"example_input is a {type(example_input).__name__}; give a tensor, a tuple or list of "
                "positional arguments, or a mapping of keyword arguments."
            )
        with evaluating(model), torch.no_grad():
            run(model, batch)
    except BaseException:
        _recorders.pop(model)[0].close()
        raise
    return change_autoquantizable_to_quantized(model, error_on_unseen=error_on_unseen)


def change_linears_to_autoquantizable(
    model: nn.Module,
    schemes: Sequence[str] = DEFAULT_SCHEMES,
    filter_fn: Filter | None = None,
    **options: Any,
) -> None:
    """From now on, keep what the linears of ``model`` see. Its weights stay as they are.

    Args:
        model: any module; run it on any inputs afterwards.
        schemes: texts of what to measure beside float.
        filter_fn: which linears.
        **options: as for :func:`autoquant`.

    Raises:
        OptionError: it is autoquantizable already, or an unknown option.
    """
    if model in _recorders:
        raise OptionError(
            f"this {type(model).__name__} is autoquantizable already. Run it on its inputs, then call "
            "change_autoquantizable_to_quantized."
        )
    known = {"isolate", "limit_s", "compiled", "remeasure", "progress"}
    if unknown := sorted(set(options) - known):
        raise OptionError(f"there is no option {', '.join(unknown)}; there are {', '.join(sorted(known))}.")
    texts = tuple(str(parse_scheme(text)) for text in schemes)

    def linear(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and (filter_fn is None or filter_fn(module, name))

    _recorders[model] = (Recorder(model, linear), texts, options)


def change_autoquantizable_to_quantized(model: M, error_on_unseen: bool = True) -> M:
    """Measure what :func:`change_linears_to_autoquantizable` has seen since, and convert; in place.

    Args:
        model: that was made autoquantizable, and run.
        error_on_unseen: raise if a linear saw no input; otherwise it stays float.

    Returns:
        The model itself.

    Raises:
        OptionError: the model was not made autoquantizable.
        ModelError: a linear saw no input; the model is unchanged and still autoquantizable.
    """
    if model not in _recorders:
        raise OptionError("the model is not autoquantizable. Call change_linears_to_autoquantizable first.")
    recorder, texts, options = _recorders[model]
    unseen = [name for name, each in recorder.seen.items() if not each.calls]
    if unseen and error_on_unseen:
        raise ModelError(
            f"{len(unseen)} linears saw no input: {', '.join(unseen[:3])}. Run the model on inputs that "
            "reach them, or give error_on_unseen=False to leave them in float."
        )
    recorder.close()
    del _recorders[model]
    found = measured(model, recorder.profile(), only={text: parse_scheme(text) for text in texts}, **options)
    plan = found.plan("latency")
    if any(choice.scheme for choice in plan.layers.values()):
        apply_(model, plan)
    return model
