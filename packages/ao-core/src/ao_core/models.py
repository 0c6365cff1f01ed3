"""Load what the command line calls MODEL, and the text to evaluate it on.

transformers is imported when a model is loaded, never with this module.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ao_core.errors import AoError, ModelError, OptionError

logger = logging.getLogger(__name__)

Kind = Literal["huggingface", "gguf", "ao"]
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_FILE_SUFFIXES = {".gguf", ".safetensors", ".bin", ".pt", ".pth", ".onnx", ".json", ".txt"}
_INSTALL = 'pip install "ao-core[hf]"'


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode and where it came from.

    Attributes:
        model: the module.
        tokenizer: its Hugging Face tokenizer, None when there is none beside the model.
        source: the path or hub id that it was read from.
        kind: ``"huggingface"``, ``"gguf"``, or ``"ao"`` for what ``ao.save`` wrote.
    """

    model: nn.Module
    tokenizer: Any
    source: str
    kind: Kind


@dataclass(frozen=True)
class _Source:
    kind: Kind
    place: str  # a directory, or a hub id
    file: str | None = None  # the GGUF inside the directory
    local: bool = True

    def __str__(self) -> str:
        return str(Path(self.place) / self.file) if self.file else self.place

    @property
    def options(self) -> dict[str, str]:
        return {"gguf_file": self.file} if self.file else {}


def load_model(
    model: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> LoadedModel:
    """Load a Hugging Face directory or hub id, a GGUF file, or a directory that ``ao.save`` wrote.

    A directory with one GGUF file and no ``config.json`` counts as that file. Code that travels
    with a checkpoint is never run.

    Args:
        model: a path or a hub id such as ``"owner/name"``; a ``Path`` is never a hub id.
        dtype: by default a Hugging Face model keeps its checkpoint's, a GGUF model (whose weights
            are expanded to plain tensors) is float32, and a saved one stays as it was saved.
        device: where the model goes.

    Raises:
        ModelError: there is no such path or hub model, the directory holds no model, a file is
            damaged, weights are missing, the hub is unreachable or transformers is not installed.
        CheckpointError: from ``ao.load``.
    """
    source = _locate(model)
    transformers = _import_transformers()
    logger.info("loading %s", source)
    with _quiet(transformers, source.kind), _explained(source):
        if source.kind == "ao":
            network = _load_saved(source, dtype, device)
        else:
            network = _load_pretrained(transformers, source, dtype)
        tokenizer = _load_tokenizer(transformers, source)
    return LoadedModel(network.to(device).eval(), tokenizer, str(source), source.kind)


def tokenize_file(path: str | Path, tokenizer: Any, *, max_tokens: int | None = None) -> Tensor:
    """Tokens of a UTF-8 text file: int64 ``[n]``, without special tokens, the first ``max_tokens``.

    Raises:
        ModelError: the file is missing, empty or no UTF-8 text, or the tokenizer is None.
        OptionError: ``max_tokens`` is below 1.
    """
    path = Path(path).expanduser()
    if tokenizer is None:
        raise ModelError("the model came without a tokenizer; put its tokenizer files beside it")
    if max_tokens is not None and max_tokens < 1:
        raise OptionError(f"max_tokens must be 1 or more, found {max_tokens}")
    # verbose=False: a text longer than the model's context is expected here
    ids = tokenizer(read_text(path), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids[:max_tokens], dtype=torch.int64)


def read_text(path: Path) -> str:
    """A UTF-8 text file; raises :class:`ModelError` if it is missing, empty or something else."""
    if not path.is_file():
        found = "is a directory" if path.is_dir() else "does not exist"
        raise ModelError(f"the text file {path} {found}; pass a UTF-8 text file")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ModelError(
            f"{path} is no UTF-8 text ({error.reason} at byte {error.start}); convert it first"
        ) from error
    if not text.strip():
        raise ModelError(f"the text file {path} holds no text; pass one that does")
    return text


def _locate(model: str | Path) -> _Source:
    path = Path(model).expanduser()
    if path.is_dir():
        return _locate_inside(path)
    if path.is_file():
        return _locate_gguf(path)
    if isinstance(model, str) and _HUB_ID.fullmatch(model) and path.suffix not in _FILE_SUFFIXES:
        return _Source("huggingface", model, local=False)
    raise ModelError(
        f"the model {str(model)!r} does not exist, and its form is not that of a hub id; "
        "pass a model directory, a .gguf file, or a hub id such as 'owner/name'"
    )


def _locate_inside(directory: Path) -> _Source:
    files = sorted(entry.name for entry in directory.iterdir())
    ggufs = [name for name in files if name.lower().endswith(".gguf")]
    if "ao.json" in files:
        return _Source("ao", str(directory))
    if "config.json" in files:
        return _Source("huggingface", str(directory))
    if len(ggufs) == 1:
        return _locate_gguf(directory / ggufs[0])
    if ggufs:
        raise ModelError(f"{directory} holds {len(ggufs)} GGUF files ({', '.join(ggufs)}); pass one of them")
    found = ", ".join(files[:8]) + (", ..." if len(files) > 8 else "")
    raise ModelError(
        f"{directory} is no model directory: it holds {found or 'nothing'}; needed is config.json "
        "(Hugging Face), ao.json (saved by ao) or one .gguf file"
    )


def _locate_gguf(path: Path) -> _Source:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == b"GGUF":
        return _Source("gguf", str(path.parent), path.name)
    if path.suffix.lower() == ".gguf":
        raise ModelError(
            f"{path} is damaged: a GGUF file begins with b'GGUF', this one with {magic!r}; download it again"
        )
    raise ModelError(f"{path} is a file but no GGUF; pass the directory that holds the model")


def _load_pretrained(transformers: Any, source: _Source, dtype: torch.dtype | None) -> nn.Module:
    options: dict[str, Any] = {"dtype": dtype or "auto", **source.options}
    if source.kind == "gguf":
        options["dtype"] = dtype or torch.float32
        if hasattr(transformers, "GgufConfig"):  # else weights may stay packed, in foreign modules
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    config = transformers.AutoConfig.from_pretrained(source.place, trust_remote_code=False, **source.options)
    _forget_gguf(config)
    model, info = _model_class(transformers, config).from_pretrained(
        source.place, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    _forget_gguf(model.config)
    if missing := sorted(info["missing_keys"]):
        # transformers fills them with random numbers and only logs it
        raise ModelError(
            f"{source} lacks {len(missing)} of the model's weights, the first is {missing[0]}; "
            "complete the checkpoint"
        )
    for name, found, needed in sorted(info["mismatched_keys"]):
        raise ModelError(
            f"{name} of {source} is {tuple(found)}, and {tuple(needed)} by its config.json; use the files of "
            "one model"
        )
    return model  # type: ignore[no-any-return]


def _forget_gguf(config: Any) -> None:
    """Drop the marker of packed weights: they are plain, and it makes a saved copy unreadable."""
    found = getattr(config, "quantization_config", None)
    fields = found if isinstance(found, dict) else vars(found) if found is not None else {}
    method = fields.get("quant_method")
    if getattr(method, "value", method) == "gguf":
        del config.quantization_config


def _model_class(transformers: Any, config: Any) -> Any:
    """The class that the checkpoint names, so that encoders load too; else a language model's."""
    for name in getattr(config, "architectures", None) or ():
        if isinstance(found := getattr(transformers, name, None), type):
            return found
    return transformers.AutoModelForCausalLM


def _load_saved(source: _Source, dtype: torch.dtype | None, device: str | torch.device) -> nn.Module:
    from ao_core.checkpoint import load

    model = load(source.place, device=device)
    return model if dtype is None else model.to(dtype)


def _load_tokenizer(transformers: Any, source: _Source) -> Any:
    if source.local and not source.file and not any(Path(source.place).glob("*token*")):
        logger.info("%s holds no tokenizer", source)
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(
            source.place, trust_remote_code=False, **source.options
        )
    except Exception as error:
        if isinstance(error, (ImportError, MemoryError)) or source.file or not source.local:
            raise
        raise ModelError(
            f"the tokenizer in {source} can't be loaded ({_found(error)}); check its files, or take them away"
        ) from error


def _import_transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ModelError(
            f"loading a model needs transformers, which can't be imported ({error}); {_INSTALL}"
        ) from error


@contextlib.contextmanager
def _quiet(transformers: Any, kind: Kind) -> Iterator[None]:
    """Silence the progress bars and warnings of transformers and the hub, and put them back."""
    log, hub_log = transformers.utils.logging, importlib.import_module("huggingface_hub").logging
    levels, bars = (log.get_verbosity(), hub_log.get_verbosity()), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    hub_log.set_verbosity_error()
    log.disable_progress_bar()
    written = io.StringIO()
    try:
        # the GGUF reader's bar obeys no switch; what ao says of its own checkpoint is to be seen
        with contextlib.nullcontext() if kind == "ao" else contextlib.redirect_stderr(written):
            yield
    finally:
        log.set_verbosity(levels[0])
        hub_log.set_verbosity(levels[1])
        if bars:
            log.enable_progress_bar()
        logger.debug("transformers wrote while loading: %s", written.getvalue())


@contextlib.contextmanager
def _explained(source: _Source) -> Iterator[None]:
    """Turn what readers of damaged or foreign files raise, which is anything, into a ModelError."""
    try:
        yield
    except (AoError, MemoryError):
        raise
    except Exception as error:
        raise ModelError(_explanation(source, error)) from error


def _is_damaged(file: Path) -> bool:
    """Whether the header of a safetensors file does not fit it."""
    try:
        with safe_open(file, framework="pt"):
            return False
    except (SafetensorError, OSError) as error:
        return isinstance(error, SafetensorError)


def _found(error: Exception) -> str:
    """An error by its class and its first line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def _explanation(source: _Source, error: Exception) -> str:
    found = _found(error)
    if isinstance(error, ImportError):
        return f"{source} needs a package that is not installed ({found}); {_INSTALL}"
    if source.kind == "gguf":
        return (
            f"{source} can't be read ({found}): it is damaged or cut short, or its architecture "
            "is unknown to transformers; download it again, or pass a Hugging Face directory"
        )
    if source.local:
        for file in filter(_is_damaged, sorted(Path(source.place).glob("*.safetensors"))):
            return f"{file} is damaged or cut short ({found}); copy or download it again"
        return f"the model in {source} can't be loaded ({found}); check the files in it"
    if "connect" in str(error):
        return (
            f"there is no directory {source} here, and the hub can't be reached to look for a "
            "model of that name; pass a local directory"
        )
    return f"{source} is neither a directory here nor a model that the hub gives ({found})"
