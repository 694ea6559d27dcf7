/* SPDX-License-Identifier: MIT */
#pragma once
/* Opening, closing and sizing; the rows of the set. What each does stands at the operation in
 * policy/train/backend.h. */
#include "policy/train/cuda/cuda.cuh"

int net_of(struct net *ret, const struct train_opts *o);
/* Everything that open() takes for this set, the lanes in work counted with GROUP_PLANNED bytes. */
uint64_t memory_set_bytes(const struct train_opts *o, const struct train_set_shape *s);
uint64_t memory_free(void);
int memory_open(struct cuda_backend **ret, const struct train_opts *o, const struct train_set_shape *s,
		char *err, size_t errsize);
void memory_close(struct cuda_backend *b);

/* set.cu. Any thread, LOADERS of them at a time; more wait. */
int set_put_rows(struct cuda_backend *b, uint32_t lane, uint32_t doc, const uint16_t *k, const uint16_t *v);
int set_put_utility(struct cuda_backend *b, uint32_t lane, uint32_t unit, const float *u);
