"""What is kept of the inputs that a layer sees: small statistics, updated batch by batch.

Each is made for the number of input columns and a device, takes inputs ``[..., K]`` of any float dtype,
none of whose rows need be there, and counts rows as ``tokens``. Sums are float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch


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


class Hessian(Collector):
    """``H = 2/n Σ x xᵀ`` over tokens: float32 ``[K, K]`` (GPTQ, arXiv 2210.17323, section 3).

    It is that of the squared error of one output, ``‖X w - X ŵ‖² / n``.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        super().__init__(columns, device)
        self._mean = torch.zeros(columns, columns, device=device)

    def add(self, rows: torch.Tensor) -> None:
        """See :meth:`Collector.add`."""
        rows, before = rows.float(), self.tokens - rows.shape[0]
        # A running mean: the sum of many tokens would lose the last bits of late ones.
        self._mean.addmm_(rows.t(), rows, beta=before / self.tokens, alpha=2 / self.tokens)

    @property
    def value(self) -> torch.Tensor:
        """``H``."""
        return self._mean


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
