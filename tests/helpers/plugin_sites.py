"""Loading plugins in tests: quietly, and the faults by plugin."""

from __future__ import annotations

import warnings

from ao_core import plugins
from ao_core.registry import FAULTS, Fault

HEAD = "import ao_core as ao\n\n@ao.hookimpl\n"


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
