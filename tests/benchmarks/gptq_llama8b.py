"""GPTQ on a model of Llama-3-8B's shape with random weights: time by phase, and peak memory, as JSON.

The model lies on the host; one block at a time is on the GPU, with the activations of all batches. Under
``torchrun`` the batches are shared.

    python tests/benchmarks/gptq_llama8b.py results.json --codes one.safetensors
    torchrun --nproc-per-node=2 tests/benchmarks/gptq_llama8b.py results.json --codes one.safetensors

``--codes`` keeps one in 64 bytes of codes, or, where the file exists, says how many codes equal it.
``phases`` has a row for each process; the seconds in which they first met are among them, and in the total.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import ao_core as ao
from ao_core.calibrate import inputs, placement, processes, stage
from ao_core.plan import fingerprint
from ao_gptq import factor, gptq, layers


def llama(options: argparse.Namespace, device: torch.device) -> LlamaForCausalLM:
    """Random weights in bfloat16, drawn where that is quick, on the host; no float32 copy of the model."""
    config = LlamaConfig(
        hidden_size=options.hidden, intermediate_size=options.hidden * 7 // 2, vocab_size=options.vocabulary,
        num_hidden_layers=options.layers, num_attention_heads=options.hidden // 128 or 1,
        num_key_value_heads=max(options.hidden // 512, 1), max_position_embeddings=8192, rope_theta=5e5,
        tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in list(model.named_parameters()):
        owner, _, attribute = name.rpartition(".")
        if parameter.ndim == 1:
            made = torch.ones(parameter.shape, dtype=torch.bfloat16)
        else:
            made = torch.randn(parameter.shape, generator=generator, device=device).mul_(0.02)
            made = made.to(torch.bfloat16).cpu()
        setattr(model.get_submodule(owner), attribute, torch.nn.Parameter(made, requires_grad=False))
    return model


@torch.no_grad()
def sampled_codes(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """One in 64 bytes of each quantized weight's packed codes: uint8, two codes in each."""
    stored = {
        name: each.stored() for name, each in model.named_parameters() if isinstance(each, ao.QuantizedTensor)
    }
    return {name: parts["packed"].flatten()[::64].clone() for name, parts in stored.items()}


def equal_codes(found: dict[str, torch.Tensor], kept: dict[str, torch.Tensor]) -> float:
    """The fraction of equal 4-bit codes."""
    pairs = [(found[name], kept[name]) for name in kept]
    equal = sum(int(((a ^ b) & mask == 0).sum()) for a, b in pairs for mask in (15, 240))
    return equal / sum(2 * a.numel() for a, _ in pairs)


class Phases:
    """Seconds spent in some functions, the device waited for; a phase inside another counts once.

    ``peaks``: the most bytes that were allocated on the device meanwhile; of what is outside, ``"other"``.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.peaks: dict[str, int] = defaultdict(int)
        self._device, self._inside, self._phase = device, 0.0, "other"

    def watch(self, owner: Any, name: str, phase: str) -> None:
        """Replace ``owner.name`` by itself, timed."""
        setattr(owner, name, self._timed(getattr(owner, name), phase))

    def _timed(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            before, self._inside = self._inside, 0.0
            start, outer = self._now(), self._phase
            self.look()
            self._phase = phase
            try:
                return function(*args, **kwargs)
            finally:
                took = self._now() - start
                self.look()
                self._phase = outer
                self.seconds[phase] += took - self._inside
                self._inside = before + took

        return timed

    def look(self) -> None:
        """Count the peak since the last look for the phase that ran."""
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device)
            self.peaks[self._phase] = max(self.peaks[self._phase], peak)
            torch.cuda.reset_peak_memory_stats(self._device)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=1, help="sequences to a batch")
    parser.add_argument("--algorithm", default="gptq")
    parser.add_argument("--scheme", default="int4-weight-only:group_size=128,zero_point=integer")
    parser.add_argument("--codes", type=Path, help="a safetensors file to write, or to compare with")
    options = parser.parse_args()
    phases = Phases(torch.device(options.device))
    phases.watch(processes, "connected", "processes meet")
    with processes.started(torch.device(options.device)) as device:
        data = measure(options, device, phases)
        if processes.rank() == 0:
            options.results.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
            print(json.dumps(data, indent=1))


def measure(options: argparse.Namespace, device: torch.device, phases: Phases) -> dict[str, Any]:
    """Compress once, and say how long each phase took; where processes had to meet, that counts too."""
    model = llama(options, device)
    shape = (options.samples // options.batch, options.batch, options.context)
    ids = torch.randint(options.vocabulary, shape, generator=torch.Generator().manual_seed(0))
    met = sum(phases.seconds.values())
    phases.watch(stage.Stage, "collect", "forward and Hessians")
    phases.watch(stage.Stage, "collect_pairs", "forward and Hessians")
    phases.watch(inputs.Stream, "advance", "forward of the compressed block")
    phases.watch(placement.Placement, "_bring", "weights to the device")
    for name in ("_return", "returned"):
        phases.watch(placement.Placement, name, "weights from the device")
    for name in ("all_reduce", "total", "gathered", "broadcast") if processes.world() > 1 else ():
        phases.watch(processes, name, "sent to other processes, or waited for them")
    phases.watch(layers, "gptq", "columns")
    phases.watch(factor, "damped_factor", "factorization")
    phases.watch(gptq, "choose", "parameters")
    phases.watch(layers, "_better", "rounding and errors")
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        phases.peaks.clear()
    start = time.perf_counter()
    report = ao.compress_(
        model,
        options.algorithm,
        list(ids),
        scheme=options.scheme,
        exclude="lm_head",
        device=device,
        progress=True,
    )
    total = time.perf_counter() - start + met
    phases.look()
    took = {name: round(seconds, 2) for name, seconds in sorted(phases.seconds.items())}
    took["other"] = round(total - sum(phases.seconds.values()), 2)
    digest = hashlib.sha256()
    for _, weight in model.named_parameters():
        if isinstance(weight, ao.QuantizedTensor):
            for part in weight.stored().values():
                digest.update(part.contiguous().view(torch.uint8).numpy().tobytes())
    compared = None
    if options.codes and processes.rank() == 0:
        found = sampled_codes(model)
        if options.codes.is_file():
            compared = equal_codes(found, load_file(options.codes))
        else:
            save_file(found, options.codes)
    launch = "python" if processes.world() == 1 else f"torchrun --nproc-per-node={processes.world()}"
    command = f"{launch} tests/benchmarks/gptq_llama8b.py FILE"
    notes = [facts for facts in report.notes.values() if "error" in facts]
    return {
        "command": command,
        "fingerprint": fingerprint(device),
        "processes": processes.world(),
        **{key: str(value) for key, value in vars(options).items() if key not in ("results", "codes")},
        "seconds": round(total, 2),
        "phases": processes.gathered(took),
        "peak_device_bytes": processes.gathered(max(phases.peaks.values(), default=0)),
        "peak_device_bytes_by_phase": processes.gathered(dict(phases.peaks)),
        "reserved_device_bytes": torch.cuda.max_memory_reserved(device) if on_gpu else None,
        "layers_rounded": len(notes),
        "error_over_rounded": sum(facts["error"] / facts["error_rounded"] for facts in notes) / len(notes),
        "codes_equal": compared,
        "codes_sha256": digest.hexdigest(),
    }


if __name__ == "__main__":
    main()
