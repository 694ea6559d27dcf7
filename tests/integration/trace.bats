#!/usr/bin/env bats
# SPDX-License-Identifier: MIT
# kvtier-trace as an operator meets it.
# shellcheck disable=SC2154

bats_require_minimum_version 1.5.0

setup() {
	root=$(cd "$BATS_TEST_DIRNAME/../.." && pwd)
	tool=${KVT_BUILD:-$root/build}/kvtier-trace
	cd "$BATS_TEST_TMPDIR" || return 1
	KVT_BUILD=${KVT_BUILD:-$root/build} python3 - "$root" <<-'PY'
		import random, struct, sys
		from array import array
		sys.path.insert(0, sys.argv[1] + "/policy/lab")
		import kvtr
		random.seed(4)
		T, K = 50, 8
		def floats(n):
		    return array("f", [random.gauss(0, 1) for _ in range(n)])
		def put(path, cuts, q=True):
		    h = kvtr.header(model="made-up", source="a page", domain="prose", layers=2, heads=1, group=2, k_dim=K,
		                    rows=T, dtype="float32", split="test", seed=7)
		    with kvtr.Writer(path, h, cuts) as w:
		        t = array("I", range(100, 100 + T))
		        w.chunk(kvtr.TOKENS, (t.buffer_info()[0], 4 * T))
		        for kind, n in ((kvtr.K, T * K), (kvtr.V, T * K)) + (((kvtr.Q, 2 * T * K),) if q else ()):
		            for lane in range(2):
		                x = floats(n)
		                w.chunk(kind, (x.buffer_info()[0], 4 * n), lane)
		put("a.kvtr", [])
		put("b.kvtr", [], q=False)
	PY
}

# Write bytes (hex) at an offset of a copy of a.kvtr.
damage() { # OFFSET HEX NAME
	cp a.kvtr "$3"
	printf '%b' "\\x$2" | dd of="$3" bs=1 seek="$1" conv=notrunc status=none
}

@test "info prints header and chunks" {
	run -0 "$tool" info a.kvtr
	[[ $output == *"model        made-up"* ]]
	[[ $output == *"split        test, seed 7"* ]]
	[[ $output == *"2 layers x 1 KV heads = 2 lanes, group 2, k_dim 8, v_dim 8, f32"* ]]
	[[ $output == *"Q            2 chunks, 6400 bytes"* ]]
	run -0 "$tool" info a.kvtr b.kvtr
	[[ $output == *"b.kvtr:"* ]]
}

@test "cat prints rows, and the bytes as they are" {
	run -0 "$tool" cat a.kvtr tokens
	[ "${#lines[@]}" -eq 50 ]
	[ "${lines[49]}" = 149 ]
	run -0 "$tool" cat a.kvtr Q --lane 1
	[ "${#lines[@]}" -eq 100 ]
	[ "$(wc -w <<< "${lines[3]}")" -eq 8 ]
	"$tool" cat a.kvtr k --lane 1 --raw > raw
	[ "$(stat -c %s raw)" -eq 1600 ]
	cmp <("$tool" cat a.kvtr k --lane 1 | head -1 | tr ' ' '\n') \
		<(python3 -c 'import struct; [print("%.9g" % x) for x in struct.unpack("8f", open("raw", "rb").read(32))]')
	run -1 "$tool" cat a.kvtr umax
	[[ $output == *"no UMAX of lane 0, cut 0"* ]]
	run -1 "$tool" cat a.kvtr k --lane 2
	run -1 bash -c "'$tool' cat a.kvtr k > /dev/full"
	[[ $output == *"No space left"* ]]
}

@test "cut adds cuts and utilities" {
	run -0 "$tool" cut a.kvtr -o c.kvtr --at 30:20 --at 20:10:before --split train --no-queries
	[ -z "$output" ]
	run -0 "$tool" verify c.kvtr
	[ -z "$output" ]
	run -0 "$tool" info c.kvtr
	[[ $output == *"split        train"* ]]
	[[ $output == *"cut 1        rows [0, 20), 10 queries, context 1, before the question"* ]]
	[[ $output == *"UMEAN        4 chunks"* ]]
	[[ $output != *"Q    "* ]]
	cmp <("$tool" cat a.kvtr v --lane 1) <("$tool" cat c.kvtr v --lane 1)
	# Each query spends an attention of 1 on the rows that it sees, most of it here on rows of the prompt.
	"$tool" cat c.kvtr umean --lane 1 --cut 0 | awk '{ s += $1; bad += $1 < 0 } END { exit !(s > 8 && s < 20 && !bad && NR == 30) }'
	paste <("$tool" cat c.kvtr umean) <("$tool" cat c.kvtr umax) | awk '$1 > $2 * 1.0001 || $2 > $1 * 2.0001 { exit 1 }'
}

@test "cut of a file with cuts keeps what it has" {
	"$tool" cut a.kvtr -o c.kvtr --at 30:20
	"$tool" cut c.kvtr -o c.kvtr --at 40:5
	run -0 "$tool" verify c.kvtr
	run -0 "$tool" cat c.kvtr cuts
	[ "$output" = $'30 20 0 0\n40 5 1 0' ]
}

@test "cut refuses what cannot be, and leaves no file" {
	run -1 "$tool" cut a.kvtr -o c.kvtr --at 40:11
	[[ $output == *"cut 0: queries: 11, must be 1..10 after prompt 40"* ]]
	run -1 "$tool" cut b.kvtr -o c.kvtr --at 30:10
	[[ $output == *"no Q of lane 0"* ]]
	run -1 "$tool" cut a.kvtr -o none/c.kvtr --at 30:10
	[[ $output == *"none/c.kvtr: No such file"* ]]
	run -2 "$tool" cut a.kvtr -o c.kvtr --at 30
	run -2 "$tool" cut a.kvtr -o c.kvtr --at 30:-1
	run -2 "$tool" cut a.kvtr -o c.kvtr --split exam
	run -2 "$tool" cut a.kvtr
	[ "$(ls)" = $'a.kvtr\nb.kvtr' ]
}

@test "verify names every damaged file, with the offset, and nothing else" {
	mkdir -p d/test
	cp a.kvtr d/good.kvtr
	echo text > d/notes.txt
	off=$(( 512 + 256 ))	# tokens come first, 200 bytes; then K
	damage $(( off + 9 )) 55 d/test/k.kvtr
	head -c 3000 a.kvtr > d/test/short.kvtr
	damage 9 01 d/version.kvtr
	run -1 "$tool" verify d
	[ "${#lines[@]}" -eq 3 ]
	[[ ${lines[0]} == "kvtier-trace: d/test/k.kvtr: offset $off: K of lane 0"* ]]
	[[ ${lines[1]} == "kvtier-trace: d/test/short.kvtr: offset 16: file_size: "*", must be 3000" ]]
	[[ ${lines[2]} == "kvtier-trace: d/version.kvtr: offset 8: version: 257, must be 1" ]]
	run -0 "$tool" verify d/good.kvtr
	[ -z "$output" ]
	run -1 "$tool" verify d/notes.txt none
	[[ $output == *"d/notes.txt: offset 5: size"* ]]
	[[ $output == *"none: No such file"* ]]
}

@test "usage" {
	run -2 "$tool"
	[[ $output == Usage:* ]]
	run -2 "$tool" burn
	run -2 "$tool" info
	run -2 "$tool" cat a.kvtr
	run -2 "$tool" cat a.kvtr secrets
	run -2 "$tool" cat a.kvtr k --lane -1
	run -2 "$tool" cat a.kvtr k --lane 1x
	run -0 "$tool" --help
	run -0 "$tool" --version
}

@test "options and exit status in --help and in kvtier-trace(1)" {
	page=$root/daemon/man/kvtier-trace.1.scd
	"$tool" --help | sed -nE '/^ +-/p' | grep -oE '(^|[ ,])-{1,2}[a-z][a-z-]*' | tr -d ' ,' | sort > help.txt
	sed -n '/^# OPTIONS/,/^# [^O]/p' "$page" | grep -E '^\*-' | grep -oE '\*-{1,2}[a-z][a-z-]*\*' | tr -d '*' |
		grep -vE '^(-h|--help|--version)$' | sort > man.txt
	[ -s help.txt ]
	diff -u help.txt man.txt
	"$tool" --help | grep -oE '[0-9] [a-z]' | cut -c1 | sort > help.txt
	sed -n '/^# EXIT STATUS/,/^# [^E]/p' "$page" | grep -oE '^\*[0-9]' | tr -d '*' | sort > man.txt
	diff -u help.txt man.txt
}
