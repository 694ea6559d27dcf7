/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * The counters of the daemon as Prometheus reads them: text over HTTP, from the event loop. One table
 * (metrics_text.c) says what each field of core_stat is called there. Everything is the loop's.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <systemd/sd-event.h>
#include "daemon/core.h"
#include "daemon/probes.h"

struct metrics;

/* ---- metrics_listen.c ---------------------------------------------------------------- */

/*
 * A listening stream socket at `where`: an absolute path (mode 0660), 127.0.0.1:PORT or [::1]:PORT. Returns its
 * descriptor, or -errno with one line in err. What it made at a path is the caller's to unlink.
 */
int metrics_listen(const char *where, char *err, size_t errsize);
/* May that be listened on? 0, or -EINVAL with what it must be in err. */
int metrics_where(const char *where, char *err, size_t errsize);
/* ---- metrics.c ----------------------------------------------------------------------- */

/* Serve GET and HEAD of /metrics and /-/healthy on this listening stream socket, which is taken. 0 or -errno.
 */
int metrics_open(struct metrics **ret, struct core *c, sd_event *ev, int fd);
void metrics_close(struct metrics *m);

/* ---- metrics_text.c ------------------------------------------------------------------ */

enum metric_type { METRIC_COUNTER, METRIC_GAUGE, METRIC_HISTOGRAM };
enum metric_unit { METRIC_ONE, METRIC_NS, METRIC_PERMILLE, METRIC_FLAG, METRIC_NODE };

/* One sample, or the samples of one histogram. Rows of one name stand together, the first has the help. */
struct metric {
	const char *name, *help;
	const char *label, *value; /* NULL: none */
	enum metric_type type;
	enum metric_unit unit; /* what the field counts in; Prometheus gets seconds and ratios */
	uint32_t off, size;    /* of the field in its structure */
};
extern const struct metric metrics_table[], metrics_probes[]; /* of struct core_stat, of struct probes_stat */
extern const unsigned metrics_n, metrics_n_probes;

/* Fields of core_stat that are deliberately not exported, and why. */
struct metric_left_out {
	uint32_t off, size;
	const char *why;
};
extern const struct metric_left_out metrics_left_out[];
extern const unsigned metrics_n_left_out;

/* The exposition (text format 0.0.4), the caller's to free; NULL: out of memory. */
char *metrics_text(const struct core_stat *s, const struct probes_stat *p, size_t *ret_bytes);
