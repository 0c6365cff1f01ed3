"""torchao's names for GPTQ as of April 2024, on ao's own walk: any model, any device, bounded memory.

Models are changed in place and returned. What torchao needed for tracing is gone: inputs are those of the
model, and no layer needs to be exported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from ao_core import BlockAlgorithm, OptionError, QParams, Scheme, compress_
from ao_core.calibrate import Hessian, Stage, read_texts, tokenized
from ao_gptq.algorithm import Gptq
from ao_gptq.columns import rounded_by_scheme
from ao_gptq.factor import Factor

__all__ = [
    "GPTQQuantizer",
    "InputRecorder",
    "Int4WeightOnlyGPTQQuantizer",
    "Int8DynActInt4WeightGPTQQuantizer",
    "MultiInput",
]


class MultiInput:
    """Values of one argument of a model, one for each sample.

    Args:
        inputs: tensors, or anything else that each call takes there.
    """

    def __init__(self, inputs: Sequence[Any]) -> None:
        self.values = list(inputs)

    def add_input(self, input: Any) -> MultiInput:  # noqa: A002 - torchao's name
        """Append a sample."""
        self.values.append(input)
        return self

    def __getitem__(self, index: slice) -> MultiInput:
        return MultiInput(self.values[index])

    def __len__(self) -> int:
        return len(self.values)


class InputRecorder:
    """Calibration inputs ``[1, calibration_seq_length]`` from text.

    Args:
        tokenizer: a Hugging Face tokenizer, :class:`ao_core.calibrate.SentencePiece`, or what has ``encode``.
        calibration_seq_length: tokens to a sample.
        pad_calibration_inputs: pad each text; otherwise join all and cut.
        vocab_size: ids must be below it.
        device: where samples lie.
    """

    def __init__(
        self,
        tokenizer: Any,
        calibration_seq_length: int,
        pad_calibration_inputs: bool = False,
        vocab_size: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.tokenizer, self.length, self.pads = tokenizer, calibration_seq_length, pad_calibration_inputs
        self.vocab_size, self.device = vocab_size, device
        self.inputs: list[MultiInput] | None = None

    def record_inputs(
        self, calibration_tasks: str | Path | Sequence[str], calibration_limit: int = 128
    ) -> InputRecorder:
        """Read a text file or a data set, or take texts; ``calibration_limit`` samples at most.

        Raises:
            ModelError: no text, less than a sample, or a token beyond ``vocab_size``.
        """
        named = isinstance(calibration_tasks, (str, Path))
        texts = read_texts(calibration_tasks) if named else list(calibration_tasks)  # type: ignore[arg-type]
        call = self.tokenizer if callable(self.tokenizer) else _Encoding(self.tokenizer)
        batches = tokenized(texts, call, samples=calibration_limit, context=self.length, packed=not self.pads)
        rows = [batch["input_ids"] if isinstance(batch, dict) else batch for batch in batches]
        largest = max(int(row.max()) for row in rows)
        if self.vocab_size is not None and largest >= self.vocab_size:
            raise OptionError(
                f"the tokenizer gave token {largest}, and vocab_size is {self.vocab_size}. Use the tokenizer "
                "that the model was trained with."
            )
        self.inputs = [MultiInput([row.to(self.device) for row in rows])]
        return self

    def get_inputs(self) -> list[MultiInput] | None:
        """A :class:`MultiInput` for each argument of the model: one. None before any were recorded."""
        return self.inputs


class _Encoding:
    """The call of a Hugging Face tokenizer on what has ``encode(text)`` only."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, text: str, **_: Any) -> dict[str, Any]:
        return {"input_ids": self._tokenizer.encode(text)}


class Int4WeightOnlyGPTQQuantizer:
    """GPTQ to 4-bit weights in groups with a float midpoint.

    Args:
        blocksize: columns whose errors are handed on together.
        percdamp: damping, as a share of the Hessian's mean diagonal.
        groupsize: columns to a scale: 32, 64, 128 or 256.
        inner_k_tiles: taken for its name's sake: the tiling that fits is chosen.
        padding_allowed: as above: groups need not divide a row.
    """

    _scheme: ClassVar[str] = "int4-weight-only"

    def __init__(
        self,
        blocksize: int = 128,
        percdamp: float = 0.01,
        groupsize: int = 64,
        inner_k_tiles: int = 8,
        padding_allowed: bool = True,
    ) -> None:
        self.algorithm = Gptq(block_size=blocksize, percdamp=percdamp)
        self.scheme = f"{self._scheme}:group_size={groupsize}"

    def quantize(self, model: nn.Module, inputs: Sequence[MultiInput]) -> nn.Module:
        """Quantize the linears of ``model`` in place, calibrated on ``inputs``, and return it."""
        compress_(model, self.algorithm, _batches(inputs), scheme=self.scheme)
        return model


class Int8DynActInt4WeightGPTQQuantizer(Int4WeightOnlyGPTQQuantizer):
    """GPTQ to symmetric 4-bit weights in groups, whose linears quantize activations to int8 (8da4w).

    Args:
        blocksize: columns whose errors are handed on together.
        percdamp: damping, as a share of the Hessian's mean diagonal.
        groupsize: columns to a scale.
        inner_k_tiles: taken for its name's sake.
        padding_allowed: as above.
        precision: as above: weights keep their dtype.
    """

    _scheme: ClassVar[str] = "int8-dynamic-int4-weight"

    def __init__(
        self,
        blocksize: int = 128,
        percdamp: float = 0.01,
        groupsize: int = 256,
        inner_k_tiles: int = 8,
        padding_allowed: bool = True,
        precision: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(blocksize, percdamp, groupsize, inner_k_tiles, padding_allowed)


class GPTQQuantizer:
    """Base of quantizers made of functions, as torchao had it.

    A subclass sets:

    - ``get_qparams_func(weight, groupsize) -> qparams``: tensors ``[N, 1]`` for a group ``[N, g]``;
    - ``quantize_func(weight, qparams, groupsize) -> codes`` and
      ``dequantize_func(codes, qparams, groupsize) -> weight``, also for one column ``[N, 1]``;
    - ``combine_qparams_list_func(list of qparams) -> qparams`` of the whole weight;
    - ``make_names_and_values_dict_func(codes, qparams) -> {name: tensor}``;
    - ``skip_layer_func(weight) -> bool``;
    - ``act_fake_quant_func(x) -> x``, or None.
    """

    get_qparams_func: Callable[..., Sequence[torch.Tensor]]
    quantize_func: Callable[..., torch.Tensor]
    dequantize_func: Callable[..., torch.Tensor]
    combine_qparams_list_func: Callable[..., Any]
    make_names_and_values_dict_func: Callable[..., dict[str, torch.Tensor]]
    skip_layer_func: Callable[[torch.Tensor], bool]
    act_fake_quant_func: Callable[[torch.Tensor], torch.Tensor] | None = None

    def _create_quantized_state_dict(
        self,
        model: nn.Module,
        inputs: Sequence[MultiInput],
        blocksize: int = 128,
        percdamp: float = 0.01,
        groupsize: int = 64,
    ) -> dict[str, torch.Tensor]:
        """What ``make_names_and_values_dict_func`` gives for each linear, and all other state.

        The model is left as it was. Each block sees what the blocks before it give with the weights that
        were dequantized, as torchao's run through the graph did.
        """
        state = {name: value for name, value in model.state_dict().items() if "kv_cache" not in name}
        run = _Functions(quantizer=self, blocksize=blocksize, percdamp=percdamp, groupsize=groupsize)
        before = dict(model.named_parameters())
        compress_(model, run, _batches(inputs))
        for name, parameter in before.items():
            owner, _, attribute = name.rpartition(".")
            model.get_submodule(owner)._parameters[attribute] = parameter
        for layer, made in run.found.items():
            state.pop(f"{layer}.weight", None)
            state |= {f"{layer}.{name}": value for name, value in made.items()}
        return state

    def _convert_for_runtime(self, model: nn.Module) -> nn.Module:
        """Replace the modules whose state has changed; a subclass's own."""
        raise NotImplementedError("_convert_for_runtime must be written by the subclass")

    def quantize(self, model: nn.Module, inputs: Sequence[MultiInput]) -> nn.Module:
        """Quantize ``model``; a subclass's own, of the two methods above."""
        raise NotImplementedError("quantize must be written by the subclass")


@dataclass(frozen=True)
class _Functions(BlockAlgorithm):
    """GPTQ with the functions of a :class:`GPTQQuantizer`; weights stay float, at the values found."""

    name: ClassVar[str] = "gptq-of-functions"

    quantizer: GPTQQuantizer
    blocksize: int
    percdamp: float
    groupsize: int
    found: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)

    def visit(self, stage: Stage) -> None:
        """See :class:`~ao_core.BlockAlgorithm`."""
        own = self.quantizer
        names = [name for name in stage.layers if not own.skip_layer_func(stage.weight(name))]

        def make(columns: int, device: torch.device) -> Hessian:
            return Hessian(columns, device, seen=own.act_fake_quant_func)

        for name, (hessian, *_) in stage.collect(make, names).items():
            weight = stage.weight(name)
            codes, qparams, values = self._rounded(weight, hessian)
            self.found[name] = own.make_names_and_values_dict_func(codes, qparams)
            stage.replace(name, values.to(weight.dtype))

    def _rounded(self, weight: torch.Tensor, hessian: Hessian) -> tuple[torch.Tensor, Any, torch.Tensor]:
        own, columns = self.quantizer, weight.shape[1]
        size = columns if self.groupsize == -1 else min(self.groupsize, columns)
        scheme = _FunctionScheme(own, size)
        factor = Factor.of(hessian.value, percdamp=self.percdamp)
        w, codes, values, chosen = weight.to(torch.float32, copy=True), [], [], []
        for start in range(0, columns, size):
            end = min(start + size, columns)
            qparams = own.get_qparams_func(w[:, start:end].to(weight.dtype), size)
            chosen.append(qparams)
            named: QParams = {str(i): each for i, each in enumerate(qparams)}
            upper, zeros = factor.upper[None, start:end, start:end], torch.zeros(1, end - start).long()
            made, errors = rounded_by_scheme(
                w[None, :, start:end], upper, scheme, {k: v.unsqueeze(0) for k, v in named.items()}, zeros
            )
            codes.append(made[0])
            values += [scheme.decode(made[..., i : i + 1], named)[0] for i in range(end - start)]
            w[:, end:].addmm_(errors[0], factor.upper[start:end, end:], alpha=-1)
        return torch.cat(codes, -1), own.combine_qparams_list_func(chosen), torch.cat(values, -1)


class _FunctionScheme(Scheme):
    """A quantizer's functions as ``encode`` and ``decode`` of a column ``[1, N, 1]``."""

    name: ClassVar[str] = "functions"

    def __init__(self, quantizer: GPTQQuantizer, size: int) -> None:
        self._own: GPTQQuantizer
        self._size: int
        object.__setattr__(self, "_own", quantizer)
        object.__setattr__(self, "_size", size)

    def encode(self, weight: torch.Tensor, qparams: QParams) -> torch.Tensor:
        """See :class:`~ao_core.Scheme`."""
        return self._own.quantize_func(weight[0], _listed(qparams), self._size).unsqueeze(0)

    def decode(self, codes: torch.Tensor, qparams: QParams) -> torch.Tensor:
        """See :class:`~ao_core.Scheme`."""
        found = self._own.dequantize_func(codes[0], _listed(qparams), self._size)
        return found.to(torch.float32).unsqueeze(0)


def _listed(qparams: QParams) -> list[torch.Tensor]:
    return [value[0] if value.ndim == 3 else value for value in qparams.values()]


def _batches(inputs: Sequence[MultiInput] | None) -> list[tuple[Any, ...]]:
    """Calls of the model: one value of each argument."""
    listed = [inputs] if isinstance(inputs, MultiInput) else list(inputs or [])
    if not listed or not all(isinstance(each, MultiInput) for each in listed):
        raise OptionError(
            "inputs must be a list with a MultiInput for each argument; InputRecorder makes one."
        )
    if len({len(each) for each in listed}) > 1:
        counts = ", ".join(str(len(each)) for each in listed)
        raise OptionError(f"every argument needs as many values, and there are {counts}.")
    return list(zip(*(each.values for each in listed), strict=True))
