"""Loading plugins: staged, isolated, all or nothing.

Entry points of group ``ao`` are taken in the order of their names. For each: the ao-core version that
its distribution requires is checked before anything of it is imported; it is imported; its hooks are
checked against :mod:`ao_core.hookspecs`; its answers are collected and validated. Only then is anything
registered. What fails becomes a :class:`~ao_core.registry.Fault`; the other plugins work on.
"""

from __future__ import annotations

import importlib.machinery
import inspect
import os
import threading
import types
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import pluggy
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from ao_core import hookspecs, registry
from ao_core.command import Command
from ao_core.errors import PluginError
from ao_core.registry import Fault, Source

REGISTERS = {
    "scheme": "ao_register_schemes",
    "op": "ao_register_ops",
    "kernel": "ao_register_kernels",
    "algorithm": "ao_register_algorithms",
    "command": "ao_register_commands",
}
BUILT_IN_COMMANDS = frozenset({"plugins", "schemes", "kernels", "quantize", "compress", "eval", "bench"})


class PluginWarning(UserWarning):
    """A plugin is not usable; ``ao plugins`` shows the same."""


class _Failure(Exception):
    def __init__(self, stage: str, error: str, hint: str) -> None:
        super().__init__(error)
        self.stage, self.error, self.hint = stage, error, hint


@dataclass
class Plugin:
    """One installed plugin: where it comes from, what it registered, why it or a part of it failed."""

    point: metadata.EntryPoint
    source: Source
    module: Any = None
    answers: dict[str, list[Any]] = field(default_factory=dict)
    notes: list[Fault] = field(default_factory=list)
    disabled: bool = False
    fault: Fault | None = None

    def names(self, kind: str) -> list[str]:
        """Names of what it registered, of one kind (``scheme``, ``op``, ``kernel``, ...)."""
        return [_item_name(kind, item) for item in self.answers.get(kind, [])]


_lock = threading.RLock()
_plugins: list[Plugin] | None = None
_loaded = False
_loading = False
_manager: pluggy.PluginManager | None = None


def load() -> None:
    """Load every installed plugin once; later calls return at once.

    Warns:
        PluginWarning: once for each plugin that is not usable.

    Raises:
        PluginError: instead of warning, if ``AO_STRICT_PLUGINS=1``.
    """
    global _loaded, _loading
    if _loaded:
        return
    with _lock:
        if _loaded or _loading:
            return
        _loading = True
        try:
            _load_all()
            _loaded = True
        finally:
            _loading = False


def installed() -> list[Plugin]:
    """Every installed plugin, loaded, disabled or faulty, sorted by name."""
    load()
    return list(_plugins or [])


def manager() -> pluggy.PluginManager:
    """The pluggy manager that holds the usable plugins."""
    load()
    if _manager is None:
        raise PluginError("the plugins are still loading: call no hook while a plugin is imported")
    return _manager


def commands() -> list[tuple[Command, Source]]:
    """Subcommands of all plugins, without importing a plugin that has none."""
    with _lock:
        for plugin in _discovered():
            if not plugin.disabled and _mentions(plugin.point, "ao_register_commands"):
                _attempt(plugin, kinds=("command",))
        _withdraw_clashes("command")
        return [
            (command, plugin.source)
            for plugin in _discovered()
            if plugin.fault is None
            for command in plugin.answers.get("command", [])
        ]


def reset() -> None:
    """Forget all plugins, so that the next look-up loads them anew (for tests)."""
    global _plugins, _loaded, _manager
    from ao_core.kernels import clear_choices

    with _lock:
        _plugins, _loaded, _manager = None, False, None
        registry.FAULTS.clear()
        registry.DISABLED.clear()
        for each in _registries().values():
            each.clear()
        clear_choices()


def _load_all() -> None:
    global _manager
    plugins = _discovered()
    registry.DISABLED[:] = [plugin.source.plugin for plugin in plugins if plugin.disabled]
    for plugin in plugins:
        if not plugin.disabled:
            _attempt(plugin, kinds=tuple(REGISTERS))
    for kind in REGISTERS:
        _withdraw_clashes(kind)
    _manager = _new_manager()
    _drop_orphan_kernels(plugins)
    for plugin in plugins:
        if plugin.fault is None and not plugin.disabled:
            _manager.register(plugin.module, plugin.source.plugin)
            _commit(plugin)
    _install_chooser(_manager)


def _discovered() -> list[Plugin]:
    global _plugins
    if _plugins is None:
        disabled = {name.strip() for name in os.environ.get("AO_DISABLE_PLUGINS", "").split(",")}
        points = sorted(
            metadata.entry_points(group=hookspecs.GROUP),
            key=lambda point: (point.name, point.value),
        )
        _plugins = [Plugin(point, _source(point), disabled=point.name in disabled) for point in points]
        for plugin in _same_name(_plugins):
            _fail(
                plugin,
                "clash",
                f"two entry points are called {plugin.source.plugin!r}: "
                + " and ".join(
                    sorted(p.source.distribution for p in _plugins if p.source.plugin == plugin.source.plugin)
                ),
                f"Uninstall one, or set AO_DISABLE_PLUGINS={plugin.source.plugin}",
            )
    return _plugins


def _same_name(plugins: list[Plugin]) -> list[Plugin]:
    names = [plugin.source.plugin for plugin in plugins if not plugin.disabled]
    return [p for p in plugins if names.count(p.source.plugin) > 1]


def _source(point: metadata.EntryPoint) -> Source:
    dist = point.dist
    facts: Any = (dist.metadata if dist else None) or {}
    return Source(point.name, facts.get("Name") or "unknown", facts.get("Version") or "unknown")


def _attempt(plugin: Plugin, kinds: Iterable[str]) -> None:
    if plugin.fault is not None:
        return
    try:
        if plugin.module is None:
            _check_requirement(plugin.point)
            plugin.module = _import(plugin.point)
            _check_hooks(plugin.module, plugin.source.plugin)
        fresh = {
            kind: _answers(plugin.module, kind, plugin.source.plugin)
            for kind in kinds
            if kind not in plugin.answers and hasattr(plugin.module, REGISTERS[kind])
        }
        plugin.answers.update(fresh)
    except Exception as error:  # noqa: BLE001 - whatever it raises, the others work on
        plugin.answers.clear()
        failure = error if isinstance(error, _Failure) else _unexpected(error, plugin.source.plugin)
        _fail(plugin, failure.stage, failure.error, failure.hint)


def _unexpected(error: Exception, name: str) -> _Failure:
    return _Failure(
        "answer",
        f"checking it raised {type(error).__name__}: {error}",
        f"Tell its authors; AO_DISABLE_PLUGINS={name} hides it meanwhile",
    )


def _fail(plugin: Plugin, stage: str, error: str, hint: str) -> None:
    plugin.fault = Fault(plugin.source.plugin, plugin.source.distribution, stage, error, hint)
    _report(plugin.fault)


def _report(fault: Fault) -> None:
    if os.environ.get("AO_STRICT_PLUGINS") == "1":
        reset()  # so that the next look-up raises too
        raise PluginError(str(fault))
    registry.FAULTS.append(fault)
    warnings.warn(str(fault), PluginWarning, stacklevel=2)


def _check_requirement(point: metadata.EntryPoint) -> None:
    from ao_core import __version__ as found

    for line in (point.dist.requires if point.dist else None) or []:
        try:
            requirement = Requirement(line)
        except InvalidRequirement as error:
            raise _Failure(
                "requires",
                f"its requirement {line!r} can't be read: {str(error).splitlines()[0]}",
                f"Tell its authors; AO_DISABLE_PLUGINS={point.name} hides it meanwhile",
            ) from error
        if canonicalize_name(requirement.name) != "ao-core":
            continue
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            raise _Failure(
                "requires",
                f"it requires ao-core{requirement.specifier}, and {found} is installed",
                f"Upgrade with: pip install -U ao-core {point.dist.name if point.dist else ''}".strip(),
            )


def _import(point: metadata.EntryPoint) -> Any:
    try:
        return point.load()
    except (Exception, SystemExit) as error:
        raise _Failure(
            "import",
            f"importing {point.value!r} raised {type(error).__name__}: {error}",
            f"Mend or reinstall {point.dist.name if point.dist else 'it'}, or set "
            f"AO_DISABLE_PLUGINS={point.name}",
        ) from error


def _check_hooks(module: Any, name: str) -> None:
    known = {spec for spec in dir(hookspecs) if spec.startswith("ao_")}
    routines = {n for n in dir(module) if inspect.isroutine(getattr(module, n, None))}
    marked = {n for n in routines if getattr(getattr(module, n), "ao_impl", None)}
    unmarked = {
        n for n in dir(module) if n.startswith("ao_") and isinstance(getattr(module, n), types.FunctionType)
    } - marked
    hint = f"Hooks: {', '.join(sorted(known))}. Tell its authors, or set AO_DISABLE_PLUGINS={name}"
    if unknown := sorted((marked | unmarked) - known):
        raise _Failure("hooks", f"unknown hook {', '.join(unknown)}", hint)
    if unmarked:
        raise _Failure("hooks", f"{', '.join(sorted(unmarked))} lacks @ao_core.hookimpl", hint)
    if not marked:
        raise _Failure("hooks", "it implements no hook with @ao_core.hookimpl", hint)
    try:
        _new_manager().register(module, name)
    except pluggy.PluginValidationError as error:
        raise _Failure("hooks", " ".join(str(error).split()), hint) from error


def _new_manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager(hookspecs.GROUP)
    manager.add_hookspecs(hookspecs)
    return manager


def _answers(module: Any, kind: str, name: str) -> list[Any]:
    hook = REGISTERS[kind]
    hint = f"Tell its authors; AO_DISABLE_PLUGINS={name} hides it meanwhile"
    try:
        answer = getattr(module, hook)()
        items = list(answer) if isinstance(answer, (list, tuple)) else answer
    except (Exception, SystemExit) as error:
        raise _Failure("answer", f"{hook} raised {type(error).__name__}: {error}", hint) from error
    if not isinstance(items, list):
        found = type(answer).__name__
        raise _Failure("answer", f"{hook} must return a list, and returned {found}", hint)
    for item in items:
        if reason := _invalid(kind, item):
            raise _Failure("answer", f"{hook} returned {item!r}: {reason}", hint)
    names = [_item_name(kind, item) for item in items]
    if twice := sorted({each for each in names if names.count(each) > 1}):
        raise _Failure("answer", f"{hook} returned {', '.join(twice)} twice", hint)
    return items


def _invalid(kind: str, item: Any) -> str | None:
    if kind == "command":
        return item.invalid() if isinstance(item, Command) else "not an ao_core.Command"
    if kind == "algorithm":
        ok = isinstance(item, type) and isinstance(getattr(item, "name", None), str)
        return None if ok and callable(getattr(item, "run", None)) else "not an ao_core.Algorithm class"
    if kind == "scheme":
        from ao_core.scheme import invalid_scheme

        return invalid_scheme(item)
    from ao_core.kernels import Kernel
    from ao_core.ops import Op

    if kind == "op":
        return item.invalid() if isinstance(item, Op) else "not an ao_core.Op"
    return item.invalid() if isinstance(item, Kernel) else "not an ao_core.Kernel"


def _item_name(kind: str, item: Any) -> str:
    return f"{item.op}/{item.provider}" if kind == "kernel" else str(item.name)


def _withdraw_clashes(kind: str) -> None:
    owners: dict[str, list[Plugin]] = {}
    for plugin in _discovered():
        for name in plugin.names(kind):
            owners.setdefault(name, []).append(plugin)
    for name, claimants in owners.items():
        reserved = kind == "command" and name in BUILT_IN_COMMANDS
        if len(claimants) > 1 or reserved:
            _dispute(kind, name, claimants, reserved)


def _dispute(kind: str, name: str, claimants: list[Plugin], reserved: bool) -> None:
    who = [str(plugin.source) for plugin in claimants] + ["ao itself"] * reserved
    error = f"{kind} {name!r} is claimed by {' and '.join(who)}, so neither is usable"
    if reserved:
        error = f"{kind} {name!r} of {who[0]} is ao's own, so the plugin's is not usable"
    hint = "Keep one: set " + " or ".join(
        f"AO_DISABLE_PLUGINS={plugin.source.plugin}" for plugin in claimants
    )
    for plugin in claimants:
        plugin.answers[kind] = [i for i in plugin.answers[kind] if _item_name(kind, i) != name]
        plugin.notes.append(Fault(plugin.source.plugin, plugin.source.distribution, "clash", error, hint))
    if kind != "command":
        _registries()[kind].dispute(name, f"{error}. {hint}")
    both = "+".join(plugin.source.plugin for plugin in claimants)
    distributions = "+".join(plugin.source.distribution for plugin in claimants)
    _report(Fault(both, distributions, "clash", error, hint))


def _registries() -> dict[str, registry.Registry[Any]]:
    from ao_core.algorithm import ALGORITHMS
    from ao_core.kernels import KERNELS
    from ao_core.ops import OPS
    from ao_core.scheme import SCHEMES

    return {"scheme": SCHEMES, "op": OPS, "kernel": KERNELS, "algorithm": ALGORITHMS}


def _commit(plugin: Plugin) -> None:
    for kind, into in _registries().items():
        for item in plugin.answers.get(kind, []):
            into.add(_item_name(kind, item), item, plugin.source)


def _drop_orphan_kernels(plugins: list[Plugin]) -> None:
    ops = {name for plugin in plugins for name in plugin.names("op")}
    for plugin in plugins:
        kernels = plugin.answers.get("kernel", [])
        for kernel in kernels:
            if kernel.op not in ops:
                plugin.notes.append(_orphan(plugin.source, kernel))
        kernels[:] = [kernel for kernel in kernels if kernel.op in ops]


def _orphan(source: Source, kernel: Any) -> Fault:
    error = f"kernel {kernel.op}/{kernel.provider} is left out: op {kernel.op!r} is not installed"
    return Fault(source.plugin, source.distribution, "answer", error, "Install the package that defines it")


def _install_chooser(manager: pluggy.PluginManager) -> None:
    from ao_core.kernels import set_chooser

    set_chooser(lambda op, key, usable: manager.hook.ao_choose_kernel(op=op, key=key, usable=usable))


def _mentions(point: metadata.EntryPoint, text: str) -> bool:
    """Whether the plugin's module source holds ``text``; True if it can't be read. Imports nothing."""
    path: list[str] | None = None
    origin = None
    try:
        for part in point.module.split("."):
            spec = importlib.machinery.PathFinder.find_spec(part, path)
            origin = spec.origin if spec else None
            path = list((spec.submodule_search_locations if spec else None) or [])
        return text in Path(origin or "").read_text(encoding="utf-8")
    except (OSError, ValueError, AttributeError):
        return True
