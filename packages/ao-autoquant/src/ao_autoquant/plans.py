"""Comparing plans."""

from __future__ import annotations

from typing import Any

from ao_core import Plan


def differences(first: Plan, second: Plan) -> dict[str, dict[str, tuple[Any, Any]]]:
    """Layers and fingerprint entries that differ: name → (in the first, in the second).

    A layer's value is its scheme, ``"float"``, or ``"not in the plan"``.
    """

    def scheme(plan: Plan, name: str) -> str:
        choice = plan.layers.get(name)
        if choice is None:
            return "not in the plan"
        return (choice.scheme or "float") + (f", {choice.provider}" if choice.provider else "")

    layers = {
        name: (scheme(first, name), scheme(second, name))
        for name in sorted({*first.layers, *second.layers})
        if scheme(first, name) != scheme(second, name)
    }
    keys = sorted({*first.fingerprint, *second.fingerprint})
    prints = {key: (first.fingerprint.get(key), second.fingerprint.get(key)) for key in keys}
    return {"layers": layers, "fingerprint": {k: pair for k, pair in prints.items() if pair[0] != pair[1]}}
