#!/bin/bash
# One fit on so many nodes of a SLURM cluster: a Ray of its own, with a token of its own, which ends with the job.
#     sbatch cluster/slurm.sh configs/gmm_digits.yaml                 # further arguments change the spec, as those of `gendist fit`
# The same command again goes on where the run stopped; so does SLURM itself, before the time limit, and when a node is lost.
# To change: what stands from here to the line. What it does, and what of it was never run: cluster/README.md.
#SBATCH --job-name=gendist
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
##SBATCH --gpus-per-node=4
#SBATCH --exclusive
#SBATCH --time=04:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=gendist-%j.log

RUNS=${RUNS:-$PWD/runs}                       # a folder that all nodes share; data must lie where all nodes can read them, too
ENVIRONMENT=${ENVIRONMENT:-$PWD/.venv}        # of Python, with gendist installed, on all nodes
NODE_FOLDER=${NODE_FOLDER:-/tmp}              # on a disk of each node, with room for what does not fit in memory; a short path
INTERFACE=${INTERFACE:-}                      # of the network that carries the traffic, such as ib0; empty: the first that a node has
START_TIMEOUT_S=${START_TIMEOUT_S:-300}       # for all nodes to be there
END_TIMEOUT_S=${END_TIMEOUT_S:-60}            # for Ray to end on all nodes; after that it is killed
KEEP_RAY_LOGS=${KEEP_RAY_LOGS:-}              # yes: leave them in NODE_FOLDER, where they say why something failed
# -----------------------------------------------------------------------------------------------------------------------------
set -euo pipefail
spec=${1:?usage: sbatch cluster/slurm.sh SPEC.yaml [key=value ...]}
shift
export PATH="$ENVIRONMENT/bin:$PATH"
export RAY_USAGE_STATS_ENABLED=0 RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0 OMP_NUM_THREADS=1

# Made here, and known to the steps of this job alone; no file and no list of processes shows it to others.
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN

address_of_this_node='
    if [ -n "$INTERFACE" ]; then
        ip -4 -o address show dev "$INTERFACE" | awk "{split(\$4, part, \"/\"); print part[1]; exit}"
    else
        hostname -I | awk "{print \$1}"
    fi'
export INTERFACE
if [ -n "$INTERFACE" ]; then export NCCL_SOCKET_IFNAME=$INTERFACE GLOO_SOCKET_IFNAME=$INTERFACE; fi

# This script runs on the first node, which is the head. Ports that another job on this node is unlikely to have.
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes%%$'\n'*}
head_address=$(bash -c "$address_of_this_node")
port=$((20000 + SLURM_JOB_ID % 10000))
address="$head_address:$port"
export NODE_FOLDER KEEP_RAY_LOGS CPUS=${SLURM_CPUS_PER_TASK:-1} GPUS=${SLURM_GPUS_ON_NODE:-0}
# A folder of its own each time: what an earlier start of this job left on a node would be in the way. A cluster ends with its
# head; on any other node Ray is started again when it ends, as where the node was cut off for a while.
start_ray='
    node_address=$('"$address_of_this_node"')
    ulimit -n 65536 2> /dev/null || ulimit -n "$(ulimit -Hn)"
    ending=""
    trap "ending=yes; kill -TERM \$ray 2> /dev/null" TERM INT
    while [ -z "$ending" ]; do
        folder=$(mktemp -d "$NODE_FOLDER/ray-XXXXXX")
        ray start --block --node-ip-address="$node_address" --num-cpus="$CPUS" --num-gpus="$GPUS" --disable-usage-stats \
            ${OBJECT_STORE_BYTES:+--object-store-memory="$OBJECT_STORE_BYTES"} --temp-dir="$folder" "$@" > /dev/null &
        ray=$!
        while kill -0 "$ray" 2> /dev/null; do wait "$ray"; done
        [ -n "$KEEP_RAY_LOGS" ] || rm -rf "$folder"
        if [ "$1" = --head ]; then exit 1; fi
        [ -n "$ending" ] || sleep 1
    done'

steps=()
fit=""
is_ending=""
end() {
    code=$?
    trap "" TERM INT
    # Wherever it was when it was told; what has ended by itself, or was a mistake, is not done again.
    if [ -n "$is_ending" ] && [ "$code" -ne 0 ] && [ "$code" -ne 2 ]; then
        echo "stopped; what was reached is kept in $RUNS; queued again"
        scontrol requeue "$SLURM_JOB_ID" || true
    fi
    for step in "${steps[@]}"; do kill "$step" 2> /dev/null || true; done
    for _ in $(seq "$END_TIMEOUT_S"); do
        [ -n "$(jobs -pr)" ] || break
        sleep 1
    done
    for step in $(jobs -pr); do kill -KILL "$step" 2> /dev/null || true; done
    exit "$code"
}
trap end EXIT
# SLURM tells this script alone (B:) that its time is nearly up, or that others need the nodes.
on_signal() {
    is_ending=yes
    if [ -n "$fit" ]; then kill -TERM "$fit" 2> /dev/null || true; fi
}
trap on_signal TERM INT

# Before any node is asked for anything: a mistake in the spec ends the job here, with its own code.
gendist fit "$spec" "$@" --dry-run > /dev/null

step=(srun --overlap --kill-on-bad-exit=0 --ntasks-per-node=1)
"${step[@]}" --nodes=1 --ntasks=1 --nodelist="$head" bash -c "$start_ray" ray \
    --head --port="$port" --dashboard-host=127.0.0.1 --dashboard-port=$((port + 10000)) &
steps+=($!)

until (exec 3<> "/dev/tcp/$head_address/$port") 2> /dev/null; do
    if ! kill -0 "${steps[0]}" 2> /dev/null; then echo "error: the head of Ray on $head has ended" >&2; exit 1; fi
    if [ "$SECONDS" -gt "$START_TIMEOUT_S" ]; then echo "error: no head of Ray at $address in $START_TIMEOUT_S s" >&2; exit 1; fi
    if [ -n "$is_ending" ]; then exit 130; fi
    sleep 1
done
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    workers=$((SLURM_JOB_NUM_NODES - 1))
    "${step[@]}" --nodes="$workers" --ntasks="$workers" --exclude="$head" bash -c "$start_ray" ray --address="$address" &
    steps+=($!)
fi
# Until all nodes are there; and how the spec calls the run.
name=$(python - "$address" "$SLURM_JOB_NUM_NODES" "$((START_TIMEOUT_S - SECONDS))" "$spec" "$@" <<'PYTHON'
import logging, sys, time
from gendist.config import load_spec
from gendist.protocols import UserError
import ray

try:
    name = load_spec(sys.argv[4], sys.argv[5:]).name
except UserError as error:
    sys.exit(f"error: {error}")
address, wanted, until = sys.argv[1], int(sys.argv[2]), time.monotonic() + float(sys.argv[3])
while not ray.is_initialized():
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        if time.monotonic() > until:
            sys.exit(f"error: no head of Ray at {address}: {error}")
        time.sleep(0.5)
while (there := sum(node["Alive"] for node in ray.nodes())) < wanted:
    if time.monotonic() > until:
        sys.exit(f"error: {there} of {wanted} nodes are there; with KEEP_RAY_LOGS=yes the logs of Ray on the others say why")
    time.sleep(0.5)
print(name)
PYTHON
)
if [ -n "$is_ending" ]; then exit 130; fi

gendist fit "$spec" "$@" --run-dir "$RUNS/$name" --address "$address" &
fit=$!
if [ -n "$is_ending" ]; then kill -TERM "$fit" 2> /dev/null || true; fi # told just before it had a number
# A signal ends the waiting, not the fit, which is writing a checkpoint.
code=0
wait "$fit" || code=$?
while kill -0 "$fit" 2> /dev/null; do code=0; wait "$fit" || code=$?; done

exit "$code"
