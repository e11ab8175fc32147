#!/usr/bin/env bash
# llm.train on Slurm: a process for each GPU of all nodes; put back in the queue when it was stopped.
#
# Fill in: the #SBATCH lines (nodes, GPUs of a node twice, time, partition and account where yours needs them), CONFIG,
# the mesh, and WORKDIR, a folder that all nodes see.
# Command, from the repository's root, on a file system that all nodes see:
#
#     sbatch experiments/launch/slurm.sh
#
# Three minutes before the time is up Slurm sends SIGTERM to the processes; they save one step, exit with 75, and the job
# is queued again. For one process a node with all its GPUs: --ntasks-per-node=1, and below
# export JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7. A node's own address is JAX's to find; where the nodes' names do not
# resolve, set JAX_COORDINATOR_ADDRESS=HOST:PORT.
#SBATCH --job-name=llm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=llm-%j.log
set -u
CONFIG=experiments/gpt/gpt3.py:medium
WORKDIR=runs/gpt3-medium
MESH=(--config.mesh.data=-1 --config.mesh.fsdp=8 --config.mesh.tensor=1)

trap : TERM # this script outlives a SIGTERM that the processes get
srun --kill-on-bad-exit=0 .venv/bin/python -m llm.train --config="$CONFIG" --workdir="$WORKDIR" "${MESH[@]}" "$@"
code=$?
if [ "$code" -eq 75 ]; then
  echo "stopped and saved; the job is queued again"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
