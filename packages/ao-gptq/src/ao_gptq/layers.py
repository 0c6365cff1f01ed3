"""From weights and their inputs to codes: the better of GPTQ and plain rounding for each matrix.

Layers that share an input share a Hessian, its factorization, and one run over the columns.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ao_core import QParams, Scheme
from ao_core.calibrate import Hessian, PairedHessian, matrices
from ao_core.numerics.hessian import output_errors
from ao_gptq.factor import Factor
from ao_gptq.gptq import Rounded, gptq

_STACK_BYTES = 1 << 28  # of Hessians of experts that go through the loop together


@dataclass(frozen=True)
class Settings:
    """Options of :class:`~ao_gptq.algorithm.Gptq`."""

    percdamp: float = 0.01
    block_size: int = 128
    act_order: bool = True
    static_groups: bool = False
    mse: bool = True
    asymmetric: float = 0.0
    min_tokens: int = 128


@dataclass
class Job:
    """Layers of one scheme that read the same input, or a stack of experts: one run over the columns.

    Attributes:
        scheme: of all of them.
        weights: name → ``[N, K]``, or of one stack ``[E, N, K]``.
        hessians: one, or E.
        zeros: name → bool of the weight's shape, of those that were pruned.
    """

    scheme: Scheme
    hessians: Sequence[Hessian]
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    zeros: dict[str, torch.Tensor] = field(default_factory=dict)

    def pruned(self) -> torch.Tensor | None:
        """Where the weights, below each other, stay zero; None where nothing was pruned."""
        if not self.zeros:
            return None
        none = {name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in self.weights.items()}
        return torch.cat([self.zeros.get(name, none[name]) for name in self.weights])

    @property
    def cost(self) -> int:
        """Roughly how long it takes, in units of a column of the factorization's work on one row.

        On an H200 the factor of K = 14336 took 3.6e-5 ns for each of K³, parameters and rounding 3.3 ns for
        each weight, products with Hessian and factor 1.3e-4 ns for each of N K²: derived from the phases in
        docs/results/h200-gptq.json.
        """
        columns = self.hessians[0].columns
        weights = sum(weight.numel() for weight in self.weights.values())
        return weights * (90_000 + 4 * columns) + columns**3 * len(self.hessians)


@dataclass(frozen=True)
class Found:
    """What became of a layer: codes and parameters of the weight's shape, and facts for each matrix."""

    name: str
    codes: torch.Tensor
    qparams: QParams
    facts: list[dict[str, Any]]


def jobs_of(
    layers: Mapping[str, tuple[torch.Tensor, Sequence[Hessian], Scheme | None]],
    zeros: Mapping[str, torch.Tensor],
) -> list[Job]:
    """Layers that share a Hessian and a scheme together, in their order; ``zeros`` of the pruned ones."""
    jobs: dict[Any, Job] = {}
    for name, (weight, hessians, scheme) in layers.items():
        assert scheme is not None
        key = (id(hessians[0]), str(scheme), weight.dtype) if weight.ndim == 2 else name
        job = jobs.setdefault(key, Job(scheme, hessians))
        job.weights[name] = weight
        if name in zeros:
            job.zeros[name] = zeros[name]
    return list(jobs.values())


def solve(job: Job, settings: Settings) -> list[Found]:
    """Codes and parameters of every layer of a job."""
    (first, *_) = job.weights.values()
    if first.ndim > 2:
        (name,) = job.weights
        return [_experts(name, first, job, settings)]
    hessian, rows = job.hessians[0], [weight.shape[0] for weight in job.weights.values()]
    weight = torch.cat(list(job.weights.values())) if len(rows) > 1 else first  # [N, K]
    if not hessian.tokens:
        return [_joined(name, each, [_nearest(each, job.scheme)]) for name, each in job.weights.items()]
    pruned = job.pruned()
    zeros = None if pruned is None else pruned.unsqueeze(0)
    found = _solved(weight.unsqueeze(0), [hessian], job.scheme, settings, rows, zeros)
    return [
        _joined(name, each, [matrix]) for (name, each), matrix in zip(job.weights.items(), found, strict=True)
    ]


@dataclass(frozen=True)
class _Matrix:
    """Codes ``[N, K]``, parameters ``[N, G]``, and what to say."""

    codes: torch.Tensor
    qparams: QParams
    facts: dict[str, Any]


def _solved(
    stack: torch.Tensor,
    hessians: Sequence[Hessian],
    scheme: Scheme,
    settings: Settings,
    rows: list[int],
    zeros: torch.Tensor | None,
) -> list[_Matrix]:
    """Each of the ``rows`` of each matrix of ``[B, N, K]``, whose Hessians are given."""
    factors = [
        Factor.of(each.value, percdamp=settings.percdamp, act_order=settings.act_order) for each in hessians
    ]
    aims = stack
    if settings.asymmetric:
        aims = torch.stack(
            [
                _aim(weight, each, factor, settings.asymmetric)
                for weight, each, factor in zip(stack, hessians, factors, strict=True)
            ]
        )
    solved = gptq(
        aims, factors, scheme, block_size=settings.block_size, static_groups=settings.static_groups,
        mse=settings.mse, rows=rows, dtype=stack.dtype, zeros=zeros,
    )  # fmt: skip
    facts: list[dict[str, Any]] = [
        {"percdamp": each.percdamp, **({"dead_columns": each.dead} if each.dead else {})} for each in factors
    ]
    del factors  # as large as the Hessians, and not needed to compare
    # Of a stack one scale may be for all; what is aimed at or pruned is not the weight that is rounded.
    if aims is not stack or zeros is not None or not (len(stack) == 1 or scheme.rowwise):
        solved = replace(solved, own=None)
    return [
        _better(
            stack[i, part], aims[i, part], scheme, hessians[i].value, facts[i],
            Rounded(
                solved.codes[i, part],
                {name: value[i, part] for name, value in solved.qparams.items()},
                {name: value[i, part] for name, value in solved.own.items()} if solved.own else None,
            ),
        )
        for i in range(len(stack))
        for part in [slice(sum(rows[:k]), sum(rows[: k + 1])) for k in range(len(rows))]
    ]  # fmt: skip


def _aim(weight: torch.Tensor, hessian: Hessian, factor: Factor, share: float) -> torch.Tensor:
    """The weight whose outputs on the inputs seen come closest to the float model's: ``W (I + C H⁻¹)``."""
    if not isinstance(hessian, PairedHessian):
        return weight.float()
    w = weight.to(torch.float32)
    return w + share * factor.solve(w @ hessian.cross)


def _better(
    weight: torch.Tensor,
    aim: torch.Tensor,
    scheme: Scheme,
    hessian: torch.Tensor,
    found: Mapping[str, Any],
    solved: Rounded,
) -> _Matrix:
    """What was solved, or plain rounding where it errs no more; both against ``aim``. ``found`` is noted."""
    qparams = scheme.choose_qparams(weight) if solved.own is None else solved.own
    codes = scheme.encode(weight, qparams)
    pairs = ((codes, qparams), (solved.codes, solved.qparams))
    nearest, error = output_errors(aim, (scheme.decode(*pair) for pair in pairs), hessian)
    facts = {"error_rounded": nearest, "error": error, **found}
    if error < nearest:
        return _Matrix(solved.codes, solved.qparams, {"gptq": "done", **facts})
    facts["error_gptq"], facts["error"] = error, nearest
    return _Matrix(
        codes, qparams, {"gptq": "no better than rounding to the nearest, which was kept", **facts}
    )


def _nearest(weight: torch.Tensor, scheme: Scheme) -> _Matrix:
    why = "it saw no token, and was rounded to the nearest"
    qparams = scheme.choose_qparams(weight)
    return _Matrix(scheme.encode(weight, qparams), qparams, {"gptq": why})


def _experts(name: str, weight: torch.Tensor, job: Job, settings: Settings) -> Found:
    """The matrices of a stack; those that saw few tokens on the Hessian of all of the stack's."""
    hessians, scheme, pruned = job.hessians, job.scheme, job.pruned()
    flat, masks = matrices(weight), None if pruned is None else matrices(pruned)
    found: list[_Matrix | None] = [None] * len(flat)
    needed = min(settings.min_tokens, hessians[0].columns)
    few = [i for i, each in enumerate(hessians) if each.tokens < needed]
    shared = _shared(hessians) if few else None
    for i in few:
        if shared is None:
            found[i] = _nearest(flat[i], scheme)
    at_once = max(_STACK_BYTES // (4 * hessians[0].columns ** 2), 1)
    todo = [i for i in range(len(flat)) if found[i] is None]
    for start in range(0, len(todo), at_once):
        part = todo[start : start + at_once]
        own = [shared if i in few and shared is not None else hessians[i] for i in part]
        stack = torch.stack([flat[i] for i in part])
        zeros = None if masks is None else torch.stack([masks[i] for i in part])
        solved = _solved(stack, own, scheme, settings, [stack.shape[1]], zeros)
        for i, matrix in zip(part, solved, strict=True):
            facts = {**matrix.facts, "tokens": hessians[i].tokens}
            if i in few:
                facts["gptq"] = f"{facts['gptq']}, on the tokens of all experts: its own are too few"
            found[i] = _Matrix(matrix.codes, matrix.qparams, facts)
    return _joined(name, weight, [each for each in found if each is not None])


def _shared(hessians: Sequence[Hessian]) -> Hessian | None:
    """The Hessian of all tokens that any expert of a stack saw; None if there are none."""
    return Hessian.mean_of(hessians) if any(each.tokens for each in hessians) else None


def _joined(name: str, weight: torch.Tensor, found: Sequence[_Matrix]) -> Found:
    codes = torch.stack([each.codes for each in found]).view(weight.shape)
    qparams = {
        key: torch.stack([each.qparams[key] for each in found]).view(*weight.shape[:-1], -1)
        for key in found[0].qparams
    }
    return Found(name, codes, qparams, [each.facts for each in found])


@functools.lru_cache(maxsize=64)
def column_problem(scheme: Scheme) -> str | None:
    """Why ``scheme`` can't encode and decode one column by itself, or None; tried on a small weight."""
    size = 16 if scheme.group_columns == -1 else min(scheme.group_columns, 4096)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, size + min(size, 16), generator=generator)
    try:
        qparams = scheme.choose_qparams(weight)
        whole = scheme.decode(scheme.encode(weight, qparams), qparams)
        own = {name: value[:, :1] for name, value in qparams.items()}
        column = scheme.decode(scheme.encode(weight[:, 1:2], own), own)
    except Exception as error:  # noqa: BLE001 - a stranger's code: whatever it raises is the reason
        return f"{scheme} can't encode a column by itself: {type(error).__name__}: {error}"
    if column.shape != (4, 1) or not torch.allclose(column[:, 0], whole[:, 1], rtol=1e-3, atol=1e-5):
        return f"{scheme} gives a column by itself another value than within the whole weight"
    return None
