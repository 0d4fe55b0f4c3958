#!/usr/bin/env bash
# Several hosts that find each other at a rendezvous. Run the same line on every host, in any order:
#
#     HOSTS=2 RENDEZVOUS=10.0.0.1:29500 launch/several_hosts.sh -m distpatch decode vae/ latents.npy picture.npy
#
# Files are read, and pictures written, by every rank: all hosts see the same folders.
#
# What to set:
#   HOSTS                   how many hosts
#   RENDEZVOUS              address:port of one of them, reachable from all; that host keeps the store
#   RUN_ID                  a name of this run, the same on all hosts; two runs at one rendezvous need two
#   PROCESSES               processes of this host; the number of GPUs, or 1 where there is none
#   ADDRESS, INTERFACE      this host's address and network interface, if the route to RENDEZVOUS is not the one
#                           to use (InfiniBand beside Ethernet). Hosts with several interfaces hang, or crawl, where
#                           NCCL and gloo choose one that the others do not reach.
#   OMP_NUM_THREADS         CPU threads of a process; cores divided by processes here
#   JOIN_SECONDS            how long a host waits for the others (600)
#   NCCL_DEBUG=INFO         prints which interface and transport NCCL uses, and whether GPUs reach each other directly
#   NCCL_IB_HCA             which InfiniBand adapters, where not all are wired alike
# The time that a rank waits for another in a transfer is the program's: `distpatch decode --timeout 120`.
set -euo pipefail
: "${HOSTS:?set HOSTS to the number of hosts}"
: "${RENDEZVOUS:?set RENDEZVOUS to the address:port of one of the hosts}"

# "10.0.0.1 dev eth0 src 10.0.0.2 ..."; to an address of this host itself: "local 10.0.0.1 dev lo src 10.0.0.1"
resolved=$(getent ahostsv4 "${RENDEZVOUS%:*}" | awk 'NR == 1 {print $1}')
route=$(ip -o route get "$resolved")
address=${ADDRESS:-$(sed -n 's/.* src \([^ ]*\).*/\1/p' <<<"$route")}
interface=${INTERFACE:-$(ip -o -4 addr show | awk -v address="$address" '{split($4, cidr, "/")} cidr[1] == address {print $2; exit}')}
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface}
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$interface}

gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
processes=${PROCESSES:-$((gpus > 0 ? gpus : 1))}
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores / processes > 0 ? cores / processes : 1))}

# is_host: torchrun compares names only, and may find that no host is the one that keeps the store.
is_host=$([[ $address == "$resolved" ]] && echo 1 || echo 0)

# --local_addr: what this host tells the others; its own idea of its name may lead to 127.0.0.1 there.
exec ${TORCHRUN:-torchrun} \
    --nnodes="$HOSTS" --nproc_per_node="$processes" \
    --rdzv_backend=c10d --rdzv_endpoint="$RENDEZVOUS" --rdzv_id="${RUN_ID:-distpatch}" \
    --rdzv_conf="join_timeout=${JOIN_SECONDS:-600},is_host=$is_host" --local_addr="$address" \
    "$@"
