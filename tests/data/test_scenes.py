"""Procedural scenes: deterministic, aligned, within the table's ranges, with plausible seasons and speckle."""

import pickle
import subprocess
import sys

import numpy as np
import pytest

from skysense_jax.data import records, scenes, scenes_board, scenes_layout, scenes_plan, scenes_render, scenes_surfaces
from skysense_jax.data.sample import UNDATED
from skysense_jax.modalities import MODALITIES, OSM

OSM_ID = scenes_plan.OSM_ID


def _arrays(scene: scenes.Scene) -> dict[str, np.ndarray]:
    """Every array of a scene by name."""
    arrays = dict(scene.attributes)
    if scene.sample.labels is not None:
        arrays["labels"] = scene.sample.labels
    for name, series in scene.sample.series.items():
        for field in ("images", "valid", "cloud", "days", "orbits"):
            arrays[f"{name}.{field}"] = getattr(series, field)
    return arrays


def _days_of_year(series) -> np.ndarray:
    days = series.days.astype("datetime64[D]")
    return (days - days.astype("datetime64[Y]")).astype(int) + 1


def _cells(raster: np.ndarray, value: int) -> np.ndarray:
    """[P Q] share of a cell's 4 x 4 label pixels that have ``value``."""
    side = raster.shape[0] // 4
    return (raster == value).reshape(side, 4, side, 4).mean((1, 3))


@pytest.fixture(scope="module")
def complete() -> list[scenes.Scene]:
    """Forty small scenes without gaps, Sentinel only."""
    return [scenes.render(i, seed=3, extent_cells=16, modalities=("s2", "s1"), complete=True) for i in range(40)]


@pytest.fixture(scope="module")
def gappy() -> list[scenes.Scene]:
    """Eighty tiny scenes as archives would have them."""
    return [scenes.render(i, seed=5, extent_cells=3) for i in range(80)]


def test_render_same_index_gives_equal_bytes_and_another_does_not():
    first, again = (_arrays(scenes.render(7, seed=1, extent_cells=5)) for _ in range(2))
    assert first.keys() == again.keys()
    for name in first:
        assert first[name].tobytes() == again[name].tobytes(), name
    for other in (scenes.render(8, seed=1, extent_cells=5), scenes.render(7, seed=2, extent_cells=5)):
        shared = [name for name in _arrays(other) if name.endswith(".images") and name in first]
        assert shared
        assert all(_arrays(other)[name].tobytes() != first[name].tobytes() for name in shared)


def test_render_subset_of_modalities_is_the_same_scene():
    whole = _arrays(scenes.render(4, seed=1, extent_cells=5, complete=True))
    for name in scenes.MODALITIES:
        part = scenes.render(4, seed=1, extent_cells=5, modalities=(name,), complete=True)
        assert set(part.sample.series) == {name}
        for key, value in _arrays(part).items():
            np.testing.assert_array_equal(value, whole[key], err_msg=key)


def test_render_complete_has_everything():
    for index in range(30):
        scene = scenes.render(index, seed=5, extent_cells=3, complete=True)
        sample = scene.sample
        assert set(sample.series) == set(scenes.MODALITIES)
        assert sample.labels.shape == (12, 12)
        assert scene.landscape in scenes_plan.LANDSCAPES
        for series in sample.series.values():
            assert series.valid.all()
            assert (series.days != UNDATED).all()
        assert len(sample.days("hr")) == 1
        assert 8 <= len(sample.days("s2")) <= 16
        assert 4 <= len(sample.days("s1")) <= 8
        assert (np.diff(sample.days("s2")) >= 5).all()
        assert set(sample.series["s1"].orbits) <= {1, 2}
        assert not sample.series["s2"].orbits.any()


def test_render_gaps_take_away_and_change_nothing_else(gappy):
    lost, undated, cut = {"hr": 0, "s2": 0, "s1": 0, "labels": 0}, 0, 0
    for index, scene in enumerate(gappy):
        records.validate_sample(scene.sample, tuple(MODALITIES.values()))
        assert scene.sample.series
        for name in lost:
            lost[name] += scene.sample.labels is None if name == "labels" else name not in scene.sample.series
        whole = scenes.render(index, seed=5, extent_cells=3, complete=True)
        for name, series in scene.sample.series.items():
            full = whole.sample.series[name]
            np.testing.assert_array_equal(series.images[series.valid], full.images[series.valid])
            dated = series.days != UNDATED
            np.testing.assert_array_equal(series.days[dated], full.days[dated])
            undated, cut = undated + (~dated).sum(), cut + (~series.valid).any((1, 2)).sum()
    assert lost["s2"] == 0
    assert all(2 <= lost[name] <= 18 for name in ("hr", "s1", "labels")), lost  # about 8 of 80
    assert undated > 20
    assert cut > 20


def test_render_every_class_and_every_attribute_value_appears(complete):
    seen = np.unique([scene.sample.labels for scene in complete])
    np.testing.assert_array_equal(seen, np.arange(OSM.num_classes + 1))
    for name, values in scenes.ATTRIBUTES.items():
        seen = np.unique([scene.attributes[name] for scene in complete])
        np.testing.assert_array_equal(seen, np.arange(len(values) + 1), err_msg=name)


def test_attributes_apply_where_their_class_lies(complete):
    """Where the map has the class the attribute is known, and nowhere where the map has another class."""
    owners = {"crop_type": "farmland", "forest_type": "forest"}
    for scene in complete:
        labels = scene.sample.labels
        for name, owner in owners.items():
            known = scene.attributes[name] > 0
            assert known[labels == OSM_ID[owner]].all()
            assert set(labels[known]) <= {0, OSM_ID[owner]}
        roofs = scene.attributes["roof_material"] > 0
        assert roofs[labels == OSM_ID["building"]].all()  # an unmapped building has the label of its plot
        assert set(labels[roofs]) <= {0, OSM_ID["building"], OSM_ID["residential"], OSM_ID["industrial"]}


def test_s2_water_is_darker_in_near_infrared_than_forest_of_the_same_day(complete):
    band, compared = MODALITIES["s2"].bands.index("B8"), 0
    for scene in complete:
        water, forest = (_cells(scene.sample.labels, OSM_ID[name]) == 1 for name in ("water", "forest"))
        series = scene.sample.series["s2"]
        for image, cloud, day in zip(series.images, series.cloud, _days_of_year(series)):
            if 150 < day < 260 and (water & ~cloud).any() and (forest & ~cloud).any():
                compared += 1
                assert image[water & ~cloud, band].mean() < 0.6 * image[forest & ~cloud, band].mean()
    assert compared >= 3


def test_s2_water_lies_where_the_labels_have_it(complete):
    """The infrared picks out the labelled water; turned or mirrored it would not."""
    found = []
    for scene in complete:
        share = _cells(scene.sample.labels, OSM_ID["water"])
        if not 0.1 < share.mean() < 0.6:
            continue
        series = scene.sample.series["s2"]
        clear = np.flatnonzero(~series.cloud.any((1, 2)))
        if len(clear):
            infrared = series.images[clear].astype(float)[..., [6, 8]].sum(-1).mean(0)
            turned = [share, share.T, share[::-1], share[:, ::-1], np.roll(share, 2, 0), np.roll(share, 2, 1)]
            found.append([-np.corrcoef(infrared.ravel(), other.ravel())[0, 1] for other in turned])
    found = np.array(found)
    assert len(found) >= 3
    assert found[:, 0].mean() > 0.7
    assert (found[:, 0] > found[:, 1:].max(1)).mean() > 0.8


def test_hr_and_s2_show_the_same_ground():
    agreement = []
    for index in range(8):
        sample = scenes.render(index, seed=9, extent_cells=13, modalities=("hr", "s2"), complete=True).sample
        aerial = sample.series["hr"].images[0].astype(float).reshape(13, 32, 13, 32, 3).mean((1, 3))[..., 0]
        series = sample.series["s2"]
        score = series.cloud.mean((1, 2)) * 1000 + np.abs(_days_of_year(series) - _days_of_year(sample.series["hr"])[0])
        red = series.images[score.argmin()][..., 2].astype(float)
        turned = [red, red.T, red[::-1], red[:, ::-1], np.roll(red, 2, 0), np.roll(red, 2, 1)]
        agreement.append([np.corrcoef(aerial.ravel(), other.ravel())[0, 1] for other in turned])
    agreement = np.array(agreement)
    assert agreement[:, 0].mean() > 0.5
    assert (agreement[:, 0] > agreement[:, 1:].max(1)).mean() >= 0.75


def test_s1_water_is_dark_buildings_bright_and_cross_polarisation_lower(complete):
    power = {"water": [], "forest": [], "building": []}
    for scene in complete:
        images = 10 ** (scene.sample.series["s1"].images.astype(float) / 10)
        assert images[..., 0].mean() > 2 * images[..., 1].mean()
        for name, values in power.items():
            values.append(images[:, _cells(scene.sample.labels, OSM_ID[name]) == 1].reshape(-1, 2))
    water, forest, building = (10 * np.log10(np.concatenate(power[name]).mean(0)) for name in power)
    assert (water + 3 < forest).all()
    assert (forest + 1 < building).all()


def _ndvi(make, days: np.ndarray) -> np.ndarray:
    """[T] mean NDVI over surfaces that ``make(palette)`` adds in many scenes."""
    series = []
    for seed in range(30):
        palette = scenes_surfaces.Palette(np.random.default_rng(seed))
        make(palette)
        state = scenes_surfaces.state_on(palette.surfaces, days=days, moisture=np.full(len(days), 0.3, np.float32))
        red, infrared = np.moveaxis(state.reflectance()[:, -1, [2, 6]], -1, 0)
        series.append((infrared - red) / (infrared + red))
    return np.mean(series, 0)


def test_seasons_deciduous_trees_lose_their_green_in_winter_and_conifers_do_not():
    days = np.array([20, 200], np.float32)
    winter, summer = _ndvi(lambda palette: palette.tree("deciduous"), days)
    assert summer - winter > 0.4
    winter, summer = _ndvi(lambda palette: palette.tree("conifer"), days)
    assert abs(summer - winter) < 0.1
    assert winter > 0.6


def test_seasons_crops_peak_at_different_times():
    days = np.arange(1, 366, 4, dtype=np.float32)
    curves = [_ndvi(lambda palette, kind=kind: palette.crop(kind), days) for kind in range(4)]
    middle = {}
    for name, curve in zip(scenes.CROP_TYPES, curves):
        green = np.clip(curve - 0.5 * curve.max(), 0, None) * ((days > 60) & (days < 330))
        middle[name] = (days * green).sum() / green.sum()
    assert middle["rapeseed"] + 8 < middle["winter_cereal"] < middle["maize"] - 40
    assert middle["maize"] + 5 < middle["sugar_beet"]


def test_reflectance_follows_vigour_and_moisture():
    palette = scenes_surfaces.Palette(np.random.default_rng(0))
    palette.crop(0)
    days = np.array([110, 110], np.float32)
    state = scenes_surfaces.state_on(palette.surfaces, days=days, moisture=np.array([0.0, 1.0], np.float32))
    assert (state.ground[1] < state.ground[0]).all()  # wet soil is darker
    weak, strong = (state.reflectance(vigour)[0, 0] for vigour in (0.5, 1.5))
    assert strong[6] > weak[6]
    assert strong[2] < weak[2]


@pytest.mark.parametrize("power", [0.003, 0.2])
def test_speckle_is_multiplicative_and_keeps_the_mean(power):
    seen = scenes_render.speckle(np.full((301, 299), power), np.random.default_rng(0), looks=4.4)
    assert seen.mean() == pytest.approx(power, rel=0.01)
    assert seen.var() == pytest.approx(power**2 / 4.4, rel=0.03)  # grows with the square: multiplicative
    assert seen.min() > 0


@pytest.mark.parametrize("toward", [0.0, np.pi / 2, np.pi, -np.pi / 2])
def test_cast_shadow_equals_a_walk_towards_the_sun(toward):
    rng = np.random.default_rng(1)
    height = np.where(rng.random((23, 31)) < 0.06, rng.uniform(1, 5, (23, 31)), 0.0).astype(np.float32)
    elevation = 0.7
    dx, dy = round(np.cos(toward)), round(np.sin(toward))
    wanted = np.zeros(height.shape, bool)
    for row in range(23):
        for column in range(31):
            for step in range(1, 40):
                y, x = row + step * dy, column + step * dx
                if 0 <= y < 23 and 0 <= x < 31:
                    ray = height[row, column] + 0.25 + step * np.tan(elevation) / scenes_board.PIXELS_PER_M
                    wanted[row, column] |= height[y, x] > ray
    assert 20 < wanted.sum() < 500
    np.testing.assert_array_equal(scenes_render.cast_shadow(height, elevation=elevation, toward=toward), wanted)


def test_sun_stands_in_the_south_at_noon_and_higher_in_summer():
    summer, toward = scenes_render.sun_position(day_of_year=172.0, latitude=50.0, hour=0.0)
    winter, _ = scenes_render.sun_position(day_of_year=355.0, latitude=50.0, hour=0.0)
    assert np.rad2deg(summer) == pytest.approx(90 - 50 + 23.4, abs=0.2)
    assert np.rad2deg(winter) == pytest.approx(90 - 50 - 23.4, abs=0.2)
    assert toward == pytest.approx(np.pi / 2)
    _, morning = scenes_render.sun_position(day_of_year=100.0, latitude=50.0, hour=-3.0)
    assert np.cos(morning) > 0  # in the east


def test_surface_shares_equal_counting_by_hand():
    layout = scenes_layout.build(np.random.default_rng(2), extent_cells=3)
    shares = scenes_render.surface_shares(layout)
    np.testing.assert_allclose(shares.sum(-1), 1, rtol=1e-6)
    wanted = np.zeros_like(shares)
    for row in range(96):
        for column in range(96):
            tree = layout.tree[row, column]
            ground = layout.patches[layout.patch[row, column]].surface
            wanted[row // 32, column // 32, layout.tree_surface[tree] if tree else ground] += 1 / 1024
    np.testing.assert_allclose(shares, wanted, atol=1e-6)


def test_stamp_crowns_highest_tree_is_seen():
    tree, height = scenes_board.stamp_crowns(
        centres=np.array([[10.0, 10.0], [11.0, 10.0], [20.0, 25.0]], np.float32),
        radius=np.array([2.0, 2.0, 3.0], np.float32),
        top=np.array([5.0, 20.0, 9.0], np.float32),
        shape=np.array([0, 0, 1]),
        side_px=96,
    )
    assert tree[32, 35] == 2  # row is south, column is east
    assert tree[80, 64] == 3
    assert tree[32, 28] == 1
    assert tree[10, 80] == 0
    assert (height > 0).sum() == (tree > 0).sum()
    assert 7 < height[80, 64] < 10


def test_subdivide_pieces_cover_the_land_once():
    def area(polygon):
        x, y = polygon.T
        return 0.5 * abs(x @ np.roll(y, 1) - y @ np.roll(x, 1))

    square = np.array([[0.0, 0], [310, 0], [310, 270], [0, 270]])
    pieces, cuts = scenes_plan.subdivide(
        np.random.default_rng(4), scenes_plan.Parcel(square, 0.0), scene_side=400.0, side_at=lambda _: 50.0
    )
    assert len(pieces) == len(cuts) + 1 > 12
    assert sum(area(piece.polygon) for piece in pieces) == pytest.approx(310 * 270)
    assert max(piece.size.max() for piece in pieces) < 1.3 * 50


def test_scene_source_gives_scenes_in_order_and_survives_a_pickle():
    source = pickle.loads(pickle.dumps(scenes.SceneSource(num_scenes=3, first_index=11, seed=2, extent_cells=4)))
    assert len(source) == 3
    direct = scenes.render(12, seed=2, extent_cells=4).sample
    assert source[1].id == direct.id
    for name, series in direct.series.items():
        np.testing.assert_array_equal(source[1].series[name].images, series.images)
    with pytest.raises(IndexError):
        source[3]


def test_scenes_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"config\.data\.modalities.*lidar"):
        scenes.render(0, seed=0, extent_cells=3, modalities=("s2", "lidar"))
    with pytest.raises(ValueError, match="extent_cells: got 0"):
        scenes.render(0, seed=0, extent_cells=0)
    with pytest.raises(ValueError, match="num_scenes: got 0"):
        scenes.SceneSource(num_scenes=0)
    with pytest.raises(ValueError, match="first_index -1"):
        scenes.SceneSource(num_scenes=2, first_index=-1)


def test_command_with_a_wrong_number_ends_with_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        scenes.main([f"--out={tmp_path / 'out'}", "--num_scenes=2", "--extent_cells=200"])
    assert capsys.readouterr().err.splitlines()[-1].endswith("extent_cells: got 200; wanted 1 to 160")
    assert not list(tmp_path.iterdir())


def test_command_writes_records_that_read_back(tmp_path, capsys):
    scenes.main(
        [
            f"--out={tmp_path}",
            "--num_scenes=5",
            "--extent_cells=3",
            "--scenes_per_shard=2",
            "--complete",
            "--hr_codec=png",
        ]
    )
    files = sorted(str(path) for path in tmp_path.iterdir())
    assert capsys.readouterr().out.split() == files
    with pytest.raises(SystemExit):
        scenes.main([f"--out={tmp_path}", "--num_scenes=5"])
    assert "holds 3 record files" in capsys.readouterr().err
    source = records.RecordSource(files, tuple(MODALITIES.values()))
    assert len(source) == 5
    for index in range(5):
        sample, scene = source[index].decode(), scenes.render(index, seed=0, extent_cells=3, complete=True)
        assert sample.id == scene.sample.id
        np.testing.assert_array_equal(sample.labels, scene.sample.labels)
        for name, series in scene.sample.series.items():  # "hr" too: lossless
            np.testing.assert_array_equal(sample.series[name].images, series.images)


def test_write_records_any_number_of_processes_writes_the_same_files(tmp_path):
    source = scenes.SceneSource(num_scenes=11, first_index=7, extent_cells=8, modalities=("s2",))
    alone, shared = (
        scenes.write_records(source, tmp_path / str(n), scenes_per_shard=10, num_processes=n) for n in (1, 2)
    )
    assert [path.name for path in alone] == ["scenes-00000-of-00002.array_record", "scenes-00001-of-00002.array_record"]
    assert [path.name for path in shared] == [path.name for path in alone]
    for one, other in zip(alone, shared):
        assert one.read_bytes() == other.read_bytes()


def test_scenes_import_no_jax():
    code = "import sys, skysense_jax.data.scenes; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
