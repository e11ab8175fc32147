#!/usr/bin/env bash
# llm.train on a TPU pod slice: a process on each of its hosts, each started again when the run was stopped.
#
# Fill in: NAME, ZONE and PROJECT of the slice, FOLDER (this repository on every host, with its .venv and
# "jax[tpu]" of the version in requirements.txt), CONFIG, the mesh, and WORKDIR, a folder that all hosts see (Filestore,
# or a bucket by gcsfuse).
# Command, from any machine with gcloud:
#
#     bash experiments/launch/tpu_pod.sh
#
# JAX finds the hosts of a slice by itself. All of them stop at the same step, so all start again.
set -u
NAME=my-slice
ZONE=us-east5-a
PROJECT=my-project
FOLDER=llm
CONFIG=experiments/gpt/gpt3.py:medium
WORKDIR=/mnt/shared/runs/gpt3-medium
MESH="--config.mesh.data=-1 --config.mesh.fsdp=16 --config.mesh.tensor=1"

run=".venv/bin/python -m llm.train --config=$CONFIG --workdir=$WORKDIR $MESH $*"
exec gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --project="$PROJECT" --worker=all \
  --command="cd $FOLDER && bash experiments/launch/again.sh $run"
