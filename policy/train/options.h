/* SPDX-License-Identifier: MIT */
#pragma once
/* The command line of kvtier-train. */
#include "policy/train/run.h"

enum options_mode {
	MODE_TRAIN,
	MODE_CALIBRATE_FILE,
	MODE_CALIBRATE_POLICY,
	MODE_QFILTER,
	MODE_PROBE,
	MODE_DONE
};

struct options {
	struct run_opts run;
	enum options_mode mode;
	const char *subject;       /* file or policy to calibrate; input of the probe */
	bool rows_given, lr_given; /* else by device, by net */
	bool lanes_given;
	uint32_t lane_last;
	char checkpoint[4096];
};

/* 0, or an exit status after a line on stderr (or, MODE_DONE, the text that was asked for on stdout). */
int options_parse(struct options *ret, int argc, char **argv);
