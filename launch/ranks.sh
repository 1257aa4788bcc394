#!/usr/bin/env bash
# A run on this machine without an agent: a rank that dies does not end the others, which go on with clients.min_clients=N.
#   RANKS=4 launch/ranks.sh CONFIG.yaml clients.min_clients=2 [key=value ...] --out RUN
#   RANKS  ranks (1)     PORT  where they meet on this machine (29400)
#   The ranks prove to each other that they hold one secret, made here unless SLORA_DIST_SECRET or SLORA_DIST_SECRET_FILE is set:
#   set it where a rank is to come back.
# A rank R that has died can come back:  RANK=R WORLD_SIZE=4 MASTER_ADDR=127.0.0.1 MASTER_PORT=29400 \
#                                            python -m slora_dist train CONFIG.yaml ... --out RUN --join
#   GRACE  seconds that the others may take to end after rank 0 (20): then they are killed, one that stands still too
# Ends with the exit code of rank 0; the others are ended with it.
set -euo pipefail
python=${PYTHON:-python}
if [ -z "${SLORA_DIST_SECRET_FILE:-}" ]; then
  export SLORA_DIST_SECRET
  : "${SLORA_DIST_SECRET:=$(od -An -v -tx1 -N32 /dev/urandom | tr -d ' \n')}"
fi
export WORLD_SIZE=${RANKS:-1} LOCAL_WORLD_SIZE=${RANKS:-1} MASTER_ADDR=127.0.0.1 MASTER_PORT=${PORT:-29400}
others=()
for ((rank = 1; rank < WORLD_SIZE; rank++)); do
  RANK=$rank LOCAL_RANK=$rank "$python" -m slora_dist train "$@" &
  others+=($!)
done
code=0
RANK=0 LOCAL_RANK=0 "$python" -m slora_dist train "$@" || code=$?
if [ "$code" -ne 0 ] && [ "$code" -ne 3 ] && [ ${#others[@]} -gt 0 ]; then kill "${others[@]}" 2>/dev/null || true; fi
deadline=$((SECONDS + ${GRACE:-20}))
while [ ${#others[@]} -gt 0 ] && [ "$SECONDS" -lt "$deadline" ] && kill -0 "${others[@]}" 2>/dev/null; do sleep 0.2; done
if [ ${#others[@]} -gt 0 ]; then kill -KILL "${others[@]}" 2>/dev/null || true; fi # one that stands still would never end
wait
exit "$code"
