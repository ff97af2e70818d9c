#!/bin/bash
# Runs a command in a Slurm job, with a Ray over the job's nodes:
#   sbatch --nodes=4 --cpus-per-task=8 --gpus-per-node=1 docs/slurm.sh dvc repro
#SBATCH --ntasks-per-node=1
#SBATCH --time=24:00:00
set -eu
source .venv/bin/activate

# Whoever reaches Ray's ports can run code as you; the token keeps other users of the cluster out.
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
# A folder of the job's own on each node. Short: the path of a socket has at most 107 bytes.
export NODE_TMP=/tmp/ray-$SLURM_JOB_ID

# Ray on one node, with what Slurm gave of it, on free ports: several jobs may share the node.
# `ray stop` would stop the Ray of all of them.
ray_node() {
  rm -rf "$NODE_TMP" # of the same job before it was requeued
  ray start --block --temp-dir="$NODE_TMP" --object-store-memory=500000000 \
    --num-cpus="$SLURM_CPUS_ON_NODE" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" \
    --dashboard-agent-listen-port=0 "$@" >/dev/null &
  trap 'kill -KILL $!; wait $! 2>/dev/null || true' TERM # its processes end with it
  wait $! 2>/dev/null || true
  rm -rf "$NODE_TMP"
}
export -f ray_node

port=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
address=$(python -c 'import ray.util; print(ray.util.get_node_ip_address())'):$port
unset RAY_ADDRESS
ray_node --head --port="$port" --include-dashboard=false &
head=$!
trap 'kill $head; wait $head' EXIT # the other nodes' Slurm ends, with the job
until ray status --address="$address" >/dev/null 2>&1; do
  kill -0 $head
  sleep 1
done
others=$((SLURM_JOB_NUM_NODES - 1))
if [ $others -gt 0 ]; then
  srun --nodes=$others --ntasks=$others --exclude="$SLURMD_NODENAME" \
    ${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK} \
    bash -c "ray_node --address=$address" &
fi

export RAY_ADDRESS=$address
set -m # a process group for the command
"$@" &
command=$!
# At scancel and the time limit Slurm tells this shell alone; DVC and bob end as at Ctrl-C.
trap 'kill -INT -- -$command; wait $command; exit 143' TERM
wait $command
