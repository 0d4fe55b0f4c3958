#!/usr/bin/env bash
# Two network namespaces joined by a veth pair, as two hosts: hosts.sh start|stop NAME. Needs root.
#
# `ip netns exec NAME-a` is the host 10.77.0.1, `ip netns exec NAME-b` the host 10.77.0.2; they see each other only.
set -euo pipefail
what=$1
name=$2

stop() {
    ip netns delete "$name-a" 2>/dev/null || true
    ip netns delete "$name-b" 2>/dev/null || true
}

start() {
    trap stop ERR
    ip netns add "$name-a"
    ip netns add "$name-b"
    ip link add dpatch0 netns "$name-a" type veth peer name dpatch1 netns "$name-b"
    ip -n "$name-a" address add 10.77.0.1/24 dev dpatch0
    ip -n "$name-b" address add 10.77.0.2/24 dev dpatch1
    for host in a:dpatch0 b:dpatch1; do
        ip -n "$name-${host%:*}" link set lo up
        ip -n "$name-${host%:*}" link set "${host#*:}" up
    done
}

"$what"
