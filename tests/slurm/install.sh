#!/usr/bin/env bash
# SLURM for the tests, from Debian's or Ubuntu's own packages. Starts nothing: the tests run their own daemons.
set -euo pipefail

missing=
for program in slurmctld slurmd munged ip; do
    command -v "$program" >/dev/null || missing="$missing $program"
done
[ -n "$missing" ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "no$missing here, and only root can install them, with apt-get:" >&2
    echo "    apt-get install --no-install-recommends slurm-wlm munge iproute2" >&2
    exit 0 # the tests say the same, as a skip or a failure
fi
export DEBIAN_FRONTEND=noninteractive
timeout 120 apt-get -qq update
timeout 300 apt-get -qq install -y --no-install-recommends slurm-wlm munge iproute2 >/dev/null
