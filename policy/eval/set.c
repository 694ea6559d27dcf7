/* SPDX-License-Identifier: MIT */
/* Opening a split: everything that could stop the evaluation later is found here, by name. */
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include "policy/eval/set.h"
#include "shm/util.h"

#define CONTINUATIONS 5u /* equal cuts that make an attainable oracle: four and the fifth */

static int refuse(const char *path, const char *what, char *err, size_t errsize)
{
	snprintf(err, errsize, "%s: %s", path, what);
	return -EINVAL;
}

/* Index of a name in a list of names, which grows by it when it is new. */
static int intern(char ***names, uint32_t *n, char *name, uint32_t *ret)
{
	char **more;

	for (uint32_t i = 0; i < *n; i++) {
		if (strcmp((*names)[i], name) != 0)
			continue;
		*ret = i;
		return 0;
	}
	more = realloc(*names, (*n + 1) * sizeof(*more));
	if (!more)
		return -ENOMEM;
	*names = more;
	more[*n] = name;
	*ret = (*n)++;
	return 0;
}

static int check_chunks(const struct eval_doc *d, char *err, size_t errsize)
{
	const struct trace *t = d->trace;
	bool q = trace_find(t, TRACE_Q, 0, 0) != NULL;

	if (t->h.keys != TRACE_KEYS_CACHED)
		return refuse(d->path, "keys: 1 (before RoPE), must be 0: attention needs keys as cached", err,
			      errsize);
	if (!trace_find(t, TRACE_K, 0, 0) || !trace_find(t, TRACE_V, 0, 0))
		return refuse(d->path, "K or V: none, every policy needs them", err, errsize);
	for (uint32_t c = 0; c < t->h.cuts; c++) {
		bool branch = t->cut[c].flags & TRACE_CUT_BRANCH;

		if (!trace_find(t, TRACE_UMAX, 0, c) && (branch || !q))
			return refuse(d->path, "UMAX: none, and no queries of the future to find it from", err,
				      errsize);
		if (!branch && (uint64_t)t->cut[c].prompt + t->cut[c].queries > t->h.rows)
			return refuse(d->path, "cut: its future queries end after the last row", err, errsize);
	}
	return 0;
}

static uint32_t count_equal(const struct trace *t, uint32_t cut)
{
	uint32_t n = 0;

	for (uint32_t c = 0; c < t->h.cuts; c++)
		n += t->cut[c].context == t->cut[cut].context && t->cut[c].prompt == t->cut[cut].prompt;
	return n;
}

/* -ENOMEM only. */
static int add_items(struct eval_set *s, uint32_t doc)
{
	struct eval_doc *d = &s->doc[doc];
	const struct trace *t = d->trace;
	struct eval_item *more = realloc(s->item, (s->items + t->h.cuts + 1) * sizeof(*more));

	if (!more)
		return -ENOMEM;
	s->item = more;
	d->first_item = s->items;
	for (uint32_t c = 0; c < t->h.cuts; c++) {
		if (t->cut[c].prompt < LEAST_PROMPT)
			continue;
		s->item[s->items++] = (struct eval_item){.doc = doc,
							 .cut = c,
							 .prompt = t->cut[c].prompt,
							 .queries = t->cut[c].queries,
							 .flags = t->cut[c].flags,
							 .attainable = count_equal(t, c) >= CONTINUATIONS};
	}
	d->items = s->items - d->first_item;
	s->max_rows = MAX(s->max_rows, t->h.rows);
	s->max_cuts = MAX(s->max_cuts, t->h.cuts);
	return 0;
}

static int add_doc(struct eval_set *s, const char *path, char *err, size_t errsize)
{
	struct eval_doc *d = &s->doc[s->docs];
	char why[256];
	int r;

	*d = (struct eval_doc){.path = strdup(path)};
	if (!d->path)
		return -ENOMEM;
	r = trace_open(&d->trace, path, err, errsize);
	if (r < 0) {
		free(d->path);
		return r;
	}
	s->docs++; /* from here on closed with the set */
	if (s->docs == 1 && !s->shape.layers)
		s->shape = d->trace->h;
	if (trace_same_shape(&s->shape, &d->trace->h, why, sizeof(why)) < 0)
		return refuse(path, why, err, errsize);
	if (d->trace->h.dtype != s->shape.dtype)
		return refuse(path, "dtype: differs from the other traces'", err, errsize);
	r = check_chunks(d, err, errsize);
	if (r < 0)
		return r;
	if (intern(&s->cluster, &s->clusters, d->trace->h.source, &d->cluster) < 0 ||
	    intern(&s->domain, &s->domains, d->trace->h.domain, &d->domain) < 0 ||
	    add_items(s, s->docs - 1) < 0) {
		snprintf(err, errsize, "memory: not enough for the list of traces");
		return -ENOMEM;
	}
	return 0;
}

static void raise_descriptors(void)
{
	struct rlimit l;

	if (getrlimit(RLIMIT_NOFILE, &l) == 0 && l.rlim_cur < l.rlim_max) {
		l.rlim_cur = l.rlim_max;
		setrlimit(RLIMIT_NOFILE, &l);
	}
}

static const char *split_name(enum trace_split split)
{
	static const char *const names[] = {"train", "valid", "test", "calib"};

	return names[split];
}

int eval_set_open(struct eval_set *ret, const char *dir, enum trace_split split, uint32_t limit,
		  const struct trace_header *like, char *err, size_t errsize)
{
	struct eval_set s = {0};
	char **list;
	uint32_t n, take;
	int r = trace_list(&list, &n, dir, split, err, errsize);

	if (r < 0)
		return r;
	raise_descriptors();
	take = limit ? MIN(limit, n) : n;
	s.doc = calloc(take + 1, sizeof(*s.doc));
	r = s.doc ? 0 : -ENOMEM;
	if (like)
		s.shape = *like;
	for (uint32_t i = 0; r == 0 && i < take; i++)
		r = add_doc(&s, list[(uint64_t)i * n / take], err, errsize);
	trace_list_free(list, n);
	if (r == 0 && s.items == 0) {
		snprintf(err, errsize, "%s: no trace of split %s with a cut of %u rows or more", dir,
			 split_name(split), LEAST_PROMPT);
		r = -ENOENT;
	}
	if (r < 0) {
		eval_set_close(&s);
		return r;
	}
	*ret = s;
	return 0;
}

int eval_set_need_q(const struct eval_set *s, char *err, size_t errsize)
{
	for (uint32_t i = 0; i < s->docs; i++)
		if (!trace_find(s->doc[i].trace, TRACE_Q, 0, 0))
			return refuse(s->doc[i].path,
				      "Q: none, the policies that rank by attention need it (name others with "
				      "--policies)",
				      err, errsize);
	return 0;
}

void eval_set_close(struct eval_set *s)
{
	for (uint32_t i = 0; i < s->docs; i++) {
		trace_free(s->doc[i].trace);
		free(s->doc[i].path);
	}
	free(s->doc);
	free(s->item);
	free(s->cluster);
	free(s->domain);
	*s = (struct eval_set){0};
}

void eval_set_mark_held_out(struct eval_set *s, const struct eval_set *seen)
{
	for (uint32_t i = 0; i < s->items; i++) {
		const struct eval_doc *d = &s->doc[s->item[i].doc];
		const char *name = s->domain[d->domain];

		s->item[i].long_doc = d->trace->h.rows > MAX(seen->max_rows, EVAL_MAIN_ROWS);
		s->item[i].held_out = !s->item[i].long_doc;
		for (uint32_t k = 0; k < seen->domains; k++)
			if (strcmp(seen->domain[k], name) == 0)
				s->item[i].held_out = false;
	}
}

int eval_table_init(struct eval_table *t, uint32_t items, uint32_t lanes, uint32_t policies)
{
	size_t n = (size_t)items * lanes * policies * METRICS;

	*t = (struct eval_table){.items = items, .lanes = lanes, .policies = policies};
	t->value = malloc(n * sizeof(*t->value));
	if (!t->value)
		return -ENOMEM;
	for (size_t i = 0; i < n; i++)
		t->value[i] = NAN;
	return 0;
}

void eval_table_done(struct eval_table *t)
{
	free(t->value);
	t->value = NULL;
}
