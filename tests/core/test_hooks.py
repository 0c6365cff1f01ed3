"""Each hook does what it says, has a test, and is documented with exactly its arguments."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

import pytest
import torch
from plugin_sites import HEAD, load_quietly, strangers_commands

import ao_core as ao
from ao_core import hookspecs, plugins, registry
from ao_core.kernels import KERNELS, choose, clear_choices, key_of
from ao_core.ops import OPS
from ao_core.registry import FAULTS
from ao_core.scheme import SCHEMES

ROOT = Path(__file__).parents[2]


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
