#!/usr/bin/env bats
# SPDX-License-Identifier: MIT
# kvtierd and kvtierctl as an operator meets them: a real daemon in a private directory.
# shellcheck disable=SC2030,SC2031,SC2154

setup_file() {
	export ROOT BUILD SHARED
	ROOT=$(cd "$BATS_TEST_DIRNAME/../.." && pwd)
	BUILD=${KVT_BUILD:-$ROOT/build}
	SHARED=$(mktemp -d /tmp/kvt.XXXX)
	cat > "$SHARED/c.conf" <<-CONF
		[kvtierd]
		run_dir = $SHARED
		[dram]
		size = 64M
		segment = 4M
		[tenant default]
		socket_mode = 0666
	CONF
	chmod 755 "$SHARED"
	"$BUILD/kvtierd" -c "$SHARED/c.conf" 2> "$SHARED/log" 3>&- &
	echo $! > "$SHARED/pid"
	wait_for "$SHARED/admin.sock"
}

teardown_file() {
	kill "$(cat "$SHARED/pid")"
	for _ in $(seq 100); do
		kill -0 "$(cat "$SHARED/pid")" 2> /dev/null || break
		sleep 0.05
	done
	rm -rf "$SHARED"
}

setup() {
	dir=$(mktemp -d /tmp/kvt.XXXX)
	pids=()
}

teardown() {
	for p in "${pids[@]}"; do
		kill -9 "$p" 2> /dev/null || true
		wait "$p" 2> /dev/null || true
	done
	chmod -R u+rwx "$dir"
	rm -rf "$dir"
}

wait_for() { # PATH of a socket: until somebody answers there
	for _ in $(seq 200); do
		"$BUILD/kvtierctl" --socket "$1" --timeout 1 version > /dev/null 2>&1 && return 0
		sleep 0.02
	done
	echo "nobody answers on $1"
	return 1
}

ctl() { # the shared daemon, admin socket; stdout and stderr apart
	run --separate-stderr "$BUILD/kvtierctl" --socket "$SHARED/admin.sock" "$@"
}

start() { # a daemon of this test's own, with these options; pid in $!
	"$BUILD/kvtierd" --run-dir "$dir" "$@" 2> "$dir/log" 3>&- &
	pids+=($!)
	daemon=$!
}

refuses_to_start() { # STATUS LINE-PATTERN OPTION...
	local want=$1 line=$2
	shift 2
	run --separate-stderr timeout 10 "$BUILD/kvtierd" "$@"
	echo "$status: $stderr"
	[ "$status" -eq "$want" ]
	[ "${#stderr_lines[@]}" -eq 1 ]
	[[ $stderr =~ $line ]]
	[ -z "$output" ]
}

bats_require_minimum_version 1.5.0

# ---- options and usage -----------------------------------------------------------------

@test "--version of both" {
	run "$BUILD/kvtierd" --version
	[[ $status -eq 0 && $output =~ ^kvtierd\ [0-9]+\.[0-9]+\.[0-9]+$ ]]
	run "$BUILD/kvtierctl" --version
	[[ $status -eq 0 && $output =~ ^kvtierctl\ [0-9]+\.[0-9]+\.[0-9]+$ ]]
}

@test "--help of both fits 80 columns" {
	for tool in kvtierd kvtierctl; do
		run "$BUILD/$tool" --help
		[ "$status" -eq 0 ]
		[ "$(echo "$output" | awk 'length > 80' | wc -l)" -eq 0 ]
		[ "${#lines[@]}" -gt 5 ]
	done
}

@test "bad usage is status 2 and names what is wrong" {
	ctl
	[[ $status -eq 2 && $stderr =~ "no verb" ]]
	ctl bogus
	[[ $status -eq 2 && $stderr =~ 'verb "bogus": unknown' ]]
	ctl show
	[[ $status -eq 2 && $stderr == "kvtierctl: usage: kvtierctl show SEQ [lanes]" ]]
	ctl freeze on off
	[ "$status" -eq 2 ]
	ctl --bogus status
	[ "$status" -eq 2 ]
	ctl --timeout 0 status
	[[ $status -eq 2 && $stderr =~ '--timeout: "0", must be' ]]
	ctl --count x watch
	[[ $status -eq 2 && $stderr =~ '--count: "x", must be' ]]
	refuses_to_start 2 'takes no arguments' extra
	run "$BUILD/kvtierd" --bogus
	[ "$status" -eq 2 ]
}

# ---- a daemon that is not there, silent, or not a daemon ----------------------------------

@test "no daemon is status 3" {
	run --separate-stderr "$BUILD/kvtierctl" --socket "$dir/none.sock" status
	[[ $status -eq 3 && $stderr == "kvtierctl: $dir/none.sock: No such file or directory" ]]
	python3 -c "import socket; socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET).bind('$dir/dead.sock')"
	run --separate-stderr "$BUILD/kvtierctl" --socket "$dir/dead.sock" status
	[[ $status -eq 3 && $stderr =~ "no daemon listens there" ]]
	[ -z "$output" ]
}

@test "a silent daemon is status 4" {
	python3 -c "
import socket, time
s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.bind('$dir/s'); s.listen(1); time.sleep(30)" 3>&- &
	pids+=($!)
	for _ in $(seq 100); do [ -S "$dir/s" ] && break; sleep 0.05; done
	sleep 0.1
	run --separate-stderr "$BUILD/kvtierctl" --socket "$dir/s" --timeout 0.3 status
	[[ $status -eq 4 && $stderr == "kvtierctl: $dir/s: no answer within 300 ms" ]]
}

@test "an answer that is none of kvtierd's is status 3, and nothing of it is printed" {
	python3 - "$dir/s" 3>&- <<-'PY' &
		import os, socket, struct, sys
		s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.bind(sys.argv[1]); s.listen(8)
		def head(req, length, status=0, cookie=None):
		    c = struct.unpack("<I", req[12:16])[0] if cookie is None else cookie
		    return struct.pack("<IHHIIiI", 0x3154564B, 1, 0x8020, length, c, status, 0) + bytes(200)
		def memfd(data, seal):
		    fd = os.memfd_create("j", os.MFD_ALLOW_SEALING); os.write(fd, data)
		    if seal:
		        import fcntl; fcntl.fcntl(fd, 1033, 2 | 4)
		    return fd
		bad = [
		    lambda r: (b"garbage", []),
		    lambda r: (head(r, 232, cookie=99) + struct.pack("<Q", 0), []),
		    lambda r: (head(r, 232) + struct.pack("<Q", 100), []),
		    lambda r: (head(r, 232) + struct.pack("<Q", 2), [memfd(b"{}", False)]),
		    lambda r: (head(r, 232) + struct.pack("<Q", 4096), [memfd(b"{}", True)]),
		    lambda r: (head(r, 232) + struct.pack("<Q", 5), [memfd(b"{\"a\":", True)]),
		    lambda r: (b"", []),
		]
		for make in bad:
		    c, _ = s.accept(); req = c.recv(65536); data, fds = make(req)
		    if data: socket.send_fds(c, [data], fds)
		    c.close()
	PY
	pids+=($!)
	for _ in $(seq 100); do [ -S "$dir/s" ] && break; sleep 0.05; done
	sleep 0.1
	for _ in 1 2 3 4 5 6 7; do
		run --separate-stderr "$BUILD/kvtierctl" --socket "$dir/s" --timeout 5 status
		echo "$status: $stderr"
		[ "$status" -eq 3 ]
		[ -z "$output" ]
		[ "${#stderr_lines[@]}" -eq 1 ]
	done
}

# ---- verbs without a sequence ------------------------------------------------------------------

@test "status, ls, version, policy list: tables of at most 80 printable columns" {
	for verb in status ls version "policy list" "verify status"; do
		# shellcheck disable=SC2086
		ctl $verb
		echo "$verb: $status $stderr"
		[ "$status" -eq 0 ]
		[ -n "$output" ]
		[ -z "$stderr" ]
		[ "$(echo "$output" | LC_ALL=C grep -cP '[^ -~]')" -eq 0 ]
		[ "$(echo "$output" | awk 'length > 80' | wc -l)" -eq 0 ]
	done
}

@test "--json of every looking verb parses, with the fields that the page promises" {
	ctl --json status
	echo "$output" | jq -e '.version and .uptime_ns > 0 and .mode == "publish" and (.frozen | not) and
		(.tiers | map(.name)) == ["device", "dram", "nvme"] and .tiers[1].capacity_bytes >= 60000000 and
		(.plans.decided >= 0) and (.misses | keys == ["client_mutated", "corrupt", "io", "nospace", "stale"])'
	ctl ls --json
	echo "$output" | jq -e '.seqs | type == "array"'
	ctl --json version
	echo "$output" | jq -e '.protocol == 2'
	ctl --json policy list
	echo "$output" | jq -e '(.policies | map(select(.default)) | length == 1) and
		(.policies | map(.name) | contains(["streaming", "knorm"]))'
	ctl --json verify status
	echo "$output" | jq -e 'has("running") and has("bad")'
}

@test "freeze on and off show in status" {
	ctl freeze on
	[[ $status -eq 0 && -z $output ]]
	ctl --json status
	echo "$output" | jq -e .frozen
	ctl status
	[[ $output =~ FROZEN ]]
	ctl --json freeze off
	[ "$output" = '{"ok":true}' ]
	ctl --json status
	echo "$output" | jq -e '.frozen | not'
	ctl freeze maybe
	[[ $status -eq 1 && $stderr == "kvtierctl: usage: freeze on|off" ]]
}

@test "the default policy can be set; an unknown one is refused" {
	ctl --json policy list
	before=$(echo "$output" | jq -r '.policies[] | select(.default) | .name')
	ctl policy set knorm
	[ "$status" -eq 0 ]
	ctl --json policy list
	echo "$output" | jq -e '.policies[] | select(.default) | .name == "knorm"'
	ctl policy set "$before"
	[ "$status" -eq 0 ]
	ctl policy set no-such-policy
	[[ $status -eq 1 && $stderr =~ no-such-policy ]]
	ctl policy load "$dir/none.kvp"
	[[ $status -eq 1 && $stderr =~ none.kvp ]]
}

@test "verify of everything ends with no bad page" {
	ctl verify
	[[ $status -eq 0 && $output =~ ^done:.*\ 0\ bad$ ]]
}

@test "watch prints events, as lines and as JSON" {
	ctl freeze on
	ctl freeze off
	ctl --past --count 2 watch
	[[ $status -eq 0 && ${#lines[@]} -eq 2 ]]
	ctl --past --count 2 --json watch
	echo "$output" | jq -es 'length == 2 and (map(.time_ns > 0 and has("type") and has("rows")) | all)'
	ctl --past --json --count 1 watch
	[ "$(echo "$output" | jq -r .type)" != "?" ]
}

@test "watch ends with status 3 when the daemon goes" {
	start
	wait_for "$dir/admin.sock"
	"$BUILD/kvtierctl" --socket "$dir/admin.sock" watch > "$dir/out" 2> "$dir/err" 3>&- &
	watcher=$!
	sleep 0.3
	kill "$daemon"
	wait "$daemon"
	rc=0
	wait "$watcher" || rc=$?
	[ "$rc" -eq 3 ]
	grep -q 'hung up' "$dir/err"
}

@test "what does not exist is refused with status 1 and one line" {
	for args in "show 0x1234567800000001" "drop deadbeef" "pin 0x1234567800000001 0 5" "verify start deadbeef" \
		"budget deadbeef device=1" "demote deadbeef" "promote deadbeef" "unpin deadbeef 0 1"; do
		# shellcheck disable=SC2086
		ctl $args
		echo "$args: $status $stderr"
		[ "$status" -eq 1 ]
		[ -z "$output" ]
		[ "${#stderr_lines[@]}" -eq 1 ]
	done
	ctl show zz
	[[ $status -eq 1 && $stderr =~ 'SEQ: "zz", must be a handle' ]]
}

@test "every mutation leaves one audit line with user, process and result" {
	ctl freeze on
	ctl freeze off
	ctl drop deadbeef
	grep -qE "^<5>audit: uid $(id -u) pid [0-9]+ admin: freeze on: ok\$" "$SHARED/log"
	grep -qE "^<4>audit: uid $(id -u) pid [0-9]+ admin: drop deadbeef: refused: " "$SHARED/log"
	before=$(grep -c audit: "$SHARED/log")
	ctl status
	ctl ls
	ctl policy list
	[ "$(grep -c audit: "$SHARED/log")" -eq "$before" ]
}

@test "a tenant's socket: looks at its own, steers nothing of the daemon" {
	tenant() { run --separate-stderr "$BUILD/kvtierctl" --socket "$SHARED/kvtierd.sock" "$@"; }
	for args in drain reload "freeze on" watch "policy set knorm" "policy load /x" verify "verify start"; do
		# shellcheck disable=SC2086
		tenant $args
		echo "$args: $status $stderr"
		[ "$status" -eq 1 ]
		[[ $stderr =~ "only on the admin socket" ]]
	done
	tenant --json status
	[ "$status" -eq 0 ]
	echo "$output" | jq -e '.tenant == "default" and (has("clients") | not) and (has("plans") | not)'
	tenant status
	[ "$status" -eq 0 ]
	tenant version
	[ "$status" -eq 0 ]
}

# ---- verbs on a sequence -----------------------------------------------------------------------

client() { # ROWS [leased]: key in $key, pid in $client
	"$BUILD/tests/integration/ctl_client" "$SHARED/kvtierd.sock" "$@" > "$dir/key" 2> "$dir/client" 3>&- &
	client=$!
	pids+=("$client")
	for _ in $(seq 200); do [ -s "$dir/key" ] && break; sleep 0.05; done
	cat "$dir/client"
	key=$(cat "$dir/key")
	[ "${#key}" -eq 32 ]
}

until_json() { # JQ-CONDITION VERB...: asks again until it holds
	local cond=$1
	shift
	for _ in $(seq 100); do
		ctl --json "$@"
		[ "$status" -eq 0 ] && echo "$output" | jq -e "$cond" > /dev/null && return 0
		sleep 0.05
	done
	echo "never: $cond"
	echo "$output"
	cat "$dir/client"
	return 1
}

@test "a sequence by handle, key and prefix; ls, show and lanes agree" {
	client 1000
	ctl --json ls
	handle=$(echo "$output" | jq -r ".seqs[] | select(.key == \"$key\") | .handle")
	[[ $handle == 0x* ]]
	for name in "$handle" "$key" "${key:0:12}" "${key^^}"; do
		ctl --json show "$name"
		[ "$(echo "$output" | jq -r .key)" = "$key" ]
	done
	until_json '.tiers.device.rows == 4 * 500 and .tiers.dram.rows == 4 * 500' show "$key" lanes
	echo "$output" | jq -e '.rows == 1000 and .lanes == 4 and .lifetime == "ephemeral" and .policy == "streaming" and
		.tenant == "default" and .model == "ctl-test" and .budget.device == 500 and .budget.dram == null and
		(.lane | length == 4 and (map(.device == 500 and .dram == 500 and .nvme == 0 and .dropped == 0) | all))'
	ctl show "$key" lanes
	[[ $status -eq 0 && $output =~ $key && $output =~ DROPPED ]]
	[ "$(echo "$output" | awk 'length > 80' | wc -l)" -eq 0 ]
	ctl ls
	[[ $output =~ $handle ]]
	until_json '.clients == 1 and .sequences == 1 and .loop_max_ns > 0' status # kvtierctl itself is no client
	run --separate-stderr "$BUILD/kvtierctl" --socket "$SHARED/kvtierd.sock" --json status
	echo "$output" | jq -e '.sequences == 1 and .tiers[1].rows == 2000'
}

@test "budget moves rows, and back" {
	client 1000
	ctl budget "$key" device=100
	[ "$status" -eq 0 ]
	until_json '.tiers.device.rows == 400 and .tiers.dram.rows == 3600 and .budget.device == 100' show "$key"
	ctl budget "$key" device=all
	until_json '.tiers.device.rows == 4000 and .rows_dropped == 0 and .misses == 0' show "$key"
	ctl verify start "$key"
	[[ $status -eq 0 && $output =~ \ 0\ bad$ ]]
	kill -0 "$client" # it checks every row after every plan
	ctl budget "$key" device=1048577
	[[ $status -eq 1 && $stderr =~ "must be rows from 0 to 1048576, or all" ]]
}

@test "demote and promote" {
	client 1000
	ctl demote "$key" 50
	[ "$status" -eq 0 ]
	until_json '.resident_max <= 50' show "$key"
	ctl promote "$key"
	[ "$status" -eq 0 ]
	until_json '.resident_max == 500' show "$key"
	kill -0 "$client"
}

@test "pin keeps rows on the device that the policy would demote" {
	client 1000
	ctl pin "$key" 300 100
	[ "$status" -eq 0 ]
	until_json '.rows_pinned == 100' show "$key"
	ctl unpin "$key" 300 100
	until_json '.rows_pinned == 0' show "$key"
	ctl pin "$key" 1048575 2
	[[ $status -eq 1 && $stderr =~ 'ROWS: "2", must be' ]]
}

@test "policy set of one sequence, from the tenant's own socket too" {
	client 200
	ctl policy set knorm "$key"
	[ "$status" -eq 0 ]
	ctl budget "$key" device=80 # it counts from the next plan on
	until_json '.policy == "knorm"' show "$key"
	run "$BUILD/kvtierctl" --socket "$SHARED/kvtierd.sock" policy set streaming "$key"
	[ "$status" -eq 0 ]
	run "$BUILD/kvtierctl" --socket "$SHARED/kvtierd.sock" budget "$key" device=70
	[ "$status" -eq 0 ]
	until_json '.policy == "streaming"' show "$key"
}

@test "another user on the same socket neither sees nor steers it" {
	[ "$(id -u)" -eq 0 ] || skip "needs another user"
	nobody=(setpriv --reuid=65534 --regid=65534 --clear-groups)
	"${nobody[@]}" test -x "$BUILD/kvtierctl" || skip "nobody may not run binaries in $BUILD"
	client 200
	other() { run --separate-stderr "${nobody[@]}" "$BUILD/kvtierctl" --socket "$SHARED/kvtierd.sock" "$@"; }
	other --json ls
	echo "$output" | jq -e '.seqs == []'
	other --json status
	echo "$output" | jq -e '.sequences == 0 and (.tiers | map(.rows == 0) | all)'
	for args in "show $key" "drop $key" "budget $key device=1" "verify start $key"; do
		# shellcheck disable=SC2086
		other $args
		[[ $status -eq 1 && $stderr =~ "no such sequence" ]]
	done
	ctl show "$key"
	[ "$status" -eq 0 ]
}

@test "drop ends the sequence" {
	client 200
	ctl drop "$key"
	[ "$status" -eq 0 ]
	ctl show "$key"
	[ "$status" -eq 1 ]
	for _ in $(seq 100); do kill -0 "$client" 2> /dev/null || break; sleep 0.05; done
	grep -q 'the sequence is gone' "$dir/client"
}

@test "a leased sequence outlives its client, an ephemeral one does not" {
	client 200 leased
	leased=$key
	kill -9 "$client"
	until_json '.client == "-" and .lifetime == "leased" and .ttl_left_s > 0 and .tiers.device.rows == 0' show "$leased"
	client 200
	kill -9 "$client"
	until_json ".seqs | map(select(.key == \"$key\")) | length == 0" ls
	ctl drop "$leased"
	[ "$status" -eq 0 ]
}

# ---- starting and ending --------------------------------------------------------------------------

@test "a second daemon on the same sockets is refused; the first goes on" {
	refuses_to_start 1 "^<3>socket $SHARED/admin.sock \(admin\): another kvtierd listens there\$" -c "$SHARED/c.conf"
	ctl version
	[ "$status" -eq 0 ]
}

@test "a second daemon on the same NVMe directory is refused; status tells of the tier" {
	mkdir "$dir/nvme" "$dir/other"
	printf '[nvme]\nenabled = yes\npath = %s\nsize = 16M\n' "$dir/nvme" > "$dir/c.conf"
	start -c "$dir/c.conf"
	wait_for "$dir/admin.sock"
	refuses_to_start 1 "nvme path $dir/nvme: in use by another daemon" --run-dir "$dir/other" -c "$dir/c.conf"
	[ -z "$(ls -A "$dir/other")" ]
	run "$BUILD/kvtierctl" --socket "$dir/admin.sock" --json status
	echo "$output" | jq -e '.tiers[2] | .capacity_bytes > 0 and .free_bytes == .capacity_bytes and (.offline | not)'
}

@test "a killed daemon's sockets are replaced" {
	start
	wait_for "$dir/admin.sock"
	kill -9 "$daemon"
	wait "$daemon" || true
	[ -S "$dir/admin.sock" ]
	start
	wait_for "$dir/admin.sock"
}

@test "a missing directory and a file in the socket's place are one clear line" {
	refuses_to_start 1 "^<3>socket $dir/none/admin.sock \(admin\): No such file or directory\$" --run-dir "$dir/none"
	touch "$dir/admin.sock"
	refuses_to_start 1 "admin.sock \(admin\): the path exists and is not a socket\$" --run-dir "$dir"
	refuses_to_start 2 '^<3>--run-dir: "rel", must be an absolute path' --run-dir rel
	printf '[kvtierd]\nadmin_group = nosuchgroup\n' > "$dir/g.conf"
	rm "$dir/admin.sock"
	refuses_to_start 1 'group "nosuchgroup": no such group$' --run-dir "$dir" -c "$dir/g.conf"
	[ ! -e "$dir/admin.sock" ]
}

@test "no permission for the directory is one clear line; none for the socket is status 3" {
	as=()
	if [ "$(id -u)" -eq 0 ]; then
		command -v setpriv > /dev/null || skip "root, and no setpriv to become nobody"
		as=(setpriv --reuid=65534 --regid=65534 --clear-groups)
		"${as[@]}" test -x "$BUILD/kvtierctl" || skip "nobody may not run binaries in $BUILD"
	fi
	chmod 555 "$dir"
	run --separate-stderr "${as[@]}" timeout 10 "$BUILD/kvtierd" --run-dir "$dir"
	echo "$stderr"
	[ "$status" -eq 1 ]
	[ "$stderr" = "<3>socket $dir/admin.sock (admin): Permission denied" ]
	[ "$(id -u)" -eq 0 ] || skip "needs another user"
	run --separate-stderr "${as[@]}" "$BUILD/kvtierctl" --socket "$SHARED/admin.sock" status
	[[ $status -eq 3 && $stderr =~ "Permission denied" ]]
}

@test "bad configuration is status 2 and one line with file, line, key and limit" {
	bad() { # LINE-PATTERN CONTENT
		printf %b "$2" > "$dir/bad.conf"
		refuses_to_start 2 "$1" -c "$dir/bad.conf"
		run --separate-stderr "$BUILD/kvtierd" --check-config -c "$dir/bad.conf"
		[[ $status -eq 2 && -z $output && $stderr == "$dir/bad.conf:"* ]]
	}
	bad 'bad.conf:2: key "colour" in \[dram\]: unknown$' '[dram]\ncolour = red\n'
	bad 'bad.conf:1: section \[drams\]: unknown; did you mean \[dram\]\?$' '[drams]\n'
	bad 'bad.conf:2: size: "lots", must be bytes \(K, M, G, T\), 4M to 64T$' '[dram]\nsize = lots\n'
	bad 'bad.conf:3: free_min: 20.0, must be at most free_low' '[dram]\n\nfree_min = 20\n'
	bad 'bad.conf:2: neither \[section\] nor key = value$' '[dram]\nsize\n'
	refuses_to_start 2 "^<3>$dir/none.conf: No such file or directory\$" -c "$dir/none.conf"
}

@test "--check-config and --print-config start nothing" {
	run "$BUILD/kvtierd" --check-config -c "$SHARED/c.conf"
	[[ $status -eq 0 && $output == "$SHARED/c.conf: ok" ]]
	run "$BUILD/kvtierd" --print-config --run-dir "$dir"
	[ "$status" -eq 0 ]
	echo "$output" | grep -qx "run_dir = $dir"
	[ -z "$(ls -A "$dir")" ]
}

@test "SIGTERM and SIGINT end it with status 0 and take the sockets away" {
	for sig in TERM INT; do
		start
		wait_for "$dir/admin.sock"
		kill -$sig "$daemon"
		wait "$daemon"
		[ ! -e "$dir/admin.sock" ]
		[ ! -e "$dir/kvtierd.sock" ]
		grep -q drained "$dir/log"
	done
}

@test "drain ends it with status 0" {
	start
	wait_for "$dir/admin.sock"
	run "$BUILD/kvtierctl" --socket "$dir/admin.sock" drain
	[ "$status" -eq 0 ]
	wait "$daemon"
	grep -qE 'audit: .* drain: ok$' "$dir/log"
}

@test "reload: by verb and SIGHUP; what needs a restart or is wrong changes nothing" {
	printf '[policy]\nslack = 10\n' > "$dir/c.conf"
	start -c "$dir/c.conf"
	wait_for "$dir/admin.sock"
	mine() { run --separate-stderr "$BUILD/kvtierctl" --socket "$dir/admin.sock" "$@"; }
	printf '[kvtierd]\nmode = observe\n' > "$dir/c.conf"
	mine reload
	[ "$status" -eq 0 ]
	mine --json status
	echo "$output" | jq -e '.mode == "observe"'
	mine reload
	[[ $status -eq 0 && $output == "nothing changed" ]]
	printf '[kvtierd]\nmode = observe\n[policy]\nslack = 20\n' > "$dir/c.conf"
	mine reload
	[[ $status -eq 0 && $output == "[policy] slack: 64 -> 20" ]]
	grep -qF 'configuration: [policy] slack: 64 -> 20' "$dir/log"
	printf '[dram]\nsize = 1G\n' > "$dir/c.conf"
	mine reload
	[[ $status -eq 1 && $stderr == *'[dram] size: "4G" cannot become "1G" without a restart'* ]]
	printf '[dram]\nsize = 1Q\n' > "$dir/c.conf"
	mine reload
	[[ $status -eq 1 && $stderr == *"c.conf:2: size:"* ]]
	mine --json status
	echo "$output" | jq -e '.mode == "observe"'
	printf '[kvtierd]\nmode = publish\n' > "$dir/c.conf"
	kill -HUP "$daemon"
	for _ in $(seq 100); do
		mine --json status
		echo "$output" | jq -e '.mode == "publish"' && break
		sleep 0.05
	done
	echo "$output" | jq -e '.mode == "publish"'
}

@test "systemd is told: ready, status, watchdog, reload, stop" {
	python3 - "$BUILD/kvtierd" "$dir" 3>&- <<-'PY'
		import os, signal, socket, subprocess, sys, time
		kvtierd, run = sys.argv[1:]
		s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); s.bind(run + "/n"); s.settimeout(10)
		env = dict(os.environ, NOTIFY_SOCKET=run + "/n", WATCHDOG_USEC="300000")
		p = subprocess.Popen([kvtierd, "--run-dir", run], env=env)
		def expect(word):
		    while True:
		        m = s.recv(4096).decode()
		        if word in m.split("\n") or any(l.startswith(word) for l in m.split("\n") if word.endswith("=")):
		            return
		try:
		    expect("READY=1"); expect("STATUS="); expect("WATCHDOG=1"); expect("WATCHDOG=1")
		    p.send_signal(signal.SIGHUP); expect("RELOADING=1"); expect("READY=1")
		    p.send_signal(signal.SIGTERM); expect("STOPPING=1")
		    assert p.wait(30) == 0
		finally:
		    p.kill()
	PY
}
