# SPDX-License-Identifier: MIT
# shellcheck shell=sh disable=SC2154
# The BPF programs on Debian's kernel, older than the one they were written on. Run by tests/integration/qemu.py.

if ! command -v kvtierd-bpf >/dev/null; then
	n=$((n + 1))
	echo "ok $n - BPF programs on this kernel # SKIP kvtierd-bpf was not built"
	return 0
fi

kvtierd-bpf --check >/tmp/bpf 2>&1
bpf=$?
sed "s/^/# $(uname -r): /" /tmp/bpf
check "kvtierd-bpf --check loads what the throttle needs" test "$bpf" = 0
for group in disk uring reclaim memcg_reclaim fault sched; do
	check "this kernel takes the programs of $group" grep -q "^$group  *on" /tmp/bpf
done

# Through the daemon: the guest's NVMe disk is found, and its requests are counted while pages are demoted to it.
mkdir -p /run/kvtier-bpf
kvtierd-bpf --user 0 2>/tmp/bpf.log &
loader=$!
sleep 3
seen() {
	kvtierctl --socket "$RUN/admin.sock" status >/tmp/status 2>&1
	grep -q 'probes .*disk on' /tmp/status && grep -q 'writes to the disk: [1-9]' /tmp/status
}
counted() {
	for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
		# To the disk itself, past the file system's cache.
		dd if=/dev/zero of=/store/block bs=4096 count=8 oflag=direct 2>/dev/null
		seen && return 0
		sleep 0.3
	done
	sed 's/^/# /' /tmp/bpf.log /tmp/status
	return 1
}
check "the daemon starts beside it" daemon_start node=interleave
check "requests of the guest's NVMe disk are counted" counted
daemon_stop
kill "$loader"
wait "$loader"
rm -f /store/block
