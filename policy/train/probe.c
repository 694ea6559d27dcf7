/* SPDX-License-Identifier: MIT */
/*
 * kvtier-train --probe IN --out OUT: loss, scores and gradient of one lane for
 * given rows and parameters, by the chosen device. What tests compare with other
 * implementations. IN is struct probe_head, then per unit u32 prompt, u32 n, u32 pos[n], f16 k[n][k_dim],
 * f16 v[n][v_dim], f32 u[n] (per query), then f32 params. OUT is f32: loss, the units' scores, the gradient.
 */
#include "policy/train/modes.h"
#include "shm/util.h"

#include <stdio.h>
#include <string.h>

#define PROBE_MAGIC "KVTPROBE"
#define PROBE_MAX_UNITS 64u

struct probe_head {
	char magic[8];
	uint32_t kind, k_dim, v_dim, proj, hidden, rank, pos_kind, pos_rows, pos_dim, dist_rows, octave;
	uint32_t objective, reward, weighting, perms, units;
	uint64_t seed, step;
};

struct probe_unit {
	uint32_t prompt, n, *pos;
	uint16_t *k, *v;
	float *u;
};

struct probe {
	struct probe_head h;
	struct probe_unit unit[PROBE_MAX_UNITS];
	float *params;
};

static void *read_array(FILE *f, size_t n, size_t size)
{
	void *p = n > 0 && n < (size_t)1 << 30 ? malloc(n * size) : NULL;

	if (p && fread(p, size, n, f) == n)
		return p;
	free(p);
	return NULL;
}

static void probe_drop(struct probe *p)
{
	for (uint32_t i = 0; i < PROBE_MAX_UNITS; i++) {
		free(p->unit[i].pos);
		free(p->unit[i].k);
		free(p->unit[i].v);
		free(p->unit[i].u);
	}
	free(p->params);
}

static bool read_unit(FILE *f, const struct probe_head *h, struct probe_unit *u)
{
	if (fread(&u->prompt, sizeof(u->prompt), 1, f) != 1 || fread(&u->n, sizeof(u->n), 1, f) != 1 ||
	    u->n < 2 || u->n > TRAIN_MAX_ROWS)
		return false;
	u->pos = read_array(f, u->n, sizeof(*u->pos));
	u->k = read_array(f, (size_t)u->n * h->k_dim, sizeof(*u->k));
	u->v = read_array(f, (size_t)u->n * h->v_dim, sizeof(*u->v));
	u->u = read_array(f, u->n, sizeof(*u->u));
	return u->pos && u->k && u->v && u->u;
}

static bool read_input(FILE *f, struct probe *p, struct weights_header *shape, struct net *net, char *err,
		       size_t errsize)
{
	struct probe_head *h = &p->h;

	snprintf(err, errsize, "probe: the input is not one");
	if (fread(h, sizeof(*h), 1, f) != 1 || memcmp(h->magic, PROBE_MAGIC, 8) != 0 || h->units < 1 ||
	    h->units > PROBE_MAX_UNITS)
		return false;
	*shape = (struct weights_header){.name = "probe",
					 .layers = 1,
					 .heads = 1,
					 .kind = h->kind,
					 .k_dim = h->k_dim,
					 .v_dim = h->v_dim,
					 .proj = h->proj,
					 .hidden = h->hidden,
					 .rank = h->rank,
					 .pos_kind = h->pos_kind,
					 .pos_rows = h->pos_rows,
					 .pos_dim = h->pos_dim,
					 .dist_rows = h->dist_rows,
					 .octave = h->octave};
	if (net_init(net, shape, err, errsize) < 0)
		return false;
	snprintf(err, errsize, "probe: the input is cut short");
	for (uint32_t i = 0; i < h->units; i++)
		if (!read_unit(f, h, &p->unit[i]))
			return false;
	p->params = read_array(f, net->params, sizeof(*p->params));
	return p->params != NULL;
}

/* One document per unit, all of its rows in the batch. */
static int compute(struct probe *p, const struct options *o, const struct weights_header *shape,
		   const struct net *net, FILE *out, char *err, size_t errsize)
{
	uint32_t units = p->h.units, n[PROBE_MAX_UNITS], unit[PROBE_MAX_UNITS], prompt[PROBE_MAX_UNITS],
		 most = 64;
	const uint32_t *pos[PROBE_MAX_UNITS];
	_cleanup_free_ float *grad = calloc(net->params, sizeof(*grad)), *score = NULL;
	_cleanup_free_ uint32_t *row = NULL;
	const struct train_backend_ops *ops;
	struct train_backend *b;
	float loss;
	int r;

	for (uint32_t i = 0; i < units; i++) {
		n[i] = p->unit[i].n;
		unit[i] = i;
		prompt[i] = p->unit[i].prompt;
		pos[i] = p->unit[i].pos;
		most = MAX(most, ALIGN_UP(n[i], 64u));
	}
	struct train_opts t = o->run.t;

	t.shape = *shape;
	t.lanes = t.threads = 1;
	t.batch = units;
	t.rows = most;
	t.objective = p->h.objective;
	t.reward = p->h.reward;
	t.weighting = p->h.weighting;
	t.perms = p->h.perms;
	t.seed = p->h.seed;
	struct train_set_shape s = {units, units, n, pos, unit, n, prompt};

	row = calloc((size_t)units * most, sizeof(*row));
	score = calloc((size_t)units * most, sizeof(*score));
	if (!grad || !row || !score)
		return -ENOMEM;
	for (size_t i = 0; i < (size_t)units * most; i++)
		row[i] = (uint32_t)(i % most);
	struct train_batch batch = {p->h.step, 0, units, unit, n, row};

	r = run_device(&ops, o->run.device, err, errsize);
	if (r == 0)
		r = ops->open(&b, &t, &s, err, errsize);
	if (r < 0)
		return r;
	for (uint32_t i = 0; r == 0 && i < units; i++) {
		r = ops->put_rows(b, 0, i, p->unit[i].k, p->unit[i].v);
		if (r == 0)
			r = ops->put_utility(b, 0, i, p->unit[i].u);
	}
	if (r == 0)
		r = ops->set(b, TRAIN_PARAMS, 0, p->params);
	if (r == 0)
		r = ops->gradient(b, &batch, grad, &loss);
	if (r == 0)
		r = ops->scores(b, TRAIN_PARAMS, &batch, score);
	if (r < 0)
		snprintf(err, errsize, "%s", ops->error(b));
	ops->close(b);
	if (r < 0)
		return r;
	fwrite(&loss, sizeof(loss), 1, out);
	for (uint32_t i = 0; i < units; i++)
		fwrite(score + (size_t)i * most, sizeof(*score), n[i], out);
	fwrite(grad, sizeof(*grad), net->params, out);
	return 0;
}

int mode_probe(struct options *o)
{
	struct weights_header shape;
	struct probe p = {0};
	FILE *in = fopen(o->subject, "re"), *out = fopen(o->run.out, "we");
	char err[256] = "probe: a file cannot be opened";
	struct net net;
	int r = -EINVAL;

	if (in && out && read_input(in, &p, &shape, &net, err, sizeof(err)))
		r = compute(&p, o, &shape, &net, out, err, sizeof(err));
	probe_drop(&p);
	if (in)
		fclose(in);
	if (out && fclose(out) != 0)
		r = -EIO;
	return r < 0 ? mode_fail(err) : 0;
}
