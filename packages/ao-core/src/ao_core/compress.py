"""Compressing with calibration data: a plan, then one walk in which algorithms take turns on each block."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from typing import Any, ClassVar, cast

import torch
from torch import nn

from ao_core.algorithm import Algorithm, parse_algorithm
from ao_core.calibrate import Stage, Walker, as_batches, processes, tensors
from ao_core.calibrate.batches import check_tokens
from ao_core.calibrate.resume import Resume, checksum, data_checksum
from ao_core.convert import Report, made_rules, planned, slower_than_float
from ao_core.errors import ModelError, OptionError
from ao_core.layers import Layer
from ao_core.metrics import model_bytes, stored_bytes
from ao_core.plan import Choice, Plan, Rule, resolve
from ao_core.scheme import Scheme, parse_scheme
from ao_core.tensor import QuantizedTensor


@dataclass(frozen=True)
class CompressReport(Report):
    """What :func:`compress_` did.

    Attributes:
        notes: layer → what the algorithms say about it; ``tokens`` is how many of its inputs they saw.
        walk: how the model was walked: which blocks, or why the whole model was taken at once.
    """

    notes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    walk: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-able data."""
        return {**super().to_dict(), "walk": self.walk, "notes": {n: dict(f) for n, f in self.notes.items()}}

    def __str__(self) -> str:
        return f"{super().__str__()}\ncalibrated {self.walk}"


class BlockAlgorithm:
    """Base of an algorithm that compresses a model block by block.

    A subclass is a frozen dataclass with a ``name``; its fields are its options. It writes
    :meth:`visit`. If it has an option ``scheme``, that is the scheme it quantizes with.
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    shares: ClassVar[bool] = False
    """Whether it sees data through :meth:`Stage.collect` alone, by collectors that can be joined. Of
    several processes each is then given its share of the batches, if that holds for all algorithms of
    the walk; otherwise each sees all."""

    @property
    def pairs(self) -> bool:
        """Whether it needs :attr:`Stage.reference`, what the float model's layers see."""
        return False

    def check(self, schemes: Mapping[str, Scheme | None]) -> None:
        """Raise :class:`~ao_core.errors.OptionError` unless the algorithm suits these layers' schemes.

        By default it must not reject all of them.
        """
        reasons = [self.rejects(scheme) for scheme in dict.fromkeys(schemes.values())]
        if all(reasons):
            raise OptionError(f"{self.name} can't be applied: {'; '.join(filter(None, reasons))}.")

    def rejects(self, scheme: Scheme | None) -> str | None:
        """Why the algorithm can do nothing for layers that get ``scheme`` (None: stay float), or None."""
        return None

    def check_layers(self, layers: Mapping[str, Layer]) -> None:
        """Raise :class:`OptionError` if the options don't fit ``layers``, all that can be compressed."""

    def prepared(self, survey: Callable[[Callable[[Stage], None]], None]) -> BlockAlgorithm:
        """The algorithm with what it must know of the whole model before its first block; itself by default.

        Args:
            survey: ``survey(look)`` walks the float model once and calls ``look(stage)`` for each stage.
                What ``look`` changes is undone.
        """
        return self

    def visit(self, stage: Stage) -> None:
        """Do to the layers of ``stage`` what is to be done, through its methods.

        The inputs are those that the blocks before it, compressed already, give. Layers that an
        algorithm leaves in float get the plan's scheme when all have had their turn.
        """
        raise NotImplementedError(f"{type(self).__name__} must define visit()")

    def run(self, model: nn.Module, plan: Plan, batches: Iterable[Any]) -> CompressReport:
        """Compress ``model`` with this algorithm alone; see :func:`compress_`."""
        return compress_(model, [self], batches, scheme=plan)


def compress_(
    model: nn.Module,
    algorithms: str | Algorithm | Sequence[str | Algorithm],
    batches: Iterable[Any],
    *,
    scheme: str | Scheme | Sequence[Rule] | Plan | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
    resume: str | os.PathLike[str] | None = None,
) -> CompressReport:
    """Compress ``model`` in place, calibrated on ``batches``.

    Args:
        model: any module; walked block by block where it has repeated blocks, else all at once.
        algorithms: texts such as ``"smoothquant:alpha=0.5"``, or instances. On each block they take
            turns in this order; what they leave in float is then quantized with its scheme.
        batches: inputs of the model: tensors, tuples of positional or mappings of keyword arguments.
        scheme: as for :func:`ao_core.quantize_`, or a :class:`Plan`. By default the one that an
            algorithm has as its option, or none: then only algorithms change weights.
        include: patterns of layers to compress; all by default. See :class:`Rule`.
        exclude: patterns of layers to leave alone; they win over ``include``.
        device: where blocks run; by default where they lie. If the model lies elsewhere, a block at a
            time is brought there, together with the activations of all batches.
        progress: show a progress bar, with what algorithms find for each layer.
        resume: a directory that keeps each finished block. The same call goes on from there if it was
            killed, with the same result. Delete it when the model is saved.

    Several processes that ``torchrun`` started, each called with the same arguments, share the work if the
    algorithms can, and all end with the same model.

    Returns:
        What was compressed and how, what was left alone and why, and bytes before and after.

    Raises:
        UnknownNameError, OptionError: an algorithm or scheme can't be made, or does not go with the
            other; there are no batches; the model's devices don't allow ``device``.
        PlanError: a pattern matches nothing, or no layer can be compressed.
        RejectedError: a weight holds NaN or infinity.
        ModelError: a layer saw NaN or infinity; tokens do not fit the model; memory ran out.
        CheckpointError: ``resume`` holds the walk of another model, other data or options.

    The model is unchanged if it raises; until it returns, original and compressed weights are both held.
    """
    made = [parse_algorithm(each) for each in _listed(algorithms)]
    found = as_batches(batches)
    known: dict[str, Scheme] = {}
    plan = _plan(model, _scheme(made, scheme), include, exclude, known)
    alone = [each for each in made if not isinstance(each, BlockAlgorithm)]
    if alone and len(made) > 1:
        raise OptionError(
            f"algorithm {alone[0].name!r} takes the whole model for itself; give it alone, not with "
            f"{', '.join(each.name for each in made if each is not alone[0])}."
        )
    if alone:
        given = plan if scheme is not None else _outcome(plan, {}, {})
        return _completed(alone[0].run(model, given, found), alone[0].name)
    check_tokens(model, found)
    return _compress(model, made, found, plan, known, device, progress, resume)  # type: ignore[arg-type]


def _compress(
    model: nn.Module,
    algorithms: Sequence[BlockAlgorithm],
    batches: Sequence[Any],
    plan: Plan,
    known: Mapping[str, Scheme],
    device: torch.device | str | None,
    progress: bool,
    resume: str | os.PathLike[str] | None,
) -> CompressReport:
    jobs = planned(model, plan, known, values=False)
    layers = {layer.name: layer for layer, _, _ in jobs}
    schemes = {layer.name: None if isinstance(scheme, _Float) else scheme for layer, scheme, _ in jobs}
    providers = {layer.name: provider for layer, _, provider in jobs}
    for algorithm in algorithms:
        algorithm.check(schemes)
        algorithm.check_layers(layers)
    before, old = model_bytes(model).total, {name: stored_bytes(it.weight) for name, it in layers.items()}
    shared = processes.world() > 1 and all(algorithm.shares for algorithm in algorithms)
    walker = Walker(
        model,
        layers,
        schemes,
        processes.share(batches) if shared else batches,
        device=device,
        shared=shared,
        reference=any(algorithm.pairs for algorithm in algorithms),
        resume=None if resume is None else Resume(resume, _parts(model, algorithms, plan, batches, device)),
    )

    ready = [algorithm.prepared(lambda look: _survey(walker, look, progress)) for algorithm in algorithms]

    def visit(stage: Stage) -> None:
        stage.providers = providers
        for algorithm in ready:
            algorithm.visit(stage)
        stage.finish()

    with _remembering(walker):
        walk = walker.walk(visit, progress=progress)
    done = {name: it for name, it in layers.items() if isinstance(it.weight, QuantizedTensor)}
    return CompressReport(
        plan=_outcome(plan, done, walk.notes),
        bytes_before=before,
        bytes_after=model_bytes(model).total,
        converted_bytes_before=sum(old[name] for name in done),
        converted_bytes_after=sum(stored_bytes(layer.weight) for layer in done.values()),
        slower=slower_than_float({n: (s, done[n].weight) for n, s in schemes.items() if n in done and s}),
        notes=walk.notes,
        walk=walk.how,
    )


def _survey(walker: Walker, look: Callable[[Stage], None], progress: bool) -> None:
    """Walk the model as it is, every block on float inputs."""
    with _remembering(walker):
        walker.walk(look, progress=progress, resuming=False)
    walker.restore()


def _parts(
    model: nn.Module,
    algorithms: Sequence[BlockAlgorithm],
    plan: Plan,
    batches: Sequence[Any],
    device: torch.device | str | None,
) -> dict[str, str]:
    """What the result of a walk depends on."""
    choices = {name: f"{choice.scheme} {choice.provider}" for name, choice in sorted(plan.layers.items())}
    state = chain(model.named_parameters(), model.named_buffers())
    return {
        "model": checksum(state),
        "data": data_checksum(batches),
        "set of options": f"{list(algorithms)} {choices} {device}",
        "version of torch": torch.__version__,
        "number of processes": str(processes.world()),
    }


@contextmanager
def _remembering(walker: Walker) -> Iterator[None]:
    """Say what to do where memory runs out."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        ran_out = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not ran_out and "can't allocate memory" not in str(error):
            raise
        batches = walker.batches
        sizes = [str(tuple(tensor.shape)) for tensor in tensors(batches[0])[:1]] or ["without a tensor"]
        raise ModelError(
            f"memory ran out on {walker.placement.device} while calibrating on {len(batches)} batches, the "
            f"first {sizes[0]}: {error}. Give smaller batches, fewer samples (--samples) or a smaller "
            "--context; or device='cuda' for a model that lies on the CPU: one block at a time is then there."
        ) from error


def _completed(report: Report, name: str) -> CompressReport:
    """The report of an algorithm that does not walk blocks."""
    if isinstance(report, CompressReport):
        return report
    return CompressReport(
        **{each.name: getattr(report, each.name) for each in fields(Report)}, walk=f"by {name} itself"
    )


def _listed(algorithms: str | Algorithm | Sequence[str | Algorithm]) -> list[str | Algorithm]:
    listed = list(algorithms) if isinstance(algorithms, (list, tuple)) else [algorithms]
    if not listed:
        raise OptionError("no algorithm was given. To quantize without data, use ao_core.quantize_.")
    return listed  # type: ignore[return-value]


def _scheme(
    algorithms: Sequence[Algorithm], scheme: str | Scheme | Sequence[Rule] | Plan | None
) -> str | Scheme | Sequence[Rule] | Plan | None:
    """The one scheme that the caller or an algorithm's option names."""
    own: dict[str, str | Scheme] = {}
    for each in algorithms:
        if (text := getattr(each, "scheme", None)) is not None:
            own[each.name] = _bare(text)
    if not own:
        return scheme
    if scheme is not None and not isinstance(scheme, (str, Scheme)):
        raise OptionError(f"scheme is a plan already: leave out the option scheme of {', '.join(own)}.")
    given = {**own, "scheme=": scheme} if scheme is not None else own  # a key that is no name
    if len({str(parse_scheme(each)) for each in given.values()}) > 1:
        said = ", ".join(f"{name} {each}" for name, each in given.items())
        raise OptionError(f"several schemes were given: {said}. A layer can have one: give one.")
    return next(iter(own.values()))


def _bare(text: str | Scheme) -> str | Scheme:
    """A scheme's text without the brackets that keep its commas together."""
    inside = isinstance(text, str) and text[:1] + text[-1:] in ("()", "[]")
    return text[1:-1] if inside and isinstance(text, str) else text


def _plan(
    model: nn.Module,
    scheme: str | Scheme | Sequence[Rule] | Plan | None,
    include: str | Iterable[str] | None,
    exclude: str | Iterable[str] | None,
    known: dict[str, Scheme],
) -> Plan:
    if isinstance(scheme, Plan):
        if include is not None or exclude is not None:
            raise OptionError("a plan takes no include or exclude: it says already what each layer gets.")
        return scheme
    rules = made_rules(_Float() if scheme is None else scheme, include, exclude, {}, known)
    return resolve(model, rules)


@dataclass(frozen=True)
class _Float(Scheme):
    """Stands in a plan for layers that algorithms may change and that nothing else quantizes."""

    name: ClassVar[str] = "float"


def _outcome(plan: Plan, done: Mapping[str, Layer], notes: Mapping[str, Mapping[str, Any]]) -> Plan:
    """The plan as it was carried out, with what the algorithms measured."""
    choices = dict(plan.layers)
    for name, choice in plan.layers.items():
        evidence = {**choice.evidence, **notes.get(name, {})}
        if name in done:
            scheme = cast("QuantizedTensor", done[name].weight).scheme
            choices[name] = replace(choice, scheme=scheme, evidence=evidence)
        elif choice.scheme is not None:
            choices[name] = Choice(None, reason="no scheme was given: it stays in float", evidence=evidence)
    return replace(plan, layers=choices)
