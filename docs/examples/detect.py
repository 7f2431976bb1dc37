"""Detects objects with the exported backbone: pyramid, anchor-free head, upright or oriented boxes, plain PyTorch.

    python docs/examples/detect.py --model=DIR                # a demonstration on drawn images, upright boxes
    python docs/examples/detect.py --model=DIR --oriented --tune

``Pyramid`` is what detectors ask of a backbone: images in, an ordered dict of maps of one width out, ``out_channels``
and ``strides`` beside it (the contract of torchvision's ``BackboneWithFPN``). ``Detector`` is a small FCOS (arXiv
1904.01355) on it. To train on data of your own, give ``Detector.loss`` batches of images and boxes.

Images are raw RGB of 0 to 255, [B 3 H W]. A box is (centre x, centre y, width, height, angle): pixels from the
north-west corner, x to the east and y to the south, and radians from x towards y; width lies along the angle. Upright
boxes have the angle 0. An oriented box is the same after half a turn, so its angle is learned as (cos 2a, sin 2a) and
given out between -pi/2 and pi/2.

Needs torch, safetensors, numpy, and not torchvision, whose detectors train on ``Pyramid`` too (docs/evaluation.md).
"""

import argparse
import importlib.util
import math
import pathlib
import sys
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIZES = (0, 64, 128, 256, math.inf)  # pixels: the farthest side of a box from a point, by level (FCOS)
CENTRE = 1.5  # points at most so many strides from a box's centre are asked for it (FCOS, centre sampling)
CLASSES = ("bright", "red")  # of the drawn images


class Pyramid(nn.Module):
    """The exported backbone and a feature pyramid (arXiv 1612.03144): maps "0" to "3" at strides 4, 8, 16, 32 of hr.

    Attributes:
      out_channels: width of every map.
      strides: pixels along the side of a place of each map.
    """

    def __init__(self, directory: pathlib.Path, *, width: int = 256, modality: str = "hr", tune: bool = True):
        super().__init__()
        path = pathlib.Path(directory) / "modeling_skysensev2.py"
        if not path.is_file():
            raise ValueError(f"--model: {directory} has no modeling_skysensev2.py; wanted an exported directory")
        spec = importlib.util.spec_from_file_location("modeling_skysensev2", path)
        modelling = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = modelling
        spec.loader.exec_module(modelling)
        model = modelling.SkySenseV2.from_pretrained(directory, drop_path=0.0)
        model.fusion = None  # of one image nothing is fused
        self.backbone = modelling.FeaturesOnly(model, modality).requires_grad_(tune)
        self.out_channels, self.strides = width, list(self.backbone.strides)
        channels = self.backbone.out_channels
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in channels)  # the maps carry none
        self.lateral = nn.ModuleList(nn.Linear(c, width) for c in channels)
        self.smooth = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in channels)

    def forward(self, images: Tensor) -> "OrderedDict[str, Tensor]":
        return self.pyramid(self.backbone(images))

    def pyramid(self, maps: Sequence[Tensor]) -> "OrderedDict[str, Tensor]":
        """The pyramid of the backbone's maps: of a frozen backbone they may be kept."""
        layers = zip(maps, self.norms, self.lateral)
        levels = [project(norm(x.movedim(1, -1))).movedim(-1, 1).contiguous() for x, norm, project in layers]
        for i in range(len(levels) - 2, -1, -1):
            levels[i] = levels[i] + F.interpolate(levels[i + 1], size=levels[i].shape[2:], mode="nearest")
        return OrderedDict((str(i), conv(x)) for i, (conv, x) in enumerate(zip(self.smooth, levels)))


class Detector(nn.Module):
    """A pyramid and FCOS's head, shared by all levels: classes, four distances to the sides, centreness, the angle."""

    def __init__(self, pyramid: Pyramid, num_classes: int, *, oriented: bool, depth: int = 2):
        super().__init__()
        width = pyramid.out_channels
        if width % 8:
            raise ValueError(f"--width: {width}; wanted a multiple of 8")
        if len(set(pyramid.strides)) < len(pyramid.strides):
            raise ValueError(f"modality: its maps have strides {pyramid.strides}; wanted one whose grids differ, as hr")
        block = lambda: (nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.ReLU())  # noqa: E731
        tower = lambda: nn.Sequential(*(layer for _ in range(depth) for layer in block()))  # noqa: E731
        out = lambda channels: nn.Conv2d(width, channels, 3, padding=1)  # noqa: E731
        self.pyramid, self.num_classes, self.oriented = pyramid, num_classes, oriented
        self.of_class, self.of_box = tower(), tower()
        self.classify, self.measure, self.centre = out(num_classes), out(4), out(1)
        self.turn = out(2) if oriented else None
        self.scales = nn.Parameter(torch.ones(len(pyramid.strides)))
        nn.init.constant_(self.classify.bias, -math.log(99))  # a share of 0.01 at first (arXiv 1708.02002)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """For the N points of all levels "points" [N 2], "strides" [N], and [B N ...] "logits", "distances" in pixels,
        "centreness" (a logit), "turn" (of length 1; of upright boxes (1, 0))."""
        return self.head(self.pyramid(images))

    def head(self, levels: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``forward`` from a pyramid's maps."""
        parts = []
        for x, stride, scale in zip(levels.values(), self.pyramid.strides, self.scales):
            rows, columns = (torch.arange(n, device=x.device) for n in x.shape[2:])
            grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1).flatten(0, 1)
            of_class, of_box = self.of_class(x), self.of_box(x)
            turn = F.normalize(self.turn(of_box), dim=1) if self.oriented else torch.ones_like(of_box[:, :2])
            if not self.oriented:
                turn = turn * turn.new_tensor((1.0, 0.0)).view(1, 2, 1, 1)
            flat = lambda y: y.flatten(2).movedim(1, 2)  # noqa: E731
            parts.append(
                {
                    "points": (grid + 0.5) * stride,
                    "strides": torch.full((len(grid),), float(stride), device=x.device),
                    "logits": flat(self.classify(of_class)),
                    "distances": flat(torch.exp((self.measure(of_box) * scale).clamp(max=8))) * stride,
                    "centreness": flat(self.centre(of_box))[..., 0],
                    "turn": flat(turn),
                }
            )
        return {
            key: torch.cat([part[key] for part in parts], 0 if key in ("points", "strides") else 1) for key in parts[0]
        }

    def loss(self, found: Mapping[str, Tensor], boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
        """Focal loss of classes, IoU loss of distances, cross entropy of centreness, and of oriented boxes
        1 - cos 2(a - a'). The IoU is that of two boxes of one angle, which has its own term.

        ``found`` is what ``forward`` gives, ``boxes`` [n 5] and ``labels`` [n] are those of each image.
        """
        owners = [assign(found["points"], found["strides"], x, self.pyramid.strides) for x in boxes]
        owner = torch.stack(owners)  # B N
        positive = owner >= 0
        count = positive.sum().clamp(min=1)
        wanted = torch.zeros_like(found["logits"])
        for i, classes in enumerate(labels):
            wanted[i, positive[i], classes[owner[i, positive[i]]]] = 1.0
        logits = found["logits"]
        crossed = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        right = torch.where(wanted > 0, logits.sigmoid(), 1 - logits.sigmoid())
        total = (torch.where(wanted > 0, 0.25, 0.75) * (1 - right) ** 2 * crossed).sum() / count
        if not positive.any():
            return total
        box = torch.cat([x[own[own >= 0]] for x, own in zip(boxes, owner)])
        points = torch.cat([found["points"][own >= 0] for own in owner])
        target = distances_to_sides(points, box)
        centreness = centredness(target)
        got = found["distances"][positive]
        overlap = torch.minimum(got, target)
        both = (overlap[:, 0] + overlap[:, 2]) * (overlap[:, 1] + overlap[:, 3])
        area = lambda x: (x[:, 0] + x[:, 2]) * (x[:, 1] + x[:, 3])  # noqa: E731
        iou = both / (area(got) + area(target) - both)
        total = total - (centreness * iou.clamp(min=1e-6).log()).sum() / centreness.sum()
        total = total + F.binary_cross_entropy_with_logits(found["centreness"][positive], centreness)
        if self.oriented:
            angle = torch.stack((torch.cos(2 * box[:, 4]), torch.sin(2 * box[:, 4])), 1)
            total = total + (1 - (found["turn"][positive] * angle).sum(1)).mean()
        return total

    @torch.no_grad()
    def detect(
        self, found: Mapping[str, Tensor], *, least_score: float = 0.3, most: int = 100, overlap: float = 0.5
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Boxes [n 5], labels and scores of each image, best first.

        A score is the root of class probability times centreness. Of boxes of one class that overlap by more than
        ``overlap`` (IoU) the best is kept.
        """
        scores = (found["logits"].sigmoid() * found["centreness"].sigmoid()[..., None]).sqrt()
        out = []
        for i, of_image in enumerate(scores):
            best, which = of_image.flatten().topk(min(most, of_image.numel()))
            which = which[best > least_score]
            point, label = which // self.num_classes, which % self.num_classes
            boxes = boxes_of(found["points"][point], found["distances"][i, point], found["turn"][i, point])
            keep: list[int] = []
            for k in range(len(boxes)):
                if all(label[k] != label[j] or iou(boxes[k], boxes[j]) <= overlap for j in keep):
                    keep.append(k)
            out.append((boxes[keep], label[keep], of_image.flatten()[which][keep]))
        return out


# ---- geometry of boxes


def distances_to_sides(points: Tensor, boxes: Tensor) -> Tensor:
    """[... 4]: how far points [... 2] lie inside the west, north, east and south side, in the axes of the box."""
    offset, angle = points - boxes[..., :2], boxes[..., 4]
    along = offset[..., 0] * angle.cos() + offset[..., 1] * angle.sin()
    across = offset[..., 1] * angle.cos() - offset[..., 0] * angle.sin()
    width, height = boxes[..., 2] / 2, boxes[..., 3] / 2
    return torch.stack((width + along, height + across, width - along, height - across), -1)


def boxes_of(points: Tensor, distances: Tensor, turn: Tensor) -> Tensor:
    """The boxes [N 5] at these distances from points, with ``turn`` (cos 2a, sin 2a); undoes ``distances_to_sides``."""
    west, north, east, south = distances.unbind(-1)
    angle = torch.atan2(turn[:, 1], turn[:, 0]) / 2
    along, across = (east - west) / 2, (south - north) / 2
    x = points[:, 0] + along * angle.cos() - across * angle.sin()
    y = points[:, 1] + along * angle.sin() + across * angle.cos()
    return torch.stack((x, y, west + east, north + south, angle), -1)


def centredness(distances: Tensor) -> Tensor:
    """1 in the middle of a box, 0 at its sides (FCOS eq. 3)."""
    ratio = lambda a, b: torch.minimum(a, b) / torch.maximum(a, b)  # noqa: E731
    west, north, east, south = distances.unbind(-1)
    return (ratio(west, east) * ratio(north, south)).clamp(min=0).sqrt()


def assign(points: Tensor, strides: Tensor, boxes: Tensor, levels: Sequence[int]) -> Tensor:
    """For every point the box that it is asked for, -1 for none.

    It lies in the box, near its centre, and the box is of its level's size; of several boxes the smallest.
    """
    if not len(boxes):
        return torch.full((len(points),), -1, device=points.device)
    inside = distances_to_sides(points[:, None], boxes)  # N n 4
    off_centre = (inside[..., :2] - inside[..., 2:]).abs().amax(-1) / 2
    size = inside.amax(-1)
    level = torch.stack([strides == stride for stride in levels]).int().argmax(0)
    bounds = torch.tensor((*SIZES[: len(levels)], math.inf), device=points.device)
    fits = (inside.amin(-1) > 0) & (off_centre <= CENTRE * strides[:, None])
    fits &= (size > bounds[level][:, None]) & (size <= bounds[level + 1][:, None])
    area = torch.where(fits, boxes[:, 2] * boxes[:, 3], math.inf)
    return torch.where(fits.any(1), area.argmin(1), -1)


def corners(box: Tensor) -> list[tuple[float, float]]:
    """The four corners, in order around the box."""
    x, y, width, height, angle = box.tolist()
    cos, sin = math.cos(angle), math.sin(angle)
    around = ((-1, -1), (1, -1), (1, 1), (-1, 1))
    return [
        (x + (a * width * cos - b * height * sin) / 2, y + (a * width * sin + b * height * cos) / 2) for a, b in around
    ]


def iou(first: Tensor, second: Tensor) -> float:
    """Intersection over union of two boxes of any angle: one is cut along each side of the other."""
    part, sides = corners(first), corners(second)
    for (ax, ay), (bx, by) in zip(sides, sides[1:] + sides[:1]):
        depth = [(bx - ax) * (y - ay) - (by - ay) * (x - ax) for x, y in part]  # above 0 inside
        cut = []
        for (p, d), (q, e) in zip(zip(part, depth), zip(part[1:] + part[:1], depth[1:] + depth[:1])):
            if d >= 0:
                cut.append(p)
            if d * e < 0:
                cut.append((p[0] + (q[0] - p[0]) * d / (d - e), p[1] + (q[1] - p[1]) * d / (d - e)))
        part = cut
        if not part:
            return 0.0
    both = sum(px * qy - qx * py for (px, py), (qx, qy) in zip(part, part[1:] + part[:1])) / 2
    areas = [(box[2] * box[3]).item() for box in (first, second)]
    return both / (sum(areas) - both)


# ---- demonstration


def draw(seed: int, *, size: int, oriented: bool) -> tuple[Tensor, Tensor, Tensor]:
    """An image [3 size size] of noisy ground with three objects far apart, their boxes and labels."""
    rng = np.random.default_rng(seed)
    image = rng.normal(80, 12, (size, size, 3))
    y, x = np.mgrid[:size, :size] + 0.5
    boxes, labels = [], []
    for quarter in rng.permutation(4)[:3]:
        centre = (np.array((quarter % 2, quarter // 2)) + 0.5) * size / 2 + rng.uniform(-size / 20, size / 20, 2)
        width, height = rng.uniform(size / 5, size / 3), rng.uniform(size / 10, size / 6)
        angle = rng.uniform(-math.pi / 2, math.pi / 2) if oriented else 0.0
        along = (x - centre[0]) * math.cos(angle) + (y - centre[1]) * math.sin(angle)
        across = (y - centre[1]) * math.cos(angle) - (x - centre[0]) * math.sin(angle)
        label = int(rng.integers(2))
        colour = ((235, 235, 225), (225, 60, 50))[label] + rng.normal(0, 8, (size, size, 3))
        image = np.where(((abs(along) < width / 2) & (abs(across) < height / 2))[..., None], colour, image)
        boxes.append((*centre, width, height, angle))
        labels.append(label)
    image = torch.from_numpy(np.clip(image, 0, 255)).float().movedim(-1, 0)
    return image, torch.tensor(boxes, dtype=torch.float32), torch.tensor(labels)


def train(
    detector: Detector, images: Tensor, boxes: Sequence[Tensor], labels: Sequence[Tensor], *, steps: int
) -> list[float]:
    """The loss of each step, all images in every one; changes the detector. A frozen backbone is run once."""
    trained = [x for x in detector.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    pyramid, losses = detector.pyramid, []
    tune = any(x.requires_grad for x in pyramid.backbone.parameters())
    with torch.set_grad_enabled(tune):
        maps = pyramid.backbone(images)
    for step in range(steps):
        if tune and step:
            maps = pyramid.backbone(images)
        loss = detector.loss(detector.head(pyramid.pyramid(maps)), boxes, labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 10.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def matched(found: Sequence[tuple[Tensor, Tensor, Tensor]], boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> dict:
    """How many objects there are, how many were found (right class, IoU above 0.5), how many boxes found nothing."""
    hits = wrong = 0
    for (got, classes, _), wanted, kinds in zip(found, boxes, labels):
        free = set(range(len(wanted)))
        for box, kind in zip(got, classes):
            best = max(free, key=lambda j: iou(box, wanted[j]) if kinds[j] == kind else 0.0, default=None)
            if best is not None and kinds[best] == kind and iou(box, wanted[best]) > 0.5:
                free.remove(best)
                hits += 1
            else:
                wrong += 1
    return {"objects": sum(map(len, boxes)), "found": hits, "wrong": wrong}


def run(given: argparse.Namespace) -> dict[str, int]:
    """What of the drawn images is found after training on them; prints it and the losses."""
    if given.steps < 1 or given.images < 1:
        raise ValueError(f"--steps: {given.steps}, --images: {given.images}; wanted 1 or more")
    torch.manual_seed(given.seed)
    detector = Detector(Pyramid(given.model, width=given.width, tune=given.tune), len(CLASSES), oriented=given.oriented)
    drawn = [draw(given.seed + i, size=given.size, oriented=given.oriented) for i in range(given.images)]
    images, boxes, labels = torch.stack([x for x, _, _ in drawn]), [x for _, x, _ in drawn], [x for _, _, x in drawn]
    start = time.perf_counter()
    losses = train(detector, images, boxes, labels, steps=given.steps)
    with torch.inference_mode():
        counts = matched(detector.detect(detector(images)), boxes, labels)
    seconds = time.perf_counter() - start
    print(f"loss {losses[0]:.3f} at step 1, {losses[-1]:.3f} at step {given.steps}, {seconds:.0f} s")
    print(f"of {counts['objects']} objects {counts['found']} found, {counts['wrong']} boxes wrong (of training images)")
    return counts


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The arguments of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, required=True, help="an exported directory")
    parser.add_argument("--oriented", action="store_true", help="boxes of any angle")
    parser.add_argument("--tune", action="store_true", help="train the backbone too")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--images", type=int, default=4, help="how many images to draw")
    parser.add_argument("--size", type=int, default=128, help="their side in pixels")
    parser.add_argument("--width", type=int, default=64, help="width of pyramid and head")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    try:
        run(parse(sys.argv[1:]))
    except ValueError as error:
        sys.exit(f"error: {error}")
