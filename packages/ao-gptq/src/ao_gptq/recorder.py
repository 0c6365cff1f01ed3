"""Recording what a model is called with, to calibrate on it later."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ao_core import OptionError


class InputRecorder:
    """Inside the block, keep the inputs of every call of ``model``, however it is called.

    ::

        with InputRecorder(model, limit=128) as recorder:
            evaluate(model)
        ao.compress_(model, "gptq", recorder.batches, scheme="int4-weight-only")

    Args:
        model: any module. It runs as ever.
        limit: calls that are kept, at most; later ones are counted in ``missed``.
        device: where the inputs are kept.

    Attributes:
        batches: for each call a mapping of its arguments by name, copied; what :func:`ao_core.compress_`
            takes. Arguments that are None are left out, as are caches of keys and values.
        missed: calls beyond the limit.
    """

    def __init__(
        self, model: nn.Module, *, limit: int | None = None, device: torch.device | str = "cpu"
    ) -> None:
        if limit is not None and limit < 1:
            raise OptionError(f"limit must be 1 or more, or None, found {limit!r}.")
        self.model, self.limit, self.device = model, limit, torch.device(device)
        self.batches: list[Any] = []
        self.missed = 0
        self._handle: Any = None

    def __enter__(self) -> InputRecorder:
        self._handle = self.model.register_forward_pre_hook(self._keep, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.limit is not None and len(self.batches) >= self.limit:
            self.missed += 1
            return
        given = {
            name: _copied(value, self.device)
            for name, value in kwargs.items()
            if value is not None
            and "past_key_value" not in name
            and name not in ("use_cache", "cache_params")
        }
        positional = tuple(_copied(value, self.device) for value in args)
        if positional and given:
            import inspect

            names = [*inspect.signature(module.forward).parameters][: len(positional)]
            given = {**dict(zip(names, positional, strict=False)), **given}
            positional = ()
        self.batches.append(given or positional)


def _copied(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, dict):
        return {key: _copied(each, device) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_copied(each, device) for each in value)
    return value
