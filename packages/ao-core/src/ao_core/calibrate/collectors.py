"""What is kept of the inputs that a layer sees: small statistics, updated batch by batch.

Each is made for the number of input columns and a device, takes inputs ``[..., K]`` of any float dtype,
none of whose rows need be there, and counts rows as ``tokens``. Statistics are float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch

from ao_core.calibrate import processes


class Collector(ABC):
    """Base of all collectors.

    Args:
        columns: input features, K.
        device: where the statistics lie.

    Attributes:
        tokens: rows seen so far.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        self.columns, self.device, self.tokens = columns, torch.device(device), 0

    def update(self, x: torch.Tensor) -> None:
        """Take in the rows of ``x`` ``[..., K]``.

        Raises:
            ValueError: the last dimension is not K.
        """
        if x.shape[-1] != self.columns:
            raise ValueError(f"inputs of {self.columns} columns are collected, found {tuple(x.shape)}")
        rows = x.detach().reshape(-1, self.columns)
        self.tokens += rows.shape[0]
        if rows.shape[0]:
            self.add(rows.to(self.device))

    @abstractmethod
    def add(self, rows: torch.Tensor) -> None:
        """Take in ``rows`` ``[n, K]``, n ≥ 1, in the dtype that the layer saw."""

    @property
    @abstractmethod
    def value(self) -> torch.Tensor:
        """The statistic so far; zeros, or no rows, if nothing was seen."""

    def join(self) -> None:
        """Make it that of the rows that all processes saw; each calls this once, at the end.

        Raises:
            NotImplementedError: a collector of this kind can't be joined.
        """
        raise NotImplementedError(f"{type(self).__name__} can't be joined over processes: define join()")


class Absmax(Collector):
    """The largest magnitude in each column: float32 ``[K]``."""

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        super().__init__(columns, device)
        self._largest = torch.zeros(columns, device=device)

    def add(self, rows: torch.Tensor) -> None:
        """See :meth:`Collector.add`."""
        self._largest = torch.maximum(self._largest, rows.abs().amax(0).float())

    @property
    def value(self) -> torch.Tensor:
        """``max |x_j|``."""
        return self._largest

    def join(self) -> None:
        """See :meth:`Collector.join`."""
        self.tokens = processes.total(self.tokens, self.device)
        processes.all_reduce(self._largest, "max")


class SquaredNorm(Collector):
    """The sum of squares in each column: float32 ``[K]``; divide by ``tokens`` for the mean."""

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        super().__init__(columns, device)
        self._sum = torch.zeros(columns, device=device)

    def add(self, rows: torch.Tensor) -> None:
        """See :meth:`Collector.add`."""
        self._sum += rows.float().square().sum(0)

    @property
    def value(self) -> torch.Tensor:
        """``‖x_j‖²`` over all tokens."""
        return self._sum

    def join(self) -> None:
        """See :meth:`Collector.join`."""
        self.tokens = processes.total(self.tokens, self.device)
        processes.all_reduce(self._sum)


class Hessian(Collector):
    """``H = 2/n Σ x xᵀ`` over tokens: float32 ``[K, K]`` (GPTQ, arXiv 2210.17323, section 3).

    It is that of the squared error of one output, ``‖X w - X ŵ‖² / n``. Each update's product is float32,
    their sum float64: it holds nearly every sum of float32 numbers exactly, so that their order, and how
    many processes they come from, change nothing.

    Args:
        columns: input features, K.
        device: where it lies.
        seen: what becomes of rows before they are multiplied, such as :meth:`Scheme.quantize_input`.
    """

    def __init__(
        self,
        columns: int,
        device: torch.device | str = "cpu",
        *,
        seen: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        super().__init__(columns, device)
        self._seen = seen or (lambda rows: rows)
        # One of both is there: sums on and right of the diagonal, which are as large, or the whole.
        self._sums: list[torch.Tensor] | None = None
        self._whole: torch.Tensor | None = None

    @classmethod
    def mean_of(cls, parts: Sequence[Hessian]) -> Hessian:
        """That of all tokens that any of ``parts``, of the same columns, saw."""
        made = cls(parts[0].columns, parts[0].device)
        made.tokens = sum(part.tokens for part in parts)
        whole = torch.zeros(made.columns, made.columns, device=made.device)
        for part in parts:
            whole.add_(part.value, alpha=part.tokens / max(made.tokens, 1))
        made._whole = whole
        return made

    def add(self, rows: torch.Tensor) -> None:
        """See :meth:`Collector.add`."""
        rows, sums = self._seen(rows), self._opened(self.tokens - rows.shape[0])
        for (start, end), part in zip(_bands(self.columns), sums, strict=True):
            part.add_(product(rows[:, start:end], rows[:, start:]))

    @property
    def value(self) -> torch.Tensor:
        """``H``."""
        if self._whole is None:
            whole = torch.empty(self.columns, self.columns, device=self.device)
            sums, self._sums = self._opened(0), None
            for start, end in _bands(self.columns):
                whole[start:end, start:] = sums.pop(0).mul_(2 / max(self.tokens, 1))
                whole[end:, start:end] = whole[start:end, end:].t()
            self._whole = whole
        return self._whole

    def join(self) -> None:
        """See :meth:`Collector.join`."""
        sums = self._opened(self.tokens)
        self.tokens = processes.total(self.tokens, self.device)
        for part in sums:
            processes.all_reduce(part)

    def _opened(self, tokens: int) -> list[torch.Tensor]:
        """The sums ``Σ x xᵀ`` of each band, of a whole that was made for ``tokens`` where there is one."""
        if self._sums is None:
            whole, self._whole = self._whole, None
            self._sums = [
                torch.zeros(end - start, self.columns - start, dtype=torch.float64, device=self.device)
                if whole is None
                else whole[start:end, start:].double().mul_(tokens / 2)
                for start, end in _bands(self.columns)
            ]
        return self._sums


class PairedHessian(Hessian):
    """A Hessian, and beside it what the inputs lack of those in the float model."""

    def __init__(
        self,
        columns: int,
        device: torch.device | str = "cpu",
        *,
        seen: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        super().__init__(columns, device, seen=seen)
        self._lacking: list[torch.Tensor] | None = None  # Σ (x̃ - x) xᵀ, float64, a band of rows each
        self._cross: torch.Tensor | None = None
        self._paired = 0

    def pair(self, x: torch.Tensor, reference: torch.Tensor) -> None:
        """Take in rows ``x`` ``[..., K]``, and the same rows as the float model has them."""
        self.update(x)
        rows = self._seen(x.detach().reshape(-1, self.columns).to(self.device)).float()
        wanted = reference.detach().reshape(-1, self.columns).to(self.device)
        if rows.shape[0]:
            lacking = wanted.float() - rows
            for (start, end), part in zip(_bands(self.columns), self._opened_cross(), strict=True):
                part.add_(product(lacking[:, start:end], rows))
            self._paired += rows.shape[0]

    @property
    def value(self) -> torch.Tensor:
        """``H``. Ends the sums of :attr:`cross` too, so that they don't lie in memory beside it."""
        self._end_cross()
        return super().value

    @property
    def cross(self) -> torch.Tensor:
        """``2/n Σ (x̃ - x) xᵀ`` over the tokens that came with ``x̃``, the input in the float model.

        Float32 ``[K, K]`` (GPTAQ, arXiv 2504.02692, section 3).
        """
        return self._end_cross()

    def join(self) -> None:
        """See :meth:`Collector.join`."""
        super().join()
        sums = self._opened_cross()
        self._paired = processes.total(self._paired, self.device)
        for part in sums:
            processes.all_reduce(part)

    def _end_cross(self) -> torch.Tensor:
        if self._cross is None:
            sums, self._lacking = self._opened_cross(), None
            self._cross = torch.empty(self.columns, self.columns, device=self.device)
            for start, end in _bands(self.columns):
                self._cross[start:end] = sums.pop(0).mul_(2 / max(self._paired, 1))
        return self._cross

    def _opened_cross(self) -> list[torch.Tensor]:
        if self._lacking is None:
            cross, self._cross = self._cross, None
            self._lacking = [
                torch.zeros(end - start, self.columns, dtype=torch.float64, device=self.device)
                if cross is None
                else cross[start:end].double().mul_(self._paired / 2)
                for start, end in _bands(self.columns)
            ]
        return self._lacking


def _bands(columns: int) -> list[tuple[int, int]]:
    """Eight bands of rows of ``[K, K]``, at least 128 wide: of a symmetric matrix half need no product."""
    width = max(-(-columns // 8), 128)
    return [(start, min(start + width, columns)) for start in range(0, columns, width)]


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``leftᵀ right`` in float32, for rows ``[n, A]`` and ``[n, B]``.

    16-bit rows on CUDA go to the tensor cores as they are: their products are exact in float32.
    """
    halves = left.dtype in (torch.bfloat16, torch.float16)
    if halves and left.is_cuda:
        return torch.mm(left.t(), right, out_dtype=torch.float32)
    return left.float().t() @ right.float()


class Sample(Collector):
    """Some of the rows themselves, ``[n ≤ limit, K]``, each token as likely as any other.

    Args:
        columns: input features, K.
        device: where the rows lie.
        limit: rows that are kept.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu", *, limit: int = 512) -> None:
        super().__init__(columns, device)
        self.limit = limit
        self._rows: torch.Tensor | None = None
        self._keys = torch.empty(0)
        self._generator = torch.Generator().manual_seed(0)

    def add(self, rows: torch.Tensor) -> None:
        """See :meth:`Collector.add`."""
        # The rows with the largest of independent uniform keys are a uniform sample.
        keys = torch.cat([self._keys, torch.rand(rows.shape[0], generator=self._generator)])
        both = rows if self._rows is None else torch.cat([self._rows, rows])
        kept = keys.topk(min(self.limit, keys.numel())).indices
        self._keys, self._rows = keys[kept], both[kept.to(both.device)]

    @property
    def value(self) -> torch.Tensor:
        """The rows, in no order."""
        return torch.empty(0, self.columns, device=self.device) if self._rows is None else self._rows
