/* SPDX-License-Identifier: MIT */
/* kvtierctl map, and reading maps for plot. */
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include "daemon/ctl/map.h"
#include "ipc/kvtier.h"
#include "shm/util.h"

#define NAP_NS 5000000

struct reader {
	const struct map_sink *sink;
	struct map_info *info;
	struct map_column *col;
	char line[200]; /* why the daemon refused */
	bool open;      /* a lane's end has not come */
	uint32_t lane, at, from, n;
	unsigned code;
};

static uint64_t num(const json_t *o, const char *key)
{
	json_int_t v = json_integer_value(json_object_get(o, key));

	return v > 0 ? (uint64_t)v : 0;
}

static void tell_run(struct reader *r)
{
	if (r->n && r->sink->run)
		r->sink->run(r->sink->arg, r->from, r->n, r->code);
	r->n = 0;
}

static void end_lane(struct reader *r)
{
	if (!r->open)
		return;
	tell_run(r);
	if (r->sink->end)
		r->sink->end(r->sink->arg, r->col);
	r->open = false;
}

static void begin_lane(struct reader *r, const json_t *o)
{
	static const char *const tiers[MAP_TIERS] = {"device", "dram", "nvme"};
	struct map_lane l = {.lane = (uint32_t)num(o, "lane"),
			     .layer = (uint32_t)num(o, "layer"),
			     .head = (uint32_t)num(o, "head"),
			     .placed = json_object_get(o, "layer")};

	for (unsigned t = 0; t < MAP_TIERS; t++) {
		const json_t *b = json_object_get(json_object_get(o, "budget"), tiers[t]);

		l.budget[t] = json_is_integer(b) ? (uint64_t)json_integer_value(b) : UINT64_MAX;
	}
	end_lane(r);
	for (uint32_t i = 0; i < r->info->columns; i++)
		r->col[i] = (struct map_column){.min = INFINITY, .max = -INFINITY};
	r->open = true;
	r->lane = l.lane;
	r->at = 0;
	if (r->sink->lane)
		r->sink->lane(r->sink->arg, &l);
}

/* A lane as far as a slice went. */
static bool take_lane(struct reader *r, const json_t *o)
{
	const json_t *runs = json_object_get(o, "runs"), *scores = json_object_get(o, "scores");
	uint64_t column = num(o, "column");

	if (!r->open || r->lane != num(o, "lane"))
		begin_lane(r, o);
	if (num(o, "from") != r->at || json_array_size(runs) % 2 || json_array_size(scores) % 4)
		return false;
	for (size_t i = 0; i < json_array_size(runs); i += 2) {
		uint64_t n = (uint64_t)json_integer_value(json_array_get(runs, i)),
			 code = (uint64_t)json_integer_value(json_array_get(runs, i + 1));

		if (!n || n > r->info->rows - r->at || code >= MAP_CODES)
			return false;
		if (r->n && code != r->code)
			tell_run(r);
		if (!r->n)
			r->from = r->at;
		r->code = (unsigned)code;
		r->n += (uint32_t)n;
		r->at += (uint32_t)n;
	}
	for (size_t i = 0; i < json_array_size(scores) / 4; i++) {
		uint64_t n = (uint64_t)json_integer_value(json_array_get(scores, 4 * i));
		struct map_column *c = &r->col[column + i];

		if (column + i >= r->info->columns)
			return false;
		if (!n)
			continue;
		c->rows += n;
		c->min = fmin(c->min, json_number_value(json_array_get(scores, 4 * i + 1)));
		c->max = fmax(c->max, json_number_value(json_array_get(scores, 4 * i + 2)));
		c->sum += (double)n * json_number_value(json_array_get(scores, 4 * i + 3));
	}
	return true;
}

static void take_head(struct map_info *info, const json_t *j)
{
	snprintf(info->handle, sizeof(info->handle), "%s",
		 json_string_value(json_object_get(j, "handle")) ?: "");
	snprintf(info->policy, sizeof(info->policy), "%s",
		 json_string_value(json_object_get(j, "policy")) ?: "-");
	info->rows = (uint32_t)num(j, "rows");
	info->epoch = (uint32_t)num(j, "epoch");
	info->lanes = (uint32_t)num(j, "lanes");
	info->watermark = (uint32_t)num(j, "watermark");
	info->plans = num(j, "plans");
	info->changed = false;
}

/* One question, again while a worker has the sequence. KVT_E_STALE: it was cut, or is gone. */
static int ask(struct ctl *c, struct reader *r, unsigned argc, const char *const argv[], json_t **ret)
{
	uint64_t end = now_ns() + c->timeout_ms * UINT64_C(1000000);
	const struct timespec nap = {.tv_nsec = NAP_NS};
	int e;

	for (;;) {
		ctl_fail_into(r->line, sizeof(r->line));
		e = ctl_call(c, argc, argv, ret, NULL);
		ctl_fail_into(NULL, 0);
		if (e != CTL_REFUSED || c->refusal != KVT_E_BUSY || now_ns() > end)
			return e;
		nanosleep(&nap, NULL);
	}
}

/* From the first slice to the last; *ret_cut: the sequence was cut in between. */
static int read_once(struct ctl *c, struct reader *r, const char *argv[5], bool *ret_cut)
{
	char from[64];
	json_t *j = NULL;
	unsigned slices = 0;
	bool more = true;
	int e;

	*ret_cut = false;
	for (argv[4] = from; more; slices++) {
		const json_t *o;
		size_t i;

		e = ask(c, r, slices ? 5 : 4, argv, &j);
		if (e) {
			*ret_cut = e == CTL_REFUSED && c->refusal == KVT_E_STALE && slices;
			return *ret_cut ? e : ctl_fail(e, "%s", r->line);
		}
		if (!slices) {
			take_head(r->info, j);
			argv[1] = r->info->handle;
			if (r->sink->begin)
				r->sink->begin(r->sink->arg, r->info);
		}
		r->info->changed |= num(j, "plans") != r->info->plans;
		more = json_is_string(json_object_get(j, "next"));
		snprintf(from, sizeof(from), "%s", more ? json_string_value(json_object_get(j, "next")) : "");
		json_array_foreach(json_object_get(j, "lane"), i, o)
		{
			if (!take_lane(r, o)) {
				json_decref(j);
				return ctl_fail(CTL_UNREACHABLE, "reply: not a map");
			}
		}
		json_decref(j);
	}
	end_lane(r);
	return CTL_OK;
}

int map_read(struct ctl *c, const char *seq, const char *lane, uint32_t columns, struct map_info *ret,
	     const struct map_sink *sink)
{
	struct reader r = {.sink = sink, .info = ret};
	char width[16];
	const char *argv[5] = {"map", seq, lane ?: "0+", width};
	bool cut;
	int e;

	*ret = (struct map_info){.columns = columns};
	snprintf(width, sizeof(width), "%u", columns);
	r.col = calloc(columns + 1, sizeof(*r.col));
	if (!r.col)
		return ctl_fail(CTL_UNREACHABLE, "out of memory");
	do {
		r.open = false;
		r.n = 0;
		e = read_once(c, &r, argv, &cut);
	} while (cut);
	free(r.col);
	return e;
}

/* ---- the verb ------------------------------------------------------------------------------ */

struct printer {
	FILE *f;
	bool json, runs;
	uint32_t lanes;
	struct map_info *info;
	struct map_lane lane;
};

static void print_begin(void *arg, const struct map_info *info)
{
	struct printer *p = arg;

	rewind(p->f);
	p->lanes = 0;
	if (p->json)
		fprintf(p->f,
			"{\"handle\":\"%s\",\"rows\":%u,\"epoch\":%u,\"lanes\":%u,\"watermark\":%u,\"plans\":%"
			"llu,"
			"\"policy\":\"%s\",\"columns\":%u,\"lane\":[",
			info->handle, info->rows, info->epoch, info->lanes, info->watermark,
			(unsigned long long)info->plans, info->policy, info->columns);
	else
		fprintf(p->f, "LANE  LAYER  HEAD       FROM       ROWS  WHERE\n");
}

static void print_lane(void *arg, const struct map_lane *l)
{
	static const char *const tiers[MAP_TIERS] = {"device", "dram", "nvme"};
	struct printer *p = arg;

	p->lane = *l;
	p->runs = false;
	if (!p->json)
		return;
	fprintf(p->f, "%s{\"lane\":%u", p->lanes++ ? "," : "", l->lane);
	if (l->placed)
		fprintf(p->f, ",\"layer\":%u,\"head\":%u", l->layer, l->head);
	fprintf(p->f, ",\"budget\":{");
	for (unsigned t = 0; t < MAP_TIERS; t++)
		if (l->budget[t] == UINT64_MAX)
			fprintf(p->f, "%s\"%s\":null", t ? "," : "", tiers[t]);
		else
			fprintf(p->f, "%s\"%s\":%llu", t ? "," : "", tiers[t],
				(unsigned long long)l->budget[t]);
	fprintf(p->f, "},\"runs\":[");
}

static void print_run(void *arg, uint32_t from, uint32_t rows, unsigned code)
{
	static const char *const where[MAP_CODES / 2] = {
		"dropped", "device",      "dram",      "device dram",
		"nvme",    "device nvme", "dram nvme", "device dram nvme"};
	struct printer *p = arg;

	if (p->json)
		fprintf(p->f, "%s%u,%u", p->runs ? "," : "", rows, code);
	else
		fprintf(p->f, "%4u  %5u  %4u  %9u  %9u  %s%s\n", p->lane.lane, p->lane.layer, p->lane.head,
			from, rows, where[code % (MAP_CODES / 2)], code & MAP_MOVING ? ", on its way" : "");
	p->runs = true;
}

static void print_end(void *arg, const struct map_column *col)
{
	struct printer *p = arg;

	if (!p->json)
		return;
	fputc(']', p->f);
	if (p->info->columns)
		fputs(",\"scores\":[", p->f);
	for (uint32_t i = 0; i < p->info->columns; i++)
		if (col[i].rows)
			fprintf(p->f, "%s%llu,%.6g,%.6g,%.6g", i ? "," : "", (unsigned long long)col[i].rows,
				col[i].min, col[i].max, col[i].sum / (double)col[i].rows);
		else
			fprintf(p->f, "%s0,null,null,null", i ? "," : "");
	fputs(p->info->columns ? "]}" : "}", p->f);
}

/* All of it, although the daemon answers in pieces; with a cursor the piece as it is. */
int ctl_map(struct ctl *c, unsigned argc, const char *const argv[])
{
	char *text = NULL, *end;
	size_t bytes = 0;
	struct map_info info;
	struct printer p = {.f = open_memstream(&text, &bytes), .json = c->json, .info = &info};
	const struct map_sink sink = {&p, print_begin, print_lane, print_run, print_end};
	unsigned long columns = argc > 3 ? strtoul(argv[3], &end, 10) : 0;
	json_t *j = NULL;
	int r;

	if (!p.f)
		return ctl_fail(CTL_UNREACHABLE, "out of memory");
	if (argc > 4 || (argc > 3 && (*end || columns > MAP_COLUMNS))) {
		r = ctl_call(c, argc, argv, &j, NULL);
		if (!r)
			ctl_print_json(j);
		json_decref(j);
		fclose(p.f);
		free(text);
		return r;
	}
	r = map_read(c, argv[1], argc > 2 ? argv[2] : NULL, (uint32_t)columns, &info, &sink);
	if (!r && c->json)
		fprintf(p.f, "],\"changed\":%s}\n", info.changed ? "true" : "false");
	else if (!r && info.changed)
		fprintf(p.f, "(plans were made while this was read)\n");
	if (fclose(p.f) && !r)
		r = ctl_fail(CTL_UNREACHABLE, "out of memory");
	if (!r)
		fwrite(text, 1, bytes, stdout);
	free(text);
	return r;
}
