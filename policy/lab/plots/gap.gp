# SPDX-License-Identifier: MIT
# Share of the gap from the best heuristic to the raw oracle that the networks close, by prompt length.
load "common.inc"
file = dir . "/plot_gap.csv"
set output dir . "/gap.svg"
set title "Share of the gap from the best heuristic to the oracle"
set xlabel "prompt, rows"
set ylabel "%"
n = columns(file) / 3
if (n < 1 || system("wc -l < '" . file . "'") + 0 < 2) { exit }
set yrange [*<0:0<*]
set style data histograms
set style histogram errorbars gap 1 lw 1
set style fill solid 0.6
set xzeroaxis
plot for [i = 0:n - 1] file using (100 * column(2 + 3 * i)):(100 * column(3 + 3 * i)):(100 * column(4 + 3 * i)):xtic(1) \
	title columnheader(2 + 3 * i)
