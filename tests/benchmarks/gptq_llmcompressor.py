"""llm-compressor's GPTQ on the model, text, group size and order of gptq_smollm2.py, as JSON.

    python tests/benchmarks/gptq_llmcompressor.py results.json --seed 0

llm-compressor pins its own transformers: run it in an environment of its own, with ao-core and gguf.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier

import ao_core as ao
from ao_core import metrics
from ao_core.plan import fingerprint

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "demo"))

from data import smollm2_gguf, wiki_text
from reparametrize import reparametrize_

TOKENS, CONTEXT = 12_288, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--actorder", default="weight")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    loaded = ao.load_model(str(smollm2_gguf()), dtype=torch.float32)
    model, tokenizer = loaded.model, loaded.tokenizer
    reparametrize_(model, seed=options.seed)
    text = wiki_text("calibration")[: options.samples * CONTEXT * 8]
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"][: options.samples * CONTEXT])
    tokens = wiki_text("evaluation")[: TOKENS * 8]
    tokens = torch.tensor(tokenizer(tokens, verbose=False)["input_ids"][:TOKENS])
    reference = metrics.perplexity(model, tokens, context=CONTEXT)
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids.view(-1, CONTEXT)]
    weights = QuantizationArgs(
        num_bits=4, type="int", symmetric=False, strategy="group", group_size=64, actorder=options.actorder
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        model.config._name_or_path = model.name_or_path = folder
        start = time.perf_counter()
        oneshot(
            model=model,
            dataset=torch.utils.data.DataLoader(rows, batch_size=1),
            recipe=GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]),
            max_seq_length=CONTEXT,
            num_calibration_samples=options.samples,
            tokenizer=tokenizer,
            shuffle_calibration_samples=False,
        )
        took = time.perf_counter() - start
    delta = metrics.delta_nll(reference, metrics.perplexity(model, tokens, context=CONTEXT))
    done = json.loads(options.results.read_text("utf-8")) if options.results.is_file() else {}
    versions = {name: importlib.metadata.version(name) for name in ("llmcompressor", "transformers")}
    done[f"actorder={options.actorder}, {options.samples} x {CONTEXT}, seed {options.seed}"] = {
        "command": f"python tests/benchmarks/gptq_llmcompressor.py FILE --seed {options.seed}",
        "fingerprint": fingerprint(),
        "versions": versions,
        "delta_nll": delta.mean,
        "delta_nll_se": delta.se,
        "seconds": round(took, 1),
    }
    options.results.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(done, indent=1))


if __name__ == "__main__":
    main()
