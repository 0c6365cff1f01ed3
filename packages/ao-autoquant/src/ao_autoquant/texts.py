"""What the command line measures on: a prompt and a token, text to search on, and other text to check on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ao_core import ModelError, OptionError
from ao_core.calibrate import check_tokens

_WINDOW = 256  # where there is no prompt


@dataclass(frozen=True)
class Given:
    """Inputs of a language model.

    Attributes:
        examples: a prompt and a token, ``[1, t]`` each.
        weights: how often each runs.
        calibration: windows ``[1, t]`` to search and to calibrate on, the prompt first; None: the examples.
        held: windows after these.
    """

    examples: list[torch.Tensor]
    weights: list[float]
    calibration: list[torch.Tensor] | None
    held: list[torch.Tensor] | None


def given_text(
    loaded: Any, text: str | None, prefill: int, decode: int, windows: int, *, more: bool
) -> Given:
    """Tokens of ``text``, or random ones.

    Args:
        loaded: model and tokenizer.
        text: what the model reads, or None.
        prefill: tokens of the prompt.
        decode: how often a single token runs.
        windows: of the prompt's length, to calibrate on, and to check on; a shorter text is halved.
        more: whether these are needed.

    Raises:
        OptionError: nothing is to be run; the text is too short.
        ModelError: there is no tokenizer, no vocabulary; the tokens do not fit the model.
    """
    if not prefill and not decode:
        raise OptionError("--prefill 0 and --decode 0 leave nothing to run. Give one of them tokens.")
    count, window = max(prefill, 1), prefill or _WINDOW
    tokens = _random(loaded, 2 * windows * window) if text is None else _tokens(loaded, text)
    if len(tokens) < count:
        raise OptionError(f"--prefill {prefill}: the text has {len(tokens)} tokens. Give a longer one.")
    pairs = [(tokens[:prefill][None], 1.0)] if prefill else []
    pairs += [(tokens[count - 1 : count][None], float(decode))] if decode else []
    examples, weights = [each for each, _ in pairs], [weight for _, weight in pairs]
    check_tokens(loaded.model, tokens[None].split(window, dim=1))
    if not more:
        return Given(examples, weights, None, None)
    if len(tokens) < 2 * window:
        raise OptionError(
            f"the text has {len(tokens)} tokens; searching and checking take {window} each. Give a longer "
            "one, or a smaller --prefill."
        )
    cut = [each[None] for each in tokens[: len(tokens) // window * window].split(window)]
    half = min(windows, len(cut) // 2)
    return Given(examples, weights, cut[:half], cut[half : 2 * half])


def _random(loaded: Any, count: int) -> torch.Tensor:
    size = getattr(getattr(loaded.model, "config", None), "vocab_size", None)
    if size is None:
        raise ModelError(
            "the model has no vocabulary, so that no tokens can be made for it. Use the library."
        )
    return torch.randint(int(size), (count,), generator=torch.Generator().manual_seed(0))


def _tokens(loaded: Any, text: str) -> torch.Tensor:
    if loaded.tokenizer is None:
        raise ModelError("--text needs a tokenizer, and the model came without one. Put its files beside it.")
    return torch.tensor(loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
