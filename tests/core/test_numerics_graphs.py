"""Numerics in one graph of torch.compile."""

from __future__ import annotations

import itertools

import pytest
import torch
from number_cases import make

from ao_core.numerics import affine, codebook, pack


def round_trip(weight):
    scale, zero = affine.choose_affine(weight, qmin=0, qmax=15, group_size=32)
    codes = affine.quantize(weight, scale, qmin=0, qmax=15, zero_point=zero, group_size=32, dtype=torch.uint8)
    packed = pack.pack(codes, bits=4)
    codes = pack.unpack(packed, bits=4, columns=weight.shape[-1])
    return affine.dequantize(codes, scale, zero_point=zero, group_size=32), packed


def activations(x):
    codes, scale = affine.quantize_per_token(x)
    levels = torch.tensor([-1.0, -0.5, 0.0, 2.0])
    return codes, scale, codebook.decode(codebook.encode(x, levels), levels)


@pytest.mark.parametrize("function", [round_trip, activations])
def test_one_graph_for_any_row_count(function):
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, columns in itertools.product((2, 5), (100,)):
        x = make(rows, columns)
        for got, want in zip(compiled(x), function(x), strict=True):
            assert torch.equal(got, want)
