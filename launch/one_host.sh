#!/usr/bin/env bash
# All GPUs of this host, one process each:
#
#     launch/one_host.sh -m distpatch decode vae/ latents.npy picture.png
#     PROCESSES=2 launch/one_host.sh torchrun_examples/decode_vae.py
#
# What to set, if need be:
#   PROCESSES               processes; the number of GPUs, or 1 where there is none
#   OMP_NUM_THREADS         CPU threads of a process; torchrun would set 1. Cores divided by processes here.
#   TORCHRUN                another way to call it, such as "uv run torchrun"
set -euo pipefail

gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
processes=${PROCESSES:-$((gpus > 0 ? gpus : 1))}
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores / processes > 0 ? cores / processes : 1))}

# --standalone: a rendezvous of this host's own on a free port, so that two runs do not meet.
exec ${TORCHRUN:-torchrun} --standalone --nproc_per_node="$processes" "$@"
