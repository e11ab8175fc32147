#!/usr/bin/env bash
# llm.train on one machine with several GPUs: one process that drives them all, started again when it was stopped.
#
# Fill in: CONFIG, WORKDIR, and the mesh, whose sizes multiply to the number of GPUs (-1 takes what is left).
# Command, from the repository's root, so that it outlives the terminal:
#
#     nohup bash experiments/launch/gpu_node.sh >gpu_node.log 2>&1 &
#
# It needs JAX for the machine's CUDA: .venv/bin/pip install "jax[cuda13]", of the version in requirements.txt.
set -u
CONFIG=experiments/gpt/gpt3.py:medium
WORKDIR=runs/gpt3-medium
MESH=(--config.mesh.data=-1 --config.mesh.fsdp=1 --config.mesh.tensor=1)

exec bash experiments/launch/again.sh .venv/bin/python -m llm.train --config="$CONFIG" --workdir="$WORKDIR" "${MESH[@]}" "$@"
