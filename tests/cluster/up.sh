#!/usr/bin/env bash
# Brings up a real SLURM with four nodes on this machine, as root: up.sh DIR. Then: export SLURM_CONF=DIR/slurm.conf
# Needs: apt-get install --no-install-recommends slurm-wlm slurmctld slurmd slurm-client munge iproute2
#
# Each node has network, host name and /etc/hosts of its own: a namespace on a bridge. down.sh DIR ends all of it.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
dir=$(cd "$1" && pwd)
cd "$dir"
mkdir -p log munge pids state spool-node{0..3}
number=$(($$ % 200 + 20)) # of this cluster, among several on one machine
while ip link show "slurm$number" >/dev/null 2>&1; do number=$((number + 1)); done
net=10.213.$number
echo "$number" >number
sed "s#@DIR@#$dir#g; s#@HOST@#$(hostname -s)#g; s#@NET@#$net#g; s#@PORT@#$((7100 + number))#g" \
  "$here/slurm.conf.in" >slurm.conf
export SLURM_CONF=$dir/slurm.conf
{
  echo "127.0.0.1 localhost"
  echo "$net.254 $(hostname -s)"
  for node in {0..3}; do echo "$net.$((node + 1)) node$node"; done
} >hosts

start() { # NAME COMMAND...
  local name=$1
  shift
  setsid "$@" >"log/$name.out" 2>&1 </dev/null &
  echo $! >"pids/$name"
}

# One key and one daemon of munge, for all nodes, apart from those of the machine.
dd if=/dev/urandom of=munge/key bs=64 count=1 status=none
chmod 600 munge/key
chmod 711 munge
start munged munged --foreground --force --key-file=munge/key --socket="$dir/munge/socket" \
  --log-file="$dir/log/munged.log" --pid-file="$dir/munge/pid" --seed-file="$dir/munge/seed"

ip link add "slurm$number" type bridge
ip addr add "$net.254/24" dev "slurm$number"
ip link set "slurm$number" up
for node in {0..3}; do
  name=slurm$number-node$node
  ip netns add "$name"
  ip link add "s${number}n$node" type veth peer name eth0 netns "$name"
  ip link set "s${number}n$node" master "slurm$number" up
  ip -n "$name" addr add "$net.$((node + 1))/24" dev eth0
  ip -n "$name" link set eth0 up
  ip -n "$name" link set lo up
done
for _ in $(seq 50); do [[ -S munge/socket ]] && break; sleep .1; done
start slurmctld unshare --mount sh -c "mount --bind hosts /etc/hosts && exec slurmctld -D"
for node in {0..3}; do
  # `ip netns exec` would mount another /sys, without cgroups.
  start "node$node" nsenter --net="/run/netns/slurm$number-node$node" unshare --uts --mount sh -c \
    "hostname node$node && mount --bind hosts /etc/hosts && exec slurmd -N node$node -D"
done
for _ in $(seq 150); do
  [[ $(sinfo -h -t idle -N -o %n 2>/dev/null | sort -u | wc -l) == 4 ]] && exit 0
  sleep .1
done
echo "the nodes did not come up:" >&2
tail -n 5 log/* >&2
exit 1
