/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * From a verified weight file to the network as a GPU scores with it (shm/scorer.h), and the same arithmetic
 * on a CPU, one row at a time, to check a GPU by. Pure; any thread.
 */
#include "policy/policy.h"
#include "policy/weights.h"
#include "shm/scorer.h"

/*
 * What the prepared network of `w` will look like: everything of its first 256 bytes, among them `bytes`, the
 * size of the whole. -ENOTSUP, with one line in err, for a file that no kernel serves.
 */
int scorer_header(struct scorer_hdr *ret, const struct weights *w, char *err, size_t errsize);

/*
 * The whole into `out`: h->bytes bytes of zeros, aligned to 64; h from scorer_header() of the same weights.
 * Takes about 20 ms of one core per lane at the published size. -ENOMEM.
 */
int scorer_build(void *out, const struct scorer_hdr *h, const struct weights *w);
/* The same in parts, for several threads: once what precedes the lanes, then every lane once, in any order. */
void scorer_begin(void *out, const struct scorer_hdr *h);
int scorer_fold(void *out, const struct scorer_hdr *h, const struct weights *w, uint32_t first, uint32_t lanes);

/*
 * The coefficients [h->coefs] of one row, by the kernels' definition: operands of products rounded to bf16
 * where they round them, sums in fp64. h: the whole prepared network; lane below layers * heads; k as cached.
 */
void scorer_eval_ref(const struct scorer_hdr *h, uint32_t lane, enum row_dtype dtype, const void *k,
		     const void *v, uint32_t pos, float *coef);
