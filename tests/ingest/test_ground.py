"""Areas that users name in files: .poly as OpenStreetMap's extracts have it, GeoJSON, WKT; what is none is refused."""

import json

import pytest
import shapely
import shapely.geometry

from skysense_jax.ingest import ground, plan

# As the format's own description writes them: an area, a hole in it, an island in the hole, numbers of both kinds.
POLY = """extract_v2
first_area
     0.1200000E+02    0.4800000E+02
     0.1300000E+02    0.4800000E+02
     0.1300000E+02    0.4900000E+02
     0.1200000E+02    0.4900000E+02
     0.1200000E+02    0.4800000E+02
END
!hole
     12.2 48.2
     12.8\t48.2
     12.8 48.8
     12.2 48.8
END
2
     14 48
     15 48
     14 49
END
END
"""


def test_poly_is_its_sections_without_holes(tmp_path):
    (tmp_path / "a.poly").write_text(POLY)
    found = ground.read_ground(tmp_path / "a.poly")
    wanted = shapely.box(12, 48, 13, 49) - shapely.box(12.2, 48.2, 12.8, 48.8)
    wanted = wanted.union(shapely.Polygon([(14, 48), (15, 48), (14, 49)]))
    assert found.equals(wanted)
    assert [found.contains(shapely.Point(*at)) for at in ((12.1, 48.5), (12.5, 48.5), (14.2, 48.2), (14.8, 48.8))] == [
        *(True, False, True, False)
    ]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (
            "     0.1300000E+02    0.4800000E+02\n",
            "     0.13E+02\n",
            "line 4: '0.13E\\+02'; wanted longitude and latitude",
        ),
        ("12.8\t48.2", "12.8, 48.2", "line 11: '12.8, 48.2'; wanted longitude and latitude"),
        ("12.8\t48.2", "1286942 6147110", "line 11: longitude 1.28694e\\+06, latitude 6.14711e\\+06; wanted degrees"),
        ("12.8\t48.2", "12.8 nan", "line 11: longitude 12.8, latitude nan; wanted degrees"),
        ("     14 49\n", "", "line 18: section '2' has 2 corners; wanted 3"),
        ("14 49\nEND\n", "14 49\n", "line 19: the file ends here; wanted END"),
        ("14 49\nEND\nEND\n", "14 49\n", "section '2' of line 15: no END"),
        ("END\n!hole", "END\nEND\n!hole", "line 10: '!hole' after the last END"),
        (POLY, "\n", "line 1: nothing; wanted a name"),
        (POLY, "name\nEND\n", "no section that is filled"),
    ],
)
def test_malformed_poly_is_refused_with_its_line(tmp_path, old, new, told):
    assert old in POLY
    (tmp_path / "a.poly").write_text(POLY.replace(old, new))
    with pytest.raises(ValueError, match=rf"a\.poly: {told}"):
        ground.read_ground(tmp_path / "a.poly")


def test_geojson_and_wkt_are_areas_too_for_every_flag(tmp_path):
    area = shapely.Point(9, 48).buffer(1).union(shapely.box(20, 10, 21, 11))
    (tmp_path / "a.wkt").write_text(f"{area.wkt}\n")
    collection = dict(features=[dict(geometry=shapely.geometry.mapping(part), properties={}) for part in area.geoms])
    (tmp_path / "a.geojson").write_text(json.dumps(collection))
    for name in ("a.wkt", "a.geojson"):
        assert ground.read_ground(tmp_path / name).equals_exact(area, 1e-9, normalize=True)
        assert plan.read_area(str(tmp_path / name), flag="--land").equals_exact(area, 1e-9, normalize=True)
    for name, text in (
        *(("a.wkt", "POINT (1 2)"), ("a.wkt", "POLYGON ((1 2, 3"), ("a.geojson", "[]"), ("a.geojson", "{}")),
        ("a.wkt", shapely.box(500_000, 5e6, 600_000, 5.1e6).wkt),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=rf"^--land: got .*{name}"):
            plan.read_area(str(tmp_path / name), flag="--land")
