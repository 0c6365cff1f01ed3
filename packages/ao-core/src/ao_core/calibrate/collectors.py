"""What is kept of the inputs that a layer sees: small statistics, updated batch by batch.

Each is made for the number of input columns and a device, takes inputs ``[..., K]`` of any float dtype,
none of whose rows need be there, and counts rows as ``tokens``. Sums are float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

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

    It is that of the squared error of one output, ``‖X w - X ŵ‖² / n``.

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
        self._mean = torch.zeros(columns, columns, device=device)
        self._whole = True  # else only the blocks on and right of the diagonal are up to date

    def add(self, rows: torch.Tensor) -> None:
        """See :meth:`Collector.add`."""
        rows, before, self._whole = self._seen(rows), self.tokens - rows.shape[0], False
        # A running mean: the sum of many tokens would lose the last bits of late ones.
        for start, end in _bands(self.columns):
            add_product(
                self._mean[start:end, start:],
                rows[:, start:end],
                rows[:, start:],
                keep=before / self.tokens,
                scale=2 / self.tokens,
            )

    @property
    def value(self) -> torch.Tensor:
        """``H``."""
        if not self._whole:
            for start, end in _bands(self.columns):
                self._mean[end:, start:end] = self._mean[start:end, end:].t()
            self._whole = True
        return self._mean

    def join(self) -> None:
        """See :meth:`Collector.join`."""
        mine, self.tokens = self.tokens, processes.total(self.tokens, self.device)
        processes.all_reduce(self.value.mul_(mine / max(self.tokens, 1)))


class PairedHessian(Hessian):
    """A Hessian, and beside it what the inputs lack of those in the float model.

    Attributes:
        cross: ``2/n Σ (x̃ - x) xᵀ`` over the tokens that came with ``x̃``, the input in the float model:
            float32 ``[K, K]`` (GPTAQ, arXiv 2504.02692, section 3).
    """

    def __init__(
        self,
        columns: int,
        device: torch.device | str = "cpu",
        *,
        seen: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        super().__init__(columns, device, seen=seen)
        self.cross = torch.zeros(columns, columns, device=device)
        self._paired = 0

    def pair(self, x: torch.Tensor, reference: torch.Tensor) -> None:
        """Take in rows ``x`` ``[..., K]``, and the same rows as the float model has them."""
        self.update(x)
        rows = self._seen(x.detach().reshape(-1, self.columns).to(self.device))
        wanted = reference.detach().reshape(-1, self.columns).to(self.device)
        before, self._paired = self._paired, self._paired + rows.shape[0]
        if rows.shape[0]:
            lacking = wanted.float() - rows.float()
            keep, scale = before / self._paired, 2 / self._paired
            self.cross.addmm_(lacking.t(), rows.float(), beta=keep, alpha=scale)

    def join(self) -> None:
        """See :meth:`Collector.join`."""
        super().join()
        mine, self._paired = self._paired, processes.total(self._paired, self.device)
        processes.all_reduce(self.cross.mul_(mine / max(self._paired, 1)))


def _bands(columns: int) -> list[tuple[int, int]]:
    """Eight bands of rows of ``[K, K]``, at least 128 wide: of a symmetric matrix half need no product."""
    width = max(-(-columns // 8), 128)
    return [(start, min(start + width, columns)) for start in range(0, columns, width)]


def add_product(
    out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, keep: float, scale: float
) -> None:
    """``out = keep * out + scale * leftᵀ right`` in float32, for rows ``[n, A]`` and ``[n, B]``.

    16-bit rows on CUDA go to the tensor cores as they are: their products are exact in float32.
    """
    halves = left.dtype in (torch.bfloat16, torch.float16)
    if halves and left.is_cuda:
        product = torch.mm(left.t(), right, out_dtype=torch.float32)
        out.mul_(keep).add_(product, alpha=scale)
    else:
        out.addmm_(left.float().t(), right.float(), beta=keep, alpha=scale)


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
