/* SPDX-License-Identifier: MIT */
/* Folding a weight file into the network that shm/scorer.h describes. Everything is computed in fp64 and
 * rounded once. */
#include "policy/scorer.h"
#include "policy/kvp.h"
#include "shm/util.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>

static int __attribute__((format(printf, 3, 4))) refuse(char *err, size_t errsize, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(err, errsize, fmt, ap);
	va_end(ap);
	return -ENOTSUP;
}

/* ---- shape ---- */

static int served(const struct weights_header *h, char *err, size_t errsize)
{
	if (h->kind != WEIGHTS_KVP)
		return refuse(err, errsize, "weights of kind %s: a GPU scores with kind kvp only",
			      weights_kind_name(h->kind));
	if (h->k_dim != h->v_dim)
		return refuse(err, errsize, "k_dim %u, v_dim %u: a GPU scores rows of equal width only",
			      h->k_dim, h->v_dim);
	if (h->k_dim != 64 && h->k_dim != 128)
		return refuse(err, errsize, "k_dim %u: a GPU scores 64 or 128 only", h->k_dim);
	if (h->proj != 128 && h->proj != 256)
		return refuse(err, errsize, "proj %u: a GPU scores with 128 or 256 only", h->proj);
	if (h->hidden != 128 && h->hidden != 256)
		return refuse(err, errsize, "hidden %u: a GPU scores with 128 or 256 only", h->hidden);
	if (h->pos_dim > SCORER_POS_PAD)
		return refuse(err, errsize, "pos_dim %u: a GPU scores with at most %u", h->pos_dim,
			      SCORER_POS_PAD);
	return 0;
}

int scorer_header(struct scorer_hdr *ret, const struct weights *w, char *err, size_t errsize)
{
	const struct weights_header *h = &w->h;
	struct scorer_hdr s = {.magic = SCORER_MAGIC,
			       .version = SCORER_VERSION,
			       .id = weights_id_of(w),
			       .layers = h->layers,
			       .heads = h->heads,
			       .k_dim = h->k_dim,
			       .v_dim = h->v_dim,
			       .proj = h->proj,
			       .hidden = h->hidden,
			       .pos_dim = h->pos_dim,
			       .pos_pad = SCORER_POS_PAD,
			       .pos_rows = h->pos_rows,
			       .octave = h->octave,
			       .coefs = h->rank,
			       .rope_theta = h->rope_theta};
	int r = served(h, err, errsize);

	if (r < 0)
		return r;
	if (h->keys == WEIGHTS_KEYS_UNROTATED && h->rope_type != WEIGHTS_ROPE_NONE)
		s.flags |= SCORER_UNROTATE | (h->rope_type == WEIGHTS_ROPE_PAIRS ? SCORER_ROPE_PAIRS : 0);
	if (h->pos_kind == WEIGHTS_POS_LOG2)
		s.flags |= SCORER_LOG2;
	scorer_lay_out(&s);
	*ret = s;
	return 0;
}

/* ---- one lane ---- */

/* Room for the widest lane; matrices row-major, or by column where it says so. */
struct fold {
	double w[256 * 129];   /* [proj][dim + 1]: W' and, last, b' */
	double col[129 * 256]; /* [dim + 1][proj]: the same by column, then its R */
	double m[256 * 129];   /* [hidden][dim + 1] */
	double w1[256 * 576];  /* [hidden][in] */
	double c[256];
};

static double value(const struct weights *w, uint32_t lane, uint32_t tensor, size_t i)
{
	return bf16_float(((const uint16_t *)weights_at(w, lane, tensor))[i]);
}

/* Remove the mean over rows from every column of m [rows][cols]. */
static void centre(double *m, uint32_t rows, uint32_t cols)
{
	for (uint32_t j = 0; j < cols; j++) {
		double mean = 0;

		for (uint32_t i = 0; i < rows; i++)
			mean += m[(size_t)i * cols + j];
		mean /= rows;
		for (uint32_t i = 0; i < rows; i++)
			m[(size_t)i * cols + j] -= mean;
	}
}

/* Householder: a[j] is column j of cols, m elements each; on return a[j][i], i <= j, is R. */
static void triangulate(double *a, uint32_t m, uint32_t cols)
{
	for (uint32_t j = 0; j < MIN(m, cols); j++) {
		double *x = a + (size_t)j * m, norm = 0, head, scale;

		for (uint32_t i = j; i < m; i++)
			norm += x[i] * x[i];
		norm = sqrt(norm);
		if (norm == 0)
			continue;
		head = x[j] > 0 ? -norm : norm; /* R's diagonal */
		scale = head * (head - x[j]);   /* |v|^2 / 2 of v = x - head e_j */
		x[j] -= head;
		for (uint32_t k = j + 1; k < cols; k++) {
			double *y = a + (size_t)k * m, dot = 0;

			for (uint32_t i = j; i < m; i++)
				dot += x[i] * y[i];
			dot /= scale;
			for (uint32_t i = j; i < m; i++)
				y[i] -= dot * x[i];
		}
		x[j] = head;
	}
}

/* The linear of K or V and its LayerNorm: R, r and rest; M and m behind W1's columns from `first` on. */
static void fold_projection(struct fold *f, char *out, const struct scorer_hdr *h, const struct weights *w,
			    uint32_t lane, bool value_part)
{
	const struct scorer_vecs at = scorer_vecs(h->k_dim, h->hidden);
	const uint32_t dim = h->k_dim, cols = dim + 1, proj = h->proj, in = 2 * proj + h->pos_dim,
		       first = value_part ? proj : 0, t = value_part ? KVP_WV : KVP_WK;
	uint16_t *r = (uint16_t *)(out + h->tensor_off[value_part ? SCORER_RV : SCORER_RK]),
		 *m = (uint16_t *)(out + h->tensor_off[value_part ? SCORER_MV : SCORER_MK]);
	float *vecs = (float *)(out + h->tensor_off[SCORER_VECS]), *vec_r = vecs + (value_part ? at.rv : at.rk),
	      *vec_m = vecs + (value_part ? at.mv : at.mk);
	double rest = proj > dim ? 1 : 0;

	for (uint32_t p = 0; p < proj; p++) {
		for (uint32_t i = 0; i < dim; i++)
			f->w[p * cols + i] = value(w, lane, t, (size_t)p * dim + i);
		f->w[p * cols + dim] = value(w, lane, t + 1, p);
	}
	centre(f->w, proj, cols);
	for (uint32_t p = 0; p < proj; p++)
		for (uint32_t i = 0; i < cols; i++)
			f->col[i * proj + p] = f->w[p * cols + i];
	triangulate(f->col, proj, cols);
	for (uint32_t i = 0; i < dim; i++) {
		for (uint32_t j = i / 64 * 64; j < dim; j++)
			r[scorer_tri_at(dim, i, j)] = float_bf16(j < i ? 0 : (float)f->col[j * proj + i]);
		vec_r[i] = (float)f->col[dim * proj + i];
	}
	if (rest > 0)
		rest = f->col[dim * proj + dim] * f->col[dim * proj + dim];
	vecs[value_part ? at.rest_v : at.rest_k] = (float)rest;

	for (uint32_t o = 0; o < h->hidden; o++) {
		double *row = f->m + (size_t)o * cols;

		memset(row, 0, cols * sizeof(*row));
		for (uint32_t p = 0; p < proj; p++) {
			double x = f->w1[(size_t)o * in + first + p] * value(w, lane, t + 2, p);

			f->c[o] += f->w1[(size_t)o * in + first + p] * value(w, lane, t + 3, p);
			for (uint32_t i = 0; i < cols; i++)
				row[i] += x * f->w[p * cols + i];
		}
	}
	centre(f->m, h->hidden, cols);
	for (uint32_t o = 0; o < h->hidden; o++) {
		for (uint32_t i = 0; i < dim; i++)
			m[scorer_at(h->hidden, o, i)] = float_bf16((float)f->m[o * cols + i]);
		vec_m[o] = (float)f->m[o * cols + dim];
	}
}

/* What the second layer and the outgoing one need, as they are but for the mean and the half. */
static void fold_hidden(struct fold *f, char *out, const struct scorer_hdr *h, const struct weights *w,
			uint32_t lane)
{
	const struct scorer_vecs at = scorer_vecs(h->k_dim, h->hidden);
	const uint32_t hidden = h->hidden, cols = hidden + 1;
	uint16_t *w2 = (uint16_t *)(out + h->tensor_off[SCORER_W2]);
	float *vecs = (float *)(out + h->tensor_off[SCORER_VECS]);

	for (uint32_t o = 0; o < hidden; o++) {
		for (uint32_t i = 0; i < hidden; i++)
			f->w1[o * cols + i] = value(w, lane, KVP_W2, (size_t)o * hidden + i);
		f->w1[o * cols + hidden] = value(w, lane, KVP_B2, o);
	}
	centre(f->w1, hidden, cols);
	for (uint32_t o = 0; o < hidden; o++) {
		for (uint32_t i = 0; i < hidden; i++)
			w2[scorer_at(hidden, o, i)] = float_bf16((float)f->w1[o * cols + i]);
		vecs[at.b2 + o] = (float)f->w1[o * cols + hidden];
		vecs[at.g1 + o] = (float)(value(w, lane, KVP_G1, o) / 2);
		vecs[at.o1 + o] = (float)(value(w, lane, KVP_O1, o) / 2);
		vecs[at.g2 + o] = (float)(value(w, lane, KVP_G2, o) / 2);
		vecs[at.o2 + o] = (float)(value(w, lane, KVP_O2, o) / 2);
		for (uint32_t r = 0; r < h->coefs; r++)
			vecs[at.w3 + r * hidden + o] = (float)value(w, lane, KVP_W3, r * hidden + o);
	}
	for (uint32_t r = 0; r < h->coefs; r++)
		vecs[at.b3 + r] = (float)value(w, lane, KVP_B3, r);
}

/* Row `pos` of the table through its LayerNorm. */
static void normal_position(double *p, const struct scorer_hdr *h, const struct weights *w, uint32_t lane,
			    uint32_t pos)
{
	double mean = 0, var = 0;

	for (uint32_t i = 0; i < h->pos_dim; i++) {
		p[i] = value(w, lane, KVP_POS, (size_t)pos * h->pos_dim + i);
		mean += p[i] / h->pos_dim;
	}
	for (uint32_t i = 0; i < h->pos_dim; i++)
		var += (p[i] - mean) * (p[i] - mean) / h->pos_dim;
	for (uint32_t i = 0; i < h->pos_dim; i++)
		p[i] = (p[i] - mean) / sqrt(var + (double)SCORER_EPS) * value(w, lane, KVP_GP, i) +
		       value(w, lane, KVP_OP, i);
}

static void fold_position(struct fold *f, char *out, const struct scorer_hdr *h, const struct weights *w,
			  uint32_t lane)
{
	const uint32_t in = 2 * h->proj + h->pos_dim, dim = h->pos_dim;
	uint16_t *wp = (uint16_t *)(out + h->tensor_off[SCORER_WP]),
		 *pos = (uint16_t *)(out + h->tensor_off[SCORER_POS]);
	float *ln = (float *)(out + h->tensor_off[SCORER_POS_LN]);
	double p[SCORER_POS_PAD];

	for (uint32_t o = 0; o < h->hidden; o++)
		for (uint32_t i = 0; i < dim; i++)
			f->m[o * dim + i] = f->w1[(size_t)o * in + 2 * h->proj + i];
	centre(f->m, h->hidden, dim);
	for (uint32_t o = 0; o < h->hidden; o++)
		for (uint32_t i = 0; i < dim; i++)
			wp[scorer_at(h->hidden, o, i)] = float_bf16((float)f->m[o * dim + i]);
	for (uint32_t i = 0; i < dim; i++) {
		ln[i] = (float)value(w, lane, KVP_GP, i);
		ln[SCORER_POS_PAD + i] = (float)value(w, lane, KVP_OP, i);
	}
	for (uint32_t row = 0; row < h->pos_rows; row++, pos += SCORER_POS_PAD) {
		normal_position(p, h, w, lane, row);
		for (uint32_t i = 0; i < dim; i++)
			pos[i] = h->flags & SCORER_LOG2
					 ? float_bf16((float)value(w, lane, KVP_POS, (size_t)row * dim + i))
					 : float_bf16((float)p[i]);
	}
}

static void fold_lane(struct fold *f, char *out, const struct scorer_hdr *h, const struct weights *w,
		      uint32_t lane)
{
	const struct scorer_vecs at = scorer_vecs(h->k_dim, h->hidden);
	const size_t in = 2 * h->proj + h->pos_dim;
	float *vecs = (float *)(out + h->tensor_off[SCORER_VECS]);

	for (size_t i = 0; i < h->hidden * in; i++)
		f->w1[i] = value(w, lane, KVP_W1, i);
	for (uint32_t o = 0; o < h->hidden; o++)
		f->c[o] = value(w, lane, KVP_B1, o);
	fold_projection(f, out, h, w, lane, false);
	fold_projection(f, out, h, w, lane, true);
	centre(f->c, h->hidden, 1);
	for (uint32_t o = 0; o < h->hidden; o++)
		vecs[at.c + o] = (float)f->c[o];
	fold_position(f, out, h, w, lane);
	fold_hidden(f, out, h, w, lane); /* last: it reuses w1 */
}

int scorer_fold(void *out, const struct scorer_hdr *h, const struct weights *w, uint32_t first, uint32_t lanes)
{
	_cleanup_free_ struct fold *f = lanes ? malloc(sizeof(*f)) : NULL;

	if (lanes && !f)
		return -ENOMEM;
	for (uint32_t lane = first; lane < first + lanes; lane++)
		fold_lane(f, (char *)out + h->lane_off + lane * h->lane_stride, h, w, lane);
	return 0;
}

void scorer_begin(void *out, const struct scorer_hdr *h)
{
	uint64_t *turn = (uint64_t *)((char *)out + h->turn_off);

	memcpy(out, h, sizeof(*h));
	for (uint32_t i = 0; h->flags & SCORER_UNROTATE && i < h->k_dim / 2; i++) {
		long double per_row = powl(h->rope_theta, -2.0L * i / h->k_dim) / (2 * M_PIl);

		turn[i] = (uint64_t)ldexpl(per_row - floorl(per_row), 64);
	}
}

int scorer_build(void *out, const struct scorer_hdr *h, const struct weights *w)
{
	scorer_begin(out, h);
	return scorer_fold(out, h, w, 0, w->lanes);
}
