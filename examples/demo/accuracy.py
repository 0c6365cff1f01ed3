"""What each scheme costs in accuracy, on two real models: the tables of docs/benchmarks.md.

A language model by its perplexity on English text, and a sentence encoder by how well its embeddings still
find the article that belongs to a title. Results go to a JSON file as they come, and what is in it already
is not measured again.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from data import minilm_directory, smollm2_gguf, wiki_articles, wiki_text
from reparametrize import reparametrize_
from rich.console import Console
from rich.progress import track
from rich.table import Table

import ao_core as ao
from ao_core import metrics
from ao_core.plan import fingerprint

console = Console(highlight=False)
TOKENS, CONTEXT, SAMPLES = 12_288, 512, 128
LANGUAGE = (
    "float",
    "int8-weight-only",
    "int8-dynamic",
    "smoothquant > int8-dynamic",
    "smoothquant:alpha=0.5 > int8-dynamic",
    "smoothquant:alpha=auto > int8-dynamic",
    "float8-weight-only",
    "float8-dynamic",
    "int4-weight-only:group_size=64,zero_point=integer,qparams=minmax",
    "int4-weight-only:group_size=64,zero_point=integer",
    "gptq > int4-weight-only:group_size=64,zero_point=integer",
    "gptq:act_order=False > int4-weight-only:group_size=64,zero_point=integer",
    "gptq:mse=False > int4-weight-only:group_size=64,zero_point=integer",
    "gptq:true_sequential=True > int4-weight-only:group_size=64,zero_point=integer",
    "gptq:asymmetric=0.5 > int4-weight-only:group_size=64,zero_point=integer",
    "gptq > int8-weight-only",
    "gptq > float8-weight-only",
    "gptq > nf4",
    "gptq > int8-dynamic-int4-weight",
    "ternary",
    "gptq > ternary",
    "int4-weight-only:group_size=64,qparams=minmax",
    "int4-weight-only:group_size=64,qparams=hqq",
    "int4-weight-only:group_size=64",
    "int4-weight-only:group_size=32",
    "int4-weight-only",
    "nf4",
    "nf4:double_quant=False",
    "nf4:qparams=mse",
    "int8-dynamic-int4-weight:qparams=minmax",
    "int8-dynamic-int4-weight",
    "uint4",
)
ENCODER = (
    "float",
    "int8-weight-only",
    "int8-dynamic",
    "float8-weight-only",
    "int4-weight-only:group_size=32",
    "int4-weight-only",
    "int4-weight-only:qparams=minmax",
    "nf4",
)


def main(
    results: Annotated[Path, typer.Option(help="JSON of the results; added to.")] = Path("accuracy.json"),
    only: Annotated[str, typer.Option(help="Measure only what holds this text.")] = "",
    seed: Annotated[int, typer.Option(help="Of the re-parametrization.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Measure every scheme of the tables, and show them."""
    torch.set_num_threads(min(2, torch.get_num_threads()))
    done = json.loads(results.read_text("utf-8")) if results.is_file() else {"language": {}, "encoder": {}}
    if done.get("seed", seed) != seed or done.get("fingerprint", {}).get("device", device) != device:
        console.print(f"{results} holds results of another seed or device. Give another file.")
        raise typer.Exit(2)
    done |= {
        "command": "hatch run demo:accuracy --results FILE",
        "fingerprint": fingerprint(device),
        "seed": seed,
    }
    for kind, names, opener in (("language", LANGUAGE, _language), ("encoder", ENCODER, _encoder)):
        missing = [name for name in names if name not in done[kind] and only in name]
        if not missing:
            continue
        measure = opener(seed, device)
        for name in track(missing, description=kind, console=Console(stderr=True)):
            done[kind][name] = measure(name)
            temporary = results.with_suffix(".tmp")
            temporary.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
            temporary.replace(results)
    _show(done)


def _language(seed: int, device: str) -> Callable[[str], dict[str, Any]]:
    """SmolLM2-135M in float32: perplexity of a scheme, and how far it is from float."""
    loaded = ao.load_model(str(smollm2_gguf()), dtype=torch.float32)
    reparametrize_(loaded.model, seed=seed)
    loaded.model.to(device)
    text = wiki_text("evaluation")[: TOKENS * 8]
    tokens = torch.tensor(loaded.tokenizer(text, verbose=False)["input_ids"][:TOKENS])
    reference = metrics.perplexity(loaded.model, tokens, context=CONTEXT)

    def measure(name: str) -> dict[str, Any]:
        model = copy.deepcopy(loaded.model)
        report = _convert(model, name, lambda: _calibration(loaded.tokenizer, device))
        score = metrics.perplexity(model, tokens, context=CONTEXT)
        delta = metrics.delta_nll(reference, score)
        return {"perplexity": score.perplexity, "delta_nll": delta.mean, "delta_nll_se": delta.se, **report}

    return measure


def _calibration(tokenizer: Any, device: str) -> list[torch.Tensor]:
    text = wiki_text("calibration")[: SAMPLES * CONTEXT * 8]
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"][: SAMPLES * CONTEXT])
    return list(ids.view(-1, 8, CONTEXT).to(device))


def _encoder(seed: int, device: str) -> Callable[[str], dict[str, Any]]:
    """MiniLM-L6: cosine to the float embedding, and how many titles find their article among 1,000."""
    import transformers

    directory = str(minilm_directory())
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModel.from_pretrained(directory, dtype=torch.float32).eval().to(device)
    articles = wiki_articles("evaluation")[:1000]
    texts = [title for title, _ in articles] + [extract for _, extract in articles]

    @torch.no_grad()
    def embed(network: Any) -> torch.Tensor:
        parts = []
        for start in range(0, len(texts), 64):
            batch = tokenizer(
                texts[start : start + 64], padding=True, truncation=True, max_length=128, return_tensors="pt"
            ).to(device)
            hidden = network(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1)
            parts.append((hidden * mask).sum(1) / mask.sum(1))
        return torch.nn.functional.normalize(torch.cat(parts), dim=-1)

    reference = embed(model)

    def measure(name: str) -> dict[str, Any]:
        network = copy.deepcopy(model)
        report = _convert(network, name, list)
        found = embed(network)
        titles, extracts = found.chunk(2)
        hits = (titles @ extracts.t()).argmax(-1) == torch.arange(len(titles), device=device)
        cosine = (found * reference).sum(-1)
        return {
            "cosine": float(cosine.mean()),
            "cosine_min": float(cosine.min()),
            "top1": float(hits.float().mean()),
            **report,
        }

    return measure


def _convert(model: Any, name: str, batches: Callable[[], list[torch.Tensor]]) -> dict[str, Any]:
    """Apply ``SCHEME`` or ``ALGORITHM > SCHEME``; linear weights' bytes before and after."""
    if name == "float":
        return {}
    algorithm, arrow, scheme = name.rpartition(" > ")
    errors = {}
    if arrow:
        report = ao.compress_(model, [algorithm], batches(), scheme=scheme)
        notes = [facts for facts in report.notes.values() if "error_rounded" in facts]
        if notes:  # squared, of layers' outputs on the calibration text
            ratios = [facts["error"] / facts["error_rounded"] for facts in notes]
            errors = {"error_over_rounding": sum(ratios) / len(ratios)}
    else:
        report = ao.quantize_(model, scheme)
    return {
        **errors,
        "layers": len(report.converted),
        "share_of_bfloat16": 2 * report.converted_bytes_after / report.converted_bytes_before,
    }


def _show(done: dict[str, Any]) -> None:
    language = _table("SmolLM2-135M", "share of bf16", "perplexity", "ΔNLL ± SE")
    for name, row in done["language"].items():
        delta = "" if name == "float" else f"{row['delta_nll']:+.4f} ± {row['delta_nll_se']:.4f}"
        language.add_row(name, _share(row), f"{row['perplexity']:.3f}", delta)
    encoder = _table("MiniLM-L6", "share of bf16", "cosine", "lowest", "top-1")
    for name, row in done["encoder"].items():
        encoder.add_row(
            name, _share(row), f"{row['cosine']:.4f}", f"{row['cosine_min']:.4f}", f"{row['top1']:.3f}"
        )
    console.print(language)
    console.print(encoder)


def _table(title: str, *columns: str) -> Table:
    """Schemes fold where the terminal is narrow: cut short, several would look the same."""
    table = Table(title=title, box=None, pad_edge=False)
    table.add_column("scheme", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _share(row: dict[str, Any]) -> str:
    return f"{row['share_of_bfloat16']:.3f}" if "share_of_bfloat16" in row else ""


if __name__ == "__main__":
    typer.run(main)
