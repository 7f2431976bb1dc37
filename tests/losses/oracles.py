"""Plain numpy references in float64 that several loss tests share."""

import numpy as np


def sinkhorn(logits, valid, temperature, iterations):
    """Rows of ``valid`` balanced by dividing columns and rows in turn; the others zero."""
    q = np.zeros_like(logits, dtype=np.float64)
    if not valid.any():
        return q
    part = np.exp(logits[valid].astype(np.float64) / temperature)
    for _ in range(iterations):
        part = part / part.sum(0, keepdims=True)
        part = part / part.sum(1, keepdims=True)
    q[valid] = part
    return q


def cross_entropy(student, teacher, temperature):
    """Of one row."""
    scores = student.astype(np.float64) / temperature
    peak = scores.max()
    total = 0.0
    for z in range(len(scores)):
        total -= teacher[z] * (scores[z] - peak - np.log(np.exp(scores - peak).sum()))
    return total


def unit(x):
    return x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-12)


def layer_norm(x):
    x = np.asarray(x, np.float64)
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)


class Standardise:
    """Rows [N D] of the teacher give the mean and deviation that rows of both sides are measured by."""

    def __init__(self, teacher_rows):
        rows = layer_norm(teacher_rows)
        self._mean, self._deviation = rows.mean(0), np.sqrt(rows.var(0) + 1e-5)

    def __call__(self, rows):
        return (layer_norm(rows) - self._mean) / self._deviation
