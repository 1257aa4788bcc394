#!/usr/bin/env bash
# A run under MPI.  One machine:           RANKS=4 launch/mpirun.sh CONFIG.yaml [key=value ...] --out RUN
# Several, from one that reaches the others by ssh:    RANKS=8 HOSTS=host1:4,host2:4 launch/mpirun.sh CONFIG.yaml ...
#   RANKS  ranks in all (1)     HOSTS  host:ranks,host:ranks,...
# mpiexec must be the one of the MPI library that mpi4py loads. Its own options can come from its own variables (HYDRA_*, OMPI_MCA_*).
set -euo pipefail
exec mpiexec ${HOSTS:+-host "$HOSTS"} -n "${RANKS:-1}" python -m slora_dist train "$@"
