#!/usr/bin/env bash
# Ends what up.sh started, by process id: down.sh DIR
set -u
cd "$1" || exit 0
export SLURM_CONF=$PWD/slurm.conf
scancel --user="$(id -un)" --state=RUNNING --signal=KILL --full >/dev/null 2>&1
scancel --user="$(id -un)" >/dev/null 2>&1
for _ in $(seq 100); do [[ -z $(squeue -h 2>/dev/null) ]] && break; sleep .1; done
names="node0 node1 node2 node3 slurmctld munged"
for name in $names; do kill "$(cat "pids/$name" 2>/dev/null)" 2>/dev/null; done
for name in $names; do
  pid=$(cat "pids/$name" 2>/dev/null) || continue
  for _ in $(seq 100); do kill -0 "$pid" 2>/dev/null || break; sleep .1; done
  kill -9 "$pid" 2>/dev/null
done
number=$(cat number 2>/dev/null) || exit 0
for node in {0..3}; do ip netns del "slurm$number-node$node" 2>/dev/null; done
ip link del "slurm$number" 2>/dev/null
exit 0
