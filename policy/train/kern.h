/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * The trainer's loops that no BLAS has: pairs of scores, LayerNorm with SiLU
 * both ways, AdamW. One source (kern_body.h) compiled for each instruction set;
 * the forms differ in rounding only. Pure; any thread. Rows of activations are
 * floats at 64-byte aligned addresses, widths and strides multiples of 16.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define KERN_ALIGN 64u
#define KERN_PAD 32u /* floats: arrays of pairs() are readable up to a multiple of it */

struct kern_norm { /* a LayerNorm after a linear without bias */
	uint32_t rows, width;
	const float *bias; /* of the linear, or NULL */
	const float *gain, *shift;
	bool silu;
};

struct kern_adam {
	float lr, decay; /* decay: lr * weight decay, or 0 */
	float beta1, beta2, eps;
	float scale;      /* of the gradient (clipping) */
	float fix1, fix2; /* 1 / (1 - beta^t) */
};

struct kern {
	const char *isa;
	/*
	 * Plackett-Luce in pairs, e[i] = exp(s_i) > 0 padded with ones, g padded with zeros:
	 *    rank[j] = sum_i e_i / (e_i + e_j)        (i = j included: one half)
	 *    grad[j] = sum_i (g_i - g_j) p (1 - p),   p = e_i / (e_i + e_j)
	 * rank and grad are written up to the padding; either may be NULL.
	 */
	void (*pairs)(const float *e, const float *g, uint32_t n, float *rank, float *grad);
	/* e[i] = exp(s[i] - centre), the exponent clamped to +-40. */
	void (*exp)(const float *s, uint32_t n, float centre, float *e);
	/*
	 * x = in + bias; hat = (x - mean) / sqrt(var + 1e-5); out = gain hat + shift, SiLU of it if asked.
	 * in and hat have stride width (and may be the same), out has out_ld. rstd[rows].
	 */
	void (*norm)(const struct kern_norm *k, const float *in, float *hat, float *rstd, float *out,
		     uint32_t out_ld);
	/*
	 * dout (stride dout_ld) to din (stride width), the gradient of the linear's output; adds to dgain,
	 * dshift and, unless NULL, dbias [width].
	 */
	void (*norm_back)(const struct kern_norm *k, const float *hat, const float *rstd, const float *dout,
			  uint32_t dout_ld, float *din, float *dgain, float *dshift, float *dbias);
	/* AdamW with decoupled decay on n parameters, then the exponential average: ema += (1 - keep)(p - ema).
	 */
	void (*adam)(const struct kern_adam *a, float *p, const float *grad, float *m, float *v, size_t n);
	void (*average)(float *ema, const float *p, float keep, size_t n);
	double (*sumsq)(const float *x, size_t n);
};

extern const struct kern kern_portable, kern_avx2, kern_avx512;

/* The best of this CPU; KVT_TRAIN_ISA names one for tests ("portable", "avx2", "avx512"). */
const struct kern *kern_best(void);
