#!/usr/bin/env bash
# Sourced before training on NVIDIA GPUs: settings that jax and NCCL read at their start, each with its reason. What is
# set already stays. None was measured by this project; try a run without each.

# Three quarters of a GPU's memory is jax's default; a training step wants the rest too.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
# Warnings name the network interface or GPU that is at fault.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
