#!/usr/bin/env bats
# SPDX-License-Identifier: MIT
# Manual pages, --help, the configuration table, the verb list and the default configuration say the same.
# Each comparison is a diff of two sorted lists, so what is missing on either side shows.

setup() {
	root=$(cd "$BATS_TEST_DIRNAME/../.." && pwd)
	build=${KVT_BUILD:-$root/build}
	man=$root/daemon/man
}

same() { # NAME_A NAME_B: two files in the test's directory, not empty
	[ -s "$BATS_TEST_TMPDIR/$1" ]
	sort -o "$BATS_TEST_TMPDIR/$1" "$BATS_TEST_TMPDIR/$1"
	sort -o "$BATS_TEST_TMPDIR/$2" "$BATS_TEST_TMPDIR/$2"
	diff -u "$BATS_TEST_TMPDIR/$1" "$BATS_TEST_TMPDIR/$2"
}

# "section key" of a file in configuration syntax; NAME of a tenant does not matter.
config_keys() {
	sed -nE 's/^#([a-z_]+ =)/\1/; s/^\[tenant .*/[tenant]/; /^\[|^[a-z_]+ =/p' |
		awk '/^\[/ { s = $1; next } { print s, $1 }'
}

# Options of --help: every word that begins with a dash at the start of a line's description.
help_options() {
	"$1" --help | sed -nE '/^ +-/p' | grep -oE '(^|[ ,])-{1,2}[a-z][a-z-]*' | tr -d ' ,'
}

# Options of a manual page: lines in bold at the left margin of OPTIONS.
man_options() {
	sed -n '/^# OPTIONS/,/^# [^O]/p' "$1" | grep -E '^\*-' | grep -oE '\*-{1,2}[a-z][a-z-]*\*' | tr -d '*'
}

@test "kvtierd: options in --help and in kvtierd(8)" {
	help_options "$build/kvtierd" > "$BATS_TEST_TMPDIR/help"
	man_options "$man/kvtierd.8.scd" > "$BATS_TEST_TMPDIR/man"
	same help man
}

@test "kvtierctl: options in --help and in kvtierctl(1)" {
	help_options "$build/kvtierctl" > "$BATS_TEST_TMPDIR/help"
	man_options "$man/kvtierctl.1.scd" > "$BATS_TEST_TMPDIR/man"
	same help man
}

@test "kvtierctl: verbs and arguments in --help and in kvtierctl(1)" {
	# Forms of one verb stand on one line in --help and apart in the page: compare verb and argument words.
	"$build/kvtierctl" --help | sed -n '/^Verbs:/,/^SEQ is/p' | grep -E '^  [a-z]' | sed -E 's/^  //; s/   .*//' |
		tr -d '[]|.' | tr ' ' '\n' > "$BATS_TEST_TMPDIR/words"
	"$build/kvtierctl" --help | sed -n '/^Verbs:/,/^SEQ is/p' | grep -oE '^  [a-z]+' | tr -d ' ' > "$BATS_TEST_TMPDIR/help"
	sed -n '/^# VERBS/,/^# EXIT/p' "$man/kvtierctl.1.scd" | grep -E '^\*' > "$BATS_TEST_TMPDIR/forms"
	grep -oE '^\*[a-z]+' "$BATS_TEST_TMPDIR/forms" | tr -d '*' | sort -u > "$BATS_TEST_TMPDIR/man"
	same help man
	tr -d '[]*_.' < "$BATS_TEST_TMPDIR/forms" | tr '| ' '\n' | grep . | sort -u > "$BATS_TEST_TMPDIR/manwords"
	sed -E 's/^onoff$/on\noff/' "$BATS_TEST_TMPDIR/words" | grep . | sort -u > "$BATS_TEST_TMPDIR/helpwords"
	same helpwords manwords
}

@test "every verb of --help but kvtierctl's own is known to the daemon's dispatcher" {
	"$build/kvtierctl" --help | sed -n '/^Verbs:/,/^SEQ is/p' | grep -oE '^  [a-z]+' | tr -d ' ' | grep -vxE 'top|plot|doctor' > "$BATS_TEST_TMPDIR/help"
	sed -nE 's/^\tV\(([a-z]+), .*/\1/p' "$root/daemon/verbs.h" > "$BATS_TEST_TMPDIR/list"
	same help list
	while read -r verb; do
		grep -q "^int verb_$verb(" "$root"/daemon/admin_*.c
	done < "$BATS_TEST_TMPDIR/list"
}

@test "configuration: keys in the table and in kvtierd.conf(5)" {
	"$build/kvtierd" -c /dev/null --print-config | config_keys > "$BATS_TEST_TMPDIR/table"
	sed -nE 's/^## (\[.*)/\1/; s/^\*([a-z_]+)\* = .*/\1 =/; /^\[|=$/p' "$man/kvtierd.conf.5.scd" | config_keys \
		> "$BATS_TEST_TMPDIR/man"
	same table man
}

@test "configuration: keys in the table and in the default file" {
	"$build/kvtierd" -c /dev/null --print-config | config_keys > "$BATS_TEST_TMPDIR/table"
	config_keys < "$root/systemd/kvtierd.conf" > "$BATS_TEST_TMPDIR/file"
	same table file
}

@test "configuration: defaults in kvtierd.conf(5) are the built-in ones" {
	"$build/kvtierd" -c /dev/null --print-config |
		sed -nE 's/^\[tenant .*/[tenant]/; s/^([a-z_]+) = ?/\1 /; /^\[|^[a-z_]+ /p' |
		awk '/^\[/ { s = $1; next } { print s, $1, ($2 == "" ? "empty" : $2) }' > "$BATS_TEST_TMPDIR/table"
	# One paragraph per key; "As in [dram]" takes over; the tenant's socket depends on its name.
	awk '/^## \[/ { s = $2; sub(/\]?$/, "]", s) }
	     /^\*[a-z_]+\* =/ { k = $1; gsub(/\*/, "", k) }
	     match($0, /Default [^ ]+[.;,]?( |$)/) && k != "" {
		v = substr($0, RSTART + 8, RLENGTH - 8); gsub(/[ ;,]+$/, "", v); sub(/\.$/, "", v)
		print s, k, v; k = "" }
	     /As in \[dram\]/ { print s, k, "empty"; k = "" }' "$man/kvtierd.conf.5.scd" |
		sed 's/ NAME\.sock$/ kvtierd.sock/' > "$BATS_TEST_TMPDIR/man"
	same table man
}

@test "configuration: every default has one reason, the same in table, page and default file" {
	"$build/kvtierd" -c /dev/null --print-config |
		sed -nE 's/^# (why: )/\1/; s/^\[tenant .*/[tenant]/; /^\[|^why: |^[a-z_]+ =/p' |
		awk '/^\[/ { s = $1; next } /^why: / { w = substr($0, 6); next } { print s, $1, (w == "" ? "NO REASON" : w); w = "" }' \
			> "$BATS_TEST_TMPDIR/table"
	[ "$(grep -c 'NO REASON' "$BATS_TEST_TMPDIR/table")" = 0 ]
	awk '/^## \[/ { s = $2; sub(/\]?$/, "]", s) } /^\*[a-z_]+\* =/ { k = $1; gsub(/\*/, "", k) }
	     sub(/^\tWhy: /, "") && k != "" { sub(/\.$/, ""); gsub(/\\/, ""); print s, k, $0; k = "" }' "$man/kvtierd.conf.5.scd" > "$BATS_TEST_TMPDIR/man"
	same table man
	awk '/^\[/ { s = $1; sub(/\]?$/, "]", s); w = "" }
	     sub(/^# Why: /, "") { w = $0; next } /^# / && w != "" { w = w " " substr($0, 3) }
	     /^#[a-z_]+ =/ { k = $1; sub(/#/, "", k); sub(/\.$/, "", w); print s, k, w; w = "" }' "$root/systemd/kvtierd.conf" \
		> "$BATS_TEST_TMPDIR/file"
	same table file
}

@test "configuration: what --print-config prints is a configuration again, and the same one" {
	cat > "$BATS_TEST_TMPDIR/first.conf" <<-CONF
		[dram]
		size = 1G
		segment = 64M
		[policy]
		slack = 9
		[tenant one]
		max_dram = 512M
		[tenant two]
		socket_mode = 0600
	CONF
	"$build/kvtierd" -c "$BATS_TEST_TMPDIR/first.conf" --print-config > "$BATS_TEST_TMPDIR/second.conf"
	"$build/kvtierd" -c "$BATS_TEST_TMPDIR/second.conf" --check-config
	"$build/kvtierd" -c "$BATS_TEST_TMPDIR/second.conf" --print-config > "$BATS_TEST_TMPDIR/third.conf"
	for n in second third; do
		grep -vE '^# default: |^$' "$BATS_TEST_TMPDIR/$n.conf" > "$BATS_TEST_TMPDIR/$n" # it tells where a key was set
	done
	grep -qx 'slack = 9' "$BATS_TEST_TMPDIR/third"
	grep -qx 'max_dram = 512M' "$BATS_TEST_TMPDIR/third"
	cmp "$BATS_TEST_TMPDIR/second" "$BATS_TEST_TMPDIR/third"
}

@test "configuration: keys that follow a reload are marked in page and file" {
	grep -E '^	(GLOBAL|TEXT|TENANT)\(' "$root/daemon/config_keys.c" |
		sed -nE 's/.*TENANT\("([a-z_]+)", KEY_[A-Z]+, true.*/[tenant] \1/p;
			 s/.*\("([a-z]+)", "([a-z_]+)", KEY_[A-Z]+, true.*/[\1] \2/p' > "$BATS_TEST_TMPDIR/table"
	awk '/^## \[/ { s = $2; sub(/\]?$/, "]", s) } /^\*[a-z_]+\* =/ { k = $1; gsub(/\*/, "", k) }
	     /\*\(reload\)\*/ && k != "" { print s, k; k = "" }' "$man/kvtierd.conf.5.scd" > "$BATS_TEST_TMPDIR/man"
	same table man
	# In the default file "R." opens the comment above a key or a run of keys.
	awk '/^\[/ { s = $1; sub(/\]?$/, "]", s); r = 0 }
	     /^# Why: / { why = 1 }
	     /^# / && !why { if (!c) r = 0; c = 1; if ($2 == "R.") r = 1 }
	     /^#[a-z_]+ =/ { c = why = 0; k = $1; sub(/#/, "", k); if (r) print s, k }' "$root/systemd/kvtierd.conf" \
		> "$BATS_TEST_TMPDIR/file"
	same table file
}

@test "exit status: the same numbers in --help and in the pages" {
	for p in kvtierd.8 kvtierctl.1; do
		tool=$build/${p%.*}
		sed -n '/^# EXIT STATUS/,/^# [^E]/p' "$man/$p.scd" | grep -oE '^\*[0-9]' | tr -d '*' > "$BATS_TEST_TMPDIR/man"
		"$tool" --help | sed -n '/^Exit status/,$p' | grep -oE '[0-9] [a-z]' | cut -c1 > "$BATS_TEST_TMPDIR/help"
		same help man
	done
}

@test "every environment variable that kvtierctl reads is in its page" {
	grep -ohE 'getenv\("[A-Z_]+"\)' "$root"/daemon/ctl/*.c | grep -oE '[A-Z_]{3,}' | sort -u > "$BATS_TEST_TMPDIR/code"
	sed -n '/^# ENVIRONMENT/,/^# EX/p' "$man/kvtierctl.1.scd" | grep -oE '^_[A-Z_]+_$' | sed 's/^_//; s/_$//' \
		> "$BATS_TEST_TMPDIR/man"
	same code man
}

@test "every function of the public headers is in a manual page" {
	for header in kvtier kvtier_cuda; do
		grep -oE '^KVT_PUBLIC .*' "$root/ipc/$header.h" | grep -oE 'kvtier_[a-z0-9_]+\(' | tr -d '(' > "$BATS_TEST_TMPDIR/header"
		cat "$root"/ipc/man/*.scd | sed -n '/^# SYNOPSIS/,/^# DESCRIPTION/p' | grep -oE 'kvtier_[a-z0-9_]+\(' | tr -d '(' |
			sort -u > "$BATS_TEST_TMPDIR/pages"
		sort -u "$BATS_TEST_TMPDIR/header" > "$BATS_TEST_TMPDIR/sorted"
		[ -s "$BATS_TEST_TMPDIR/sorted" ]
		comm -23 "$BATS_TEST_TMPDIR/sorted" "$BATS_TEST_TMPDIR/pages" > "$BATS_TEST_TMPDIR/missing"
		[ ! -s "$BATS_TEST_TMPDIR/missing" ] || { cat "$BATS_TEST_TMPDIR/missing"; false; }
	done
}
