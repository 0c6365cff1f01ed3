"""Building a model again without its float weights."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from torch import nn

from ao_core.errors import CheckpointError

logger = logging.getLogger(__name__)
_patching = threading.RLock()


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Inside the block, parameters of new modules have no storage; buffers are computed as always.

    Buffers that a state dict leaves out, such as rotary frequencies, thus keep their values.
    """
    with _patching:
        register = nn.Module.register_parameter

        def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
            if param is not None and param.device.type != "meta":
                param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
            register(module, name, param)

        nn.Module.register_parameter = on_meta  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]


def describe(model: nn.Module) -> dict[str, Any]:
    """What :func:`build` needs to make ``model`` again, JSON-able."""
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    if not _is_transformers(model):
        return {"kind": "module", "class": kind}
    config = json.loads(model.config.to_json_string(use_diff=False))  # type: ignore[operator,union-attr]
    config.pop("quantization_config", None)
    generation = getattr(model, "generation_config", None)
    return {
        "kind": "transformers",
        "class": type(model).__name__,
        "config": config,
        "generation_config": None if generation is None else json.loads(generation.to_json_string()),
    }


def companions(model: nn.Module, tokenizer: Any, directory: Path) -> None:
    """Write the files that travel along with a transformers model: config, generation, tokenizer."""
    if not _is_transformers(model):
        return
    model.config.save_pretrained(directory)  # type: ignore[operator,union-attr]
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(directory)
    tokenizer = tokenizer or _tokenizer_of(model)
    if tokenizer is None:
        logger.warning("no tokenizer was found for the model: pass ao.save(..., tokenizer=...)")
    else:
        tokenizer.save_pretrained(directory)


def build(description: dict[str, Any], factory: Callable[[], nn.Module] | None) -> nn.Module:
    """The model with its parameters on the meta device, in evaluation mode.

    Raises:
        CheckpointError: a factory is needed and none was given, or building fails.
    """
    if isinstance(factory, nn.Module):
        raise CheckpointError(
            "model= takes a function that builds the model, and was given a module. "
            "Give its class or a lambda, so that no float copy is made."
        )
    if factory is None and description["kind"] != "transformers":
        raise CheckpointError(
            f"this checkpoint holds a {description['class']}, which ao can't build by itself. "
            "Give a function that builds it: ao_core.load(directory, model=function)."
        )
    try:
        with parameters_on_meta():
            model = factory() if factory is not None else _from_transformers(description)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"building the {description['class']} failed ({type(error).__name__}: {error}). Parameters "
            "have no storage meanwhile: the function that builds it must not move them or read them."
        ) from error
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"model= must return an nn.Module, and returned {type(model).__name__}.")
    return model.eval()


def _from_transformers(description: dict[str, Any]) -> nn.Module:
    try:
        import transformers
    except ImportError as error:
        raise CheckpointError(
            "this checkpoint holds a transformers model, and transformers is not installed. "
            "Install it with: pip install 'ao-core[hf]'"
        ) from error
    kind = getattr(transformers, description["class"], None)
    if kind is None:
        raise CheckpointError(
            f"transformers {transformers.__version__} has no {description['class']}. Install the version "
            "that the model needs, or give ao_core.load(directory, model=function)."
        )
    config = kind.config_class.from_dict(description["config"])
    model: Any = kind(config)
    if description.get("generation_config"):
        generation = transformers.GenerationConfig.from_dict(description["generation_config"])
        model.generation_config = generation
    return cast("nn.Module", model)


def _is_transformers(model: nn.Module) -> bool:
    from sys import modules

    transformers = modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def _tokenizer_of(model: nn.Module) -> Any:
    import transformers

    source = getattr(model.config, "_name_or_path", "")
    if not source:
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError):
        return None
