"""Schemes: how a float weight becomes a quantized tensor."""

from __future__ import annotations

import ast
import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch

from ao_core.errors import OptionError, RejectedError
from ao_core.registry import Registry
from ao_core.tensor import QuantizedTensor

S = TypeVar("S", bound="Scheme")

QParams = Mapping[str, torch.Tensor]
"""Quantization parameters by name, each ``[..., N, G]``: one value a row and group of columns."""


@dataclass(frozen=True)
class Scheme:
    """Options of one way to quantize, and the free functions that do it.

    A subclass is a frozen dataclass whose fields are its options, each with a default. It writes the
    four steps; :meth:`quantize` is those in a row. ``encode`` and ``decode`` work on the whole weight,
    or on some of its columns with the parameters of the one group these lie in, so that algorithms
    such as GPTQ can run on any scheme.

    Class attributes:
        name: lower case with hyphens; what ``ao.quantize_(model, name)`` takes.
        version: of the stored layout. Raise it when stored tensors change their meaning.
        tensor_types: the tensor classes that :meth:`pack` returns.
        min_sqnr: dB that a dequantized Gaussian weight reaches at least (checked by the kit).
        min_linear_sqnr: dB of the linear's result against that of the dequantized weight, where the
            activations are quantized too; infinite where they are not.
        rowwise: whether each row (each index of the first dimension) is quantized by itself, and every
            stored tensor has that dimension. A large weight is then quantized in slices, which bounds
            the memory that it takes.
        summary: one line for ``ao schemes``.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    tensor_types: ClassVar[tuple[type[QuantizedTensor], ...]] = ()
    min_sqnr: ClassVar[float] = 0.0
    min_linear_sqnr: ClassVar[float] = math.inf
    rowwise: ClassVar[bool] = False
    summary: ClassVar[str] = ""

    @property
    def weight_only(self) -> bool:
        """Whether activations stay as they are; only such schemes fit embeddings and convolutions."""
        return math.isinf(self.min_linear_sqnr)

    @property
    def group_columns(self) -> int:
        """Neighbouring columns that share parameters, the last may be fewer; -1: all columns."""
        return -1

    def rejects(self, weight: torch.Tensor) -> str | None:
        """Why ``weight`` can't be quantized by this scheme, or None. Looks at metadata only.

        A subclass with reasons of its own asks ``super().rejects(weight)`` first.
        """
        if isinstance(weight, QuantizedTensor):
            return f"it is quantized already ({weight.scheme})"
        if weight.device.type == "meta":
            return "it lies on the meta device and has no values"
        if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"its dtype is {weight.dtype}; float32, bfloat16 and float16 can be quantized"
        if weight.ndim < 2 or weight.numel() == 0:
            return f"its shape is {tuple(weight.shape)}; a non-empty [..., N, K] is needed"
        return None

    def rejects_values(self, weight: torch.Tensor) -> str | None:
        """Why the values of ``weight`` can't be stored, or None: a scheme may need zeros in certain places.

        Asked when the weight is about to be quantized, after :meth:`rejects`; algorithms may have changed
        it until then.
        """
        return None

    def slower(self, weight: torch.Tensor, *, rows: int | None = None) -> str | None:
        """Why a linear with ``weight`` is expected to be slower than the float one where it lies, or None.

        Args:
            weight: float ``[..., N, K]`` or one that this scheme made; only metadata is looked at.
            rows: of the activations; None for any number of them.
        """
        return None

    def choose_qparams(self, weight: torch.Tensor) -> QParams:
        """Parameters for ``weight`` ``[..., N, K]``; each ``[..., N, G]``."""
        raise NotImplementedError(f"{type(self).__name__} must define choose_qparams()")

    def encode(self, weight: torch.Tensor, qparams: QParams) -> torch.Tensor:
        """Integer codes of ``weight`` ``[..., N, C]``: all columns, or some within one group."""
        raise NotImplementedError(f"{type(self).__name__} must define encode()")

    def decode(self, codes: torch.Tensor, qparams: QParams) -> torch.Tensor:
        """The float32 values that ``codes`` ``[..., N, C]`` stand for; inverse of :meth:`encode`."""
        raise NotImplementedError(f"{type(self).__name__} must define decode()")

    def quantize_input(self, x: torch.Tensor) -> torch.Tensor:
        """Activations ``[..., K]`` as the linear multiplies them: what their codes stand for, or ``x``.

        A scheme that quantizes activations writes this too, so that calibration sees what they become.
        """
        return x

    def pack(self, codes: torch.Tensor, qparams: QParams, *, dtype: torch.dtype) -> QuantizedTensor:
        """The stored tensor for ``codes`` ``[..., N, K]``; ``dtype`` is the outer dtype."""
        raise NotImplementedError(f"{type(self).__name__} must define pack()")

    def quantize(self, weight: torch.Tensor, *, provider: str | None = None) -> QuantizedTensor:
        """Quantize ``weight`` ``[..., N, K]``. The result shares no memory with it.

        Raises:
            RejectedError: with the reason of :meth:`rejects`, or if the weight holds NaN or infinity.
        """
        self.check(weight)
        with torch.no_grad():
            return self._finished(self._quantized(weight.detach()), provider)

    def assemble(
        self, codes: torch.Tensor, qparams: QParams, *, dtype: torch.dtype, provider: str | None = None
    ) -> QuantizedTensor:
        """The weight that has these codes ``[..., N, K]``: :meth:`pack`, laid out for the codes' device.

        For algorithms that choose codes by other means than :meth:`encode` of the weight itself.
        """
        with torch.no_grad():
            return self._finished(self.pack(codes, qparams, dtype=dtype), provider)

    def _finished(self, packed: QuantizedTensor, provider: str | None) -> QuantizedTensor:
        packed.scheme, packed.provider = str(self), provider
        return packed.repacked()

    def _quantized(self, weight: torch.Tensor) -> QuantizedTensor:
        rows = max(_SLICE // (weight.numel() // weight.shape[0]), 1)
        if self.rowwise and weight.shape[0] > rows:
            return _in_slices(self._quantized, weight, rows)
        qparams = self.choose_qparams(weight)
        return self.pack(self.encode(weight, qparams), qparams, dtype=weight.dtype)

    def check(self, weight: torch.Tensor, *, values: bool = True) -> None:
        """Raise :class:`~ao_core.errors.RejectedError` unless ``weight`` can be quantized.

        Without ``values`` :meth:`rejects_values` is not asked: the weight is to be changed before.
        """
        reason = Scheme.rejects(self, weight) or self.rejects(weight)
        # The bounds first: a mask of the whole weight would take half as much memory again.
        if reason is None and not all(torch.isfinite(bound) for bound in weight.detach().aminmax()):
            bad = int((~torch.isfinite(weight)).sum())
            dtype = str(weight.dtype).removeprefix("torch.")
            reason = (
                f"{bad} of its {weight.numel()} values are NaN or infinite in {dtype}; look for a damaged "
                "file, or for a cast that overflowed"
            )
        if reason is None and values:
            reason = self.rejects_values(weight.detach())
        if reason is not None:
            raise RejectedError(f"{self} can't quantize this weight: {reason}.")

    def to_dict(self) -> dict[str, Any]:
        """Name, version and all options, JSON-able."""
        return {"name": self.name, "version": self.version, "options": dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls: type[S], data: Mapping[str, Any]) -> S:
        """The inverse of :meth:`to_dict`, on the class of that name.

        Raises:
            OptionError: another name or version, or an option that this class does not have.
        """
        if data["name"] != cls.name or data["version"] != cls.version:
            raise OptionError(
                f"{data['name']!r} version {data['version']} was asked for, and the installed scheme is "
                f"{cls.name!r} version {cls.version}. Install the version that wrote it."
            )
        return cls._make({name: frozen(value) for name, value in data["options"].items()})

    def __str__(self) -> str:
        changed = [
            f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        return self.name + (":" + ",".join(changed) if changed else "")

    @classmethod
    def _make(cls: type[S], options: Mapping[str, Any]) -> S:
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(options) - set(known)):
            raise OptionError(
                f"scheme {cls.name!r} has no option {', '.join(map(repr, unknown))}; "
                f"it has {', '.join(known) or 'none'}."
            )
        return cls(**options)


_SLICE = 1 << 23  # elements of a slice: 32 MB in float32, which most temporary copies are


def _in_slices(
    quantize: Callable[[torch.Tensor], QuantizedTensor], weight: torch.Tensor, rows: int
) -> QuantizedTensor:
    """Quantize ``rows`` of ``weight`` at a time into one tensor."""
    first = quantize(weight[:rows])
    whole = {name: data.new_empty(weight.shape[0], *data.shape[1:]) for name, data in first.stored().items()}
    for start in range(0, weight.shape[0], rows):
        part = first if start == 0 else quantize(weight[start : start + rows])
        for name, data in part.stored().items():
            whole[name][start : start + rows] = data
    stored = [whole.get(name) for name in first.data_names]
    return type(first)(*stored, shape=weight.shape, dtype=first.dtype, **first.attributes())


def parse_scheme(text: str | Scheme, **options: Any) -> Scheme:
    """The scheme that a text such as ``"int4-weight-only:group_size=64"`` names.

    Args:
        text: ``NAME`` or ``NAME:OPTION=VALUE,...``; a :class:`Scheme` is returned as it is.
        **options: more options; these win over those in the text.

    Raises:
        UnknownNameError: no installed plugin provides that scheme.
        OptionError: an option it does not have, or a value it does not take.
    """
    if isinstance(text, Scheme):
        return text._make({**vars(text), **options}) if options else text
    name, given = split_text(text)
    return SCHEMES.get(name)._make({**given, **options})


def split_text(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the options of ``NAME:OPTION=VALUE,...``; commas in brackets belong to a value.

    Raises:
        OptionError: an option without a value.
    """
    name, _, tail = text.partition(":")
    given: dict[str, Any] = {}
    for part in filter(None, re.split(r",(?![^()\[\]]*[)\]])", tail)):  # commas outside brackets
        key, equals, value = part.partition("=")
        if not equals:
            raise OptionError(f"{text!r} must read NAME:OPTION=VALUE,...; {part!r} has no '='.")
        given[key.strip()] = _value(value.strip())
    return name.strip(), given


def schemes() -> dict[str, type[Scheme]]:
    """Every installed scheme class by name, sorted."""
    return {name: entry.item for name, entry in SCHEMES.entries().items()}


def invalid_scheme(item: Any) -> str | None:
    """Why ``item`` can't be registered as a scheme, or None."""
    if not (isinstance(item, type) and issubclass(item, Scheme)):
        return "not a subclass of ao_core.Scheme"
    name = getattr(item, "name", None)
    if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9][a-z0-9-]*", name):
        return f"its name {name!r} must be lower case letters, digits and hyphens"
    if not isinstance(item.version, int) or item.version < 1:
        return f"its version {item.version!r} must be a whole number from 1"
    if "__dataclass_params__" not in vars(item) or not item.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        return "it must be decorated with @dataclass(frozen=True)"
    if any(_required(field) for field in dataclasses.fields(item)):
        return "each of its options needs a default"
    types = item.tensor_types
    known = isinstance(types, tuple) and all(isinstance(t, type) for t in types)
    if not types or not known or not all(issubclass(t, QuantizedTensor) for t in types):
        return "tensor_types must be a tuple of the QuantizedTensor classes that pack() returns"
    try:
        item()
    except Exception as error:  # noqa: BLE001 - the author's own checks
        return f"made with its defaults it raises {type(error).__name__}: {error}"
    return None


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _value(text: str) -> Any:
    if text.lower() in ("true", "false", "none"):
        text = text.capitalize()
    try:
        return frozen(ast.literal_eval(text))
    except (ValueError, SyntaxError):
        return text


def frozen(value: Any) -> Any:
    """Lists as the tuples that they were: options and attributes are hashable, and JSON has no tuple."""
    return tuple(map(frozen, value)) if isinstance(value, list) else value


SCHEMES: Registry[type[Scheme]] = Registry("scheme")
