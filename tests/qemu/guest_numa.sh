# SPDX-License-Identifier: MIT
# shellcheck shell=sh disable=SC2154
# Two memory nodes: where the DRAM tier's segments are told to lie. Run by tests/integration/qemu.py inside the guest.

nodes=$(ls -d /sys/devices/system/node/node[0-9]* | wc -l)
check "the guest has two memory nodes" test "$nodes" = 2

# The memory policy that the kernel has for the daemon's DRAM segments. $1: the value of [dram] node
placed() {
	daemon_start "node=$1" || return 1
	rm -f /tmp/key
	ctl_client "$RUN/kvtierd.sock" 4000 >/tmp/key 2>/tmp/client.log &
	client=$!
	for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
		test -s /tmp/key && break
		sleep 0.3
	done
	sed 's/^/# client: /' /tmp/client.log
	grep kvtier-dram "/proc/$daemon/numa_maps" | sed 's/^/# /'
	maps=$(grep kvtier-dram "/proc/$daemon/numa_maps")
	kill "$client" 2>/dev/null
	daemon_stop
}

# Pages were written, every segment has the policy, none lies on the node that must have none. $1: policy, $2: that node
all_are() {
	test -s /tmp/key && echo "$maps" | grep -q ' N[01]=' && ! echo "$maps" | grep -qv "$1" && { test -z "$2" || ! echo "$maps" | grep -q " $2="; }
}

placed 0
check "with node=0 every segment prefers node 0, and no page lies on node 1" all_are 'prefer[^ ]*:0' N1
placed 1
check "with node=1 every segment prefers node 1, and no page lies on node 0" all_are 'prefer[^ ]*:1' N0
placed interleave
check "with node=interleave every segment is spread over both" all_are 'interleave[^ ]*:0-1' ''

daemon_start node=2
refused=$?
check "a node that the host lacks is refused" test "$refused" != 0
check "in a line that names it" grep -q 'dram node: 2 is not a memory node of this host' "$LOG"
