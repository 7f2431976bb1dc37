"""How fast is forward + backward of the backbone? Against PyTorch on the same shapes, and the machine's matmul rate.

The PyTorch side is what a user would write: ``transformers``' Swinv2 layers and merging, pre-norm blocks with PyTorch's
own attention, the same prompts; it has no rotary embedding, masks or drop path, so it does slightly less. Dense MLPs on
both sides. Command: python -m benchmarks.step --config=tiny --batch=4
"""

import argparse
import importlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.swinv2.configuration_swinv2 import Swinv2Config
from transformers.models.swinv2.modeling_swinv2 import Swinv2Layer, Swinv2PatchMerging

from benchmarks.timing import median_seconds
from skysense_jax import assembly, cost
from skysense_jax.modalities import select
from skysense_jax.models.backbone import group_modalities
from skysense_jax.models.skysense import make_backbone
from skysense_jax.sharding import unbox


class TorchBlock(nn.Module):
    """A pre-norm Transformer block with LayerScale."""

    def __init__(self, width, head_width, mlp_ratio):
        super().__init__()
        self.head_width = head_width
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.scales = nn.ParameterList(torch.full((width,), 1e-5) for _ in range(2))
        self.qkv, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_ratio * width), nn.GELU(), nn.Linear(mlp_ratio * width, width))

    def forward(self, x):
        heads = self.qkv(self.norms[0](x)).unflatten(-1, (3, -1, self.head_width)).permute(2, 0, 3, 1, 4)
        x = x + self.scales[0] * self.output(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        return x + self.scales[1] * self.mlp(self.norms[1](x))


class TorchBackbone(nn.Module):
    """The four stages with shared weights, for square images of ``modalities``."""

    def __init__(self, modalities, cells, *, width, depths, head_width, window, mlp_ratio, num_prompts):
        super().__init__()
        self.modalities, self.cells = modalities, cells
        self.tokenizers, self.prompts = nn.ModuleDict(), nn.ParameterDict()
        for m in modalities:
            patch = m.patch**2 * m.num_bands
            self.tokenizers[m.name] = nn.Sequential(nn.Linear(patch, width), nn.LayerNorm(width))
            for stage in (2, 3):
                self.prompts[f"{m.name}{stage}"] = torch.zeros(1, num_prompts, width * 2**stage)
        self.merges = nn.ModuleList(Swinv2PatchMerging(None, width * 2**i) for i in range(3))
        config = Swinv2Config(embed_dim=width, window_size=window, mlp_ratio=float(mlp_ratio))
        side = max(m.tokens_per_cell for m in modalities) * cells
        self.stages = nn.ModuleList()
        for stage, depth in enumerate(depths):
            dim = width * 2**stage
            swin = lambda i, dim=dim: Swinv2Layer(  # noqa: E731
                config, dim, (side, side), dim // head_width, shift_size=window // 2 * (i % 2)
            )
            plain = lambda i, dim=dim: TorchBlock(dim, head_width, mlp_ratio)  # noqa: E731
            self.stages.append(nn.ModuleList((swin if stage < 2 else plain)(i) for i in range(depth)))

    def forward(self, images):
        outputs = []
        grids = {m.name: (m.tokens_per_cell * self.cells,) * 2 for m in self.modalities}
        for group in group_modalities(self.modalities, grids):
            outputs.append(self.run(group, {m.name: images[m.name] for m in group}))
        return outputs

    def run(self, group, images):
        patches = {m.name: self.patches(images[m.name], m.patch) for m in group}
        x = torch.cat([self.tokenizers[m.name](patches[m.name]) for m in group])
        side = round(x.shape[1] ** 0.5)
        for stage, blocks in enumerate(self.stages):
            if stage:
                merge = self.merges[stage - 1]
                if group[0].merges_at[stage - 1]:
                    x, side = merge(x, (side, side)), side // 2
                else:
                    kernel = merge.reduction.weight.unflatten(1, (4, -1)).mean(1)
                    x = merge.norm(F.linear(x, kernel))
            num_tokens = x.shape[1]
            if stage > 1:
                prompts = [self.prompts[f"{m.name}{stage}"].expand(len(images[m.name]), -1, -1) for m in group]
                x = torch.cat((x, torch.cat(prompts)), dim=1)
            for block in blocks:
                x = block(x, (side, side))[0] if stage < 2 else block(x)
            x = x[:, :num_tokens]
        return x

    @staticmethod
    def patches(x, patch):
        x = x.unflatten(2, (-1, patch)).unflatten(1, (-1, patch)).transpose(2, 3)
        return x.flatten(3).flatten(1, 2)


def matmul_rates(dtype, size=2048, repeats=9):
    """Measured FLOP/s of a square matrix product in (XLA, PyTorch)."""
    x = jnp.ones((size, size), dtype)
    product = jax.jit(lambda x: x @ x)
    y = torch.ones((size, size), dtype=getattr(torch, jnp.dtype(dtype).name))
    return 2 * size**3 / median_seconds((lambda: product(x).block_until_ready(), lambda: y @ y), repeats)


def torch_step(modalities, cells, images, fields, dtype):
    """A function that runs forward + backward of the PyTorch network on the images."""
    names = ("width", "depths", "head_width", "window", "mlp_ratio", "num_prompts")
    torch_dtype = getattr(torch, dtype.name)
    network = TorchBackbone(modalities, cells, **{name: fields[name] for name in names}).to(torch_dtype)
    tensors = {name: torch.tensor(x).flatten(0, 1).to(torch_dtype) for name, x in images.items()}

    def run():
        network.zero_grad()
        sum(x.float().square().mean() for x in network(tensors)).backward()

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="tiny", help="a name in configs/")
    parser.add_argument("--batch", type=int, default=4, help="samples")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--skip_torch", action="store_true", help="on a machine with an accelerator for jax only")
    args = parser.parse_args()
    config = importlib.import_module(f"configs.{args.config}").get_config()
    modalities = select(config.data.modalities, config.data.new_modalities)
    fields = {**config.model.backbone, "num_moe_blocks": 0, "drop_path": 0.0}
    cells, dtype = config.data.views.global_cells, jnp.dtype(config.model.compute_dtype)
    images, valid = {}, {}
    rng = np.random.default_rng(0)
    for m in modalities:
        lead, pixels = (args.batch, config.data.num_dates[m.name]), cells * m.pixels_per_cell
        images[m.name] = rng.standard_normal((*lead, pixels, pixels, m.num_bands), np.float32)
        valid[m.name] = np.ones((*lead, *(cells * m.tokens_per_cell,) * 2), bool)

    model = make_backbone(modalities, **fields, **assembly.efficiency(config), compute_dtype=dtype)
    params = jax.jit(lambda i, v: unbox(model.init(jax.random.key(0), i, v, train=False)))(images, valid)

    def loss(params, images):
        features = model.apply(params, images, valid, train=True).features.values()
        return sum(jnp.square(x.astype(jnp.float32)).mean() for x in features)

    start = time.perf_counter()
    step = jax.jit(jax.grad(loss)).lower(params, images).compile()
    compile_s = time.perf_counter() - start
    on_device = jax.device_put(images)
    runs = [lambda: jax.block_until_ready(step(params, on_device))]
    if not args.skip_torch:
        runs.append(torch_step(modalities, cells, images, fields, dtype))
    seconds = median_seconds(runs, args.repeats)
    xla_rate, torch_rate = matmul_rates(dtype)

    forward = {m.name: cost.backbone_flops(m, cells, **{k: fields[k] for k in cost.COSTLY}) for m in modalities}
    flops = 3 * args.batch * sum(config.data.num_dates[name] * value for name, value in forward.items())
    shapes = [
        {m.name: (side * m.tokens_per_cell,) * 2 for m in modalities} for side in (cells, config.data.views.local_cells)
    ]
    graphs = sum(len(group_modalities(modalities, grids)) for grids in shapes)
    rows = [
        ("config, samples, images a sample", f"{args.config}, {args.batch}, {sum(config.data.num_dates.values())}"),
        ("device, compute dtype", f"{jax.devices()[0].device_kind}, {dtype.name}"),
        ("work, forward + backward (formula)", f"{flops / 1e9:.1f} GFLOP"),
        ("ours: compile", f"{compile_s:.1f} s"),
        ("ours: step", f"{seconds[0]:.3f} s = {flops / seconds[0] / 1e9:.0f} GFLOP/s"),
        ("ours: share of XLA's matmul rate", f"{flops / seconds[0] / xla_rate:.2f} of {xla_rate / 1e9:.0f} GFLOP/s"),
        ("token grids of the backbone (global + local)", f"{graphs}; student and teacher each run every one"),
    ]
    if not args.skip_torch:
        share = f"{flops / seconds[1] / torch_rate:.2f} of {torch_rate / 1e9:.0f} GFLOP/s"
        rows += [
            ("PyTorch: step", f"{seconds[1]:.3f} s = {flops / seconds[1] / 1e9:.0f} GFLOP/s"),
            ("PyTorch: share of its matmul rate", share),
            ("speed, ours / PyTorch", f"{seconds[1] / seconds[0]:.2f} x"),
        ]
    for name, value in rows:
        print(f"{name:<44} {value}")


if __name__ == "__main__":
    main()
