#!/usr/bin/env bash
# A run on this machine without an agent: a rank that dies does not end the others, which go on with clients.min_clients=N.
#   RANKS=4 launch/ranks.sh CONFIG.yaml clients.min_clients=2 [key=value ...] --out RUN
#   RANKS  ranks (1)     PORT  where they meet on this machine (29400)
#   The ranks prove to each other that they hold one secret, made here unless SLORA_DIST_SECRET or SLORA_DIST_SECRET_FILE is set:
#   set it where a rank is to come back.
# A rank R that has died can come back, with the same secret:  RANK=R WORLD_SIZE=4 MASTER_ADDR=127.0.0.1 MASTER_PORT=29400 \
#                                            python -m slora_dist train CONFIG.yaml ... --out RUN --join
#   GRACE  seconds (20) that the others may take to end after rank 0, and rank 0 after all others where it stands still, as they have found
#          (exit code 4) or as the kernel says. Whoever has not ended then is killed.
# Ends with the exit code of rank 0; the others are ended with it. SIGINT and SIGTERM go to rank 0.
set -euo pipefail
python=${PYTHON:-python}
if [ -z "${SLORA_DIST_SECRET_FILE:-}" ]; then
  export SLORA_DIST_SECRET
  : "${SLORA_DIST_SECRET:=$(od -An -v -tx1 -N32 /dev/urandom | tr -d ' \n')}"
fi
grace=${GRACE:-20}
export WORLD_SIZE=${RANKS:-1} LOCAL_WORLD_SIZE=${RANKS:-1} MASTER_ADDR=127.0.0.1 MASTER_PORT=${PORT:-29400}
others=()
for ((rank = 1; rank < WORLD_SIZE; rank++)); do
  RANK=$rank LOCAL_RANK=$rank "$python" -m slora_dist train "$@" &
  others+=($!)
done
RANK=0 LOCAL_RANK=0 "$python" -m slora_dist train "$@" & root=$!
trap 'kill "$root" 2>/dev/null || true' INT TERM
silent='' deadline=''
while kill -0 "$root" 2>/dev/null; do
  left=()
  for other in "${others[@]}"; do
    ended=0
    if kill -0 "$other" 2>/dev/null; then left+=("$other"); else wait "$other" || ended=$?; fi
    if [ "$ended" -eq 4 ]; then silent=yes; fi
  done
  others=("${left[@]}")
  # Without the others rank 0 may still go on, with ranks that have joined: only where it stands still it is not waited for.
  if [ "$WORLD_SIZE" -gt 1 ] && [ ${#others[@]} -eq 0 ] &&
    { [ -n "$silent" ] || grep -qs '^State:[[:space:]]*T' "/proc/$root/status"; }; then
    : "${deadline:=$((SECONDS + grace))}"
    if [ "$SECONDS" -ge "$deadline" ]; then
      echo "ranks.sh: rank 0 stands still, and all others have ended: killed after $grace s; --resume goes on" >&2
      kill -KILL "$root" 2>/dev/null || true
      break
    fi
  else
    deadline=''
  fi
  sleep 0.5 || true # Ctrl-C ends it, too
done
code=0
wait "$root" || code=$?
if [ "$code" -ne 0 ] && [ "$code" -ne 3 ] && [ ${#others[@]} -gt 0 ]; then kill "${others[@]}" 2>/dev/null || true; fi
deadline=$((SECONDS + grace))
while [ ${#others[@]} -gt 0 ] && [ "$SECONDS" -lt "$deadline" ] && kill -0 "${others[@]}" 2>/dev/null; do sleep 0.2 || true; done
if [ ${#others[@]} -gt 0 ]; then kill -KILL "${others[@]}" 2>/dev/null || true; fi # one that stands still would never end
wait
exit "$code"
