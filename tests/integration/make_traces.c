/* SPDX-License-Identifier: MIT */
/*
 * make_traces DIR LAYERS HEADS DIM DOCS [SEED]: made-up traces of splits train, valid and calib below DIR,
 * with something to learn: utilities follow a direction of the key before RoPE, one of the value, and the
 * distance. Valid and calib have queries too. Prints nothing.
 */
#include "policy/trace.h"
#include "policy/train/noise.h"
#include "shm/util.h"

#include <math.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

struct made {
	struct trace_header h;
	struct trace_cut cut[2];
	float *k, *v, *u, *q, *norm;
	uint64_t seed;
};

static float normal(uint64_t seed, uint32_t a, uint32_t b, uint32_t c)
{
	float sum = -2;

	for (uint32_t i = 0; i < 4; i++)
		sum += train_noise(seed, a, b, c, i, 0);
	return sum * 1.7320508f;
}

static void make_lane(struct made *m, uint32_t lane)
{
	uint32_t dim = m->h.k_dim;

	for (uint32_t i = 0; i < m->h.rows; i++) {
		m->norm[i] = 0.5f + (float)(lane % 3) + train_noise(m->seed, 9, lane, i, 0, 0);
		for (uint32_t c = 0; c < dim; c++) {
			m->k[i * dim + c] = normal(m->seed, 1, lane, i * dim + c);
			m->v[i * dim + c] = normal(m->seed, 2, lane, i * dim + c);
		}
	}
}

static float utility(const struct made *m, uint32_t lane, uint32_t row, uint32_t prompt)
{
	uint32_t dim = m->h.k_dim;
	float left = log2f((float)(prompt - row));

	return 0.02f * expf(1.2f * m->k[row * dim + lane % dim] + 0.8f * m->v[row * dim + (lane + 3) % dim] -
			    0.4f * left);
}

static int write_lane(struct made *m, struct trace_writer *w, uint32_t lane, const uint32_t *pos)
{
	uint32_t dim = m->h.k_dim;
	int r = 0;

	make_lane(m, lane);
	for (uint32_t c = 0; r == 0 && c < m->h.cuts; c++) {
		for (uint32_t kind = TRACE_UMAX; r == 0 && kind <= TRACE_UMEAN; kind++) {
			for (uint32_t i = 0; i < m->cut[c].prompt; i++)
				m->u[i] = (float)m->cut[c].queries * utility(m, lane, i, m->cut[c].prompt) *
					  (kind == TRACE_UMAX ? 1.5f : 1.0f);
			r = trace_writer_chunk(w, kind, lane, c, m->u);
		}
	}
	rope_apply(m->k, dim, m->h.rows, pos, m->h.rope_type, m->h.rope_theta);
	if (r == 0)
		r = trace_writer_chunk(w, TRACE_K, lane, 0, m->k);
	if (r == 0)
		r = trace_writer_chunk(w, TRACE_V, lane, 0, m->v);
	if (r == 0)
		r = trace_writer_chunk(w, TRACE_VNORM, lane, 0, m->norm);
	if (r < 0 || m->h.split == TRACE_TRAIN)
		return r;
	for (uint32_t i = 0; i < m->h.group * m->h.rows * dim; i++)
		m->q[i] = normal(m->seed, 3, lane, i) + (i % dim == lane % dim ? 2.0f : 0.0f);
	return trace_writer_chunk(w, TRACE_Q, lane, 0, m->q);
}

static int write_one(const char *dir, struct trace_header h, uint32_t doc, uint64_t seed)
{
	static const char *const names[] = {"train", "valid", "test", "calib"};
	struct made m = {.h = h, .seed = train_mix(seed ^ (doc << 2 | h.split))};
	struct trace_writer *w;
	uint32_t pos[2048];
	char path[512], err[256];
	int r;

	m.h.rows = 300 + (uint32_t)(m.seed % 400);
	m.h.cuts = 2;
	m.cut[0] = (struct trace_cut){m.h.rows / 2, 64, 0, 0};
	m.cut[1] = (struct trace_cut){m.h.rows - 64, 64, 1, TRACE_CUT_BEFORE};
	snprintf(m.h.source, sizeof(m.h.source), "made-%s-%u", names[h.split], doc);
	for (uint32_t i = 0; i < m.h.rows; i++)
		pos[i] = i;
	m.k = calloc((size_t)m.h.rows * h.k_dim, sizeof(float));
	m.v = calloc((size_t)m.h.rows * h.v_dim, sizeof(float));
	m.q = calloc((size_t)m.h.group * m.h.rows * h.k_dim, sizeof(float));
	m.u = calloc(m.h.rows, sizeof(float));
	m.norm = calloc(m.h.rows, sizeof(float));
	snprintf(path, sizeof(path), "%s/%s", dir, names[h.split]);
	mkdir(path, 0755);
	snprintf(path, sizeof(path), "%s/%s/%03u.kvtr", dir, names[h.split], doc);
	r = trace_writer_open(&w, path, &m.h, m.cut, err, sizeof(err));
	if (r < 0) {
		fprintf(stderr, "make_traces: %s\n", err);
		return r;
	}
	for (uint32_t lane = 0; r == 0 && lane < h.layers * h.heads; lane++)
		r = write_lane(&m, w, lane, pos);
	r = r < 0 ? (trace_writer_abort(w), r) : trace_writer_finish(w, 0);
	free(m.k);
	free(m.v);
	free(m.q);
	free(m.u);
	free(m.norm);
	return r;
}

int main(int argc, char **argv)
{
	static const uint32_t splits[] = {TRACE_TRAIN, TRACE_VALID, TRACE_CALIB};
	struct trace_header h = {.model = "made-up", .domain = "prose", .group = 2, .dtype = TRACE_F32};

	if (argc < 6)
		return 2;
	h.layers = (uint32_t)atoi(argv[2]);
	h.heads = (uint32_t)atoi(argv[3]);
	h.k_dim = h.v_dim = (uint32_t)atoi(argv[4]);
	h.rope_type = TRACE_ROPE_HALF;
	h.rope_theta = 10000.0f;
	for (uint32_t s = 0; s < ARRAY_SIZE(splits); s++) {
		uint32_t docs = (uint32_t)atoi(argv[5]) / (splits[s] == TRACE_TRAIN ? 1 : 2);

		h.split = splits[s];
		for (uint32_t d = 0; d < docs; d++)
			if (write_one(argv[1], h, d, argc > 6 ? strtoull(argv[6], NULL, 10) : 1) < 0)
				return 1;
	}
	return 0;
}
