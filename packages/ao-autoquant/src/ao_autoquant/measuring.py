"""Measuring candidates on a layer: what is known is reused, what fails is noted and skipped."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ao_autoquant import measure
from ao_autoquant.cache import Cache
from ao_autoquant.measure import Digests, EndedError, FaultError, Quality, Time
from ao_autoquant.modules import call_shape, module_shape
from ao_autoquant.profile import Seen
from ao_autoquant.search import FLOAT, Option
from ao_autoquant.sensitivity import Sensitivity
from ao_autoquant.subject import Subject
from ao_autoquant.worker import Workers
from ao_core import KERNELS, AoError, ModelError, RejectedError, Scheme, fingerprint, scheme_source


@dataclass(frozen=True)
class Faulty:
    """A scheme that could not be measured.

    Attributes:
        scheme: its text.
        distribution: that provides it.
        layer: where it failed first.
        error: what happened.
        hung: whether it was ended for taking too long; it is not tried again in this search.
    """

    scheme: str
    distribution: str
    layer: str
    error: str
    hung: bool = False


class Measurer:
    """Holds what one search knows. A context: at its end the child process ends, the cache is written.

    Whoever it comes from, a scheme's first measurement on a shape is made in a child process; what came back
    from there once, in this search or an earlier one, is safe to run here: a measurement, or a refusal, after
    which the other weights of that shape are looked at here before a child is asked. So is float measured,
    for the two to be compared.
    """

    def __init__(
        self,
        cache: Cache,
        *,
        compiled: bool,
        isolate: str | bool,
        limit_s: float,
        sensitivity: Sensitivity | None = None,
        known: Any = None,
        digests: Digests | None = None,
    ) -> None:
        self.digests = digests or Digests()
        self.sensitivity, self.known = sensitivity, known
        self.cache, self.compiled, self.isolate = cache, compiled, isolate
        self.faults: dict[tuple[str, str], Faulty] = {}
        self.measured = self.reused = 0
        self._workers = Workers(limit_s)
        self._prepared: set[tuple[Any, ...]] = set()
        kernels = {f"{e.source.distribution} {e.source.version}" for e in KERNELS.entries().values()}
        self._versions: dict[str, Any] = {
            "kernels": sorted(kernels),
            "forced": os.environ.get("AO_KERNELS", ""),
            "compiled": compiled,
        }
        self._broken: set[str] = set()
        self._shares: dict[str, float] = {}
        self._stored: dict[tuple[str, torch.Size, torch.dtype], int] = {}

    def __enter__(self) -> Measurer:
        return self

    def __exit__(self, *_: object) -> None:
        self._workers.close()
        self.cache.flush()

    def share(self, seen: Mapping[str, Seen]) -> None:
        """Divide the time of modules that hold several searched weights among these, by their bytes."""
        held: dict[int, int] = {}
        for each in seen.values():
            key = id(each.layer.owners[0][0])
            held[key] = held.get(key, 0) + each.layer.weight.nbytes
        self._shares = {
            name: each.layer.weight.nbytes / held[id(each.layer.owners[0][0])] for name, each in seen.items()
        }

    def options(
        self, name: str, seen: Seen, schemes: Mapping[str, Scheme], rejected: dict[str, str]
    ) -> dict[str, Option]:
        """Float and each scheme that could be measured, on one layer; reasons go into ``rejected``."""
        subject = Subject(name, seen, self.digests)
        made: dict[str, Option] = {}
        base = 0.0
        self._prepare(subject, schemes)
        for text, scheme in {FLOAT: None, **schemes}.items():
            if text in self._broken:
                continue
            if self.known is not None and (whole := self.known.whole(name, text, seen.calls)):
                made[text] = whole
                self.reused += 1
                if seen.by_module and scheme is None:
                    base = whole.us / self._shares[name]
                continue
            try:
                quality, times, used = self._one(text, scheme, subject)
                error = self._error(name, text, scheme, seen, quality, used)
            except RejectedError as refusal:
                rejected[text] = str(refusal)
                continue
            except Exception as fault:
                if scheme is None or isinstance(fault, ModelError):
                    raise
                self._note(text, scheme, name, fault)
                continue
            us = sum(times[rows].us * count for rows, count in seen.calls.items())
            if seen.by_module:  # of the module's time this weight's share, and what its scheme changes
                base = us if scheme is None else base
                us -= (1 - self._shares[name]) * base
            spread = sum(times[rows].spread * count for rows, count in seen.calls.items())
            made[text] = Option(us, spread, quality.bytes, error)
        return made

    def _error(
        self,
        name: str,
        text: str,
        scheme: Scheme | None,
        seen: Seen,
        quality: Quality,
        used: torch.Tensor | None,
    ) -> float:
        """What the search counts as the error of a candidate that could be measured."""
        if scheme is not None and self.known is not None and (held := self.known.error(name, text)):
            self.reused += 1
            return float(held.error)
        if self.sensitivity is None or scheme is None:
            return quality.error
        about = self._about(text, scheme, seen.layer.weight, seen)
        key = {**about, **self.sensitivity.key, **self._versions, "layer": name}
        known = self.cache.get(key)
        self.reused += known is not None
        if known is None:
            found = self.sensitivity.increase(name, seen.layer.quantize(scheme) if used is None else used)
            if not math.isfinite(found):
                raise FaultError("the model's predictions with it hold NaN or infinity")
            known = {"nats": found}
            self.measured += 1
            self.cache.put(key, known)
        return float(known["nats"])

    def _one(
        self, text: str, scheme: Scheme | None, subject: Subject
    ) -> tuple[Quality, dict[int, Time], torch.Tensor | None]:
        """Error, times, and the quantized weight if it was made here."""
        seen, weight = subject.seen, subject.weight
        rows = sorted(seen.calls)
        common = {**self._about(text, scheme, weight, seen), **self._versions}
        keys = self._time_keys(common, seen)
        quality_key = {"what": "quality", **subject.values, **common}
        times = {count: Time(**found) for count, key in keys.items() if (found := self.cache.get(key))}
        known = self.cache.get(quality_key)
        self.reused += len(times) + (known is not None)
        missing = [count for count in rows if count not in times]
        if known is not None and not missing:
            return Quality(**known), times, None
        refusal = {"what": "refusal", **common}
        if scheme is not None and self.isolate == "auto" and self.cache.get(refusal):
            scheme.check(seen.layer.matrix)  # raises if these values are refused too
        measure_it = self._with_module if seen.by_module else self._measure
        try:
            quality, fresh, used = measure_it(text, scheme, subject, missing)
        except RejectedError as refused:
            self.cache.put(refusal, {"reason": str(refused)})
            raise
        self._stored[text, weight.shape, weight.dtype] = quality.bytes
        self.measured += len(fresh) + (known is None)
        self.cache.put(quality_key, measure.as_dict(quality))
        for count, time in fresh.items():
            self.cache.put(keys[count], measure.as_dict(time))
        return quality, times | fresh, used

    def _prepare(self, subject: Subject, schemes: Mapping[str, Scheme]) -> None:
        """Have kernels compiled, by several children, for a shape that was not seen before."""
        seen, weight = subject.seen, subject.weight
        if self.isolate is False or seen.by_module:
            return
        shape = (weight.shape, weight.dtype, seen.dtype, seen.bias is None, *sorted(seen.calls))
        if shape in self._prepared:
            return
        self._prepared.add(shape)
        missing, rows = [], set()
        for text, scheme in schemes.items():
            if text in self._broken or (self.known and self.known.whole(subject.name, text, seen.calls)):
                continue
            common = {**self._about(text, scheme, weight, seen), **self._versions}
            if self.cache.get({"what": "refusal", **common}) is None:
                absent = {n for n, key in self._time_keys(common, seen).items() if not self.cache.get(key)}
                rows |= absent
                missing += [text] if absent else []
        ended = self._workers.prepare(missing, subject.reference, sorted(rows), compiled=self.compiled)
        for text, error in ended.items():
            self._note(text, schemes[text], subject.name, error)

    def _time_keys(self, common: dict[str, Any], seen: Seen) -> dict[int, dict[str, Any]]:
        """Rows of a call → under what its time is kept."""
        shapes = {rows: call_shape(call) for rows, call in seen.inputs.items()}
        return {
            rows: {"what": "time", "rows": rows, "inputs": shapes.get(rows), **common}
            for rows in sorted(seen.calls)
        }

    def _measure(
        self, text: str, scheme: Scheme | None, subject: Subject, rows: list[int]
    ) -> tuple[Quality, dict[int, Time], torch.Tensor | None]:
        layer = subject.reference
        if self.isolate is True or (self.isolate == "auto" and rows):
            try:
                asked = None if scheme is None else text
                found = self._workers.first.measure(
                    asked, layer.weight, layer.sample, layer.bias, rows, compiled=self.compiled
                )
            except FaultError as error:
                if scheme is not None:
                    raise
                raise AoError(
                    f"float itself could not be measured in a child process: {error}. Give isolate=False to "
                    "measure in this one."
                ) from error
            return *found, None
        stored = self._stored.get((text, layer.weight.shape, layer.weight.dtype))
        if scheme is not None and not rows and stored and self.sensitivity is None:  # nats need all rows
            part = measure.quality_of_rows(scheme, layer, stored)
            if part is not None:
                return part, {}, None
        quality, used = measure.quality(scheme, layer)
        times = {
            count: measure.timed(used, layer.sample, count, layer.bias, compiled=self.compiled)
            for count in rows
        }
        return quality, times, used

    def _with_module(
        self, text: str, scheme: Scheme | None, subject: Subject, rows: list[int]
    ) -> tuple[Quality, dict[int, Time], torch.Tensor | None]:
        """Error and times by running the module; a child tries the scheme on one matrix before."""
        if scheme is None:
            quality, used = Quality(0.0, subject.weight.nbytes), subject.seen.layer.weight
        else:
            if self.isolate is True or (self.isolate == "auto" and rows):
                one = subject.matrix
                self._workers.first.measure(text, one.weight, one.sample, None, [], compiled=False)
            used = subject.seen.layer.quantize(scheme)
            quality = subject.module_quality(used)
        return quality, {count: subject.module_time(used, count) for count in rows}, used

    def _about(self, text: str, scheme: Scheme | None, weight: torch.Tensor, seen: Seen) -> dict[str, Any]:
        source = None if scheme is None else scheme_source(scheme)
        return {
            **fingerprint(weight.device),
            "scheme": text,
            "version": None if scheme is None else scheme.version,
            "distribution": "" if source is None else f"{source.distribution} {source.version}",
            "shape": list(weight.shape),
            "dtype": str(weight.dtype),
            "input": str(seen.dtype),
            "bias": seen.bias is not None,
            "module": module_shape(seen) if seen.by_module else "",
        }

    def _note(self, text: str, scheme: Scheme, layer: str, error: Exception) -> None:
        source = scheme_source(scheme)
        hung = isinstance(error, EndedError) and error.hung
        if isinstance(error, EndedError):  # each try takes the whole limit, or a process
            self._broken.add(text)
        reason = measure.explained(error)
        fault = Faulty(text, "" if source is None else source.distribution, layer, reason, hung)
        self.faults.setdefault((text, re.sub(r"\d+", "#", reason)), fault)
