"""Tiles for int4 that are wrong, fail, hang, or end their process; and what answers in a child for them."""

import os
import sys
import time

from ao_kernels import trials
from ao_kernels.configs import Few, Gemm

FEW = RIGHT = Few(2, 16, 4, 2, 32, 3)
GEMM = Gemm("pointers", 16, 16, 64, 4, 3, 0, 1)
WRONG = Few(4, 16, 1, 2, 32, 2)
BROKEN = Few(3, 16, 1, 2, 32, 2)  # Triton wants powers of two
HANGS = Few(2, 16, 1, 2, 32, 7)
HANGS_LATER = Few(2, 16, 1, 2, 32, 8)
CRASHES = Few(2, 16, 1, 2, 32, 9)

_make = trials._runner
_runs = {HANGS_LATER: 0}


def _forever():
    while True:
        time.sleep(3600)


def runner(cell, arguments):
    """Launches the right tiles, or does what the hostile ones do."""

    def run(tiles):
        if tiles == HANGS:
            _forever()
        if tiles == HANGS_LATER:
            _runs[tiles] += 1
            if _runs[tiles] > 1:
                _forever()
        if tiles == CRASHES:
            sys.stderr.flush()
            os.abort()
        if tiles == BROKEN:
            raise RuntimeError("arange's range must be a power of 2")
        return _make(cell, arguments)(RIGHT) + (tiles == WRONG)

    return run


def answer(request):
    """:func:`ao_kernels.trials.answer` with them."""
    trials._runner = runner
    return trials.answer(request)
