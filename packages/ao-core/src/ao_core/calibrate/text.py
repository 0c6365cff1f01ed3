"""Calibration batches out of text: where it comes from, what tokenizes it, how it is cut.

sentencepiece and datasets are imported when they are used.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ao_core.errors import ModelError, OptionError
from ao_core.models import read_text

logger = logging.getLogger(__name__)
_DATASET = "datasets:"


class SentencePiece:
    """A SentencePiece model with the call of a Hugging Face tokenizer.

    Args:
        path: the ``.model`` file.

    Raises:
        ModelError: the file is missing or no SentencePiece model, or sentencepiece is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        file = Path(path).expanduser()
        if not file.is_file():
            raise ModelError(f"there is no SentencePiece model {file}. Give the tokenizer's .model file.")
        try:
            import sentencepiece
        except ImportError as error:
            raise ModelError(
                f"{file} needs sentencepiece, which is not installed: pip install sentencepiece"
            ) from error
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (RuntimeError, OSError) as error:
            raise ModelError(f"{file} is no SentencePiece model ({error}). Give the .model file.") from error

    def __len__(self) -> int:
        return int(self._processor.get_piece_size())

    @property
    def pad_token_id(self) -> int | None:
        """The id that pads, or None."""
        found = int(self._processor.pad_id())
        return found if found >= 0 else None

    @property
    def eos_token_id(self) -> int | None:
        """The id that ends a text, or None."""
        found = int(self._processor.eos_id())
        return found if found >= 0 else None

    def __call__(
        self, text: str | Sequence[str], *, add_special_tokens: bool = True, verbose: bool = True
    ) -> dict[str, Any]:
        """Token ids as ``input_ids``, of one text or of several; special tokens: the first one, BOS."""
        first = add_special_tokens and self._processor.bos_id() >= 0
        return {"input_ids": self._processor.encode(text, add_bos=first)}


def read_texts(source: str | Path, *, column: str = "text") -> list[str]:
    """The texts of a UTF-8 file (one), of a data set saved by ``datasets``, or of ``"datasets:NAME"``.

    Args:
        source: a file; a directory that ``Dataset.save_to_disk`` wrote; or ``datasets:NAME`` or
            ``datasets:NAME:SPLIT``, which ``datasets.load_dataset`` loads (split ``train`` by default).
        column: of a data set.

    Raises:
        ModelError: there is nothing there, no text in it, no such column, or datasets is not installed.
    """
    if not str(source).startswith(_DATASET) and not Path(source).expanduser().is_dir():
        file = Path(source).expanduser()
        if not file.is_file():
            raise ModelError(f"there is no text file {file}. Give a UTF-8 text, or a data set.")
        return [read_text(file)]
    rows = _dataset(str(source))
    names = list(getattr(rows, "column_names", []))
    if column not in names:
        raise ModelError(f"{source} has no column {column!r}; it has {', '.join(names) or 'none'}. Give one.")
    texts = [text for text in rows[column] if isinstance(text, str) and text.strip()]
    if not texts:
        raise ModelError(f"column {column!r} of {source} holds no text. Give one that does.")
    return texts


def _dataset(source: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ModelError(f"{source} needs datasets, which is not installed: pip install datasets") from error
    try:
        if source.startswith(_DATASET):
            name, _, split = source.removeprefix(_DATASET).partition(":")
            return datasets.load_dataset(name, split=split or "train")
        found = datasets.load_from_disk(source)
    except Exception as error:
        raise ModelError(
            f"{source} can't be read as a data set ({type(error).__name__}: {error})."
        ) from error
    if isinstance(found, Mapping):
        first = next(iter(found))
        logger.info("%s holds the splits %s; taking %s", source, ", ".join(found), first)
        return found[first]
    return found


def tokenized(
    texts: Iterable[str],
    tokenizer: Any,
    *,
    samples: int = 128,
    context: int = 512,
    packed: bool = True,
    source: str = "the text",
) -> list[Any]:
    """Calibration batches of one sequence each.

    Args:
        texts: what is tokenized.
        tokenizer: a Hugging Face tokenizer, :class:`SentencePiece`, or anything that is called like them.
        samples: sequences, at most.
        context: tokens in one.
        packed: texts joined by a blank line and cut into windows ``[1, context]`` without a gap. Otherwise
            each text is a sequence of its own, cut at ``context`` and padded up to it:
            ``{"input_ids", "attention_mask"}``, whose padding no statistic counts.
        source: what messages call the text.

    Raises:
        ModelError: there is no tokenizer, no text, or less than one window of it.
        OptionError: ``samples`` or ``context`` below 1.
    """
    if tokenizer is None:
        raise ModelError("the model came without a tokenizer; put its files beside it, or give --tokenizer.")
    if samples < 1 or context < 1:
        raise OptionError(f"samples and context must be 1 or more, found {samples} and {context}.")
    listed = [text for text in texts if text.strip()]
    if not listed:
        raise ModelError(f"{source} holds no text to calibrate on. Give one that does.")
    batches = (_packed if packed else _padded)(listed, tokenizer, samples, context, source)
    if len(batches) < samples:
        logger.info(
            "%s holds %d sequences of %d tokens; %d were asked for", source, len(batches), context, samples
        )
    return batches


def _packed(texts: list[str], tokenizer: Any, samples: int, context: int, source: str) -> list[Any]:
    # verbose=False: a text longer than the model's context is expected here
    ids = tokenizer("\n\n".join(texts), add_special_tokens=False, verbose=False)["input_ids"]
    count = min(samples, len(ids) // context)
    if count < 1:
        raise ModelError(
            f"{source} holds {len(ids)} tokens, fewer than one window of {context}. Give a longer text, or a "
            "smaller --context."
        )
    return list(torch.tensor(ids[: count * context], dtype=torch.int64).view(count, 1, context))


def _padded(texts: list[str], tokenizer: Any, samples: int, context: int, source: str) -> list[Any]:
    fill = getattr(tokenizer, "pad_token_id", None)
    fill = getattr(tokenizer, "eos_token_id", None) if fill is None else fill
    batches = []
    for text in texts[:samples]:
        ids = tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"][:context]
        if len(ids) < 2:
            continue
        row = torch.full((1, context), 0 if fill is None else fill, dtype=torch.int64)
        row[0, : len(ids)] = torch.tensor(ids)
        mask = torch.arange(context).unsqueeze(0) < len(ids)
        batches.append({"input_ids": row, "attention_mask": mask.to(torch.int64)})
    if not batches:
        raise ModelError(f"no text of {source} has two tokens or more. Give longer ones.")
    return batches
