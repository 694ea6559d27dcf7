/* SPDX-License-Identifier: MIT */
#include "policy/train/net.h"
#include "policy/train/noise.h"
#include "shm/util.h"

#include <cblas.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

int net_init(struct net *ret, const struct weights_header *shape, char *err, size_t errsize)
{
	struct net n = {.h = *shape, .in = 2 * shape->proj + shape->pos_dim, .kern = kern_best()};

	n.h.dtype = n.h.kind == WEIGHTS_KVP ? WEIGHTS_BF16 : WEIGHTS_F32;
	if (n.h.kind != WEIGHTS_KVP && n.h.kind != WEIGHTS_POSITION) {
		snprintf(err, errsize, "kind: %u has no network to train, must be 1 (kvp) or 2 (position)",
			 n.h.kind);
		return -EINVAL;
	}
	if (weights_check_shape(&n.h, err, errsize) < 0)
		return -EINVAL;
	if (n.h.kind == WEIGHTS_KVP && !n.h.octave && (n.h.pos_kind == WEIGHTS_POS_LOG2 || n.h.dist_rows)) {
		snprintf(err, errsize, "octave: 0, must be 1 to 64 for knots at log2");
		return -EINVAL;
	}
	weights_lay_out(&n.layout, &n.h);
	for (uint32_t t = 0; t < n.layout.count; t++)
		n.at[t] = n.layout.tensor[t].off / n.layout.elem;
	n.params = n.layout.params;
	*ret = n;
	return 0;
}

bool net_decays(const struct net *n, uint32_t t)
{
	return n->h.kind == WEIGHTS_KVP &&
	       (t == KVP_WK || t == KVP_WV || t == KVP_W1 || t == KVP_W2 || t == KVP_W3);
}

void net_random(const struct net *n, uint64_t seed, uint32_t lane, float *params)
{
	memset(params, 0, n->params * sizeof(*params));
	for (uint32_t t = 0; n->h.kind == WEIGHTS_KVP && t < n->layout.count; t++) {
		const struct weights_tensor *x = &n->layout.tensor[t];
		size_t count = (size_t)x->rows * x->cols;
		float *p = params + n->at[t], bound = 0;

		if (net_decays(n, t))
			bound = (t == KVP_W3 ? 0.1f : 1.0f) / sqrtf((float)x->cols);
		else if (t == KVP_POS)
			bound = 0.1f;
		for (size_t i = 0; i < count; i++) {
			if (t == KVP_GK || t == KVP_GV || t == KVP_GP || t == KVP_G1 || t == KVP_G2)
				p[i] = 1;
			else if (bound > 0)
				p[i] = bound * (2 * train_noise(seed, t, lane, 0, 0, (uint32_t)i) - 1);
		}
	}
}

/* Carve the work's arrays out of one allocation; NULL memory only counts. */
static size_t carve(struct net_work *w, const struct net *n)
{
	const struct weights_header *h = &n->h;
	struct {
		float **p;
		uint32_t width;
	} parts[] = {
		{&w->k, h->k_dim},
		{&w->v, h->v_dim},
		{&w->hat_k, h->proj},
		{&w->hat_v, h->proj},
		{&w->hat_p, h->pos_dim},
		{&w->x, n->in},
		{&w->hat_1, h->hidden},
		{&w->h1, h->hidden},
		{&w->hat_2, h->hidden},
		{&w->h2, h->hidden},
		{&w->f, 2},
		{&w->rstd[0], 1},
		{&w->rstd[1], 1},
		{&w->rstd[2], 1},
		{&w->rstd[3], 1},
		{&w->rstd[4], 1},
		{&w->dx, n->in},
		{&w->dh, MAX(h->hidden, h->pos_dim)},
		{&w->d1, MAX(h->proj, h->hidden)},
		{&w->df, 2},
		{(float **)&w->dist_knot, 1},
		{(float **)&w->pos_knot, 1},
		{&w->dist_part, 1},
		{&w->pos_part, 1},
	};
	size_t used = 0;

	for (size_t i = 0; i < ARRAY_SIZE(parts); i++) {
		if (w->memory)
			*parts[i].p = (float *)w->memory + used;
		used += ALIGN_UP((size_t)w->rows * parts[i].width, (size_t)16);
	}
	return used * sizeof(float);
}

int net_work_new(struct net_work **ret, const struct net *n, uint32_t rows)
{
	struct net_work *w = calloc(1, sizeof(*w));

	if (!w)
		return -ENOMEM;
	w->rows = rows;
	w->memory = aligned_alloc(KERN_ALIGN, carve(w, n));
	if (!w->memory) {
		free(w);
		return -ENOMEM;
	}
	carve(w, n);
	*ret = w;
	return 0;
}

void net_work_free(struct net_work *w)
{
	if (!w)
		return;
	free(w->memory);
	free(w);
}

/* Knots at log2(1 + x), `per_octave` of them per octave, of a table of `rows`. */
static void knot(uint32_t x, uint32_t per_octave, uint32_t rows, uint32_t *at, float *part)
{
	float t = (float)per_octave * log2f(1.0f + (float)x);

	if (t >= (float)(rows - 1)) {
		*at = rows - 1;
		*part = 0;
		return;
	}
	*at = (uint32_t)t;
	*part = t - (float)*at;
}

static float between(const float *table, uint32_t at, float part)
{
	return part > 0 ? table[at] + part * (table[at + 1] - table[at]) : table[at];
}

static void between_back(float *table, uint32_t at, float part, float d)
{
	table[at] += d * (1 - part);
	if (part > 0)
		table[at + 1] += d * part;
}

static void find_knots(const struct net *n, struct net_work *w, const uint32_t *pos, uint32_t prompt)
{
	const struct weights_header *h = &n->h;
	bool position = h->kind == WEIGHTS_POSITION;
	uint32_t octave = position ? h->pos_dim : h->octave, dist_rows = position ? h->pos_rows : h->dist_rows;

	w->lambda = MIN(MAX(log2f((float)prompt), 8.0f), 14.0f) - 11.0f;
	for (uint32_t i = 0; i < w->n; i++) {
		uint32_t left = pos[i] < prompt ? prompt - 1 - pos[i] : 0;

		if (dist_rows)
			knot(left, octave, dist_rows, &w->dist_knot[i], &w->dist_part[i]);
		if (h->pos_kind == WEIGHTS_POS_LOG2) {
			knot(pos[i], octave, h->pos_rows, &w->pos_knot[i], &w->pos_part[i]);
		} else {
			w->pos_knot[i] = MIN(pos[i], h->pos_rows - 1);
			w->pos_part[i] = 0;
		}
	}
}

/* y = x W', W [out][in] */
static void linear(const float *x, uint32_t ldx, const float *w, float *y, uint32_t rows, uint32_t in,
		   uint32_t out)
{
	cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, (int)rows, (int)out, (int)in, 1, x, (int)ldx, w,
		    (int)in, 0, y, (int)out);
}

/* dw += dy' x */
static void linear_weights(const float *dy, const float *x, uint32_t ldx, float *dw, uint32_t rows, uint32_t in,
			   uint32_t out)
{
	cblas_sgemm(CblasRowMajor, CblasTrans, CblasNoTrans, (int)out, (int)in, (int)rows, 1, dy, (int)out, x,
		    (int)ldx, 1, dw, (int)in);
}

/* dx = dy W */
static void linear_input(const float *dy, const float *w, float *dx, uint32_t rows, uint32_t in, uint32_t out)
{
	cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, (int)rows, (int)in, (int)out, 1, dy, (int)out, w,
		    (int)in, 0, dx, (int)in);
}

static struct kern_norm norm_of(const struct net *n, const struct net_work *w, const float *p, uint32_t width,
				int bias, int gain, bool silu)
{
	return (struct kern_norm){
		.rows = w->n,
		.width = width,
		.bias = bias < 0 ? NULL : p + n->at[bias],
		.gain = p + n->at[gain],
		.shift = p + n->at[gain + 1],
		.silu = silu,
	};
}

/* phi_0 and phi_1 of row i. */
static void phis(const struct net *n, const struct net_work *w, const float *p, uint32_t i, float phi[2])
{
	const float *dist = p + n->at[KVP_DIST];

	for (uint32_t r = 0; r < n->h.rank; r++, dist += 2 * n->h.dist_rows)
		phi[r] = between(dist, w->dist_knot[i], w->dist_part[i]) +
			 w->lambda * between(dist + n->h.dist_rows, w->dist_knot[i], w->dist_part[i]);
}

static void position_forward(const struct net *n, const struct net_work *w, const float *p, float *scores)
{
	for (uint32_t i = 0; i < w->n; i++)
		scores[i] = between(p + n->at[POSITION_DIST], w->dist_knot[i], w->dist_part[i]) +
			    between(p + n->at[POSITION_INDEX], w->pos_knot[i], w->pos_part[i]);
}

static void embed(const struct net *n, struct net_work *w, const float *p)
{
	const struct weights_header *h = &n->h;
	struct kern_norm k = norm_of(n, w, p, h->pos_dim, -1, KVP_GP, false);

	for (uint32_t i = 0; i < w->n; i++)
		for (uint32_t c = 0; c < h->pos_dim; c++) {
			const float *row = p + n->at[KVP_POS] + (size_t)w->pos_knot[i] * h->pos_dim + c;
			float part = w->pos_part[i];

			w->hat_p[(size_t)i * h->pos_dim + c] =
				part > 0 ? *row + part * (row[h->pos_dim] - *row) : *row;
		}
	n->kern->norm(&k, w->hat_p, w->hat_p, w->rstd[2], w->x + 2 * h->proj, n->in);
}

void net_forward(const struct net *n, struct net_work *w, const float *p, uint32_t rows, const uint32_t *pos,
		 uint32_t prompt, float *scores)
{
	const struct weights_header *h = &n->h;
	struct kern_norm k;

	w->n = rows;
	find_knots(n, w, pos, prompt);
	if (h->kind == WEIGHTS_POSITION) {
		position_forward(n, w, p, scores);
		return;
	}
	linear(w->k, h->k_dim, p + n->at[KVP_WK], w->hat_k, rows, h->k_dim, h->proj);
	k = norm_of(n, w, p, h->proj, KVP_BK, KVP_GK, false);
	n->kern->norm(&k, w->hat_k, w->hat_k, w->rstd[0], w->x, n->in);
	linear(w->v, h->v_dim, p + n->at[KVP_WV], w->hat_v, rows, h->v_dim, h->proj);
	k = norm_of(n, w, p, h->proj, KVP_BV, KVP_GV, false);
	n->kern->norm(&k, w->hat_v, w->hat_v, w->rstd[1], w->x + h->proj, n->in);
	embed(n, w, p);
	linear(w->x, n->in, p + n->at[KVP_W1], w->hat_1, rows, n->in, h->hidden);
	k = norm_of(n, w, p, h->hidden, KVP_B1, KVP_G1, true);
	n->kern->norm(&k, w->hat_1, w->hat_1, w->rstd[3], w->h1, h->hidden);
	linear(w->h1, h->hidden, p + n->at[KVP_W2], w->hat_2, rows, h->hidden, h->hidden);
	k = norm_of(n, w, p, h->hidden, KVP_B2, KVP_G2, true);
	n->kern->norm(&k, w->hat_2, w->hat_2, w->rstd[4], w->h2, h->hidden);
	linear(w->h2, h->hidden, p + n->at[KVP_W3], w->f, rows, h->hidden, h->rank);
	for (uint32_t i = 0; i < rows; i++) {
		float *f = w->f + (size_t)i * h->rank, phi[2] = {0, 0};

		for (uint32_t r = 0; r < h->rank; r++)
			f[r] += p[n->at[KVP_B3] + r];
		if (h->dist_rows)
			phis(n, w, p, i, phi);
		scores[i] = f[0] + phi[0] + (h->rank > 1 ? f[1] * phi[1] : 0);
	}
}

/* Through s = f_0 + phi_0 + f_1 phi_1 to df and the distance tables. */
static void scores_back(const struct net *n, struct net_work *w, const float *p, const float *ds, float *grad)
{
	const struct weights_header *h = &n->h;

	for (uint32_t i = 0; i < w->n; i++) {
		float *f = w->f + (size_t)i * h->rank, *df = w->df + (size_t)i * h->rank;
		float phi[2] = {0, 0}, dphi[2] = {ds[i], h->rank > 1 ? ds[i] * f[1] : 0};

		if (h->dist_rows)
			phis(n, w, p, i, phi);
		df[0] = ds[i];
		if (h->rank > 1)
			df[1] = ds[i] * phi[1];
		for (uint32_t r = 0; r < h->rank; r++) {
			float *dist = grad + n->at[KVP_DIST] + (size_t)2 * r * h->dist_rows;

			grad[n->at[KVP_B3] + r] += df[r];
			if (!h->dist_rows)
				continue;
			between_back(dist, w->dist_knot[i], w->dist_part[i], dphi[r]);
			between_back(dist + h->dist_rows, w->dist_knot[i], w->dist_part[i],
				     w->lambda * dphi[r]);
		}
	}
}

static void embed_back(const struct net *n, struct net_work *w, const float *p, float *grad)
{
	const struct weights_header *h = &n->h;
	struct kern_norm k = norm_of(n, w, p, h->pos_dim, -1, KVP_GP, false);
	float *d = w->dh; /* no longer needed */

	n->kern->norm_back(&k, w->hat_p, w->rstd[2], w->dx + 2 * h->proj, n->in, d, grad + n->at[KVP_GP],
			   grad + n->at[KVP_OP], NULL);
	for (uint32_t i = 0; i < w->n; i++, d += h->pos_dim) {
		float part = w->pos_part[i];
		float *row = grad + n->at[KVP_POS] + (size_t)w->pos_knot[i] * h->pos_dim;

		for (uint32_t c = 0; c < h->pos_dim; c++) {
			row[c] += (1 - part) * d[c];
			if (part > 0)
				row[h->pos_dim + c] += part * d[c];
		}
	}
}

void net_backward(const struct net *n, struct net_work *w, const float *p, const float *ds, float *grad)
{
	const struct weights_header *h = &n->h;
	struct kern_norm k;

	if (h->kind == WEIGHTS_POSITION) {
		for (uint32_t i = 0; i < w->n; i++) {
			between_back(grad + n->at[POSITION_DIST], w->dist_knot[i], w->dist_part[i], ds[i]);
			between_back(grad + n->at[POSITION_INDEX], w->pos_knot[i], w->pos_part[i], ds[i]);
		}
		return;
	}
	scores_back(n, w, p, ds, grad);
	linear_weights(w->df, w->h2, h->hidden, grad + n->at[KVP_W3], w->n, h->hidden, h->rank);
	linear_input(w->df, p + n->at[KVP_W3], w->dh, w->n, h->hidden, h->rank);

	k = norm_of(n, w, p, h->hidden, KVP_B2, KVP_G2, true);
	n->kern->norm_back(&k, w->hat_2, w->rstd[4], w->dh, h->hidden, w->d1, grad + n->at[KVP_G2],
			   grad + n->at[KVP_O2], grad + n->at[KVP_B2]);
	linear_weights(w->d1, w->h1, h->hidden, grad + n->at[KVP_W2], w->n, h->hidden, h->hidden);
	linear_input(w->d1, p + n->at[KVP_W2], w->dh, w->n, h->hidden, h->hidden);

	k = norm_of(n, w, p, h->hidden, KVP_B1, KVP_G1, true);
	n->kern->norm_back(&k, w->hat_1, w->rstd[3], w->dh, h->hidden, w->d1, grad + n->at[KVP_G1],
			   grad + n->at[KVP_O1], grad + n->at[KVP_B1]);
	linear_weights(w->d1, w->x, n->in, grad + n->at[KVP_W1], w->n, n->in, h->hidden);
	linear_input(w->d1, p + n->at[KVP_W1], w->dx, w->n, n->in, h->hidden);

	k = norm_of(n, w, p, h->proj, KVP_BK, KVP_GK, false);
	n->kern->norm_back(&k, w->hat_k, w->rstd[0], w->dx, n->in, w->d1, grad + n->at[KVP_GK],
			   grad + n->at[KVP_OK], grad + n->at[KVP_BK]);
	linear_weights(w->d1, w->k, h->k_dim, grad + n->at[KVP_WK], w->n, h->k_dim, h->proj);
	k = norm_of(n, w, p, h->proj, KVP_BV, KVP_GV, false);
	n->kern->norm_back(&k, w->hat_v, w->rstd[1], w->dx + h->proj, n->in, w->d1, grad + n->at[KVP_GV],
			   grad + n->at[KVP_OV], grad + n->at[KVP_BV]);
	linear_weights(w->d1, w->v, h->v_dim, grad + n->at[KVP_WV], w->n, h->v_dim, h->proj);
	embed_back(n, w, p, grad);
}
