"""What terms of the loss ask of a config: what ``config_checks.validate`` says of ``config.objective``."""

import pathlib
from collections.abc import Iterator

from ml_collections import ConfigDict

from skysense_jax import modalities
from skysense_jax.data import text


def objective_problems(config: ConfigDict, *, text_table: pathlib.Path) -> Iterator[str]:
    """What is wrong with terms and their weights; ``text_table`` is the file of ``config.objective.text_table``."""
    objective, weights = config.objective, config.objective.weights
    terms = ("mgcl", "qsacl", "text_alignment", "distil")
    if not any(weights[term] for term in terms):
        yield f"config.objective.weights: got 0 for {', '.join(terms)}; wanted at least one above 0"
    granularities = ("pixel_weight", "object_weight", "image_weight")
    if weights.mgcl and not any(objective.mgcl[name] for name in granularities):
        yield f"config.objective.mgcl: got 0 for {', '.join(granularities)}; wanted one above 0, or weights.mgcl = 0"
    if weights.text_alignment:
        try:
            classes = tuple(config.data.label_classes) or modalities.OSM.classes
            text.load_text_table(text_table, classes, text_dim=config.model.text_dim)
        except ValueError as error:
            yield f"{error} (config.objective.weights.text_alignment = 0 needs no table)"
    if bool(weights.distil) != bool(objective.distil.teacher):
        yield (
            f"config.objective.distil.teacher: got {objective.distil.teacher!r} with config.objective.weights.distil "
            f"{weights.distil}; wanted the --workdir of a trained run with a weight above 0, or '' with 0"
        )
    levels = ("stage3_weight", "stage4_weight", "fused_weight")
    if weights.distil and not any(objective.distil[name] for name in levels):
        yield f"config.objective.distil: got 0 for {', '.join(levels)}; wanted one above 0"
