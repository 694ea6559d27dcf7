/* SPDX-License-Identifier: MIT */
#pragma once
#include <stddef.h>

/*
 * Run gnuplot, with dir='out' and `scripts` as the load path, on every *.gp of the directory `scripts`. Without
 * gnuplot a line on stderr says that the tables are all there is, and 0 is returned. -errno with one line in
 * err. Blocks until they are done.
 */
int eval_plots(const char *scripts, const char *out, char *err, size_t errsize);
