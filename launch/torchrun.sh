#!/usr/bin/env bash
# A run under torchrun.  One machine:      RANKS=4 launch/torchrun.sh CONFIG.yaml [key=value ...] --out RUN
# Several: on every one of them, alike:    NODES=2 HEAD=host1 RANKS=4 launch/torchrun.sh CONFIG.yaml [key=value ...] --out RUN
#   RANKS  ranks on this machine (1)         NODES  machines (1)
#   HEAD   one of the machines, by a name or address that all know; the ranks meet at its port PORT (29400)
#   COMMAND  train, or doctor, which measures where and how the run would be played (train)
#   RESTARTS  how often a run whose rank has died goes on from its last checkpoint by itself (0)
#   ID     tells this run from another that meets at the same port (slora)
# The ranks prove to each other that they hold one secret. On one machine it is made here. For several make a file with `slora-dist secret
# FILE`, copy it to each of them and set SLORA_DIST_SECRET_FILE=FILE (or SLORA_DIST_SECRET) everywhere.
set -euo pipefail
nodes=${NODES:-1}
if [ "$nodes" -eq 1 ]; then
  meet=(--standalone)
  if [ -z "${SLORA_DIST_SECRET_FILE:-}" ]; then
    export SLORA_DIST_SECRET
    : "${SLORA_DIST_SECRET:=$(od -An -v -tx1 -N32 /dev/urandom | tr -d ' \n')}"
  fi
else
  [ -n "${SLORA_DIST_SECRET_FILE:-}${SLORA_DIST_SECRET:-}" ] ||
    echo "torchrun.sh: no secret: whoever reaches ${HEAD:-the machine where all meet}:${PORT:-29400} can join; see SLORA_DIST_SECRET_FILE in $0" >&2
  meet=(--nnodes "$nodes" --rdzv-backend c10d --rdzv-endpoint "${HEAD:?the machine where all meet}:${PORT:-29400}" --rdzv-id "${ID:-slora}")
fi
if [ "${RESTARTS:-0}" -gt 0 ]; then export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1; fi  # the agent's store keeps what dead ranks wrote
exec torchrun "${meet[@]}" --max-restarts "${RESTARTS:-0}" --nproc-per-node "${RANKS:-1}" -m slora_dist "${COMMAND:-train}" "$@"
