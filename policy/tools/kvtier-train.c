/* SPDX-License-Identifier: MIT */
/* kvtier-train: from traces to weight files. */
#include "policy/train/options.h"
#include "policy/train/modes.h"
#include "shm/util.h"

#include <signal.h>
#include <stdio.h>
#include <string.h>

static void on_signal(int sig)
{
	run_stop = 1;
}

static int run_mode(struct options *o)
{
	switch (o->mode) {
	case MODE_TRAIN:
		return mode_train(o);
	case MODE_CALIBRATE_FILE:
	case MODE_CALIBRATE_POLICY:
		return mode_calibrate(o);
	case MODE_QFILTER:
		return mode_qfilter(o);
	case MODE_PROBE:
		return mode_probe(o);
	case MODE_DONE:
		break;
	}
	return 0;
}

int main(int argc, char **argv)
{
	struct sigaction stop = {.sa_handler = on_signal, .sa_flags = SA_RESETHAND};
	struct options o;
	int r = options_parse(&o, argc, argv);

	if (r != 0 || o.mode == MODE_DONE)
		return r;
	sigaction(SIGINT, &stop, NULL);
	sigaction(SIGTERM, &stop, NULL);
	return run_mode(&o);
}
