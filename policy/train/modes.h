/* SPDX-License-Identifier: MIT */
#pragma once
/* What kvtier-train can be asked for. Each says what is wrong on stderr and returns the exit status. */
#include "policy/train/options.h"

#define EXIT_STOPPED 75 /* a checkpoint was written: the same command goes on */

int mode_train(struct options *o);
int mode_calibrate(struct options *o);
int mode_qfilter(struct options *o);
int mode_probe(struct options *o);

/* Fill in what depends on traces and device: lanes, rows, splits. 0 or an exit status. */
int mode_prepare(struct options *o);
int mode_fail(const char *line);
