"""How much GPTQ holds at a time: tensors that torch's operators return are counted while they live."""

from __future__ import annotations

import weakref

import torch
from small_models import hessian_of, inputs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ao_core as ao
from ao_core.calibrate import Hessian
from ao_core.numerics.hessian import output_errors
from ao_gptq.factor import Factor
from ao_gptq.layers import Job, Settings, solve
from ao_gptq.spread import spread


class Peak(TorchDispatchMode):
    """The most bytes of storages alive that were made inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.most, self._alive = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)
        }
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            storage = leaf.untyped_storage() if torch.is_tensor(leaf) else None
            if storage is not None and storage._cdata not in given | self._alive.keys():
                self._alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self._alive.pop, storage._cdata, None)
        self.most = max(self.most, sum(self._alive.values()))
        return out


def test_a_factor_needs_two_matrices_beside_the_hessian():
    hessian = hessian_of(inputs(1024, 1100))
    for act_order in (False, True):
        with Peak() as peak:
            factor = Factor.of(hessian, act_order=act_order)
        assert 2 <= peak.most / hessian.nbytes < 2.3
        assert factor.upper.is_contiguous() and torch.equal(factor.upper, factor.upper.triu())


def test_errors_are_measured_some_rows_at_a_time(monkeypatch):
    weight, hessian = inputs(96, 4000), hessian_of(inputs(96, 200))
    changed = weight + 0.1
    whole = output_errors(weight, [changed], hessian)
    monkeypatch.setattr("ao_core.numerics.hessian._ELEMENTS", 96 * 300)
    with Peak() as peak:
        found = output_errors(weight, [changed], hessian)
    assert peak.most < weight.nbytes / 3
    torch.testing.assert_close(torch.tensor(found), torch.tensor(whole), rtol=1e-4, atol=0)
    exact = (changed - weight).double() @ hessian.double()
    direct = (exact * (changed - weight)).sum() / ((weight.double() @ hessian.double()) * weight).sum()
    torch.testing.assert_close(torch.tensor(found[0]).double(), direct, rtol=1e-3, atol=0)


def test_a_hessian_being_collected_is_no_larger_than_one_and_a_quarter():
    x = inputs(2048, 8)
    with Peak() as peak:
        found = Hessian(2048)
        for row in x.split(4):
            found.update(row)
    assert peak.most < 4 * 2048 * 2048 * 1.4  # a band's product beside the sums


def test_hessians_go_when_their_layer_is_done():
    scheme, alive = ao.parse_scheme("int8-weight-only"), []

    def job():
        hessian = Hessian(64)
        hessian.update(inputs(64, 100))
        alive.append(weakref.ref(hessian))
        return Job(scheme, [hessian], {str(len(alive)): inputs(64, 7)})

    jobs = [job() for _ in range(3)]
    found = spread(jobs, lambda job: solve(job, Settings()))
    left = [sum(each() is not None for each in alive) for _ in found]
    assert left == [2, 1, 0] and jobs == []
