#!/usr/bin/env bash
# Runs a command again as long as it exits with 75, which says: stopped, everything saved, the same command goes on.
#
#     bash experiments/launch/again.sh .venv/bin/python -m llm.train --config=... --workdir=...
#
# Any other exit code is its own. SIGTERM or Ctrl-C to this script stop the run and the loop, with 75 once it has saved.
set -u
stopped="" child=""
trap 'stopped=1; [ -z "$child" ] || kill -TERM "$child"' TERM
trap 'stopped=1' INT # a terminal sends it to the run, too
while true; do
  "$@" &
  child=$!
  wait "$child"
  code=$?
  # A signal ends wait before the run has ended.
  while kill -0 "$child" 2>/dev/null; do
    wait "$child"
    code=$?
  done
  child=""
  if [ "$code" -ne 75 ] || [ -n "$stopped" ]; then
    exit "$code"
  fi
  echo "stopped and saved; going on in ${PAUSE:=5} s" >&2
  sleep "$PAUSE"
done
