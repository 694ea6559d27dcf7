/* SPDX-License-Identifier: MIT */
/*
 * Q-filters (Godey et al., arXiv 2503.02812): per KV head the main direction of its queries, from traces
 * that hold them. A key is worth much when it points where queries point, so that the filter, which scores
 * -f . k, is that direction turned round.
 */
#include "policy/learned.h"
#include "policy/train/modes.h"
#include "shm/util.h"

#include <cblas.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#define MAX_DIM 1024u

struct moments {
	uint32_t lanes, dim;
	double *square; /* [lanes][dim][dim] sum of q q' */
	double *sum;    /* [lanes][dim] */
	uint64_t queries;
};

static int add_lane(struct moments *m, const struct trace *t, uint32_t lane, void *raw, float *q, float *square,
		    char *err, size_t errsize)
{
	size_t rows = (size_t)t->h.group * t->h.rows, dim = m->dim;
	double *to = m->square + lane * dim * dim, *sum = m->sum + lane * dim;
	int r = trace_read(t, TRACE_Q, lane, 0, raw, err, errsize);

	if (r < 0)
		return r;
	for (size_t i = 0; i < rows * dim; i++) {
		q[i] = row_element(raw, i, t->h.dtype);
		sum[i % dim] += (double)q[i];
	}
	cblas_ssyrk(CblasRowMajor, CblasUpper, CblasTrans, (int)dim, (int)rows, 1, q, (int)dim, 0, square,
		    (int)dim);
	for (size_t i = 0; i < dim; i++)
		for (size_t j = 0; j < dim; j++)
			to[i * dim + j] += (double)square[MIN(i, j) * dim + MAX(i, j)];
	return 0;
}

static int add_trace(struct moments *m, const char *path, char *err, size_t errsize)
{
	_cleanup_free_ float *q = NULL, *square = NULL;
	_cleanup_free_ void *raw = NULL;
	struct trace *t;
	int r = trace_open(&t, path, err, errsize);

	if (r < 0)
		return r;
	if (!trace_find(t, TRACE_Q, 0, 0))
		goto out;
	raw = malloc(trace_chunk_bytes(&t->h, TRACE_Q, NULL));
	q = malloc((size_t)t->h.group * t->h.rows * m->dim * sizeof(*q));
	square = calloc((size_t)m->dim * m->dim, sizeof(*square));
	if (!raw || !q || !square)
		r = -ENOMEM;
	for (uint32_t lane = 0; r == 0 && lane < m->lanes; lane++)
		r = add_lane(m, t, lane, raw, q, square, err, errsize);
	m->queries += r == 0 ? (uint64_t)t->h.group * t->h.rows : 0;
out:
	trace_free(t);
	return r;
}

/* The first right singular vector of the queries: power iteration on the sum of q q'. */
static void main_direction(const double *square, const double *sum, uint32_t dim, float *f)
{
	double v[MAX_DIM], next[MAX_DIM], along = 0;

	for (uint32_t i = 0; i < dim; i++)
		v[i] = sum[i] + 1e-3 * (i + 1); /* near the answer as a rule, orthogonal to it never */
	for (uint32_t round = 0; round < 1000; round++) {
		double norm = 0, moved = 0;

		for (uint32_t i = 0; i < dim; i++) {
			next[i] = 0;
			for (uint32_t j = 0; j < dim; j++)
				next[i] += square[(size_t)i * dim + j] * v[j];
			norm += next[i] * next[i];
		}
		norm = sqrt(norm) + 1e-300;
		for (uint32_t i = 0; i < dim; i++) {
			next[i] /= norm;
			moved += (next[i] - v[i]) * (next[i] - v[i]);
			v[i] = next[i];
		}
		if (moved < 1e-20)
			break;
	}
	for (uint32_t i = 0; i < dim; i++)
		along += v[i] * sum[i];
	for (uint32_t i = 0; i < dim; i++)
		f[i] = (float)(along > 0 ? -v[i] : v[i]);
}

static int write_filters(const struct moments *m, const struct trace_header *t, const char *path, char *err,
			 size_t errsize)
{
	struct weights_header h = {.layers = t->layers,
				   .heads = t->heads,
				   .k_dim = t->k_dim,
				   .v_dim = t->v_dim,
				   .rope_type = t->rope_type,
				   .rope_theta = t->rope_theta,
				   .kind = WEIGHTS_QFILTER};
	_cleanup_free_ uint8_t *image = NULL;
	int r;

	memcpy(h.name, t->model, sizeof(h.name));
	r = weights_image_new(&image, &h, 0, err, errsize);
	if (r < 0)
		return r;
	for (uint32_t lane = 0; lane < m->lanes; lane++)
		main_direction(m->square + (size_t)lane * m->dim * m->dim, m->sum + (size_t)lane * m->dim,
			       m->dim, weights_image_at(image, lane, QFILTER_F));
	r = weights_image_seal(image, ((struct weights_header *)image)->total_size);
	if (r == 0)
		r = weights_image_write(image, path);
	if (r < 0)
		snprintf(err, errsize, "%s: %s", path, strerror(-r));
	return r;
}

static int gather(struct moments *m, struct set *s, char *err, size_t errsize)
{
	int r = 0;

	for (uint32_t i = 0; r == 0 && i < s->docs && !run_stop; i++)
		r = add_trace(m, s->doc[i].path, err, errsize);
	if (r == 0 && run_stop) {
		snprintf(err, errsize, "interrupted");
		r = -EINTR;
	}
	if (r == 0 && !m->queries) {
		snprintf(err, errsize, "%s: no trace of train or valid holds queries, filters need them",
			 s->o.dir);
		r = -EINVAL;
	}
	return r;
}

int mode_qfilter(struct options *o)
{
	struct moments m = {0};
	struct set *s = NULL;
	char err[320];
	int r;

	o->run.s.splits = 1u << TRACE_TRAIN | 1u << TRACE_VALID;
	o->run.s.lanes = 1;
	r = set_plan(&s, &o->run.s, err, sizeof(err));
	if (r < 0)
		return mode_fail(err);
	m.lanes = s->model.layers * s->model.heads;
	m.dim = s->model.k_dim;
	m.square = calloc((size_t)m.lanes * m.dim * m.dim, sizeof(*m.square));
	m.sum = calloc((size_t)m.lanes * m.dim, sizeof(*m.sum));
	if (m.dim > MAX_DIM || s->model.keys != TRACE_KEYS_CACHED || !m.square || !m.sum) {
		snprintf(err, sizeof(err), "%s: filters need keys after RoPE of at most %u elements", s->o.dir,
			 MAX_DIM);
		r = -EINVAL;
	}
	if (r == 0)
		r = gather(&m, s, err, sizeof(err));
	if (r == 0)
		r = write_filters(&m, &s->model, o->run.out, err, sizeof(err));
	if (r == 0)
		printf("%s: %u filters from %llu queries each\n", o->run.out, m.lanes,
		       (unsigned long long)m.queries);
	set_free(s);
	free(m.square);
	free(m.sum);
	return r < 0 ? mode_fail(err) : 0;
}
