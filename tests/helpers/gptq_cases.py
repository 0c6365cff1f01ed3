"""What several GPTQ tests need."""

from __future__ import annotations

from ao_gptq.factor import Factor
from ao_gptq.gptq import gptq as loop


def gptq(weight, hessian, scheme, *, percdamp=0.01, act_order=False, **options):
    """The loop on a Hessian."""
    return loop(weight, Factor.of(hessian, percdamp=percdamp, act_order=act_order), scheme, **options)
