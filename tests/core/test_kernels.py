"""How a kernel is chosen, and what an op must look like."""

from __future__ import annotations

import logging

import pytest
import torch

import ao_core as ao
from ao_core import kernels, plugins, registry
from ao_core.kernels import KERNELS, choose, clear_choices, explain, key_of, use_provider
from ao_core.ops import OPS

SOURCE = registry.Source("tests", "tests", "1")
pytestmark = pytest.mark.usefixtures("plain_environment")


def reference(x, weight, shift):
    return x @ weight.to(x.dtype).t() + shift


def fake(x, weight, shift):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def samples(device):
    """Two keys: the second and the third differ in rows only."""
    for rows, n, k in ((1, 7, 5), (3, 2, 9), (17, 2, 9)):
        yield torch.ones(rows, k, device=device), torch.ones(n, k, device=device), 0.5


def make_op(name, schema="(Tensor x, Tensor weight, float shift) -> Tensor", **changes):
    parts = {"reference": reference, "fake": fake, "samples": samples, **changes}
    return ao.Op(name, schema, **parts)


def adding(number):
    """A kernel that can be told by its result: ``number`` more than the reference."""
    return lambda x, weight, shift: reference(x, weight, shift) + number


@pytest.fixture
def register():
    """Register an op with kernels ``provider=(fn, priority, reason or None)``; gone afterwards."""
    plugins.load()

    def add(op, **providers):
        OPS.add(op.name, op, SOURCE)
        for provider, (fn, priority, reason) in providers.items():
            kernel = ao.Kernel(op.name, provider, fn, priority, lambda key, why=reason: why)
            KERNELS.add(f"{op.name}/{provider}", kernel, SOURCE)
        clear_choices()
        return op

    yield add
    plugins.reset()


@pytest.fixture
def ran(register):
    """Which kernel an op runs: ``ran(provider=None)`` gives its word. Made of op ``order_of_choice``."""
    register(make_op("another_op"))
    op = register(
        make_op("order_of_choice"),
        low=(adding(1), 1, None),
        high=(adding(2), 2, None),
        refusing=(adding(3), 3, "it never runs"),
    )
    x, weight = torch.randn(3, 5), torch.randn(7, 5)

    def run(provider=None):
        more = op(x, weight, 0.5, provider=provider) - reference(x, weight, 0.5)
        return ["reference", "low", "high", "refusing"][round(more.mean().item())]

    return run


@pytest.fixture
def force(monkeypatch):
    """Set ``AO_KERNELS``, which is read when a key is first seen."""

    def setenv(text):
        monkeypatch.setenv("AO_KERNELS", text)
        clear_choices()

    return setenv


def preferring(provider):
    return lambda op, key, usable: next(k for k in usable if k.provider == provider)


def test_priority_decides_among_those_that_do_not_reject(ran):
    assert ran() == "high"


def test_the_hook_goes_before_priority(ran):
    kernels.set_chooser(preferring("low"))
    assert ran() == "low"
    kernels.set_chooser(preferring("reference"))
    assert ran() == "reference"


def test_the_plan_goes_before_the_hook(ran):
    kernels.set_chooser(preferring("low"))
    assert ran(provider="high") == "high"
    assert ran(provider="reference") == "reference"


def test_the_environment_goes_before_the_plan(ran, force):
    kernels.set_chooser(preferring("low"))
    force("another_op=high, order_of_choice=reference, low")
    assert ran(provider="high") == "reference"
    force("low")
    assert ran(provider="high") == "low"
    force("another_op=low")
    assert ran() == "low", "the environment speaks of another op: the hook decides"


def test_the_block_goes_before_the_environment(ran, force):
    force("high")
    with use_provider("low"):
        assert ran() == "low"
        with use_provider("reference", op="order_of_choice"):
            assert ran() == "reference"
        with use_provider("reference", op="another_op"):
            assert ran() == "low", "an inner block about another op must not end the outer one"
    assert ran() == "high"


def test_a_misspelt_op_is_no_silent_no(ran, force):
    force("order_of_choise=low")
    with pytest.raises(ao.UnknownNameError, match="order_of_choice"):
        ran()


def test_nothing_usable_is_the_reference(register):
    op = register(make_op("all_refuse"), mine=(adding(1), 5, "no"))
    x, weight = torch.randn(2, 5), torch.randn(7, 5)
    assert torch.equal(op(x, weight, 0.5), reference(x, weight, 0.5))


def test_explicit_never_falls_back(ran, force):
    """A forced or pinned kernel that rejects, or does not exist, is an error with the reason."""
    reason = "'refusing'.*order_of_choice.*rejects it: it never runs.*high, low, reference"
    unknown = "no kernel of provider 'absent'; it has refusing, high, low, reference"
    with pytest.raises(ao.RejectedError, match=reason.replace("high", "refusing, high")):
        ran(provider="refusing")
    with pytest.raises(ao.UnknownNameError, match=unknown):
        ran(provider="absent")
    for provider, error in (("refusing", ao.RejectedError), ("absent", ao.UnknownNameError)):
        with use_provider(provider), pytest.raises(error):
            ran()
        force(f"order_of_choice={provider}")
        with pytest.raises(error):
            ran(provider="low")


def test_a_setting_that_cannot_be_read(ran, force):
    force("order_of_choice=")
    with pytest.raises(ao.OptionError, match="PROVIDER or OP=PROVIDER"):
        ran()


def test_what_is_passed_over_is_logged_once(register, caplog):
    op = register(make_op("logged_once"), picky=(adding(1), 1, "it is Tuesday"))
    with caplog.at_level(logging.INFO, "ao_core.kernels"):
        for n in (2, 7, 63):
            op(torch.ones(3, 5), torch.ones(n, 5), 0.5)
    assert caplog.messages == ["logged_once: kernel picky passed over: it is Tuesday"]


def test_the_activations_shape_never_chooses(register):
    """Weights, dtype, device and options make the key; ``rejects`` is asked once for each."""
    keys = []
    op = make_op("keyed")
    register(op)
    kernel = ao.Kernel("keyed", "mine", reference, rejects=keys.append)
    KERNELS.add("keyed/mine", kernel, SOURCE)
    clear_choices()
    for rows in (1, 17, 100):
        op(torch.ones(2, rows, 5), torch.ones(7, 5), 0.5)
    assert len(keys) == 1
    (key,) = keys
    assert key.weights == ((torch.Size([7, 5]), torch.float32),)
    assert (key.device, key.dtype, key.options) == (torch.device("cpu"), torch.float32, (0.5,))
    assert key.capability == (0, 0)
    op(torch.ones(1, 5), torch.ones(7, 5), 0.25)
    op(torch.ones(1, 5).half(), torch.ones(7, 5), 0.5)
    assert [k.options[0] for k in keys] == [0.5, 0.25, 0.5]
    assert keys[2].dtype == torch.float16


def test_absent_weights_and_lists_are_part_of_the_key(register):
    def scaled(x, weight, scale, block):
        return x * weight * block[0] * (1 if scale is None else scale)

    op = register(
        make_op(
            "optional_parts",
            "(Tensor x, Tensor weight, Tensor? scale, int[] block) -> Tensor",
            reference=scaled,
            fake=lambda x, *_: torch.empty_like(x),
        )
    )
    x = torch.ones(3)
    assert op(x, x, None, [2, 3]).tolist() == [2, 2, 2]
    assert op(x, x, 2 * x, [5, 3]).tolist() == [10, 10, 10]
    key = key_of(op, (x, x, None, [2, 3]))
    assert key.weights == ((x.shape, x.dtype), None)
    assert key.options == ((2, 3),)
    assert hash(key) == hash(key_of(op, (x, x, None, [2, 3])))


def test_tensors_on_different_devices(register):
    op = register(make_op("two_devices"))
    with pytest.raises(ao.RejectedError, match=r"two_devices .*cpu and meta.*\.to\(device\)"):
        key_of(op, (torch.ones(3, 5), torch.ones(7, 5, device="meta"), 0.5))


def test_explain_has_a_row_for_each_key_and_kernel(ran):
    rows = explain(OPS.get("order_of_choice"))
    keys = ["cpu, float32 activations, float32[7, 5]", "cpu, float32 activations, float32[2, 9]"]
    expected = [
        ("refusing", 3, "it never runs", False),
        ("high", 2, None, True),
        ("low", 1, None, False),
        ("reference", float("-inf"), None, False),
    ]
    found = [(row.key, row.provider, row.priority, row.reason, row.chosen) for row in rows]
    assert found == [(key, *line) for key in keys for line in expected]
    with use_provider("low"):
        assert [row.provider for row in explain(OPS.get("order_of_choice")) if row.chosen] == ["low"] * 2


def test_a_choice_is_that_of_explain(ran):
    op = OPS.get("order_of_choice")
    for args in samples(torch.device("cpu")):
        assert choose(op, key_of(op, args)).provider == "high"


@pytest.mark.parametrize(
    ("name", "schema", "words"),
    [
        ("Upper", "(Tensor x) -> Tensor", "lower case letters"),
        ("a-b", "(Tensor x) -> Tensor", "lower case letters"),
        ("no_arrow", "(Tensor x)", "must look like"),
        ("no_arguments", "() -> Tensor", "must look like"),
        ("keyword_only", "(Tensor x, *, int k) -> Tensor", "must look like"),
        ("bad_type", "(Tensorr x) -> Tensor", "does not parse"),
        ("bad_default", "(Tensor x, int k=) -> Tensor", "does not parse"),
    ],
)
def test_an_op_says_what_is_wrong_with_its_definition(name, schema, words):
    """And defines nothing."""
    op = make_op(name, schema)
    assert words in op.invalid()
    assert not hasattr(torch.ops.ao, name)


def test_an_op_name_belongs_to_one_module(register):
    """Making it again in the same module, as a reload does, is no clash."""
    first = make_op("defined_twice")
    assert first.invalid() is None
    assert make_op("defined_twice").invalid() is None

    def elsewhere(x, weight, shift):
        return x

    elsewhere.__module__ = "somebody.else"
    other = make_op("defined_twice", reference=elsewhere)
    x, weight = torch.randn(3, 5), torch.randn(7, 5)
    with pytest.raises(ao.PluginError, match=f"{__name__} has defined an op of that name"):
        other(x, weight, 0.5)
    assert torch.equal(first(x, weight, 0.5), reference(x, weight, 0.5)), "the first op must stay"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"op": 3}, "op's name"),
        ({"provider": "reference"}, "other than 'reference'"),
        ({"provider": "two words"}, "must be a word"),
        ({"provider": None}, "must be a word"),
        ({"fn": None}, "callable"),
        ({"rejects": "never"}, "callable"),
        ({"priority": "high"}, "must be a number"),
    ],
)
def test_a_kernel_says_what_is_wrong_with_it(changes, words):
    good = {"op": "x", "provider": "mine", "fn": print}
    assert ao.Kernel(**good).invalid() is None
    assert words in ao.Kernel(**{**good, **changes}).invalid()
