"""``nf4_dequantize`` gives the reference's bits."""

from __future__ import annotations

import pytest
import torch

import ao_core as ao
from ao_core.testing.kernels import poisoned_memory
from ao_kernels import nf4_linear

# The interpreter cuts bfloat16 off where a GPU rounds.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_is_the_references(dtype, device):
    for *args, _ in ao.OPS.get("nf4_dequantize").samples(device):
        if args[1].shape[-1] > 1 and args[5] % 32:
            continue  # blocks that the kernel rejects
        with poisoned_memory():
            found = nf4_linear.dequantize(*args, dtype)
        assert torch.equal(found, ao.OPS.get("nf4_dequantize").reference(*args, dtype))


def test_levels_are_those_of_float32(device):
    packed = torch.arange(256, dtype=torch.uint8, device=device).view(1, 256)
    found = nf4_linear.dequantize(
        packed, torch.ones(1, 1, device=device), None, None, 512, 512, 256, torch.float32
    )
    from ao_quant.nf4_ops import NF4_LEVELS

    codes = torch.stack((torch.arange(256) & 15, torch.arange(256) >> 4), -1).flatten()
    assert torch.equal(found.cpu().flatten(), torch.tensor(NF4_LEVELS)[codes])


def test_codes_in_strides_and_what_does_not_fit(device):
    op = ao.OPS.get("nf4_dequantize")
    wide = torch.randint(0, 256, (5, 80), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    absmax = torch.rand(5, 4, generator=torch.Generator().manual_seed(1)).to(device)[:, ::2]
    packed = wide.to(device)[:, 1:65:2]  # [5, 32]
    found = nf4_linear.dequantize(packed, absmax, None, None, 63, 32, 256, torch.float32)
    assert torch.equal(found, op.reference(packed, absmax, None, None, 63, 32, 256, torch.float32))
    with pytest.raises(ValueError, match="66 columns take 33 bytes a row, not 32"):
        nf4_linear.dequantize(packed, absmax, None, None, 66, 32, 256, torch.float32)
