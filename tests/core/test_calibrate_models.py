"""Real architectures, tiny: decoders, vision and text encoders, experts. Layers see what hooks see."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ao_core as ao
from ao_core.calibrate import SquaredNorm, Walker, as_batches
from ao_core.calibrate.observer import Observer
from ao_core.layers import find_layers

transformers = pytest.importorskip("transformers", reason="needs the extra ao-core[hf]")

SIZES = {
    "hidden_size": 36,
    "intermediate_size": 63,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
}
TEXT = {"vocab_size": 99, "max_position_embeddings": 64}


def llama(**options):
    config = {**SIZES, **TEXT, "num_key_value_heads": 2, "tie_word_embeddings": False, **options}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))


def gemma3():
    """Other masks and other rotary frequencies in every second block; norms that multiply by 1 + w."""
    config = transformers.Gemma3TextConfig(
        **SIZES,
        **TEXT,
        num_key_value_heads=2,
        head_dim=6,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    return transformers.Gemma3ForCausalLM(config)


def vit():
    return transformers.ViTModel(transformers.ViTConfig(**SIZES, image_size=16, patch_size=4))


def dinov2():
    return transformers.Dinov2Model(transformers.Dinov2Config(**SIZES, image_size=16, patch_size=4))


def bert():
    return transformers.BertModel(transformers.BertConfig(**SIZES, **TEXT))


def ids(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 99, shape, generator=generator) for shape in ((2, 17), (1, 9), (1, 1))]


def images():
    return [{"pixel_values": torch.randn(n, 3, 16, 16)} for n in (3, 1)]


def tokenized():
    """As a tokenizer gives them, one of them padded."""
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    return [transformers.BatchEncoding({"input_ids": ids()[1].repeat(2, 1), "attention_mask": mask})]


def seeded(make):
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():  # the usual start has norms of 1 and biases of 0
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def squares(model, data, *, padded=False):
    """Layer → sum of squares of its inputs, by ordinary hooks, padding left out."""
    found, handles = {}, []

    def hook(name):
        def add(module, args):
            x = args[0]
            if padded:
                x = x[mask.bool()] if x.ndim == 3 else x
            rows = x.reshape(-1, x.shape[-1]).double()
            found[name] = found.get(name, 0) + rows.square().sum(0)

        return add

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(hook(name)))
    with torch.no_grad():
        for batch in data:
            mask = batch.get("attention_mask") if padded else None
            model(**batch) if not isinstance(batch, torch.Tensor) else model(batch)
    for handle in handles:
        handle.remove()
    return found


def walk(model, data, visit=None):
    """Sums of squares that the walk shows, and the walk."""
    layers = {n: it for n, it in find_layers(model).replaceable.items() if it.kind in ("linear", "experts")}
    found = {}

    def collect(stage):
        for name, norms in stage.collect(SquaredNorm).items():
            found[name] = torch.stack([norm.value.double() for norm in norms])
        if visit is not None:
            visit(stage)

    done = Walker(model, layers, dict.fromkeys(layers), as_batches(data)).walk(collect)
    return found, done


@pytest.mark.parametrize(
    ("make", "data", "how"),
    [
        (llama, ids, "3 blocks of model.layers in turn, then 1 layers outside them"),
        (gemma3, ids, "3 blocks of model.layers in turn"),
        (vit, images, "3 blocks of"),
        (dinov2, images, "3 blocks of encoder.layer in turn"),
        (bert, tokenized, "3 blocks of encoder.layer in turn"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_layers_see_what_hooks_see(make, data, how):
    model, batches = seeded(make), data()
    found, done = walk(model, batches)
    assert done.how.startswith(how)
    expected = squares(model, batches, padded=make is bert)
    pooled = {name for name in expected if name not in found} | {"pooler.dense"}
    assert pooled <= {"pooler.dense", "lm_head"}
    for name in set(expected) - pooled:
        torch.testing.assert_close(found[name][0], expected[name], rtol=1e-4, atol=1e-6)


def test_an_encoder_with_a_decoder_is_taken_at_once():
    config = transformers.T5Config(
        vocab_size=99, d_model=36, d_kv=6, d_ff=63, num_layers=2, num_decoder_layers=2, num_heads=6
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    data = [{"input_ids": ids()[0], "decoder_input_ids": ids(1)[0]}]
    found, done = walk(model, data)
    assert "more than one stack of blocks: decoder.block, encoder.block" in done.how
    expected = squares(model, data)
    for name in found:
        torch.testing.assert_close(found[name][0], expected[name], rtol=1e-4, atol=1e-6)


def mixtral(implementation):
    def make():
        config = transformers.MixtralConfig(
            **{**SIZES, **TEXT, "intermediate_size": 64},  # grouped_mm needs rows of whole 16 bytes
            num_key_value_heads=2,
            num_local_experts=5,
            num_experts_per_tok=2,
        )
        model = transformers.MixtralForCausalLM(config)
        model.set_experts_implementation(implementation)
        return model

    return make


def expert_squares(model, data):
    """By the definition: what the router sends to each expert, and what that makes of it."""
    found = {}

    def hook(name):
        def add(module, args):
            hidden, top, _ = (each.detach() for each in args)
            for expert in range(module.num_experts):
                x = hidden[(top == expert).any(-1)].double()
                gate, up = F.linear(x, module.gate_up_proj[expert].double()).chunk(2, -1)
                for part, rows in (("gate_up_proj", x), ("down_proj", F.silu(gate) * up)):
                    key = (f"{name}.{part}", expert)
                    found[key] = found.get(key, 0) + rows.square().sum(0)

        return add

    handles = [
        module.register_forward_pre_hook(hook(name))
        for name, module in model.named_modules()
        if name.endswith("experts")
    ]
    with torch.no_grad():
        for batch in data:
            model(batch)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_experts_see_the_tokens_that_are_sent_to_them(implementation):
    """Whichever way transformers multiplies; an expert that gets none has none."""
    model, data = seeded(mixtral(implementation)), ids()
    for layer in model.model.layers:
        layer.mlp.gate.weight.data[3] = 0
        layer.mlp.gate.weight.data[4] = -layer.mlp.gate.weight.data[:3].sum(0) * 50
    found, done = walk(model, data)
    assert done.how.startswith("3 blocks of model.layers")
    expected = expert_squares(model, data)
    stacks = [name for name in found if "experts" in name]
    assert len(stacks) == 6
    for name in stacks:
        for expert in range(5):
            torch.testing.assert_close(found[name][expert], expected[name, expert], rtol=1e-4, atol=1e-6)
        idle = [expert for expert in range(5) if not expected[name, expert].any()]
        assert done.notes[name]["experts_without_tokens"] == idle
        tokens = sum(each.numel() for each in data)
        assert done.notes[name]["tokens"] == 2 * tokens


def test_experts_that_are_linears():
    class Mixture(nn.Module):
        """Each token goes to one expert."""

        def __init__(self):
            super().__init__()
            self.norm, self.router = nn.LayerNorm(12), nn.Linear(12, 3)
            self.experts = nn.ModuleList(
                [nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 12)) for _ in range(3)]
            )

        def forward(self, x):
            y, out = self.norm(x), torch.zeros_like(x)
            choice = self.router(y).argmax(-1)
            for index, expert in enumerate(self.experts):
                out[choice == index] = expert(y[choice == index])
            return x + out

    torch.manual_seed(0)
    model = nn.Sequential(Mixture(), Mixture()).eval()
    model[1].router.bias.data[2] = -100
    data = [torch.randn(2, 9, 12), torch.randn(1, 4, 12)]
    found, done = walk(model, data)
    assert done.how == "2 blocks of Sequential in turn"
    assert done.notes["1.experts.2.0"]["tokens"] == 0
    for name, expected in squares(model, data).items():
        torch.testing.assert_close(found[name][0], expected, rtol=1e-4, atol=1e-6)


def test_compressed_experts_are_what_the_next_block_reads():
    model, data = seeded(mixtral("eager")), ids()
    found, _ = walk(model, data, visit=halve)
    expected = squares(model, data)  # of the model as it is now
    name = "model.layers.2.self_attn.q_proj"
    torch.testing.assert_close(found[name][0], expected[name], rtol=1e-4, atol=1e-6)


def halve(stage):
    for name in stage.layers:
        stage.replace(name, stage.weight(name) / 2)


@pytest.mark.parametrize(
    "multiply",
    [
        lambda x, w: F.linear(x, w[1]),
        lambda x, w: F.linear(x, w[torch.tensor(1)]),
        lambda x, w: F.linear(x, w[-2]),
        lambda x, w: F.linear(x, w.unbind(0)[1]),
        lambda x, w: F.linear(x, w.select(0, 1)),
        lambda x, w: F.linear(x, next(m for i, m in enumerate(w) if i == 1).to(torch.float32)),
        lambda x, w: x @ w[1].T,
        lambda x, w: x @ w[1].mT,
        lambda x, w: torch.mm(x, w[1].t()),
        lambda x, w: torch.addmm(torch.zeros(4), x, w[1].transpose(0, 1)),
        lambda x, w: torch.bmm(w[torch.ones(5, dtype=torch.long)], x[:, :, None]),
        lambda x, w: torch.bmm(x[:, None], w[torch.ones(5, dtype=torch.long)].transpose(1, 2)),
        lambda x, w: torch.matmul(w[1], x.T),
    ],
)
def test_the_ways_to_multiply_by_an_expert(multiply):
    weight, x, seen = nn.Parameter(torch.randn(3, 4, 6)), torch.randn(5, 6), []
    with torch.no_grad(), Observer({"w": weight}, lambda *args: seen.append(args)):
        out = multiply(x, weight)
    expected = x @ weight[1].T
    torch.testing.assert_close(out.reshape(-1).sort().values, expected.detach().reshape(-1).sort().values)
    ((name, index, rows, _),) = seen
    assert (name, index) == ("w", 1)
    torch.testing.assert_close(rows.reshape(-1, 6), x)


def test_what_is_no_input_is_not_taken_for_one():
    """``x @ w`` sums over the outputs; a copied address is not a weight."""
    weight, seen = nn.Parameter(torch.randn(6, 6)), []
    with torch.no_grad(), Observer({"w": weight}, lambda *args: seen.append(args)):
        torch.randn(5, 6) @ weight
        F.linear(torch.randn(5, 6), torch.randn(6, 6))
        weight.sum()
    assert seen == []


def test_the_walk_quantizes_experts_with_the_plan_s_scheme():
    model, data = seeded(mixtral("eager")), ids()
    before = model(data[0]).logits.detach()

    class Watch(ao.BlockAlgorithm):
        name = "watch"

        def visit(self, stage):
            stage.collect(SquaredNorm)

    report = ao.compress_(model, [Watch()], data, scheme="int8-weight-only")
    assert report.converted["model.layers.1.mlp.experts.down_proj"] == "int8-weight-only"
    assert ao.sqnr(before, model(data[0]).logits) > 25
