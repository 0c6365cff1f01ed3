"""Where a model's parts lie while it is walked, and what they were before it was changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ao_core.errors import OptionError


class Placement:
    """Brings parts of a model to ``device`` and back to where the model lies.

    Args:
        model: all of it on one device, unless ``device`` is None.
        device: where blocks run; None leaves everything in place.

    Raises:
        OptionError: ``device`` is given and the model lies on several, or has parts on the meta device;
            there is no such device.
    """

    def __init__(self, model: nn.Module, device: torch.device | str | None) -> None:
        found = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
        if any(each.type == "meta" for each in found):
            raise OptionError(
                "parts of the model lie on the meta device and have no values. Load them first."
            )
        if device is not None and len(found) > 1:
            places = ", ".join(sorted(map(str, found)))
            raise OptionError(
                f"device={str(device)!r} was given for a model that lies on {places}; leave device out to "
                "run each part where it is."
            )
        self.home = next(iter(found), torch.device("cpu"))
        # An empty tensor knows that "cuda" is "cuda:0".
        try:
            self.device = self.home if device is None else torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise OptionError(f"device={str(device)!r} can't be used: {reason}. Leave it out.") from error
        if self.device.type == "meta":
            raise OptionError("device='meta' holds no values, and blocks can't run there. Try cpu or cuda.")
        self.moves = self.device != self.home
        self._left: dict[int, _Left] = {}  # by the storage on the device
        self._ahead: dict[int, _Ahead] = {}  # by the id of the tensor at home
        self._copier = ThreadPoolExecutor(1)
        self._copying: Future[None] | None = None

    @contextmanager
    def brought(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Inside the block, the own tensors of each of ``modules`` lie on the device.

        Those that were not written to, as a tensor's version tells, are found afterwards as they lay at home,
        without a copy. Writing through ``.data`` changes no version: write through the tensor itself.
        """
        modules = list(modules) if self.moves else []
        known = set(self._left)
        try:
            for module in modules:
                self._bring(module)
            yield
        finally:
            self._return(modules)
            for storage in set(self._left) - known:
                del self._left[storage]

    def fetch(self, modules: Iterable[nn.Module]) -> None:
        """Begin to copy the own tensors of ``modules`` to the device, while something else runs there.

        :meth:`brought` takes the copies of tensors not written since. Quantized ones it copies itself.
        """
        if not self.moves or self.device.type not in ("cpu", "cuda"):
            return
        self._forget()
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        for tensor in (tensor for module in modules for _, tensor in _own(module)):
            plain = not is_traceable_wrapper_subclass(tensor) and not tensor.is_inference()
            if plain and tensor.device == self.home and id(tensor) not in self._ahead:
                copy = torch.empty_like(tensor.detach(), device=self.device)
                self._ahead[id(tensor)] = _Ahead(tensor, tensor._version, copy)
                pairs.append((tensor.detach(), copy))
        stream = None
        if self.device.type == "cuda":
            stream = torch.cuda.Stream(self.device)
            # The copies may lie where kernels that were launched before still read.
            stream.wait_stream(torch.cuda.current_stream(self.device))
        self._copying = self._copier.submit(_copy, pairs, stream)

    @contextmanager
    def lent(self, lender: nn.Module, module: nn.Module) -> Iterator[None]:
        """Inside the block, ``module`` runs on the device with the weights of ``lender``, which lies there.

        What is unlike the lender's, or belongs to a part with buffers, is brought. For finding out how a
        module is called, whatever its values; the two must share no tensor.
        """
        theirs = dict(lender.named_modules())
        exchanged: list[tuple[nn.Module, dict[str, nn.Parameter | None]]] = []
        rest: list[nn.Module] = []
        for name, part in module.named_modules():
            if name in theirs and _alike(part, theirs[name]):
                exchanged.append((part, dict(part._parameters)))
                part._parameters.update(theirs[name]._parameters)
            else:
                rest.append(part)
        try:
            with self.brought(rest):
                yield
        finally:
            for part, own in exchanged:
                part._parameters.update(own)

    def settle(self, model: nn.Module) -> None:
        """Bring whatever lies on the device back, also parameters that were put there inside a block."""
        self._forget()
        self._return(model.modules() if self.moves else ())

    def returned(self, tensor: torch.Tensor) -> torch.Tensor:
        """The values of ``tensor`` where the model lies."""
        if tensor.device == self.home:
            return tensor
        left = None if is_traceable_wrapper_subclass(tensor) else self._left.get(_storage(tensor))
        if left is not None and left.version == tensor._version and left.there.shape == tensor.shape:
            return left.at_home
        return tensor.to(self.home)

    def _bring(self, module: nn.Module) -> None:
        before = {name: tensor.detach() for name, tensor in _own(module) if not tensor.is_inference()}
        module._apply(self._moved, recurse=False)
        for name, tensor in _own(module):
            at_home = before.get(name)
            plain = at_home is not None and not is_traceable_wrapper_subclass(tensor)
            if plain and at_home.device == self.home and tensor.device == self.device:  # type: ignore[union-attr]
                left = _Left(at_home, tensor.detach(), tensor._version)  # type: ignore[arg-type]
                self._left[_storage(tensor)] = left

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` on the device: the copy that was fetched, if it is still that of its values."""
        ahead = self._ahead.pop(id(tensor), None)
        if ahead is None or self._copying is None or ahead.version != tensor._version:
            return tensor.to(self.device)
        self._copying.result()
        return ahead.copy

    def _forget(self) -> None:
        """Drop what was fetched and not taken."""
        if self._copying is not None:
            self._copying.exception()  # it must not write any more
        self._copying, self._ahead = None, {}

    def _return(self, modules: Iterable[nn.Module]) -> None:
        for module in modules:
            module._apply(self.returned, recurse=False)


@dataclass(frozen=True)
class _Left:
    """A tensor that was copied to the device: as it lies at home, its copy, and that one's version."""

    at_home: torch.Tensor
    there: torch.Tensor
    version: int


@dataclass(frozen=True)
class _Ahead:
    """A tensor that is being copied to the device; held, so that its id stays its own."""

    tensor: torch.Tensor
    version: int
    copy: torch.Tensor


def _copy(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], stream: torch.cuda.Stream | None) -> None:
    if stream is not None:
        torch.cuda.set_device(stream.device)  # of this thread; the first one's would be woken otherwise
    with torch.no_grad(), nullcontext() if stream is None else torch.cuda.stream(stream):
        for source, copy in pairs:
            copy.copy_(source)
    if stream is not None:
        stream.synchronize()


def _alike(part: nn.Module, other: nn.Module) -> bool:
    """Whether two modules hold plain parameters of the same names, shapes and dtypes, and no buffers."""
    if any(buffer is not None for each in (part, other) for buffer in each._buffers.values()):
        return False

    def outline(module: nn.Module) -> dict[str, object]:
        return {
            name: value if value is None else (value.shape, value.dtype, is_traceable_wrapper_subclass(value))
            for name, value in module._parameters.items()
        }

    found = outline(part)
    return found == outline(other) and not any(each and each[2] for each in found.values())  # type: ignore[index]


def _own(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a module itself, not of those in it."""
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            yield name, tensor


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@dataclass
class _Entry:
    module: nn.Module
    attribute: str
    original: nn.Parameter | None


class Journal:
    """Every parameter that was exchanged, so that it can be put back."""

    def __init__(self) -> None:
        self._entries: list[_Entry] = []

    def exchange(self, module: nn.Module, attribute: str, parameter: nn.Parameter) -> None:
        """Put ``parameter`` in its place."""
        self._entries.append(_Entry(module, attribute, module._parameters[attribute]))
        module.register_parameter(attribute, parameter)

    def mark(self) -> int:
        """A point that :meth:`restore` can go back to."""
        return len(self._entries)

    def restore(self, mark: int = 0) -> None:
        """Undo what was done since ``mark``, last first."""
        while len(self._entries) > mark:
            entry = self._entries.pop()
            entry.module._parameters[entry.attribute] = entry.original

    def settle(self, placement: Placement) -> None:
        """Forget all but the first state of each parameter, and bring those home. Marks expire."""
        first: dict[tuple[int, str], _Entry] = {}
        for entry in self._entries:
            first.setdefault((id(entry.module), entry.attribute), entry)
        self._entries = list(first.values())
        for entry in self._entries:
            if placement.moves and entry.original is not None:
                entry.original.data = placement.returned(entry.original)

    def original(self, module: nn.Module, attribute: str) -> torch.Tensor:
        """The first state of a parameter; as it is now if it was never exchanged."""
        for entry in self._entries:
            if entry.module is module and entry.attribute == attribute:
                return cast("torch.Tensor", entry.original)
        return cast("torch.Tensor", module._parameters[attribute])
