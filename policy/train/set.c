/* SPDX-License-Identifier: MIT */
/* Choosing what to train on. */
#include "policy/train/set.h"
#include "policy/train/noise.h"
#include "shm/crc.h"
#include "shm/util.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#define MIN_UNIT_ROWS 32u

static int __attribute__((format(printf, 4, 5))) refuse(int r, char *err, size_t errsize, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(err, errsize, fmt, ap);
	va_end(ap);
	return r;
}

void set_free(struct set *s)
{
	if (!s)
		return;
	for (uint32_t i = 0; i < s->docs; i++) {
		free(s->doc[i].path);
		free(s->doc[i].pos);
	}
	for (uint32_t i = 0; i < s->units; i++)
		free(s->unit[i].mean);
	free(s->doc);
	free(s->unit);
	free(s->vnorm);
	free(s->doc_rows);
	free(s->unit_doc);
	free(s->unit_rows);
	free(s->unit_prompt);
	free(s->doc_pos);
	free(s);
}

/* What the utility needs, in this file? */
static int check_chunks(const struct trace *t, const struct set_opts *o, char *err, size_t errsize)
{
	uint32_t kind = o->utility == SET_MAX ? TRACE_UMAX : TRACE_UMEAN, lane = o->lane_first;

	if (!trace_find(t, TRACE_K, lane, 0) || !trace_find(t, TRACE_V, lane, 0))
		return refuse(-EINVAL, err, errsize, "%s: lane %u has no K or no V, training needs both",
			      t->path, lane);
	if (o->utility == SET_VALUE && !trace_find(t, TRACE_VNORM, lane, 0))
		return refuse(-EINVAL, err, errsize, "%s: no VNORM, --utility value needs it", t->path);
	for (uint32_t c = 0; c < t->h.cuts; c++)
		if (!trace_find(t, kind, lane, c) && !trace_find(t, TRACE_Q, lane, 0))
			return refuse(-EINVAL, err, errsize, "%s: cut %u has neither utilities nor queries",
				      t->path, c);
	return 0;
}

/* By the file's name alone: what is drawn from a document depends neither on its folder nor on its neighbours.
 */
static uint32_t salt_of(const char *path)
{
	const char *name = strrchr(path, '/');

	name = name ? name + 1 : path;
	return crc32c(0, name, strlen(name));
}

/* Rows of [first, end) without replacement, `most` of them, ascending (Knuth's algorithm S). */
static int choose_rows(struct set_doc *d, uint32_t first, uint32_t end, uint32_t most, uint64_t seed)
{
	uint32_t have = end > first ? end - first : 0, want = MIN(have, most);
	uint32_t salt = salt_of(d->path);

	d->pos = calloc(want + 1, sizeof(*d->pos));
	if (!d->pos)
		return -ENOMEM;
	for (uint32_t p = first; p < end && d->stored < want; p++) {
		uint64_t draw = train_hash(seed, 1, salt, 0, 0, p) % (end - p);

		if (draw < want - d->stored)
			d->pos[d->stored++] = p;
	}
	return 0;
}

static uint32_t rows_below(const struct set_doc *d, uint32_t pos)
{
	uint32_t n = 0;

	while (n < d->stored && d->pos[n] < pos)
		n++;
	return n;
}

static int add_doc(struct set *s, const char *path, char *err, size_t errsize)
{
	struct set_doc *d = &s->doc[s->docs];
	uint32_t most = 0, first_unit = s->units;
	struct set_unit *more;
	struct trace *t;
	int r;

	r = trace_open(&t, path, err, errsize);
	if (r < 0)
		return r;
	if (!s->docs)
		s->model = t->h;
	r = trace_same_shape(&s->model, &t->h, err, errsize);
	if (r < 0) {
		char line[256];

		snprintf(line, sizeof(line), "%s", err);
		refuse(r, err, errsize, "%s: of another shape than %s: %s", path,
		       s->docs ? s->doc[0].path : "the first", line);
	}
	if (r == 0 && s->o.lane_first + s->o.lanes > t->h.layers * t->h.heads)
		r = refuse(-EINVAL, err, errsize, "lanes %u-%u: %s has %u", s->o.lane_first,
			   s->o.lane_first + s->o.lanes - 1, path, t->h.layers * t->h.heads);
	if (r == 0)
		r = check_chunks(t, &s->o, err, errsize);
	if (r < 0)
		goto out;
	r = -ENOMEM;
	more = realloc(s->unit, (s->units + t->h.cuts + 1) * sizeof(*more));
	if (!more)
		goto out;
	s->unit = more;
	*d = (struct set_doc){.path = strdup(path), .split = t->h.split, .rows = t->h.rows};
	s->docs++;
	if (!d->path)
		goto out;
	for (uint32_t c = 0; c < t->h.cuts; c++)
		most = MAX(most, t->cut[c].prompt);
	r = choose_rows(d, TRAIN_PROTECT_FIRST, most > TRAIN_PROTECT_LAST ? most - TRAIN_PROTECT_LAST : 0,
			s->o.doc_rows, s->o.seed);
	for (uint32_t c = 0; r == 0 && c < t->h.cuts; c++) {
		uint32_t prompt = t->cut[c].prompt;
		uint32_t last = prompt > TRAIN_PROTECT_LAST ? prompt - TRAIN_PROTECT_LAST : 0;
		uint32_t rows = rows_below(d, last);

		if (rows >= MIN_UNIT_ROWS)
			s->unit[s->units++] = (struct set_unit){.doc = s->docs - 1,
								.cut = c,
								.split = d->split,
								.prompt = prompt,
								.queries = t->cut[c].queries,
								.rows = rows,
								.salt = salt_of(path) + c};
	}
	s->digest = train_mix(s->digest ^ t->h.crc);
	s->digest = train_mix(s->digest ^ crc32c(0, d->pos, d->stored * sizeof(*d->pos)));
	if (s->units == first_unit) { /* nothing to rank in it */
		free(d->path);
		free(d->pos);
		s->docs--;
	}
out:
	trace_free(t);
	return r;
}

static int add_split(struct set *s, enum trace_split split, char *err, size_t errsize)
{
	struct set_doc *more;
	uint32_t n, take;
	char **list;
	int r;

	r = trace_list(&list, &n, s->o.dir, split, err, errsize);
	if (r < 0)
		return r;
	take = s->o.limit ? MIN(n, s->o.limit) : n;
	more = realloc(s->doc, (s->docs + take + 1) * sizeof(*more));
	if (!more)
		r = -ENOMEM;
	else
		s->doc = more;
	for (uint32_t i = 0; r == 0 && i < take; i++)
		r = add_doc(s, list[i], err, errsize);
	trace_list_free(list, n);
	return r;
}

/* The arrays that a backend sees. */
static int describe(struct set *s)
{
	s->doc_rows = calloc(s->docs, sizeof(*s->doc_rows));
	s->doc_pos = calloc(s->docs, sizeof(uint32_t *));
	s->unit_doc = calloc(s->units, sizeof(*s->unit_doc));
	s->unit_rows = calloc(s->units, sizeof(*s->unit_rows));
	s->unit_prompt = calloc(s->units, sizeof(*s->unit_prompt));
	s->vnorm = calloc((size_t)s->docs * s->o.lanes, sizeof(*s->vnorm));
	if (!s->doc_rows || !s->doc_pos || !s->unit_doc || !s->unit_rows || !s->unit_prompt || !s->vnorm)
		return -ENOMEM;
	for (uint32_t i = 0; i < s->docs; i++) {
		s->doc_rows[i] = s->doc[i].stored;
		s->doc_pos[i] = s->doc[i].pos;
	}
	for (uint32_t i = 0; i < s->units; i++) {
		s->unit_doc[i] = s->unit[i].doc;
		s->unit_rows[i] = s->unit[i].rows;
		s->unit_prompt[i] = s->unit[i].prompt;
	}
	s->shape = (struct train_set_shape){s->docs,     s->units,     s->doc_rows,   s->doc_pos,
					    s->unit_doc, s->unit_rows, s->unit_prompt};
	return 0;
}

int set_plan(struct set **ret, const struct set_opts *o, char *err, size_t errsize)
{
	static const char *const names[] = {"train", "valid", "test", "calib"};
	struct set *s = calloc(1, sizeof(*s));
	int r = s ? 0 : -ENOMEM;

	snprintf(err, errsize, "%s: out of memory", o->dir);
	if (s)
		s->o = *o;
	for (uint32_t split = 0; r == 0 && split < ARRAY_SIZE(names); split++) {
		uint32_t before = s->units;

		if (!(o->splits >> split & 1))
			continue;
		r = add_split(s, split, err, errsize);
		if (r == 0 && s->units == before)
			r = refuse(-EINVAL, err, errsize,
				   "%s: no traces of split %s with a cut of %u rows to rank", o->dir,
				   names[split], MIN_UNIT_ROWS);
	}
	if (r == 0)
		r = describe(s);
	if (r < 0) {
		set_free(s);
		return r;
	}
	*ret = s;
	return 0;
}
