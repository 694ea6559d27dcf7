/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * The kernels from the host's side: each wrapper chooses grid and block, launches on the stream and
 * returns at once. Errors: KVT_E_GPU with a line. The device's context is current (cuda_enter()).
 */
#include <stddef.h>
#include <stdint.h>
#include "ipc/cuda/args.h"
#include "ipc/cuda/driver.h"

/* Every kernel by its name in the fatbin. */
/* clang-format off */
#define CUDA_KERNELS(X) \
	X(kvt_extend) X(kvt_gather) X(kvt_scatter) X(kvt_compact) X(kvt_compact_to) X(kvt_word) \
	X(kvt_score_64_128) X(kvt_score_64_256) X(kvt_score_128_128) X(kvt_score_128_256) \
	X(kvt_recall_sum) X(kvt_recall_mark) X(kvt_recall_select) X(kvt_recall_bound) X(kvt_recall_choose) \
	X(kvt_recall_probe) X(kvt_recall_score) X(kvt_recall_near) X(kvt_recall_top) X(kvt_recall_pick)
/* clang-format on */

enum cuda_kernel {
#define X(name) K_##name,
	CUDA_KERNELS(X)
#undef X
		CUDA_KERNEL_COUNT
};

/* One GPU of this process. device.c makes it; the wrappers only read it. */
struct kvtier_cuda {
	const struct cuda_driver *d;
	int device, major, minor, numa_node, sms, driver;
	void *ctx, *module;
	void *fn[CUDA_KERNEL_COUNT];
	uint64_t crc; /* the checksum kernels' tables, in GPU memory */
	char name[64], pci[16];
	uint64_t bytes;
	_Atomic int lost; /* first sticky error, a cuda_result; 0: none */
};

/* Make the device's context current on this thread, and undo it. */
int cuda_enter(struct kvtier_cuda *g);
void cuda_leave(struct kvtier_cuda *g);
/* Was there an error after which the context is of no use? KVT_E_GPU with a line, or 0. */
int cuda_lost(struct kvtier_cuda *g);
/* cuda_check(), and remember an error after which the context is of no use. */
int cuda_try(struct kvtier_cuda *g, cuda_result r, const char *call);
/* Launch with one struct of arguments; `shared` bytes of dynamic shared memory. */
int cuda_launch(struct kvtier_cuda *g, enum cuda_kernel k, unsigned gx, unsigned gy, unsigned block,
		unsigned shared, void *args, void *stream);

/* ---- move.c ---- */
int kern_extend(struct kvtier_cuda *g, const struct extend_args *a, void *stream);
int kern_gather(struct kvtier_cuda *g, const struct gather_args *a, void *stream);
int kern_scatter(struct kvtier_cuda *g, const struct scatter_args *a, void *stream);
int kern_compact(struct kvtier_cuda *g, const struct compact_args *a, void *stream);
size_t compact_scratch(uint32_t lanes, uint32_t slots); /* bytes that compact_args.scratch needs */
int kern_word(struct kvtier_cuda *g, const struct word_args *a, void *stream);
/* Bytes of the checksum tables, and their contents, to be copied to g->crc. */
size_t crc_tables_bytes(void);
void crc_tables_fill(void *ret);

/* ---- score.c ---- */
struct scorer_hdr;
int kern_score(struct kvtier_cuda *g, const struct scorer_hdr *h /* host copy */, const struct score_args *a,
	       void *stream);

/* ---- recall_kern.c: see recall_args.h ---- */
struct find_sum_args;
struct find_mark_args;
struct find_args;
int kern_recall_sum(struct kvtier_cuda *g, const struct find_sum_args *a, uint32_t max_dim, void *stream);
int kern_recall_mark(struct kvtier_cuda *g, const struct find_mark_args *a, void *stream);
/* One layer's search: `pages` of its lane that has most, `rows` likewise (an upper bound is fine). */
int kern_recall(struct kvtier_cuda *g, const struct find_args *a, uint32_t pages, uint32_t rows, void *stream);
/* What it consists of, in this order. */
#define KERN_RECALL_STEPS 8
extern const enum cuda_kernel kern_recall_steps[KERN_RECALL_STEPS];
int kern_recall_step(struct kvtier_cuda *g, enum cuda_kernel k, const struct find_args *a, uint32_t pages,
		     uint32_t rows, void *stream);
