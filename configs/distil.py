"""distil: `tiny` learns the features of a trained run of any named size. Source: our choice.

Command: python -m skysense_jax.train --config=configs/distil.py:RUN --workdir=NEW
RUN is the --workdir of the trained run; the same as --config.objective.distil.teacher=RUN. Its modalities, their rows
and views.global_cells must be those here (docs/evaluation.md). Another student: the fields of config.model.
Chips: 2 CPU cores, from a teacher twice as wide: benchmarks/results.md. From larger ones: not run.
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config(teacher: str = "runs/teacher") -> ConfigDict:
    config = tiny.get_config()
    config.name = "distil"
    # What the teacher learned from these terms is in its features. Any of them can stand beside.
    config.objective.weights.update(mgcl=0.0, qsacl=0.0, text_alignment=0.0, distil=1.0)
    config.objective.distil.teacher = teacher
    return config
