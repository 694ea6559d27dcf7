#!/bin/sh
# SPDX-License-Identifier: MIT
# Evaluate the shipped weights: on traces (kvtier-eval) and with the model in the loop (loop.py). Makes what is missing:
# corpus, samples, traces, the rivals' weights. Runs again where it was stopped.
#
#    policy/lab/eval.sh          small, on a CPU (about an hour on two cores): SCALE=0.05 N=12
#    DEVICE=cuda SCALE=1 N=400 policy/lab/eval.sh       as in policy/RESULTS.md
#
# Results: build/eval/summary.md, build/loop/tables/results.md, with CSV files and plots beside them.
set -eu
cd "$(dirname "$0")/../.."
build=${KVT_BUILD:-build}
python=$(cat build/python 2>/dev/null || echo "${PYTHON:-python3}")
device=${DEVICE:-cpu}
n=${N:-12}
weights=${WEIGHTS:-policy/models/smollm2-135m-instruct.kvp}
export PYTHONPATH="$PWD/ipc/python${PYTHONPATH:+:$PYTHONPATH}"

samples=build/samples/samples.jsonl.gz
[ -f build/corpus/corpus.jsonl.gz ] || [ -f "$samples" ] || "$python" policy/lab/corpus.py
[ -f "$samples" ] || "$python" policy/lab/samples.py --scale "${SCALE:-0.05}"
"$python" policy/lab/traces.py --samples "$samples" --out build/traces --device "$device"
mkdir -p build/weights
for kind in position qfilter; do
	[ -f build/weights/$kind.kvp ] && continue
	case $kind in
	position) set -- --net position --weighting uniform --utility max --steps 1000 ;;
	qfilter) set -- --q-filter ;;
	esac
	"$build/kvtier-train" --traces build/traces --out build/weights/$kind.kvp "$@"
done
"$build/kvtier-eval" --out build/eval --weights kvp="$weights" --weights position=build/weights/position.kvp \
	--weights qfilter=build/weights/qfilter.kvp --plots policy/lab/plots build/traces
for mode in prepare perplexity accuracy adaptive recall; do
	"$python" policy/lab/loop.py $mode --samples "$samples" --out build/loop --device "$device" --weights "$weights" \
		--weights-position build/weights/position.kvp --weights-qfilter build/weights/qfilter.kvp --n "$n"
done
"$python" policy/lab/report.py build/loop
