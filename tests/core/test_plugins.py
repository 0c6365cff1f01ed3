"""Loading plugins: each broken one is named with what to do, and never disturbs another."""

from __future__ import annotations

import sys

import pytest
import torch
from plugin_sites import HEAD, faults_by_plugin, load_quietly, strangers_commands

import ao_core as ao
from ao_core import plugins
from ao_core.registry import FAULTS


def test_seven_broken_plugins_beside_a_good_one(site, faults):
    """The good one works; each of the others is a fault with stage and remedy, warned of once."""
    marker = site.install_broken()
    site.install_scheme("good", "whole")
    caught = load_quietly()

    model = torch.nn.Sequential(torch.nn.Linear(7, 5))
    weight = model[0].weight.detach() * 100
    model[0].weight.data.copy_(weight)
    ao.quantize_(model, "whole")
    assert torch.equal(model[0].weight.dequantize(), weight.round())

    found = faults_by_plugin()
    assert set(found) == {*faults, "clash-a+clash-b"}
    for plugin, (stage, error, hint) in faults.items():
        fault = found[plugin]
        assert (fault.stage, fault.distribution) == (stage, plugin)
        assert error in fault.error, fault
        assert hint in fault.hint, fault
    clash = found["clash-a+clash-b"]
    assert clash.stage == "clash"
    for words in ("clash-a (clash-a 1.0)", "clash-b (clash-b 1.0)", "'claimed'"):
        assert words in clash.error
    assert "AO_DISABLE_PLUGINS=clash-a or AO_DISABLE_PLUGINS=clash-b" in clash.hint
    assert not marker.exists(), "a plugin for another ao-core was imported"
    assert sorted(str(each.message) for each in caught) == sorted(map(str, FAULTS))

    ao.schemes()
    assert len(FAULTS) == 7, "a later look-up must not report again"


def test_a_claimed_name_is_not_usable_and_says_so(site):
    site.install_scheme("one", "claimed")
    site.install_scheme("two", "claimed")
    load_quietly()
    assert "claimed" not in ao.schemes()
    words = r"'claimed' is not usable: .*one \(one 1.0\) and two \(two 1.0\).*AO_DISABLE_PLUGINS=one"
    with pytest.raises(ao.UnknownNameError, match=words):
        ao.parse_scheme("claimed")


def test_disabling_one_claimant_gives_the_name_to_the_other(site, monkeypatch):
    site.install_scheme("one", "claimed")
    site.install_scheme("two", "claimed")
    monkeypatch.setenv("AO_DISABLE_PLUGINS", " one ,nobody")
    assert load_quietly() == []
    assert ao.schemes()["claimed"].__module__ == "fake_two"
    assert "fake_one" not in sys.modules, "a disabled plugin was imported"
    (row,) = [plugin for plugin in plugins.installed() if plugin.source.plugin == "one"]
    assert row.disabled and row.fault is None


def test_an_algorithm_that_is_asked_for_as_a_scheme_is_named(site):
    """And the other way round."""
    site.install_scheme("one", "rounds")
    load_quietly()
    name = next(iter(ao.algorithms()))
    with pytest.raises(ao.UnknownNameError, match="It is the name of an algorithm"):
        ao.parse_scheme(name)
    with pytest.raises(ao.UnknownNameError, match="It is the name of a scheme"):
        ao.parse_algorithm("rounds")


def test_a_name_of_a_disabled_plugin_is_not_merely_unknown(site, monkeypatch):
    site.install_scheme("one", "lost")
    monkeypatch.setenv("AO_DISABLE_PLUGINS", "one")
    load_quietly()
    with pytest.raises(
        ao.UnknownNameError, match=r"unknown scheme 'lost'.*Left out by AO_DISABLE_PLUGINS: one\."
    ):
        ao.parse_scheme("lost")


@pytest.mark.parametrize("good", ["aaa", "zzz"])
def test_load_order_never_decides(site, good):
    """The good plugin sorts before or after all the broken ones: the outcome is the same."""
    site.install_broken()
    site.install_scheme("good", "whole", point=good)
    site.install_scheme("rival", "claimed", point={"aaa": "zzz", "zzz": "aaa"}[good])
    load_quietly()
    assert ao.schemes()["whole"].__module__ == "fake_good"
    assert "claimed" not in ao.schemes()
    by_stage = sorted(fault.stage for fault in FAULTS)
    assert by_stage == ["answer", "answer", "answer", "clash", "hooks", "import", "requires"]


def test_one_bad_answer_withdraws_all_of_a_plugin(site):
    """All or nothing: its good scheme is not registered either."""
    module = site.install_scheme("half", "whole")
    module.write_text(module.read_text() + "\n\n@ao.hookimpl\ndef ao_register_kernels():\n    return [1]\n")
    load_quietly()
    assert "whole" not in ao.schemes()
    assert "not an ao_core.Kernel" in faults_by_plugin()["half"].error


def test_a_plugin_that_fails_after_its_commands_were_read(site):
    """The command line asks for commands first; nothing of the plugin is left in the end."""
    code = HEAD + "def ao_register_commands():\n    return [ao.Command('greet', print)]\n\n"
    site.install("late", code + "@ao.hookimpl\ndef ao_register_schemes():\n    return 1 / 0\n")
    assert [command.name for command, _ in strangers_commands()] == ["greet"]
    load_quietly()
    assert strangers_commands() == []
    (plugin,) = [each for each in plugins.installed() if each.source.plugin == "late"]
    assert plugin.names("command") == []


def test_strict_raises_every_time(site, monkeypatch):
    site.install("bad", "1 / 0\n")
    monkeypatch.setenv("AO_STRICT_PLUGINS", "1")
    for _ in range(2):
        with pytest.raises(ao.PluginError, match="ZeroDivisionError"):
            ao.schemes()
    monkeypatch.setenv("AO_DISABLE_PLUGINS", "bad")
    ao.schemes()


def test_strict_raises_for_a_clash(site, monkeypatch):
    site.install_scheme("one", "claimed")
    site.install_scheme("two", "claimed")
    monkeypatch.setenv("AO_STRICT_PLUGINS", "1")
    for _ in range(2):
        with pytest.raises(ao.PluginError, match="'claimed' is claimed by"):
            ao.schemes()


def test_an_unknown_scheme_lists_nearest_names_and_faults(site):
    site.install("bad", "1 / 0\n")
    site.install_scheme("good", "whole-numbers")
    load_quietly()
    with pytest.raises(ao.UnknownNameError) as caught:
        ao.parse_scheme("whole-number")
    text = str(caught.value)
    assert "Did you mean 'whole-numbers'" in text
    assert "Not loaded: plugin 'bad' of bad, import: " in text
    assert "ZeroDivisionError" in text


def test_two_entry_points_of_one_name(site):
    """Neither is loaded, and both distributions are named."""
    site.install_scheme("first", "whole", point="same")
    site.install_scheme("second", "other", point="same")
    load_quietly()
    assert not {"whole", "other"} & set(ao.schemes())
    assert {fault.distribution for fault in FAULTS} == {"first", "second"}
    assert all("first and second" in fault.error for fault in FAULTS)
