#!/usr/bin/env bash
# SLURM for the tests, from Debian's or Ubuntu's own packages. Starts nothing: the tests run their own daemons.
set -euo pipefail

if command -v slurmctld slurmd munged ip >/dev/null; then
    exit 0
fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "install.sh: slurmctld, slurmd, munged or ip is missing, and only root can install them, with apt-get:" >&2
    echo "    apt-get install --no-install-recommends slurm-wlm munge iproute2" >&2
    exit 0 # the tests say the same, as a skip or a failure
fi
export DEBIAN_FRONTEND=noninteractive
timeout 120 apt-get -qq update
timeout 300 apt-get -qq install -y --no-install-recommends slurm-wlm munge iproute2 >/dev/null
