#!/bin/sh
# SPDX-License-Identifier: MIT
# The shipped weights, from traces of every split (traces.py): the network, the position-only prior and the q-filters
# that it is measured against. On a GPU when there is one. Runs again where it was stopped.
#
#    policy/lab/train.sh [TRACES [OUT]]      default: build/traces build/weights; STEPS=3000 SEED=1
set -eu
cd "$(dirname "$0")/../.."
traces=${1:-build/traces}
out=${2:-build/weights}
build=${KVT_BUILD:-build}
mkdir -p "$out"

train() {
	file=$out/$1.kvp
	shift
	[ -f "$file" ] || "$build/kvtier-train" --traces "$traces" --out "$file" --seed "${SEED:-1}" "$@"
}

train smollm2-135m-instruct --net narrow --rank 2 --keys unrotated --position log2 --distance yes \
	--objective exact --reward regret --weighting uniform --utility max --steps "${STEPS:-3000}" --calibrate
train position --net position --objective exact --weighting uniform --utility max --steps 1000
train qfilter --q-filter
