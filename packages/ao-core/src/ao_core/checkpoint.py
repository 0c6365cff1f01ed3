"""Saving and loading: safetensors shards and ``ao.json``. No pickle, and no float copy on the way back.

``ao.json`` (format 1) holds: ``files`` (bytes and SHA-256 of each shard), ``companions`` (SHA-256 of
each file that travels along), ``tensors`` (for each parameter and buffer its shard and, where it is
quantized, its scheme, class, options, the parts that are quantized tensors themselves, and the
distribution that provides it), ``tied`` (alias → name), ``plan``, ``model`` (what rebuilds a transformers
model), and the ``sha256`` of all that. Quantized weights are stored in the layout that every device reads.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import nn

from ao_core import rebuild, shards
from ao_core.errors import CheckpointError, UnknownNameError
from ao_core.plan import Plan, plan_of
from ao_core.scheme import SCHEMES, Scheme, frozen, parse_scheme
from ao_core.tensor import WRAPPERS, QuantizedTensor

FORMAT = 1
_GB = 1_000_000_000


def save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    plan: Plan | None = None,
    tokenizer: Any = None,
    shard_bytes: int = 5 * _GB,
) -> None:
    """Save ``model`` to ``directory``: safetensors shards and ``ao.json``.

    Args:
        model: quantized or not. For a transformers model the config and the tokenizer travel along.
        directory: new, empty, or an earlier checkpoint, which is replaced in one step.
        plan: to keep its evidence and reasons; derived from the model by default.
        tokenizer: a transformers tokenizer; by default the one found where the model came from.
        shard_bytes: a shard's size limit in bytes. A layer is never split.

    Raises:
        CheckpointError: the directory can't be written, or the disk is full; what was there before is
            unchanged.
    """
    target = Path(directory)
    state, tied = _state(model)  # quantized weights in the layout that every device reads
    records = {name: describe_tensor(name, tensor) for name, tensor in state.items()}
    groups = _groups(state)
    names = shards.layout(groups, shard_bytes)
    needed = sum(t.nbytes for group in groups.values() for t in group.values())
    with shards.writer(target, needed) as out:
        for number, members in enumerate(names, 1):
            tensors = {k: t for member in members for k, t in owned(groups[member]).items()}
            file = out.shard(tensors, number, len(names))
            for member in members:
                records[member]["file"] = file
        rebuild.companions(model, tokenizer, out.scratch / shards.COMPANIONS)
        index = {"files": out.files, "companions": out.companions(), "tensors": records, "tied": tied}
        out.commit(_index(model, index, plan or plan_of(model)))


def load(
    directory: str | os.PathLike[str],
    *,
    model: Callable[[], nn.Module] | None = None,
    device: torch.device | str = "cpu",
    verify: bool = True,
) -> nn.Module:
    """Load what :func:`save` wrote, without building the float model.

    Memory peaks at the checkpoint's size plus one shard.

    Args:
        directory: of the checkpoint.
        model: builds the module; not needed for a transformers model.
        device: where the weights go.
        verify: compare SHA-256 checksums before reading.

    Returns:
        The model in evaluation mode.

    Raises:
        CheckpointError: missing, truncated or corrupt files; a scheme that is not installed (the
            message names the distribution); a model whose weights are called otherwise.
    """
    path = Path(directory)
    index = shards.read_index(path)
    if index.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {index.get('format')}, and this ao-core reads {FORMAT}. "
            "Install the ao-core version that wrote it, or save it again."
        )
    if verify:
        shards.check_seal(path, index)
        shards.check_companions(path, index["companions"])
    schemes = _schemes(path, index["tensors"])
    shards.verify(path, index["files"], checksums=verify)
    built = rebuild.build(index["model"], model)
    _check_names(built, index, path)
    _fill(built, path, index, schemes, torch.device(device))
    return built


def _state(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors by name, and aliases of those that several names share.

    Also buffers that the state dict leaves out: a cast may have changed them, and the model that is
    loaded shall compute the same.
    """
    state: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    outside = {name: buffer for name, buffer in model.named_buffers() if buffer is not None}
    for name, tensor in {**outside, **model.state_dict(keep_vars=True)}.items():
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(
                f"{name!r} of the model's state is {type(tensor).__name__}, no tensor, and can't be saved."
            )
        if hasattr(tensor, "full_tensor"):
            raise CheckpointError(
                f"{name!r} is sharded over several processes. Gather the state first, with "
                "torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
                "options=StateDictOptions(full_state_dict=True)), load it into a model that is not sharded, "
                "and save that."
            )
        if tensor.device.type == "meta":
            raise CheckpointError(f"{name!r} lies on the meta device and has no values to save.")
        if id(tensor) in first:
            tied[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            detached = tensor.detach()
            state[name] = detached.portable() if isinstance(detached, QuantizedTensor) else detached
    return state, tied


def _groups(state: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    return {
        name: plain_parts(name, tensor) if isinstance(tensor, QuantizedTensor) else {name: tensor}
        for name, tensor in state.items()
    }


def plain_parts(name: str, tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
    """The plain tensors of a quantized one by their names in a shard; a wrapper's base included."""
    parts: dict[str, torch.Tensor] = {}
    for part, data in tensor.stored().items():
        key = f"{name}:{part}"
        parts |= plain_parts(key, data) if isinstance(data, QuantizedTensor) else {key: data}
    return parts


def owned(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous tensors that share no storage: what safetensors can write."""
    return {
        name: data.contiguous()
        if data.untyped_storage().nbytes() == data.nbytes
        else data.clone(memory_format=torch.contiguous_format)
        for name, data in tensors.items()
    }


def describe_tensor(name: str, tensor: torch.Tensor) -> dict[str, Any]:
    """What :func:`read_tensor` needs to know of a quantized tensor, JSON-able; nothing of a plain one."""
    if not isinstance(tensor, QuantizedTensor):
        return {}
    if not tensor.scheme:
        raise CheckpointError(f"{name!r} is a {type(tensor).__name__} without a scheme, and can't be saved.")
    scheme = parse_scheme(tensor.scheme)
    if type(tensor) not in (*scheme.tensor_types, *WRAPPERS.values()):
        raise CheckpointError(
            f"{name!r} is a {type(tensor).__name__}, which {scheme.name!r} does not list in tensor_types."
        )
    source = SCHEMES.entry(scheme.name).source
    parts = {
        part: describe_tensor(f"{name}:{part}", data)
        for part, data in tensor.stored().items()
        if isinstance(data, QuantizedTensor)
    }
    return {
        "scheme": scheme.to_dict(),
        "tensor": type(tensor).__name__,
        "attributes": tensor.attributes(),
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "provider": tensor.provider,
        "data": list(tensor.stored()),
        **({"parts": parts} if parts else {}),
        "distribution": source.distribution,
        "distribution_version": source.version,
    }


def _index(model: nn.Module, parts: Mapping[str, Any], plan: Plan) -> str:
    from ao_core import __version__

    data: dict[str, Any] = {
        "format": FORMAT,
        "ao_core": __version__,
        **parts,
        "plan": json.loads(plan.to_json()),
        "model": rebuild.describe(model),
    }
    data["sha256"] = shards.seal(data)
    return json.dumps(data, indent=1) + "\n"


def _schemes(path: Path, records: Mapping[str, Any]) -> dict[str, Scheme]:
    """The scheme of each quantized tensor."""
    made: dict[str, Scheme] = {}
    for name, record in records.items():
        if "scheme" not in record:
            continue
        wanted = record["scheme"]
        try:
            made[name] = SCHEMES.get(wanted["name"]).from_dict(wanted)
        except (UnknownNameError, ValueError) as error:
            raise CheckpointError(
                f"{path} needs scheme {wanted['name']!r} version {wanted['version']}, provided by "
                f"{record['distribution']} {record['distribution_version']}. Install it with: "
                f"pip install {record['distribution']}=={record['distribution_version']} ({error})"
            ) from error
    return made


def _check_names(model: nn.Module, index: Mapping[str, Any], path: Path) -> None:
    saved = {*index["tensors"], *index["tied"]}
    needed = set(model.state_dict(keep_vars=True))
    known = needed | {name for name, _ in model.named_buffers()}
    missing, extra = sorted(needed - saved), sorted(saved - known)
    if missing or extra:
        raise CheckpointError(
            f"{path} does not fit {type(model).__name__}: it lacks {missing[:5] or 'nothing'} and holds "
            f"{extra[:5] or 'nothing'} that the model does not have. Build the model that was saved."
        )


def _fill(
    model: nn.Module,
    path: Path,
    index: Mapping[str, Any],
    schemes: Mapping[str, Scheme],
    device: torch.device,
) -> None:
    for file in index["files"]:
        with safe_open(path / file, framework="pt", device=str(device)) as shard:
            for name, record in index["tensors"].items():
                if record["file"] == file:
                    tensor = read_tensor(shard, name, record, schemes.get(name))
                    _place(model, name, tensor.repacked() if isinstance(tensor, QuantizedTensor) else tensor)
    for alias, name in index["tied"].items():
        _tie(model, alias, name)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device != device:
                module._buffers[name] = buffer.to(device)


def read_tensor(shard: Any, name: str, record: Mapping[str, Any], scheme: Scheme | None) -> torch.Tensor:
    """The tensor ``name`` of an open safetensors file."""
    if scheme is None:
        return cast("torch.Tensor", shard.get_tensor(name))
    kinds = {kind.__name__: kind for kind in scheme.tensor_types} | WRAPPERS
    kind = kinds.get(record["tensor"])
    if kind is None:
        raise CheckpointError(
            f"{name!r} is a {record['tensor']}, and the installed {scheme.name!r} has {list(kinds)}. "
            f"Install {record['distribution']}=={record['distribution_version']}."
        )
    parts = record.get("parts", {})
    inner = {
        part: read_tensor(shard, f"{name}:{part}", parts[part], scheme)
        if part in parts
        else shard.get_tensor(f"{name}:{part}")
        for part in record["data"]
    }
    data = [inner.get(part) for part in kind.data_names]
    return kind(
        *data,
        shape=tuple(record["shape"]),
        dtype=getattr(torch, record["dtype"]),
        scheme=str(scheme),
        provider=record["provider"],
        **{name: frozen(value) for name, value in record["attributes"].items()},
    )


def _place(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    if attribute in module._buffers:
        module._buffers[attribute] = tensor
        return
    if attribute == "_extra_state":
        module.set_extra_state(tensor)
        return
    expected = cast("nn.Parameter", module._parameters[attribute])
    if expected.shape != tensor.shape:
        raise CheckpointError(
            f"{name!r} is {tuple(tensor.shape)} in the checkpoint and {tuple(expected.shape)} in the "
            "model. Build the model that was saved."
        )
    trains = expected.requires_grad and not isinstance(tensor, QuantizedTensor)
    module.register_parameter(attribute, nn.Parameter(tensor, requires_grad=trains))


def _tie(model: nn.Module, alias: str, name: str) -> None:
    owner, _, attribute = name.rpartition(".")
    parameter = getattr(model.get_submodule(owner), attribute)
    owner, _, attribute = alias.rpartition(".")
    module = model.get_submodule(owner)
    if attribute in module._buffers:
        module._buffers[attribute] = parameter
    else:
        module.register_parameter(attribute, parameter)
