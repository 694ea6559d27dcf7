# SPDX-License-Identifier: MIT
# Regret lane by lane: networks, the best heuristic of the lane, the attainable oracle.
load "common.inc"
file = dir . "/plot_lanes.csv"
set output dir . "/lanes.svg"
set title "Regret per lane (0: oracle, 1: random)"
set xlabel "lane (layer × KV heads + head)"
set ylabel "regret"
set yrange [0:*]
set offsets 1, 1, 0, 0
plot for [c = 2:columns(file)] file using 1:c with points lt c pt 7 ps 0.7 title columnheader(c)
