"""Strangers' plugins beside ours, seen from the command line in a fresh process."""

from __future__ import annotations

import json
from importlib import metadata

import pytest

OURS = sorted(point.name for point in metadata.entry_points(group="ao"))

COMMANDS = '''
import ao_core as ao
import typer

tools = typer.Typer(help="Tools of a stranger.")

@tools.command()
def count(number: int):
    """Count."""
    typer.echo("counted " + str(number + 1))

@tools.command()
def other():
    """Do another thing."""

def greet(name: str = "nobody"):
    """Greet somebody."""
    typer.echo("hello " + name)

def odd(value: "Nowhere"):
    """Take what typer does not know."""

@ao.hookimpl
def ao_register_commands():
    return [ao.Command("greet", greet), ao.Command("tools", tools)EXTRA]
'''

HELP = """
import sys
from ao_core.cli import main

try:
    main(["--help"])
finally:
    print(sorted({"torch", "transformers", "ao_quant", "ao_ternary"} & set(sys.modules)), file=sys.stderr)
"""

CONVERT = """
import torch, ao_core as ao

model = torch.nn.Sequential(torch.nn.Linear(33, 17))
ao.quantize_(model, "int8-weight-only")
ao.save(model, "saved")
again = ao.load("saved", model=lambda: torch.nn.Sequential(torch.nn.Linear(33, 17)))
x = torch.randn(5, 33)
assert torch.equal(again(x), model(x))
"""


@pytest.fixture
def broken(site):
    """Seven broken plugins beside a good one and ours."""
    marker = site.install_broken()
    site.install_scheme("good", "whole")
    return marker


def test_json_names_each_fault_with_its_stage_and_remedy(broken, faults, run_ao):
    """Exit code 0, ours and the good one ok, one warning for each that is not."""
    done = run_ao("plugins", "--json")
    assert done.returncode == 0, done.stderr
    rows = {row["plugin"]: row for row in json.loads(done.stdout)}
    assert set(rows) == {*OURS, *faults, "clash-a", "clash-b", "good"}
    assert {name for name, row in rows.items() if row["state"] == "ok"} == {*OURS, "good"}
    assert rows["good"]["names"] == {"schemes": ["whole"]}
    for plugin, (stage, error, hint) in faults.items():
        assert rows[plugin]["state"] == "not usable"
        (problem,) = rows[plugin]["problems"]
        assert problem["stage"] == stage
        assert error in problem["error"]
        assert hint in problem["hint"]
    for plugin in ("clash-a", "clash-b"):
        assert rows[plugin]["state"] == "in part"
        (problem,) = rows[plugin]["problems"]
        assert problem["stage"] == "clash"
        assert "clash-a" in problem["error"] and "clash-b" in problem["error"]
        assert f"AO_DISABLE_PLUGINS={plugin}" in problem["hint"]
    assert done.stderr.count("warning:") == 7
    assert "Traceback" not in done.stderr
    assert not broken.exists(), "a plugin for another ao-core was imported"


def test_the_table_names_each_fault_too(broken, faults, run_ao):
    done = run_ao("plugins")
    assert done.returncode == 0, done.stderr
    for plugin, (stage, error, hint) in faults.items():
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"{plugin}, {stage}: ")]
        assert error in line
        assert hint in line
    assert "clash-b, clash: scheme 'claimed' is claimed by clash-a (clash-a 1.0) and" in done.stdout


def test_disabled_plugins_are_hidden(broken, faults, run_ao):
    """The switch that every message names does what it says."""
    done = run_ao("plugins", "--json", AO_DISABLE_PLUGINS=",".join([*faults, "clash-a"]))
    assert done.returncode == 0
    assert done.stderr == ""
    states = {row["plugin"]: row["state"] for row in json.loads(done.stdout)}
    assert {plugin for plugin, state in states.items() if state == "disabled"} == {*faults, "clash-a"}
    assert states["clash-b"] == "ok"


def test_strict_fails_and_names_the_plugin(broken, run_ao):
    done = run_ao("schemes", AO_STRICT_PLUGINS="1")
    assert done.returncode == 1
    assert "error: plugin 'bad-core'" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_scheme_lists_names_and_faults(broken, run_ao, tmp_path):
    done = run_ao("quantize", "nowhere", "--scheme", "hole", "-o", str(tmp_path / "out"))
    assert done.returncode == 1
    error = " ".join(done.stderr[done.stderr.index("error:") :].split())
    assert "Did you mean 'whole'" in error
    for plugin in ("bad-core", "bad-import", "clash-a+clash-b"):
        assert f"Not loaded: plugin '{plugin}'" in error


def test_ours_work_beside_the_broken(broken, run_python):
    done = run_python(CONVERT)
    assert done.returncode == 0, done.stderr


def test_schemes_lists_what_is_usable_and_says_that_some_is_not(broken, run_ao):
    done = run_ao("schemes", "--json")
    names = {row["scheme"] for row in json.loads(done.stdout)}
    assert {"whole", "int8-weight-only", "int8-dynamic"} <= names
    assert "claimed" not in names
    table = run_ao("schemes")
    assert "7 plugins have problems; 'ao plugins' shows them" in table.stderr


def test_help_is_light_and_lists_commands_of_plugins(broken, site, run_python):
    """No torch, and no plugin without commands, is imported for it."""
    site.install("commands", COMMANDS.replace("EXTRA", ""))
    done = run_python(HELP)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == ["[]"]
    for name in ("plugins", "schemes", "kernels", "quantize", "eval", "greet", "tools"):
        assert f" {name} " in done.stdout
    assert "Greet somebody." in done.stdout
    assert "Tools of a stranger." in done.stdout


def test_a_function_and_an_app_become_commands(site, run_ao):
    site.install("commands", COMMANDS.replace("EXTRA", ""))
    assert run_ao("greet", "--name", "you").stdout == "hello you\n"
    assert run_ao("tools", "count", "41").stdout == "counted 42\n"
    assert run_ao("tools", "count", "many").returncode == 2


def test_a_command_below_kernels(site, run_ao):
    site.install("commands", COMMANDS.replace("EXTRA", ', ao.Command("kernels greet", greet)'))
    assert run_ao("kernels", "greet", "--name", "them").stdout == "hello them\n"
    assert "int8_weight_linear" in run_ao("kernels").stdout
    assert run_ao("kernels", "nothing").returncode == 2


def test_a_command_of_ours_cannot_be_taken(site, run_ao):
    """The refusal names the plugin; ours and the plugin's other commands work."""
    site.install("commands", COMMANDS.replace("EXTRA", ', ao.Command("schemes", greet)'))
    done = run_ao("schemes", "--json")
    assert done.returncode == 0
    assert "int8-weight-only" in {row["scheme"] for row in json.loads(done.stdout)}
    assert "'schemes' of commands (commands 1.0) is ao's own" in done.stderr
    assert run_ao("greet").stdout == "hello nobody\n"


def test_a_command_that_typer_refuses_is_left_out_alone(site, run_ao):
    site.install("commands", COMMANDS.replace("EXTRA", ', ao.Command("odd", odd)'))
    done = run_ao("greet")
    assert (done.returncode, done.stdout) == (0, "hello nobody\n")
    assert "command 'odd' of commands (commands 1.0) is left out" in done.stderr
    assert run_ao("odd").returncode == 2
