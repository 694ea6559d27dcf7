/* SPDX-License-Identifier: MIT */
/* Launches of the kernels that move rows: grids, shared memory, limits. */
#include "ipc/client/client.h"
#include "ipc/cuda/kernels.h"

#define BLOCK 256u
#define SHARED_MAX (223u << 10) /* of a block on compute capability 9.0, less what kernels have anyway */
#define SHARED_OLD (95u << 10)  /* the least of all from 8.0 on */
#define SHARED_KEEP (48u << 10) /* above this the bitmap of positions is read where it lies */
/*
 * Blocks of the kernels that PCIe bounds. They need few multiprocessors: the figures are in tests/gpu/NOTES.md,
 * and what they do not take is left to decoding.
 */
#define GATHER_BLOCKS 24u
#define SCATTER_BLOCKS 64u
#define COMPACT_PER_SM 27u /* blocks that move: many a lane, so that few lanes are in work at a time */

int kern_extend(struct kvtier_cuda *g, const struct extend_args *a, void *stream)
{
	struct extend_args args = *a;

	if (!a->n || !a->lanes)
		return 0;
	return cuda_launch(g, K_kvt_extend, MIN(DIV_UP(a->n, BLOCK), 64), a->lanes, BLOCK, 0, &args, stream);
}

int kern_gather(struct kvtier_cuda *g, const struct gather_args *a, void *stream)
{
	struct gather_args args = *a;

	return a->n ? cuda_launch(g, K_kvt_gather, MIN(a->n, GATHER_BLOCKS), 1, BLOCK, 0, &args, stream) : 0;
}

int kern_scatter(struct kvtier_cuda *g, const struct scatter_args *a, void *stream)
{
	struct scatter_args args = *a;

	return a->n ? cuda_launch(g, K_kvt_scatter, MIN(a->n, SCATTER_BLOCKS), 1, BLOCK, 0, &args, stream) : 0;
}

size_t compact_scratch(uint32_t lanes, uint32_t slots)
{
	return (2 + (size_t)lanes + (size_t)lanes * DIV_UP(slots, 32)) * sizeof(uint32_t);
}

/* Bytes of shared memory that a block may have. */
static unsigned shared_max(const struct kvtier_cuda *g)
{
	return g->major == 8 && g->minor == 0    ? 159u << 10
	       : g->major == 9 || g->major == 10 ? SHARED_MAX
						 : SHARED_OLD;
}

int kern_compact(struct kvtier_cuda *g, const struct compact_args *a, void *stream)
{
	struct compact_args args = *a;
	unsigned rows = DIV_UP(a->rows, 64), slots = DIV_UP(a->cap, 32), parts, shared, keep;

	if (!a->lanes)
		return 0;
	keep = 2 * (a->to ? rows : a->words);
	shared = a->to ? 2 * rows + keep : keep;
	args.keep_words = shared * sizeof(uint32_t) > SHARED_KEEP ? 0 : keep;
	shared = a->to ? 2 * rows + args.keep_words : MAX(2 * slots + a->words, args.keep_words);
	shared *= sizeof(uint32_t);
	if (shared > shared_max(g))
		return err_set(KVT_E_INVAL,
			       "compaction: %u rows in %u slots a lane need %u bytes of shared memory, must be "
			       "at most %u",
			       a->rows, a->cap, shared, shared_max(g));
	parts = MIN(MAX((unsigned)g->sms * COMPACT_PER_SM / a->lanes, 1),
		    DIV_UP(a->to ? a->rows : a->cap, BLOCK));
	if (a->to)
		return cuda_launch(g, K_kvt_compact_to, parts, a->lanes, BLOCK, shared, &args, stream);
	parts += DIV_UP(a->cap, COMPACT_SLICE); /* those that look */
	return cuda_launch(g, K_kvt_compact, parts * a->lanes, 1, BLOCK, shared, &args, stream);
}

int kern_word(struct kvtier_cuda *g, const struct word_args *a, void *stream)
{
	struct word_args args = *a;

	return cuda_launch(g, K_kvt_word, 1, 1, 32, 0, &args, stream);
}
