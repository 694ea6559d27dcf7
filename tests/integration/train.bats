#!/usr/bin/env bats
# SPDX-License-Identifier: MIT
# kvtier-train as an operator meets it: on made-up traces, killed, stopped, refused.
# shellcheck disable=SC2154

bats_require_minimum_version 1.5.0

setup_file() {
	export BUILD ROOT T
	ROOT=$(cd "$BATS_TEST_DIRNAME/../.." && pwd)
	BUILD=${KVT_BUILD:-$ROOT/build}
	T=$BATS_FILE_TMPDIR/traces
	mkdir "$T"
	"$BUILD/tests/integration/make_traces" "$T" 1 2 32 24
}

setup() {
	cd "$BATS_TEST_TMPDIR" || return 1
	quick=(--traces "$T" --device cpu --threads 2 --batch 4 --steps 120 --validate 40 --quiet)
}

train() {
	"$BUILD/kvtier-train" "$@"
}

json() { # FILE EXPRESSION over d
	python3 -c 'import json, sys; d = json.load(open(sys.argv[1])); sys.exit(not eval(sys.argv[2]))' "$1" "$2"
}

@test "trains a file that verifies, learns, reports; the same again from the same seed" {
	train "${quick[@]}" --out a.kvp --json --csv a.csv > a.json
	"$BUILD/kvtier-weights" verify a.kvp
	json a.json 'd["regret"] < 0.15 and len(d["lanes"]) == 2 and d["steps"] == 120 and d["params"] > 60000'
	json a.json 'abs(d["regret"] - d["regret_unrounded"]) < 0.01'
	[ "$(head -n 1 a.csv)" = step,lane,layer,head,regret ]
	[ "$(wc -l < a.csv)" -eq 7 ]
	[ ! -e a.kvp.part ]
	train "${quick[@]}" --threads 1 --out b.kvp
	cmp a.kvp b.kvp
	train "${quick[@]}" --seed 2 --out c.kvp
	run ! cmp -s a.kvp c.kvp
}

@test "the prior over positions learns less than the network" {
	train "${quick[@]}" --net position --out p.kvp --json > p.json
	json p.json '0.3 < d["regret"] < 0.95'
	"$BUILD/kvtier-weights" info p.kvp | grep -q '^kind *position'
}

# Start a run in the background, its pid in $pid, and wait until it has written another checkpoint than before.
start_and_wait() { # OUT OPTION...
	local out=$1 before
	shift
	before=$(stat -c %i "$out.part" 2> /dev/null || echo none)
	"$BUILD/kvtier-train" "${quick[@]}" --out "$out" --every 0.01 "$@" > "$out.log" 3>&- &
	pid=$!
	until [ -e "$out.part" ] && [ "$(stat -c %i "$out.part" 2> /dev/null)" != "$before" ]; do
		kill -0 "$pid" 2> /dev/null || return 0
		sleep 0.01
	done
}

@test "killed again and again, it ends with the file of an uninterrupted run" {
	train "${quick[@]}" --out whole.kvp
	for _ in 1 2 3; do
		start_and_wait cut.kvp
		kill -KILL "$pid"
		wait "$pid" || true
		[ -s cut.kvp.part ]
		[ ! -e cut.kvp ]
	done
	train "${quick[@]}" --out cut.kvp
	cmp whole.kvp cut.kvp
}

@test "--stop-after and SIGTERM leave a checkpoint and exit with 75" {
	train "${quick[@]}" --out whole.kvp
	run -75 train "${quick[@]}" --out s.kvp --stop-after 0.001
	[ -s s.kvp.part ] && [ ! -e s.kvp ]
	train "${quick[@]}" --out s.kvp
	cmp whole.kvp s.kvp
	start_and_wait t.kvp --steps 100000
	kill -TERM "$pid"
	local status=0
	wait "$pid" || status=$?
	[ "$status" -eq 75 ]
	[ -s t.kvp.part ]
}

@test "a checkpoint of another run is refused by field and value, a damaged one as such" {
	run -75 train "${quick[@]}" --out s.kvp --stop-after 0.001
	run -1 train "${quick[@]}" --out s.kvp --lr 2e-3
	[[ $output == *"lr: 0.001, this run has 0.002"* ]]
	run -1 train "${quick[@]}" --out s.kvp --objective mse
	[[ $output == *"objective: 0, this run has 3"* ]]
	mkdir other
	"$BUILD/tests/integration/make_traces" other 1 2 32 24 9
	run -1 train "${quick[@]}" --out s.kvp --traces other
	[[ $output == *"traces: "* ]]
	printf X | dd of=s.kvp.part bs=1 seek=5000 conv=notrunc 2> dd.log
	run -1 train "${quick[@]}" --out s.kvp
	[[ $output == *"damaged (CRC)"* ]]
	train "${quick[@]}" --out s.kvp --resume no
}

@test "a trace of another shape, a damaged one, a missing split: refused before training" {
	cp -r "$T" mixed
	mkdir odd
	"$BUILD/tests/integration/make_traces" odd 1 2 48 2
	cp odd/train/000.kvtr mixed/train/zzz.kvtr
	run -1 train "${quick[@]}" --traces mixed --out x.kvp
	[[ $output == *"zzz.kvtr: of another shape"* && $output == *k_dim* && $output == *48* ]]
	rm mixed/train/zzz.kvtr
	printf 'XXXXXXXX' | dd of=mixed/train/003.kvtr bs=1 seek=20000 conv=notrunc 2> dd.log
	run -1 train "${quick[@]}" --traces mixed --out x.kvp
	[[ $output == *003.kvtr* ]]
	rm -r mixed/valid
	run -1 train "${quick[@]}" --traces mixed --out x.kvp
	[[ $output == *"split valid"* ]]
	run -1 train "${quick[@]}" --out x.kvp --lanes 0-2
	[[ $output == *"--lanes: 2, the model has 0 to 1"* ]]
	[ ! -e x.kvp ]
}

@test "lanes one by one make the file of all at once" {
	train "${quick[@]}" --out all.kvp
	train "${quick[@]}" --lanes 1 --out one.kvp
	train "${quick[@]}" --lanes 0 --base one.kvp --out both.kvp
	cmp all.kvp both.kvp
	run -1 train "${quick[@]}" --lanes 0 --base one.kvp --rank 1 --out none.kvp
	[[ $output == *"of another model or network"* ]]
}

@test "calibration: in one go and afterwards the same, slope near 1" {
	train "${quick[@]}" --calibrate --out a.kvp --json > a.json
	json a.json '0.7 < d["slope_median"] < 1.3'
	"$BUILD/kvtier-weights" verify a.kvp
	train "${quick[@]}" --out b.kvp
	run ! cmp -s a.kvp b.kvp
	train "${quick[@]}" --calibrate-only b.kvp
	cmp a.kvp b.kvp
	train "${quick[@]}" --calibrate-policy lagkv --out lagkv.cal
	[ "$(head -c 8 lagkv.cal)" = KVTCALIB ]
	run -1 train "${quick[@]}" --calibrate-policy nobody --out x
	[[ $output == *nobody* ]]
}

@test "q-filters: a file that verifies, and points where the queries do" {
	train --traces "$T" --q-filter --out q.kvp
	"$BUILD/kvtier-weights" verify q.kvp
	# make_traces lifts element `lane` of every query of the lane by 2: the filter is -1 there.
	python3 - <<-'PY'
		import struct
		b = open("q.kvp", "rb").read()
		off, stride = struct.unpack("<QQ", b[184:200])
		for lane in range(2):
		    f = struct.unpack("<32f", b[off + lane * stride:off + lane * stride + 128])
		    assert f[lane] < -0.95, f
	PY
}

@test "wrong usage exits with 2 and says what is allowed" {
	run -2 train --out x
	[[ $output == *"--traces"* ]]
	run -2 train "${quick[@]}" --out x --objective best
	[[ $output == *"--objective: best, must be exact, rloo, rloo-batch or mse"* ]]
	run -2 train "${quick[@]}" --out x --rows 100
	run -2 train "${quick[@]}" --out x --rank 3
	[[ $output == *"--rank: 3, must be a whole number from 1 to 2"* ]]
	run -2 train "${quick[@]}" --out x --lanes 3-1
	run -1 train "${quick[@]}" --out x --proj 33
	[[ $output == *"proj: 33"* ]]
	run -2 train "${quick[@]}" --out x stray
}

@test "options: the same in --help and in kvtier-train(1)" {
	page=$ROOT/daemon/man/kvtier-train.1.scd
	train --help | grep -oE '^  --[a-z-]+' | tr -d ' ' | sort > help
	sed -n '/^# OPTIONS/,/^# EXIT/p' "$page" | grep -oE '^\*--[a-z-]+\*' | tr -d '*' | sort > options
	diff -u help options
	sed -n '/^# EXIT STATUS/,/^# [^E]/p' "$page" | grep -oE '^\*[0-9]+' | tr -d '*' > exits
	train --help | sed -n '/^Exit status/,$p' | grep -oE '(^Exit status: |, )[0-9]+' | grep -oE '[0-9]+' | diff -u - exits
	train --version | grep -q '^kvtier-train '
}
