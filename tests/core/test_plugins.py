"""Loading plugins: each broken one is named with what to do, and never disturbs another."""

from __future__ import annotations

import inspect
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch

import ao_core as ao
from ao_core import hookspecs, plugins, registry
from ao_core.kernels import KERNELS, choose, clear_choices, key_of
from ao_core.ops import OPS
from ao_core.registry import FAULTS, Fault
from ao_core.scheme import SCHEMES

ROOT = Path(__file__).parents[2]
HEAD = "import ao_core as ao\n\n@ao.hookimpl\n"
HOOKS = sorted(name for name in dir(hookspecs) if name.startswith("ao_"))

OP = """
import ao_core as ao
import torch

OP = ao.Op(
    {name!r}, "(Tensor x, Tensor weight) -> Tensor",
    reference=lambda x, weight: x @ weight.t(),
    fake=lambda x, weight: x.new_empty(x.shape[0], weight.shape[0]),
    samples=lambda device: [(torch.ones(3, 5, device=device), torch.ones(2, 5, device=device))],
)
"""


def strangers_commands():
    """Commands of plugins that are not ao's own packages."""
    return [
        (command, source)
        for command, source in plugins.commands()
        if not source.distribution.startswith("ao-")
    ]


def load_quietly() -> list[warnings.WarningMessage]:
    """Load all plugins; returns the plugin warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plugins.load()
    return [each for each in caught if issubclass(each.category, plugins.PluginWarning)]


def faults_by_plugin() -> dict[str, Fault]:
    return {fault.plugin: fault for fault in FAULTS}


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


# One test for each hook.


def test_ao_register_schemes(site):
    site.install_scheme("mine", "whole")
    assert ao.parse_scheme("whole").name == "whole"
    assert SCHEMES.entry("whole").source == registry.Source("mine", "mine", "1.0")


def test_ao_register_ops(site):
    code = OP.format(name="fake_ops_hook") + "\n\n@ao.hookimpl\ndef ao_register_ops():\n    return [OP]\n"
    site.install("mine", code)
    op = OPS.get("fake_ops_hook")
    x, weight = torch.randn(3, 5), torch.randn(2, 5)
    assert torch.equal(op(x, weight), x @ weight.t())
    assert torch.equal(torch.ops.ao.fake_ops_hook(x, weight), x @ weight.t())


def test_an_op_that_two_plugins_define(site):
    """It belongs to neither, whoever was imported first."""
    code = OP.format(name="fake_op_claimed") + "\n\n@ao.hookimpl\ndef ao_register_ops():\n    return [OP]\n"
    site.install("one", code)
    site.install("two", code)
    load_quietly()
    (fault,) = FAULTS
    assert (fault.plugin, fault.stage) == ("one+two", "clash")
    with pytest.raises(ao.UnknownNameError, match=r"one \(one 1.0\) and two \(two 1.0\)"):
        OPS.get("fake_op_claimed")


def test_ao_register_kernels(site):
    """For an op of another plugin; one for an op that nobody defines is left out and listed."""
    code = OP.format(name="fake_kernel_hook") + "\n\n@ao.hookimpl\ndef ao_register_ops():\n    return [OP]\n"
    site.install("zz-op", code)
    kernels = "[ao.Kernel(op, 'mine', lambda *a: 'mine') for op in ('fake_kernel_hook', 'absent')]"
    site.install("aa-kernels", HEAD + f"def ao_register_kernels():\n    return {kernels}\n")
    assert load_quietly() == []
    assert "fake_kernel_hook/mine" in KERNELS
    assert "absent/mine" not in KERNELS
    op = OPS.get("fake_kernel_hook")
    assert choose(op, key_of(op, (torch.ones(1, 5), torch.ones(2, 5)))).provider == "mine"
    (plugin,) = [each for each in plugins.installed() if each.source.plugin == "aa-kernels"]
    (note,) = plugin.notes
    assert "absent/mine" in note.error and "'absent' is not installed" in note.error


def test_ao_register_algorithms(site):
    from ao_core.algorithm import ALGORITHMS

    code = (
        "class Mine:\n    name = 'mine'\n\n    def run(self, model, plan, batches):\n        return 3\n\n\n"
    )
    site.install("mine", code + HEAD + "def ao_register_algorithms():\n    return [Mine]\n")
    algorithm = ALGORITHMS.get("mine")()
    assert isinstance(algorithm, ao.Algorithm)
    assert algorithm.run(None, None, []) == 3


def test_ao_register_commands(site):
    """Commands are found without importing plugins that have none."""
    site.install("mine", HEAD + "def ao_register_commands():\n    return [ao.Command('greet', print)]\n")
    site.install_scheme("other", "whole")
    ((command, source),) = strangers_commands()
    assert (command.name, command.run, source.plugin) == ("greet", print, "mine")
    assert "fake_other" not in sys.modules
    load_quietly()
    assert "whole" in ao.schemes()


def test_ao_propose_schemes(site):
    """Every plugin is asked, with the arguments that it names."""
    module = site.install_scheme("mine", "whole")
    hook = "@ao.hookimpl\ndef ao_propose_schemes(weight, fqn):\n"
    hook += "    return [Whole()] if fqn == 'a.b' else []\n"
    module.write_text(f"{module.read_text()}\n\n{hook}")
    ask = plugins.manager().hook.ao_propose_schemes
    proposed = {
        fqn: [str(s) for each in ask(fqn=fqn, weight=torch.ones(2, 2), sample=None) for s in each]
        for fqn in ("a.b", "c")
    }
    assert "whole" in proposed["a.b"]
    assert "whole" not in proposed["c"]


CHOOSER = """
from pathlib import Path

@ao.hookimpl
def ao_register_ops():
    return [OP]

@ao.hookimpl
def ao_register_kernels():
    return [
        ao.Kernel(OP.name, provider, lambda x, weight, p=provider: x @ weight.t() + len(p), priority)
        for provider, priority in (("fast", 2), ("slow", 1))
    ]

asked = []

@ao.hookimpl
def ao_choose_kernel(op, key, usable):
    asked.append((op.name, str(key), [kernel.provider for kernel in usable]))
    return {answer}
"""


@pytest.fixture
def chooser(site):
    """Install a plugin with an op, two kernels and a hook that answers as told; returns (op, asked)."""

    def install(name, answer):
        site.install("chooser", OP.format(name=name) + CHOOSER.format(answer=answer))
        clear_choices()
        return OPS.get(name), sys.modules["fake_chooser"].asked

    return install


def test_ao_choose_kernel(chooser):
    """Asked once a key, whatever the row count; its answer goes before priority."""
    op, asked = chooser("fake_choose_once", "usable[1]")
    weight = torch.randn(2, 5)
    for rows in (1, 3, 63):
        x = torch.randn(rows, 5)
        assert torch.equal(op(x, weight), x @ weight.t() + len("slow"))
    assert asked == [
        ("fake_choose_once", "cpu, float32 activations, float32[2, 5]", ["fast", "slow", "reference"])
    ]
    op(torch.randn(1, 5).double(), weight.double())
    op(torch.randn(1, 7), torch.randn(2, 7))
    assert len(asked) == 3


def test_ao_choose_kernel_may_leave_the_choice(chooser):
    op, asked = chooser("fake_choose_none", "None")
    x, weight = torch.randn(3, 5), torch.randn(2, 5)
    assert torch.equal(op(x, weight), x @ weight.t() + len("fast"))
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("answer", "named"), [("'fast'", "'fast'"), ("ao.Kernel(op.name, 'stray', print)", "'stray'")]
)
def test_ao_choose_kernel_with_a_wrong_answer(chooser, answer, named):
    """Only a kernel that is usable is an answer; nothing falls back."""
    op, _ = chooser(f"fake_choose_wrong{len(answer)}", answer)
    with pytest.raises(ao.RejectedError, match=rf"preferred {named} .*\['fast', 'slow', 'reference'\]"):
        op(torch.randn(3, 5), torch.randn(2, 5))


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_has_a_test(hook):
    assert callable(globals().get(f"test_{hook}"))


def documented_hooks() -> dict[str, list[str]]:
    """Hook → its arguments, from the headings of docs/hooks.md."""
    text = (ROOT / "docs" / "hooks.md").read_text("utf-8")
    headings = re.findall(r"^## `?(ao_\w+)\((.*?)\)`?\s*$", text, flags=re.MULTILINE)
    return {name: [argument.strip() for argument in filter(None, args.split(","))] for name, args in headings}


def test_every_hook_is_documented_with_exactly_its_arguments():
    specified = {name: list(inspect.signature(getattr(hookspecs, name)).parameters) for name in HOOKS}
    assert documented_hooks() == specified


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hookspec_says_what_it_takes_and_returns(hook):
    spec = getattr(hookspecs, hook)
    text = inspect.getdoc(spec)
    assert "Returns:" in text
    for argument in inspect.signature(spec).parameters:
        assert f"{argument}: " in text
