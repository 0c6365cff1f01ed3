"""What each of two processes under FSDP2 does and finds: run as ``fsdp_ranks.py RANK FOLDER``."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import ao_core as ao

RANKS = 2


DEVICE = "cuda" if torch.cuda.device_count() >= RANKS else "cpu"


K = 64


class TableTensor(ao.QuantizedTensor):
    """A stranger's: one scale a row without a second dimension, and a table that all rows share."""

    data_names = ("codes", "scale", "table", "absent")
    attr_names = ("factor",)
    row_data = ("codes", "scale", "absent")

    def dequantize(self):
        return (self.table[self.codes.int()] * self.scale.float()[:, None] * self.factor).to(self.dtype)


class ColumnTensor(ao.QuantizedTensor):
    """A stranger's layout without rows: codes ``[K, N]``."""

    data_names = ("columns", "scale", "table")
    row_data = ()

    def portable(self):
        codes = self.columns.t().contiguous()
        return TableTensor(
            codes,
            self.scale,
            self.table,
            None,
            shape=self.shape,
            dtype=self.dtype,
            factor=2.0,
            scheme="table",
        )

    def dequantize(self):
        return self.portable().dequantize()


class LooseTensor(TableTensor):
    """Names a tensor as cut that has no rows."""

    row_data = ("codes", "scale", "table")


class WholeTensor(TableTensor):
    """Has no layout that can be cut."""

    row_data = ()


def by_hand(kind, rows):
    generator = torch.Generator().manual_seed(rows)
    codes = torch.randint(0, 16, (rows, K), generator=generator, dtype=torch.uint8)
    scale = torch.rand(rows, generator=generator).half() / 10
    table = torch.linspace(-1, 1, 16)
    options = {"shape": (rows, K), "dtype": torch.float32, "scheme": "table"}
    if kind is ColumnTensor:
        return kind(codes.t().contiguous(), scale, table, **options)
    return kind(codes, scale, table, None, factor=2.0, **options)


class Lora(nn.Module):
    """A linear and its adapter of rank 3."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(3, base.in_features) / 8)
        self.up = nn.Parameter(torch.randn(base.out_features, 3) / 8)

    def forward(self, x):
        return self.base(x) + x @ self.down.t() @ self.up.t()


def lora_model(weight, rows):
    """``weight`` is a scheme, or a class of this file."""
    torch.manual_seed(rows)
    model = nn.Sequential(Lora(nn.Linear(K, rows)), nn.Tanh(), Lora(nn.Linear(rows, 32)))
    if isinstance(weight, str):
        ao.quantize_(model, weight)
    else:
        model[0].base.weight = nn.Parameter(by_hand(weight, rows), requires_grad=False)
        model[2].base.weight.requires_grad = False
    for layer in (model[0].base, model[2].base):
        layer.bias.requires_grad = False
    return model.to(DEVICE)


def data(rows=8):
    return torch.randn(rows, K, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def train(model, x, steps=3):
    """Loss and gradients of each step: the second one gathers into memory that was freed."""
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(wanted.values(), lr=0.5)
    found = []
    for _ in range(steps):
        loss = model(x).square().mean()
        loss.backward()
        found.append((loss.detach().cpu(), {name: whole(p.grad).cpu() for name, p in wanted.items()}))
        optimizer.step()
        optimizer.zero_grad()
    return found


WEIGHTS = [
    ("nf4", 32),
    ("nf4", 17),
    ("nf4", 1),
    ("nf4:double_quant=false", 17),
    ("int8-weight-only", 32),
    ("int8-weight-only", 17),
    ("int8-weight-only:group_size=32", 17),
    ("float8-weight-only", 17),
    ("float8-weight-only:granularity=tensor", 32),
    ("float8-weight-only:granularity=tensor", 17),
    (TableTensor, 32),
    (TableTensor, 17),
    (ColumnTensor, 17),
]


TRAINED = {f"{getattr(weight, '__name__', weight)}, {rows} rows": (weight, rows) for weight, rows in WEIGHTS}


# What each process does; all return what the tests look at.


def shard(model, mesh, **options):
    from torch.distributed.fsdp import fully_shard

    for layer in model.children():
        if next(layer.parameters(), None) is not None:
            fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def run_training(mesh, rank):
    results = {}
    for name, (weight, rows) in TRAINED.items():
        model = shard(lora_model(weight, rows), mesh)
        found = train(model, data().chunk(RANKS)[rank])
        for loss, _ in found:
            summed = loss.to(DEVICE)
            dist.all_reduce(summed)
            loss.copy_(summed / RANKS)
        base = whole(model.state_dict()["0.base.weight"])
        results[name] = found, type(base).__name__, [stored.cpu() for stored in base.stored().values()]
    return results


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8, K))

    def forward(self, x):
        return torch.bmm(x.expand(3, *x.shape), self.weight.transpose(-2, -1))


def odd_layers():
    """An embedding, three experts, a convolution, and a linear behind an input scale; ranks and sizes odd."""
    torch.manual_seed(5)
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(11, K),
            "experts": Experts(),
            "conv": nn.Conv1d(4, 7, 3),
            "linear": nn.Linear(K, 9),
        }
    )
    ao.quantize_(model, "nf4", include=["*", "embed", "conv"])
    base = model["linear"].weight.detach()
    scale = torch.rand(K)
    scaled = ao.InputScaledTensor(base, scale, shape=base.shape, dtype=base.dtype, scheme=base.scheme)
    model["linear"].weight = nn.Parameter(scaled, requires_grad=False)
    return model.to(DEVICE)


@torch.no_grad()
def run_odd_layers(model):
    ids = torch.tensor([0, 10, 3, 3], device=DEVICE)
    hidden = model["embed"](ids)
    outputs = [hidden, model["experts"](hidden), model["conv"](hidden[:, :20]), model["linear"](hidden)]
    return [out.cpu() for out in outputs]


def run_sharded_odd_layers(mesh, rank):
    model = odd_layers()
    for layer in model.values():
        shard(layer, mesh)
    kinds = [type(layer.weight.to_local()).__name__ for layer in model.values()]
    return kinds, run_odd_layers(model)


@torch.no_grad()
def run_policies(mesh, rank):
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    policies = {
        "kept": {"reshard_after_forward": False},
        "offloaded": {"offload_policy": CPUOffloadPolicy(pin_memory=DEVICE == "cuda")},
        "bfloat16": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)},
    }
    found = {}
    for name, options in policies.items():
        for rows in (32, 17):
            model = shard(lora_model("nf4", rows), mesh, **options)
            found[name, rows] = [model(data()).cpu() for _ in range(2)]
    return found


@torch.no_grad()
def run_freeing(mesh, rank):
    """Bytes of the whole weight while the layer runs, and afterwards."""
    return {rows: bytes_around(shard(lora_model("nf4", rows), mesh)) for rows in (32, 17)}


def bytes_around(model):
    held, running = [], []

    def look(module, inputs, output):
        held.extend(module.weight.stored().values())
        running.append(storage_bytes(held))

    model[0].base.register_forward_hook(look)
    model(data())
    return running, storage_bytes(held)


def storage_bytes(tensors):
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@torch.no_grad()
def run_state_dicts(mesh, rank, folder):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    def emptied():
        """The same layers with zeros for weights."""
        model = lora_model("nf4", 17)
        for layer in (model[0].base, model[2].base):
            for stored in layer.weight.stored().values():
                stored.zero_()
        return shard(model, mesh)

    model = shard(lora_model("nf4", 17), mesh)
    state = model.state_dict()
    found = {}
    for name, assign in (("copied", False), ("assigned", True)):
        again = emptied()
        before = again(data()).cpu()
        again.load_state_dict(state, assign=assign)
        found[name] = before, again(data()).cpu()
    dcp.save(state, checkpoint_id=folder / "dcp")
    again = emptied()
    loaded = again.state_dict()
    dcp.load(loaded, checkpoint_id=folder / "dcp")
    again.load_state_dict(loaded)
    found["saved"] = before, again(data()).cpu()
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    found["full"] = {key: type(value).__name__ for key, value in full.items()}
    return found


@torch.no_grad()
def run_dtensors(mesh, rank):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = lora_model("nf4", 17)
    cut = distribute_tensor(model[0].base.weight, mesh, [Shard(0)], src_data_rank=None)
    back = cut.redistribute(placements=[Replicate()]).redistribute(placements=[Shard(0)])
    layer = nn.Sequential(lora_model("nf4", 32)[0].base)
    expected = layer(data())
    plan = {"0": ColwiseParallel(output_layouts=Replicate())}
    parallelize_module(layer, mesh, plan, src_data_rank=None)
    return {
        "rows": (cut.to_local().shape[0], back.to_local().shape[0]),
        "values": (cut.full_tensor().dequantize().cpu(), model[0].base.weight.dequantize().cpu()),
        "columnwise": (layer(data()).cpu(), expected.cpu()),
    }


def run_refusals(mesh, rank):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.nn.parallel import DistributedDataParallel

    def linear(kind):
        layer = nn.Linear(K, 18, bias=False, device=DEVICE)
        layer.weight = nn.Parameter(by_hand(kind, 18).to(DEVICE), requires_grad=False)
        return layer

    weight = lora_model("nf4", 17)[0].base.weight
    tries = {
        "columns": lambda: fully_shard(linear(TableTensor), mesh=mesh, shard_placement_fn=lambda p: Shard(1)),
        "no rows": lambda: fully_shard(linear(LooseTensor), mesh=mesh),
        "one piece": lambda: fully_shard(linear(WholeTensor), mesh=mesh),
        "scattered": lambda: distribute_tensor(weight, mesh, [Shard(0)]),
        "broadcast": lambda: distribute_tensor(weight, mesh, [Replicate()]),
        "replicas": lambda: DistributedDataParallel(lora_model("nf4", 17)),
    }
    return {name: refusal(attempt) for name, attempt in tries.items()}


def refusal(attempt):
    try:
        attempt()
    except NotImplementedError as error:
        return str(error)
    return "nothing was refused"


def main(rank, folder):
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    if DEVICE == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if DEVICE == "cuda" else "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=60),
    )
    mesh = init_device_mesh(DEVICE, (RANKS,))
    found = {
        "training": run_training(mesh, rank),
        "odd layers": run_sharded_odd_layers(mesh, rank),
        "policies": run_policies(mesh, rank),
        "freeing": run_freeing(mesh, rank),
        "state dicts": run_state_dicts(mesh, rank, folder),
        "dtensors": run_dtensors(mesh, rank),
        "refusals": run_refusals(mesh, rank),
    }
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
