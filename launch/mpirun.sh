#!/usr/bin/env bash
# A run under MPI.  One machine:           RANKS=4 launch/mpirun.sh CONFIG.yaml [key=value ...] --out RUN
# Several, from one that reaches the others by ssh:    RANKS=8 HOSTS=host1:4,host2:4 launch/mpirun.sh CONFIG.yaml ...
#   RANKS  ranks in all (1)     HOSTS  host:ranks,host:ranks,...
#   COMMAND  train, or doctor, which measures where and how the run would be played (train)
#   FT=ulfm  with Open MPI 5: a rank that dies does not end the others, which go on with clients.min_clients=N
# mpiexec must be the one of the MPI library that mpi4py loads. Its own options can come from its own variables (HYDRA_*, OMPI_MCA_*).
# The ranks prove to each other that they hold one secret. It is made here and reaches them with mpiexec's own messages.
set -euo pipefail
if [ -z "${SLORA_DIST_SECRET_FILE:-}" ]; then
  export SLORA_DIST_SECRET
  : "${SLORA_DIST_SECRET:=$(od -An -v -tx1 -N32 /dev/urandom | tr -d ' \n')}"
fi
give=()
if mpiexec --version 2>/dev/null | grep -qiE 'open ?mpi|openrte|prte'; then  # MPICH hands on the environment unasked
  give=(-x "$([ -z "${SLORA_DIST_SECRET_FILE:-}" ] && echo SLORA_DIST_SECRET || echo SLORA_DIST_SECRET_FILE)")
fi
exec mpiexec "${give[@]}" ${FT:+--with-ft "$FT"} ${HOSTS:+-host "$HOSTS"} -n "${RANKS:-1}" python -m slora_dist "${COMMAND:-train}" "$@"
