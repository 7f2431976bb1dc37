"""Fine-tunes a land-cover segmenter on exported features: NAIP chips of 1 m in GEO-Bench's HDF5 layout, plain PyTorch.

    python docs/examples/segment_naip.py --model=DIR --data=CHIPS --validate=id_000138 --out=head.safetensors

The backbone is frozen unless ``--tune``. The same head is also trained on raw RGB, and both are compared with the most
frequent class of the training chips, on a chip that neither has seen. A few chips show how it is done, not how good the
features are.

Resolution: hr was pre-trained at 0.3125 m and NAIP has 1 m. Enlarging it 3.2 times would add no detail and cost ten
times the work, so chips go in as they are (``--scale=1``): objects look 3.2 times smaller than in pre-training.
``--scale=2`` enlarges twice, to 0.5 m, for tokens of 2 m instead of 4 m. NAIP's near-infrared band has no place in hr.

Needs torch, safetensors, numpy, h5py.
"""

import argparse
import importlib.util
import json
import pathlib
import sys
import time
from collections.abc import Callable, Sequence

import h5py
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = ("water", "tree canopy", "low vegetation", "barren", "impervious", "road")  # labels 1 to 6
IGNORED = 255
BANDS = ("Red", "Green", "Blue")


def read_chip(path: pathlib.Path) -> tuple[Tensor, Tensor]:
    """RGB [3 H W], 0 to 255, and labels [H W], 0 to 5 or IGNORED, of a chip.

    Only named data sets are read; the file's attribute ``pickle`` could run code and is left alone.
    """
    with h5py.File(path) as file:
        missing = [name for name in (*BANDS, "label") if name not in file]
        if missing:
            raise ValueError(f"{path}: no {', '.join(missing)}; wanted a chip of cvpr_chesapeake_landcover")
        image, label = np.stack([file[name][...] for name in BANDS]), file["label"][...]
    if image.min() < 0 or image.max() > 1:
        raise ValueError(f"{path}: RGB from {image.min():g} to {image.max():g}; wanted 0 to 1")
    known = (label >= 1) & (label <= len(CLASSES))
    return torch.from_numpy(image * 255.0).float(), torch.from_numpy(np.where(known, label - 1, IGNORED)).long()


class Features(nn.Module):
    """The exported backbone: maps of its four stages for RGB of 0 to 255, enlarged ``scale`` times first."""

    def __init__(self, directory: pathlib.Path, scale: int, tune: bool):
        super().__init__()
        spec = importlib.util.spec_from_file_location("modeling_skysensev2", directory / "modeling_skysensev2.py")
        if spec is None or not (directory / "modeling_skysensev2.py").is_file():
            raise ValueError(f"--model: {directory} has no modeling_skysensev2.py; wanted an exported directory")
        modelling = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = modelling
        spec.loader.exec_module(modelling)
        # drop path is a regulariser of long training; without dropout, training and evaluation mode then are the same
        model = modelling.SkySenseV2.from_pretrained(directory, drop_path=0.0)
        model.fusion = None  # of one image nothing is fused
        self.backbone = modelling.FeaturesOnly(model, "hr").requires_grad_(tune)
        self.scale, self.out_channels = scale, self.backbone.out_channels

    def forward(self, images: Tensor) -> list[Tensor]:
        if self.scale > 1:
            images = F.interpolate(images, scale_factor=self.scale, mode="bilinear", align_corners=False)
        return self.backbone(images)


class RawPixels(nn.Module):
    """What the same head gets without a backbone: all pixels of a 4 x 4 patch, and RGB means over 8, 16, 32 pixels."""

    out_channels = (48, 3, 3, 3)

    def forward(self, images: Tensor) -> list[Tensor]:
        images = (images - 118.0) / 57.0
        return [F.pixel_unshuffle(images, 4), *(F.avg_pool2d(images, side) for side in (8, 16, 32))]


class Head(nn.Module):
    """All stages projected to one width, enlarged to the first one's grid and summed; two convolutions; all pixels."""

    def __init__(self, out_channels: Sequence[int], num_classes: int, width: int = 64):
        super().__init__()
        # LayerNorm over channels: torch 2.13's GroupNorm crashes in backward on a CPU when its input is channels-last,
        # as the backbone's maps are, and needs no gradient
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for channels in out_channels)
        self.projections = nn.ModuleList(nn.Linear(channels, width) for channels in out_channels)
        self.mix = nn.Conv2d(width, width, 3, padding=1)
        self.classify = nn.Conv2d(width, num_classes, 1)

    def forward(self, maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Logits [B classes H W] of ``size`` H W."""
        resize = lambda x, size: F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)  # noqa: E731
        layers = zip(maps, self.norms, self.projections)
        projected = [project(norm(x.movedim(1, -1))).movedim(-1, 1) for x, norm, project in layers]
        summed = sum(resize(x, projected[0].shape[2:]) for x in projected)
        return resize(self.classify(F.relu(self.mix(F.relu(summed)))), size)


def train(
    features: nn.Module, head: Head, images: Tensor, labels: Tensor, *, steps: int, seed: int, tune: bool = False
) -> list[float]:
    """The loss of each step; all chips are seen in every one, turned and mirrored at random. Changes the modules."""
    groups = [{"params": list(head.parameters()), "lr": 1e-3}]
    if tune:
        groups.append({"params": list(features.parameters()), "lr": 1e-4})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [g["lr"] for g in groups], total_steps=max(steps, 1))
    rng, losses = np.random.default_rng(seed), []
    for _ in range(steps):
        quarters, mirrored = rng.integers(4), rng.integers(2)
        turn: Callable[[Tensor], Tensor] = lambda x: torch.rot90(x.flip(-1) if mirrored else x, quarters, (-2, -1))  # noqa: E731
        with torch.set_grad_enabled(tune):
            maps = features(turn(images))
        loss = F.cross_entropy(head(maps, images.shape[2:]), turn(labels), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def scores(predicted: Tensor, labels: Tensor) -> dict[str, float]:
    """Pixel accuracy, and the mean over the classes that ``labels`` have of intersection over union; in per cent."""
    known = labels != IGNORED
    predicted, labels = predicted[known], labels[known]
    union = [
        ((predicted == c) & (labels == c)).sum() / ((predicted == c) | (labels == c)).sum() for c in labels.unique()
    ]
    return {
        "mIoU": 100 * float(torch.stack(union).mean()),
        "accuracy": 100 * float((predicted == labels).float().mean()),
    }


def run(given: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Scores on the validation chip by method; prints them and the losses, and saves the head on features."""
    if given.steps < 1 or given.scale < 1:
        raise ValueError(f"--steps: {given.steps}, --scale: {given.scale}; wanted 1 or more")
    paths = {path.stem: path for path in sorted(given.data.glob("*.hdf5"))}
    if len(paths) < 2:
        raise ValueError(f"--data: {len(paths)} files *.hdf5 in {given.data}; wanted 2 or more chips")
    held_out = given.validate or list(paths)[-1]
    if held_out not in paths:
        raise ValueError(f"--validate: {held_out!r}; {given.data} has {', '.join(paths)}")
    torch.manual_seed(given.seed)
    networks = {"raw RGB": RawPixels(), "features": Features(given.model, given.scale, given.tune)}
    chips = {name: read_chip(path) for name, path in paths.items()}
    image, label = chips.pop(held_out)
    images, labels = (torch.stack(x) for x in zip(*chips.values()))
    count = torch.bincount(labels[labels != IGNORED], minlength=len(CLASSES))
    print(f"trained on {', '.join(chips)}; validated on {held_out}")
    of_label = torch.bincount(label[label != IGNORED], minlength=len(CLASSES))
    for name, seen, wanted in zip(CLASSES, count.tolist(), of_label.tolist()):
        print(f"  {name:15s} {seen:7d} pixels to train on, {wanted:6d} to validate on")
    found = {f"majority class ({CLASSES[count.argmax()]})": scores(torch.full_like(label, int(count.argmax())), label)}
    for name, features in networks.items():
        start = time.perf_counter()
        tune = given.tune and name == "features"
        head = Head(features.out_channels, len(CLASSES))
        losses = train(features, head, images, labels, steps=given.steps, seed=given.seed, tune=tune)
        with torch.inference_mode():
            predicted = head(features(image[None]), image.shape[1:]).argmax(1)[0]
        found[name] = scores(predicted, label)
        seconds = time.perf_counter() - start
        print(f"{name}: loss {losses[0]:.3f} at step 1, {losses[-1]:.3f} at step {given.steps}, {seconds:.0f} s")
    for name, values in found.items():
        print(f"{name:32s} mIoU {values['mIoU']:5.1f}, pixel accuracy {values['accuracy']:5.1f} %")
    state = {f"head.{key}": value for key, value in head.state_dict().items()}
    if given.tune:
        state |= {f"backbone.{key}": value for key, value in features.backbone.model.state_dict().items()}
    classes = json.dumps(CLASSES)
    save_file(state, given.out, metadata={"classes": classes, "scale": str(given.scale), "modality": "hr"})
    print(f"head{' and backbone' if given.tune else ''}: {given.out}")
    return found


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The arguments of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, required=True, help="an exported directory")
    parser.add_argument("--data", type=pathlib.Path, required=True, help="folder of chips, *.hdf5")
    parser.add_argument("--validate", default="", help="name of the chip to validate on; the last by default")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--scale", type=int, default=1, help="how many times chips are enlarged")
    parser.add_argument("--tune", action="store_true", help="train the backbone too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="safetensors file for the trained head")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    try:
        run(parse(sys.argv[1:]))
    except ValueError as error:
        sys.exit(f"error: {error}")
