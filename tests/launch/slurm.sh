#!/usr/bin/env bash
# A Slurm of one node, this one, for tests: slurm.sh start|stop FOLDER. Needs root, slurm-wlm and munge.
#
# All its files are under FOLDER (a short path: it has sockets in it), and nothing of the system's is touched.
# `export SLURM_CONF=FOLDER/slurm.conf` and sbatch, srun and sinfo talk to it.
set -euo pipefail
what=$1
folder=$(realpath -m "$2")

stop() {
    local pids=()
    for daemon in slurmd slurmctld munged; do
        [[ ! -f $folder/$daemon.pid ]] || pids+=("$(<"$folder/$daemon.pid")")
    done
    for pid in "${pids[@]}"; do
        kill "$pid" 2>/dev/null || true
        for _ in $(seq 100); do # slurmctld saves its state before it ends
            kill -0 "$pid" 2>/dev/null || break
            sleep 0.1
        done
    done
}

start() {
    mkdir -p "$folder"/{state,spool,munge}
    chmod 0755 "$folder" "$folder/munge"
    local host memory port
    host=$(hostname -s)
    memory=$(awk '/MemTotal/ {print int($2 / 1024 * 0.9)}' /proc/meminfo)
    port=$((30000 + RANDOM % 2000 * 2))
    head -c 1024 /dev/urandom >"$folder/munge/key"
    chmod 0600 "$folder/munge/key"
    cat >"$folder/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
SlurmctldPort=$port
SlurmdPort=$((port + 1))
SlurmdParameters=config_overrides
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
NodeName=$host NodeAddr=127.0.0.1 CPUs=4 RealMemory=$memory State=UNKNOWN
PartitionName=test Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
    munged --force --socket="$folder/munge/socket" --key-file="$folder/munge/key" --pid-file="$folder/munged.pid" \
        --seed-file="$folder/munge/seed" --log-file="$folder/munge/log"
    export SLURM_CONF=$folder/slurm.conf
    slurmctld -f "$SLURM_CONF" -c
    slurmd -f "$SLURM_CONF"
    for _ in $(seq 60); do
        [[ $(sinfo --noheader --format=%T 2>/dev/null) == idle ]] && return
        sleep 0.5
    done
    sinfo >&2 || true
    tail -n 20 "$folder"/slurm*.log >&2
    stop
    return 1
}

"$what"
