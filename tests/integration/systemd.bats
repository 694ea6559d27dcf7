#!/usr/bin/env bats
# SPDX-License-Identifier: MIT
# The units, the default configuration, and what systemd makes of them.

setup() {
	root=$(cd "$BATS_TEST_DIRNAME/../.." && pwd)
	build=${KVT_BUILD:-$root/build}
	command -v systemd-analyze > /dev/null || skip "no systemd-analyze here"
	# The units name installed binaries: let them name the built ones.
	units=$BATS_TEST_TMPDIR/units
	mkdir "$units"
	for u in "$root"/systemd/*.service "$root"/systemd/*.socket; do
		sed -E "s|=/usr/sbin/kvtierd|=$build/kvtierd|; s|=/usr/bin/kvtierctl|=$build/kvtierctl|" "$u" \
			> "$units/${u##*/}"
	done
}

@test "systemd-analyze verify has nothing to say" {
	for u in "$units"/*; do
		run env SYSTEMD_UNIT_PATH="$units:" systemd-analyze verify --man=no "$u"
		[ "$status" -eq 0 ]
		[ -z "$output" ]
	done
}

@test "verify would have complained about an unknown key" {
	sed -i 's/^NoNewPrivileges=/NoNewPrivilegs=/' "$units/kvtierd.service"
	run env SYSTEMD_UNIT_PATH="$units:" systemd-analyze verify --man=no "$units/kvtierd.service"
	[ -n "$output" ]
}

@test "exposure is at most 1.5" {
	run systemd-analyze security --offline=yes --threshold=15 "$units/kvtierd.service"
	echo "$output" | tail -n 1
	[ "$status" -eq 0 ]
}

@test "what the daemon needs is left open" {
	grep -qx 'PrivateUsers=no' "$units/kvtierd.service"
	grep -qx 'StartLimitIntervalSec=0' "$units/kvtierd.service"
	grep -qx 'LimitMEMLOCK=infinity' "$units/kvtierd.service"
	grep -qE '^FileDescriptorStoreMax=[0-9]+' "$units/kvtierd.service"
	# FileDescriptorName= is what the daemon looks for.
	grep -qx 'FileDescriptorName=admin' "$units/kvtierd-admin.socket"
	grep -qx 'FileDescriptorName=default' "$units/kvtierd.socket"
}

@test "sysusers and tmpfiles read their files" {
	mkdir -p "$BATS_TEST_TMPDIR/r/etc" "$BATS_TEST_TMPDIR/r/run" "$BATS_TEST_TMPDIR/r/var/lib"
	run systemd-sysusers --root="$BATS_TEST_TMPDIR/r" "$root/systemd/sysusers.d/kvtier.conf"
	echo "$output"
	[ "$status" -eq 0 ]
	grep -q '^kvtier:' "$BATS_TEST_TMPDIR/r/etc/passwd"
	grep -q '^kvtier-admin:' "$BATS_TEST_TMPDIR/r/etc/group"
	[ "$(id -u)" -eq 0 ] || skip "tmpfiles needs root to give directories away"
	run systemd-tmpfiles --create --root="$BATS_TEST_TMPDIR/r" "$root/systemd/tmpfiles.d/kvtier.conf"
	echo "$output"
	[ "$status" -eq 0 ]
	[ "$(stat -c %a "$BATS_TEST_TMPDIR/r/run/kvtier")" = 755 ]
	[ "$(stat -c %a "$BATS_TEST_TMPDIR/r/var/lib/kvtier")" = 700 ]
}

@test "the default configuration loads" {
	run "$build/kvtierd" --check-config -c "$root/systemd/kvtierd.conf"
	[ "$status" -eq 0 ]
	[ "$output" = "$root/systemd/kvtierd.conf: ok" ]
}

@test "the default configuration is the built-in one, as it is and with every line uncommented" {
	print_config() { # without where a value was set
		"$build/kvtierd" -c "$1" --print-config | sed -E '/^# default:/s/; (not set|set at [^;]*)//'
	}
	print_config /dev/null > "$BATS_TEST_TMPDIR/builtin"
	grep -q '^# default: .' "$BATS_TEST_TMPDIR/builtin"
	print_config "$root/systemd/kvtierd.conf" | diff "$BATS_TEST_TMPDIR/builtin" -
	sed -E 's/^#([a-z_]+ =)/\1/' "$root/systemd/kvtierd.conf" > "$BATS_TEST_TMPDIR/full.conf"
	[ "$(grep -cE '^[a-z_]+ =' "$BATS_TEST_TMPDIR/full.conf")" -gt 40 ]
	print_config "$BATS_TEST_TMPDIR/full.conf" | diff "$BATS_TEST_TMPDIR/builtin" -
}

@test "socket activation: passed sockets are served by name, and not removed at the end" {
	dir=$(mktemp -d /tmp/kvt.XXXX)
	systemd-socket-activate --seqpacket -l "$dir/a" -l "$dir/t" --fdname=admin:default -E PATH \
		"$build/kvtierd" -c /dev/null --run-dir "$dir" 2> "$dir/log" &
	pid=$!
	for _ in $(seq 100); do [ -S "$dir/t" ] && break; sleep 0.05; done
	run "$build/kvtierctl" --socket "$dir/a" version
	echo "$output"; cat "$dir/log"
	[ "$status" -eq 0 ]
	run "$build/kvtierctl" --socket "$dir/t" reload # a tenant's socket
	[ "$status" -eq 1 ]
	[ ! -e "$dir/admin.sock" ]
	kill "$pid"
	wait "$pid"
	[ -S "$dir/a" ]
	rm -rf "$dir"
}
