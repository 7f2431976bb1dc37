"""docs/examples/detect.py: geometry of boxes against shapely and loops, and a detector that learns to find objects."""

import math
import pathlib
import re

import numpy as np
import pytest
import torch
from loading import module_from_file
from shapely import affinity, geometry

EXAMPLE = pathlib.Path(__file__).parents[2] / "docs" / "examples" / "detect.py"


@pytest.fixture(scope="module")
def example():
    return module_from_file(EXAMPLE)


@pytest.fixture(autouse=True)
def _one_thread():
    """On a busy machine the threads of such small products wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def drawn_boxes(count, seed=0):
    rng = np.random.default_rng(seed)
    columns = (rng.uniform(0, 60, (count, 2)), rng.uniform(4, 50, (count, 2)), rng.uniform(-1.57, 1.57, (count, 1)))
    return torch.tensor(np.concatenate(columns, 1), dtype=torch.float32)


def polygon(box):
    x, y, width, height, angle = box.tolist()
    upright = geometry.box(x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    return affinity.rotate(upright, angle, origin=(x, y), use_radians=True)


def test_iou_of_any_angle_equals_shapely(example):
    boxes = drawn_boxes(40)
    values = []
    for first in boxes:
        for second in boxes:
            a, b = polygon(first), polygon(second)
            values.append(example.iou(first, second))
            assert values[-1] == pytest.approx(a.intersection(b).area / a.union(b).area, abs=1e-4)
    assert sum(0.05 < value < 0.95 for value in values) > 200


def test_boxes_come_back_from_their_distances_and_points_lie_where_shapely_says(example):
    boxes, rng = drawn_boxes(300, seed=1), np.random.default_rng(2)
    points = boxes[:, :2] + torch.from_numpy(rng.uniform(-20, 20, (300, 2))).float()
    distances = example.distances_to_sides(points, boxes)
    angle = 2 * boxes[:, 4]
    again = example.boxes_of(points, distances, torch.stack((angle.cos(), angle.sin()), 1))
    torch.testing.assert_close(again, boxes, atol=1e-3, rtol=0)
    inside = [polygon(box).contains(geometry.Point(point.tolist())) for box, point in zip(boxes, points)]
    assert (distances.amin(-1) > 0).tolist() == inside
    assert 50 < sum(inside) < 250


def test_points_are_asked_for_the_smallest_box_of_their_level_near_its_centre(example):
    strides_of_levels = (4, 8, 16, 32)
    points, strides = [], []
    for stride in strides_of_levels:
        for row in range(256 // stride):
            for column in range(256 // stride):
                points.append(((column + 0.5) * stride, (row + 0.5) * stride))
                strides.append(float(stride))
    boxes = torch.tensor(
        [(60, 70, 40, 90, 0.4), (62, 70, 30, 20, -0.3), (150, 150, 200, 180, 1.0), (200, 40, 7, 7, 0.0)]
    )
    got = example.assign(torch.tensor(points), torch.tensor(strides), boxes, strides_of_levels)
    for (x, y), stride, found in zip(points, strides, got.tolist()):
        level, candidates = strides_of_levels.index(int(stride)), []
        for i, (cx, cy, width, height, angle) in enumerate(boxes.tolist()):
            turned = complex(x - cx, y - cy) * complex(math.cos(-angle), math.sin(-angle))
            sides = (
                width / 2 + turned.real,
                width / 2 - turned.real,
                height / 2 + turned.imag,
                height / 2 - turned.imag,
            )
            near = max(abs(turned.real), abs(turned.imag)) <= 1.5 * stride
            upper = math.inf if level == 3 else example.SIZES[level + 1]
            if min(sides) > 0 and near and example.SIZES[level] < max(sides) <= upper:
                candidates.append((width * height, i))
        assert found == (min(candidates)[1] if candidates else -1), (x, y, stride)
    assert set(got.tolist()) == {-1, 0, 1, 2, 3}
    assert example.assign(torch.tensor(points), torch.tensor(strides), boxes[:0], strides_of_levels).eq(-1).all()


def test_pyramid_has_the_contract_of_detectors(example, model_dir):
    pyramid = example.Pyramid(model_dir, width=16)
    maps = pyramid(torch.rand(2, 3, 96, 160) * 255)
    assert list(maps) == ["0", "1", "2", "3"]
    assert pyramid.out_channels == 16
    assert pyramid.strides == [4, 8, 16, 32]
    assert [tuple(x.shape) for x in maps.values()] == [(2, 16, 96 // s, 160 // s) for s in pyramid.strides]
    sum(x.square().mean() for x in maps.values()).backward()
    assert pyramid.backbone.model.patch_embed["hr"].projection.weight.grad.abs().max() > 0


@pytest.mark.parametrize("oriented", [False, True])
def test_detector_learns_to_find_the_objects_of_a_few_images(example, model_dir, capsys, oriented):
    options = ["--width=32", "--images=3", "--size=96", "--steps=90", *["--oriented"] * oriented]
    counts = example.run(example.parse([f"--model={model_dir}", *options]))
    first, last = re.match(r"loss (\S+) at step 1, (\S+) at step", capsys.readouterr().out).groups()
    assert float(last) < 0.3 * float(first)
    assert counts["objects"] == 9
    assert counts["found"] >= 8
    assert counts["wrong"] <= 3


def test_image_without_objects_has_a_loss_with_gradients_and_tuning_moves_the_backbone(example, model_dir):
    torch.manual_seed(0)
    detector = example.Detector(example.Pyramid(model_dir, width=16), 2, oriented=True)
    weight = detector.pyramid.backbone.model.patch_embed["hr"].projection.weight
    before, images = weight.detach().clone(), torch.rand(1, 3, 64, 64) * 255
    nothing = detector.loss(detector(images), [torch.zeros(0, 5)], [torch.zeros(0, dtype=torch.long)])
    nothing.backward()
    assert 0 < nothing.item() < math.inf
    image, boxes, labels = example.draw(0, size=64, oriented=True)
    losses = example.train(detector, image[None], [boxes], [labels], steps=2)
    assert np.isfinite(losses).all()
    assert not torch.equal(weight, before)


def test_wrong_arguments_are_said(example, model_dir, tmp_path):
    for arguments, message in (
        ([f"--model={tmp_path}"], "--model: .* has no modeling_skysensev2.py; wanted an exported directory"),
        ([f"--model={model_dir}", "--width=12"], "--width: 12; wanted a multiple of 8"),
        ([f"--model={model_dir}", "--steps=0"], "--steps: 0, --images: 4; wanted 1 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            example.run(example.parse(arguments))
    with pytest.raises(ValueError, match=r"maps have strides \[1, 1, 1, 1\]; wanted one whose grids differ"):
        example.Detector(example.Pyramid(model_dir, width=8, modality="s2"), 2, oriented=False)
