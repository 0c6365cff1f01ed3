"""Every way in which a plugin can be wrong is one fault, with what to do."""

from __future__ import annotations

import pytest
from plugin_sites import HEAD, faults_by_plugin, load_quietly, strangers_commands

import ao_core as ao
from ao_core import plugins
from ao_core.registry import FAULTS

UNUSUAL = {
    "marker-without-hook": ("x = 1\n", "hooks", "implements no hook"),
    "undecorated": ("def ao_register_schemes():\n    return []\n", "hooks", "lacks @ao_core.hookimpl"),
    "arguments": (HEAD + "def ao_register_schemes(extra):\n    return []\n", "hooks", "extra"),
    "exits": ("raise SystemExit(3)\n", "import", "SystemExit"),
    "missing-module": ("import nowhere_to_be_found\n", "import", "nowhere_to_be_found"),
    "twice": (
        HEAD + "def ao_register_commands():\n    return [ao.Command('x', print)] * 2\n",
        "answer",
        "x twice",
    ),
    "command-name": (
        HEAD + "def ao_register_commands():\n    return [ao.Command('No Name', print)]\n",
        "answer",
        "lower case",
    ),
    "command-run": (
        HEAD + "def ao_register_commands():\n    return [ao.Command('x', None)]\n",
        "answer",
        "function or a typer app",
    ),
    "provider": (
        HEAD + "def ao_register_kernels():\n    return [ao.Kernel('op', 3, print)]\n",
        "answer",
        "provider 3 must be a word",
    ),
    "priority": (
        HEAD + "def ao_register_kernels():\n    return [ao.Kernel('op', 'me', print, 'high')]\n",
        "answer",
        "priority must be a number",
    ),
    "algorithm": (
        HEAD + "def ao_register_algorithms():\n    return [int]\n",
        "answer",
        "not an ao_core.Algorithm",
    ),
    "repr": (
        "class Rude:\n    def __repr__(self):\n        raise OSError('no')\n\n\n"
        + HEAD
        + "def ao_register_schemes():\n    return [Rude()]\n",
        "answer",
        "OSError: no",
    ),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_every_way_to_be_wrong_is_one_fault(site, name):
    code, stage, words = UNUSUAL[name]
    site.install("odd", code)
    load_quietly()
    (fault,) = FAULTS
    assert (fault.plugin, fault.stage) == ("odd", stage), fault
    assert words in fault.error, fault
    assert fault.hint


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("(WholeTensor,)", "WholeTensor"), "must be a tuple"),
        (("(WholeTensor,)", "(int,)"), "must be a tuple"),
        (("@dataclass(frozen=True)", ""), "frozen=True"),
        (("'whole'", "'Whole!'"), "lower case letters"),
        (("    def choose", "    bits: int\n\n    def choose"), "needs a default"),
        (("    def choose", "    def __post_init__(self):\n        1 / 0\n\n    def choose"), "ZeroDivision"),
    ],
)
def test_invalid_scheme_classes(site, change, words):
    module = site.install_scheme("odd", "whole")
    text = module.read_text()
    assert change[0] in text
    module.write_text(text.replace(*change, 1))
    load_quietly()
    (fault,) = FAULTS
    assert fault.stage == "answer"
    assert words in fault.error


def test_a_requirement_that_cannot_be_read(site):
    site.install_scheme("odd", "whole", requires=["ao-core >= "])
    load_quietly()
    assert faults_by_plugin()["odd"].stage == "requires"
    assert "'ao-core >= '" in faults_by_plugin()["odd"].error


def test_requirements_of_others_and_of_extras_do_not_count(site):
    site.install_scheme(
        "fine",
        "whole",
        requires=["torch>=99", "ao_core>=99; extra == 'new'", "AO.Core>=0.0.1", "ao-core-more>=99"],
    )
    assert load_quietly() == []
    assert "whole" in ao.schemes()


def test_a_distribution_without_metadata(site):
    """What a broken uninstall leaves behind."""
    site.install_scheme("left", "whole")
    next(site.path.glob("*.dist-info/METADATA")).unlink()
    assert load_quietly() == []
    assert "whole" in ao.schemes()


def test_an_entry_point_that_names_no_module(site):
    site.install("odd", HEAD + "def ao_register_schemes():\n    return []\n", target="not a module")
    with pytest.warns(plugins.PluginWarning):
        assert strangers_commands() == []
    assert faults_by_plugin()["odd"].stage == "import"


def test_names_that_make_things_up_on_access_are_no_hooks(site):
    """``torch.ops`` answers to every name, also to the mark of a hook."""
    module = site.install_scheme("fine", "whole")
    module.write_text(
        "from torch import ops\nfrom unittest import mock\nany_ = mock.MagicMock()\n" + module.read_text()
    )
    assert load_quietly() == []
    assert "whole" in ao.schemes()


def test_a_plugin_may_be_an_object(site):
    code = HEAD.replace("@ao.hookimpl", "class Plugin:\n    @ao.hookimpl")
    code += "    def ao_register_commands(self):\n        return [ao.Command('hello', print)]\n\n"
    code += "plugin = Plugin()\n"
    site.install("object", code, target="fake_object:plugin")
    assert [command.name for command, _ in strangers_commands()] == ["hello"]
    assert load_quietly() == []


def test_a_lookup_while_a_plugin_is_imported_does_not_hang(site):
    module = site.install_scheme("curious", "whole")
    module.write_text(module.read_text() + "\n\nao.schemes()\n")
    assert load_quietly() == []
    assert "whole" in ao.schemes()


def test_reserved_and_disputed_commands(site):
    """A plugin's ``quantize`` is refused; what else it brings stays."""
    code = HEAD + "def ao_register_commands():\n    return [ao.Command(n, print) for n in ({})]\n"
    site.install("greedy", code.format("'quantize', 'one', 'both'"))
    site.install("other", code.format("'two', 'both'"))
    with pytest.warns(plugins.PluginWarning) as caught:
        names = [command.name for command, _ in strangers_commands()]
    assert names == ["one", "two"]
    texts = sorted(str(each.message) for each in caught)
    assert len(texts) == 2
    assert "'quantize' of greedy (greedy 1.0) is ao's own" in "".join(texts)
    assert "'both' is claimed by greedy (greedy 1.0) and other (other 1.0)" in "".join(texts)


def test_the_built_in_commands_are_the_reserved_ones():
    from ao_core.cli import BUILT_IN

    assert set(BUILT_IN) == plugins.BUILT_IN_COMMANDS
