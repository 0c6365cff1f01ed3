"""``ao.propose``: every installed scheme, what hooks add, and hooks that fail."""

from __future__ import annotations

import torch

import ao_core as ao

HOOK = "import ao_core as ao\n\n@ao.hookimpl\ndef ao_propose_schemes(fqn, weight):\n    "


def test_defaults_and_proposals_and_faults(site):
    site.install_scheme("maker", "whole")
    site.install(
        "adds", HOOK + "return [ao.parse_scheme('int8-weight-only', group_size=48)] if fqn == 'a' else []\n"
    )
    site.install("raises", HOOK + "raise KeyError('lost')\n")
    site.install("wrong", HOOK + "return ['int8-weight-only']\n")
    found = ao.propose("a", torch.randn(8, 96))
    assert set(ao.schemes()) <= set(found.schemes)
    assert "whole" in found.schemes
    assert "int8-weight-only:group_size=48" in found.schemes
    assert list(found.schemes) == sorted(found.schemes)
    assert "KeyError" in found.faults["raises"] and "list of schemes" in found.faults["wrong"]
    assert "int8-weight-only:group_size=48" not in ao.propose("b", torch.randn(8, 96)).schemes
    assert ao.scheme_source(found.schemes["whole"]).distribution == "maker"
