"""Tiles to a raster without a network: weights, blending, exact principal components, the picture."""

import numpy as np
import pytest
import rasterio
from rasterio.crs import CRS
from rasterio.windows import Window

from skysense_jax.export import ground, mosaic


@pytest.mark.parametrize(("rows", "columns", "tile", "overlap"), [(37, 50, 16, 5), (16, 17, 16, 15), (9, 40, 16, 0)])
def test_tiles_and_weights_give_back_what_all_tiles_agree_on(tmp_path, rows, columns, tile, overlap):
    grid = ground.Grid(0.0, 5e6, rows, columns, 10.0, CRS.from_epsg(32632))
    scene = np.random.default_rng(0).normal(size=(4, rows, columns)).astype("float32")
    cores = np.zeros((rows, columns), int)
    with mosaic.Mosaic(tmp_path / "out.tif", tmp_path / "out.png", grid=grid, dim=4) as whole:
        for part in mosaic.tiles(rows, columns, tile=tile, overlap=overlap):
            assert (part.cells.height, part.cells.width) == (min(tile, rows), min(tile, columns))
            cores[part.core.toslices()] += 1
            weight = mosaic.weights(part, rows, columns, overlap=overlap)
            assert 0 < weight.min() <= weight.max() <= 1
            whole.add(part.cells, scene[:, *part.cells.toslices()], weight)
        assert whole.finish(descriptions=[f"f_{i}" for i in range(4)], tags={}) == 0
    assert (cores == 1).all()
    np.testing.assert_allclose(rasterio.open(tmp_path / "out.tif").read(), scene, atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.png", "out.tif"]


# ---- the picture


def test_principal_components_equal_those_of_all_vectors_at_once():
    vectors = np.random.default_rng(0).normal(size=(500, 7)) * [9, 1, 5, 1, 1, 2, 1] + 100
    principal = mosaic.Principal(7)
    for part in (vectors[:3], vectors[3:3], vectors[3:400], vectors[400:]):
        principal.add(part)
    np.testing.assert_allclose(principal.mean, vectors.mean(0))
    _, _, rows = np.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    axes = principal.components()
    np.testing.assert_allclose(np.abs(np.diag(rows[:3] @ axes)), 1, atol=1e-9)
    assert (axes[np.abs(axes).argmax(0), range(3)] > 0).all()
    flat = mosaic.Principal(2)
    flat.add(np.ones((4, 2)))
    assert flat.components().shape == (2, 3)


def test_a_large_preview_is_the_mean_of_the_cells_it_shows(tmp_path, monkeypatch):
    monkeypatch.setattr(mosaic, "PREVIEW_SIDE", 10)
    monkeypatch.setattr(mosaic, "STRETCH_PERCENT", (0, 100))
    grid = ground.Grid(0.0, 5e6, 25, 38, 10.0, CRS.from_epsg(32632))
    x = np.mgrid[:25, :38][1].astype("float32")
    with mosaic.Mosaic(tmp_path / "out.tif", tmp_path / "out.png", grid=grid, dim=3) as whole:
        weight = np.ones((25, 38), "float32")
        weight[:4, :4] = 0  # a whole pixel of the picture
        weight[5, 7] = 0
        whole.add(Window(0, 0, 38, 25), np.stack((x, 0 * x, 0 * x)), weight)
        assert whole.finish(descriptions=("a", "b", "c"), tags={}) == 17
    picture = rasterio.open(tmp_path / "out.png").read()
    assert picture.shape == (4, 7, 10)
    np.testing.assert_array_equal(np.argwhere(picture[3] == 0), [[0, 0]])
    means = np.array([x[8, start : start + 4].mean() for start in range(0, 38, 4)])
    np.testing.assert_allclose(picture[0, 2], 255 * (means - means[0]) / np.ptp(means), atol=0.51)
