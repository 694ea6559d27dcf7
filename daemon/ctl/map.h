/* SPDX-License-Identifier: MIT */
#pragma once
/* Reading the map of a sequence, which the daemon tells a slice of its loop at a time. */
#include "daemon/ctl/ctl.h"
#include "daemon/verbs.h"

#define MAP_TIERS 3u

struct map_info {
	char handle[24], policy[32];
	uint32_t rows, epoch, lanes, watermark, columns;
	uint64_t plans; /* that had been made when it was begun */
	bool changed;   /* more were made while it was read */
};
struct map_column {
	uint64_t rows; /* that have a score */
	double min, max, sum;
};
struct map_lane {
	uint32_t lane, layer, head;
	bool placed;                /* layer and head are known */
	uint64_t budget[MAP_TIERS]; /* UINT64_MAX: all */
};

/* What is told, lane after lane: its beginning, its runs, its end. All may be NULL but arg. */
struct map_sink {
	void *arg;
	void (*begin)(void *arg, const struct map_info *info); /* again, if the sequence was cut meanwhile */
	void (*lane)(void *arg, const struct map_lane *l);
	void (*run)(void *arg, uint32_t from, uint32_t rows, unsigned code);
	void (*end)(void *arg, const struct map_column *col); /* [info->columns] */
};

/* lane: as the verb takes it, or NULL: all. An enum ctl_exit; when not CTL_OK a line is on stderr. */
int map_read(struct ctl *c, const char *seq, const char *lane, uint32_t columns, struct map_info *ret,
	     const struct map_sink *sink);
