#!/usr/bin/env bash
# A run under torchrun.  One machine:      RANKS=4 launch/torchrun.sh CONFIG.yaml [key=value ...] --out RUN
# Several: on every one of them, alike:    NODES=2 HEAD=host1 RANKS=4 launch/torchrun.sh CONFIG.yaml [key=value ...] --out RUN
#   RANKS  ranks on this machine (1)         NODES  machines (1)
#   HEAD   one of the machines, by a name or address that all know; the ranks meet at its port PORT (29400)
#   ID     tells this run from another that meets at the same port (slora)
set -euo pipefail
nodes=${NODES:-1}
if [ "$nodes" -eq 1 ]; then
  meet=(--standalone)
else
  meet=(--nnodes "$nodes" --rdzv-backend c10d --rdzv-endpoint "${HEAD:?the machine where all meet}:${PORT:-29400}" --rdzv-id "${ID:-slora}")
fi
exec torchrun "${meet[@]}" --nproc-per-node "${RANKS:-1}" -m slora_dist train "$@"
