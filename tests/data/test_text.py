"""The text table: the committed file, and what a wrong one says."""

import numpy as np
import pytest

from skysense_jax.data.text import load_text_table, make_table
from skysense_jax.modalities import OSM


def test_committed_table_is_unit_rows_of_the_osm_classes():
    table = load_text_table(make_table.DEFAULT_PATH, OSM.classes, text_dim=384)
    assert table.shape == (16, 384)
    assert table.dtype == np.float32
    np.testing.assert_allclose((table**2).sum(1), 1, atol=1e-5)
    with np.load(make_table.DEFAULT_PATH, allow_pickle=False) as file:
        assert tuple(file["prompts"]) == OSM.prompts, "prompts changed: run make_table.py"
        assert str(file["licence"]) == "Apache-2.0"


def test_committed_table_nearest_classes_make_sense():
    table = load_text_table(make_table.DEFAULT_PATH, OSM.classes)
    similarity = table @ table.T - 2 * np.eye(16)
    nearest = {name: OSM.classes[row.argmax()] for name, row in zip(OSM.classes, similarity, strict=True)}
    assert nearest["orchard"] == "vineyard"
    assert nearest["grassland"] == "farmland"
    assert nearest["sand"] == "bare_ground"
    assert nearest["railway"] == "road"
    assert similarity.max() < 0.9  # no two classes are one


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("embeddings"), r"holds \['classes'\]; wanted"),
        (lambda t: t.update(classes=np.array(["b", "a"])), r"is for the classes \('b', 'a'\); wanted \('a', 'b'\)"),
        (lambda t: t.update(embeddings=np.eye(3, 3, dtype=np.float32)), r"shape \(3, 3\); wanted \(2, width\)"),
        (
            lambda t: t.update(embeddings=np.eye(2, 5, dtype=np.float32)),
            r"width 5; wanted 3: set config.model.text_dim",
        ),
        (lambda t: t["embeddings"].__setitem__(1, 2.0), r"'b' has length 3.464; wanted unit rows"),
        (lambda t: t["embeddings"].__setitem__(0, np.nan), r"'a' has length nan"),
    ],
)
def test_load_text_table_wrong_table_says_so(tmp_path, change, message):
    table = {"classes": np.array(["a", "b"]), "embeddings": np.eye(2, 3, dtype=np.float32)}
    change(table)
    path = tmp_path / "table.npz"
    np.savez(path, **table)
    with pytest.raises(ValueError, match="config.objective.text_table: .*" + message):
        load_text_table(path, ("a", "b"), text_dim=3)


def test_load_text_table_missing_file_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"config.objective.text_table: .*nowhere.npz is no file"):
        load_text_table(tmp_path / "nowhere.npz", ("a",))
