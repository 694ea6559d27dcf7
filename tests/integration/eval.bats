#!/usr/bin/env bats
# SPDX-License-Identifier: MIT
# kvtier-eval on made-up traces: what it writes, what it refuses, and that its page says the same as it does.

setup_file() {
	build=${KVT_BUILD:-$BATS_TEST_DIRNAME/../../build}
	export build traces=$BATS_FILE_TMPDIR/traces
	mkdir "$traces"
	"$build/tests/integration/eval_traces" "$traces" 4 6 700
	for kind in kvp position qfilter; do
		"$build/kvtier-weights" random --layers 2 --heads 2 --dim 16 --model made-up --kind $kind \
			-o "$BATS_FILE_TMPDIR/$kind.kvp"
	done
	"$build/kvtier-eval" --quiet --resamples 500 --threads 2 --out "$BATS_FILE_TMPDIR/out" \
		--weights "net=$BATS_FILE_TMPDIR/kvp.kvp" --weights "position=$BATS_FILE_TMPDIR/position.kvp" \
		--weights "qfilter=$BATS_FILE_TMPDIR/qfilter.kvp" "$traces"
	export out=$BATS_FILE_TMPDIR/out
}

field() { # FILE COLUMN SLICE POLICY [METRIC]: one value
	awk -F, -v c="$2" -v s="$3" -v p="$4" -v m="${5:-}" \
		'$1 == s && $2 == p && (m == "" || $4 == m) { print $c; exit }' "$out/$1"
}

@test "a run leaves every table, with a value for every policy" {
	for f in summary.md policies.csv budgets.csv gap.csv lanes.csv wins.csv selected.csv plot_evicted.csv \
		plot_lanes.csv plot_gap.csv; do
		[ -s "$out/$f" ]
	done
	for p in net position qfilter random streaming knorm keydiff lagkv cur cur-local vrange vnorm tova h2o snapkv \
		expected-attention defensive attainable-oracle oracle best-heuristic; do
		[ -n "$(field policies.csv 5 main $p regret)" ]
		grep -q "^| $p |" "$out/summary.md"
	done
	[ "$(wc -l < "$out/selected.csv")" -eq 5 ]
	[ "$(cat "$out/policies.csv" "$out/lanes.csv" | grep -ci nan)" -eq 0 ]
}

@test "the oracle has no regret, random about one, and intervals hold their means" {
	[ "$(field policies.csv 5 all oracle regret)" = 0 ]
	awk -v r="$(field policies.csv 5 all random regret)" 'BEGIN { exit !(r > 0.9 && r < 1.1) }'
	awk -F, 'NR > 1 && ($5 < $6 - 1e-5 || $5 > $7 + 1e-5) { bad = 1 } END { exit bad }' "$out/policies.csv"
}

@test "a policy that is the best heuristic closes none of its gap; the oracle's rows are left out" {
	best=$(awk -F, 'NR == 2 { print $2 }' "$out/selected.csv")
	[ "$(awk -F, 'NR > 1 { print $2 }' "$out/selected.csv" | sort -u | wc -l)" -eq 1 ] # one for all lanes, by design
	share=$(awk -F, -v p="$best" '$1 == "main" && $2 == p && $3 == "oracle" { print $4 }' "$out/gap.csv")
	[ "$share" = 0 ] || [ "$share" = -0 ]
	[ "$(cat "$out/gap.csv" "$out/wins.csv" | grep -c '^main,oracle,')" -eq 0 ]
}

@test "the held-out domain is the one without validation traces" {
	[ "$(field policies.csv 5 held-out-domain net regret)" = "$(field policies.csv 5 domain-letters net regret)" ]
	[ -n "$(field policies.csv 5 domain-code net regret)" ]
}

@test "the same seed gives the same tables, and an earlier choice can be taken over" {
	"$build/kvtier-eval" --quiet --resamples 500 --threads 1 --out "$BATS_TEST_TMPDIR/again" \
		--policies all --weights "net=$BATS_FILE_TMPDIR/kvp.kvp" \
		--weights "position=$BATS_FILE_TMPDIR/position.kvp" --weights "qfilter=$BATS_FILE_TMPDIR/qfilter.kvp" \
		"$traces"
	diff "$out/policies.csv" "$BATS_TEST_TMPDIR/again/policies.csv"
	diff "$out/gap.csv" "$BATS_TEST_TMPDIR/again/gap.csv"
	"$build/kvtier-eval" --quiet --resamples 500 --out "$BATS_TEST_TMPDIR/third" --lanes 1,3 --limit 2 --queries 0 \
		--policies star --select-from "$out/selected.csv" "$traces"
	[ "$(cut -d, -f1 "$BATS_TEST_TMPDIR/third/lanes.csv" | sort -u | tr '\n' ' ')" = "1 3 lane " ]
	[ "$(grep -c ',error_' "$BATS_TEST_TMPDIR/third/policies.csv")" -eq 0 ]
}

refused() { # WORD... -- ARGUMENT...: exit status 1 and every word in one line
	words=()
	while [ "$1" != -- ]; do
		words+=("$1")
		shift
	done
	shift
	run "$build/kvtier-eval" --quiet --out "$BATS_TEST_TMPDIR/refused" "$@"
	echo "$output"
	[ "$status" -eq 1 ]
	for w in "${words[@]}"; do
		[[ "${lines[-1]}" == *"$w"* ]]
	done
}

@test "bad weights and traces of another shape are refused by name" {
	head -c 1000 "$BATS_FILE_TMPDIR/kvp.kvp" > "$BATS_TEST_TMPDIR/short.kvp"
	refused short.kvp size -- --weights "x=$BATS_TEST_TMPDIR/short.kvp" "$traces"
	"$build/kvtier-weights" random --layers 3 --heads 2 --dim 16 --model made-up -o "$BATS_TEST_TMPDIR/deep.kvp"
	refused deep.kvp layers 3 2 -- --weights "x=$BATS_TEST_TMPDIR/deep.kvp" "$traces"
	refused --policies nobody -- --policies random,nobody "$traces"
	refused --lanes 4 -- --lanes 2-4 "$traces"
	refused calib.csv -- --select-from "$BATS_TEST_TMPDIR/calib.csv" "$traces"
	refused "$BATS_TEST_TMPDIR/none" -- "$BATS_TEST_TMPDIR/none"
}

@test "wrong usage ends with 2 and says what" {
	for args in "" "--out x" "--out x a b" "$traces" "--out x --split train $traces" "--out x --weights y $traces" \
		"--out x --resamples 5 $traces" "--out x --threads 0 $traces" "--nothing"; do
		# shellcheck disable=SC2086
		run "$build/kvtier-eval" $args
		[ "$status" -eq 2 ]
		[ -n "$output" ]
	done
}

@test "plots are drawn where gnuplot is, and their absence is said where it is not" {
	mkdir "$BATS_TEST_TMPDIR/nothing"
	PATH=$BATS_TEST_TMPDIR/nothing run "$build/kvtier-eval" --quiet --resamples 100 --policies star --queries 0 \
		--out "$BATS_TEST_TMPDIR/plain" --plots "$BATS_TEST_DIRNAME/../../policy/lab/plots" "$traces"
	[ "$status" -eq 0 ]
	[[ "$output" == *"gnuplot is not installed"* ]]
	if ! command -v gnuplot > /dev/null; then
		skip "gnuplot is not installed: no plots to look at"
	fi
	"$build/kvtier-eval" --quiet --resamples 100 --out "$BATS_TEST_TMPDIR/drawn" \
		--weights "net=$BATS_FILE_TMPDIR/kvp.kvp" --plots "$BATS_TEST_DIRNAME/../../policy/lab/plots" "$traces"
	for f in evicted lanes gap; do
		grep -q '<svg' "$BATS_TEST_TMPDIR/drawn/$f.svg"
		[ "$(stat -c %s "$BATS_TEST_TMPDIR/drawn/$f.svg")" -lt 200000 ]
	done
}

@test "options and exit status: the same in --help and in kvtier-eval(1)" {
	page=$BATS_TEST_DIRNAME/../../daemon/man/kvtier-eval.1.scd
	"$build/kvtier-eval" --help | sed -nE '/^ +-/p' | grep -oE '(^|[ ,])--[a-z][a-z-]*' | tr -d ' ,' | sort \
		> "$BATS_TEST_TMPDIR/help"
	sed -n '/^# OPTIONS/,/^# [^O]/p' "$page" | grep -oE '^\*--[a-z-]+\*' | tr -d '*' | sort > "$BATS_TEST_TMPDIR/man"
	[ -s "$BATS_TEST_TMPDIR/help" ]
	diff -u "$BATS_TEST_TMPDIR/help" "$BATS_TEST_TMPDIR/man"
	for n in 0 1 2; do
		grep -q "^\*$n\*" "$page"
		"$build/kvtier-eval" --help | grep '^Exit status' | grep -q "$n "
	done
}
