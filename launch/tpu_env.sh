#!/usr/bin/env bash
# Sourced before training on TPUs: settings that libtpu reads at its start, each with its reason. What is set already
# stays. None was measured by this project; try a run without each.

# Exchanges of parameters (FSDP) run while other layers compute, instead of between them.
export LIBTPU_INIT_ARGS="--xla_tpu_enable_async_collective_fusion=true \
--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true \
--xla_tpu_overlap_compute_collective_tc=true ${LIBTPU_INIT_ARGS:-}"
