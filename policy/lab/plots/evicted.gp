# SPDX-License-Identifier: MIT
# Evicted utility over the budget, a line a policy.
load "common.inc"
file = dir . "/plot_evicted.csv"
set output dir . "/evicted.svg"
set title "Utility evicted (mean over the query group, main slice)"
set xlabel "budget, % of the evictable rows"
set ylabel "% of the future attention lost"
set xtics (5, 10, 20, 30, 50)
set yrange [0:*]
plot for [c = 2:columns(file)] file using 1:(100 * column(c)) with linespoints lt c pt c ps 0.6 title columnheader(c)
