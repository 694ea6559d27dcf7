/* SPDX-License-Identifier: MIT */
/* The launch of the scoring kernels. */
#include "ipc/cuda/score.h"
#include "ipc/client/client.h"
#include "ipc/cuda/kernels.h"

#define BLOCK 256u
#define TILE_ROWS 128u /* of a block, at least */

static enum cuda_kernel kernel_of(const struct scorer_hdr *h)
{
	if (h->k_dim == 64)
		return h->hidden == 128 ? K_kvt_score_64_128 : K_kvt_score_64_256;
	return h->hidden == 128 ? K_kvt_score_128_128 : K_kvt_score_128_256;
}

static int check(const struct scorer_hdr *h, const struct score_args *a)
{
	if (h->magic != SCORER_MAGIC || h->version != SCORER_VERSION)
		return err_set(KVT_E_VERSION, "scorer: version %u, this library reads %u", h->version,
			       SCORER_VERSION);
	if (h->k_dim != h->v_dim || (h->k_dim != 64 && h->k_dim != 128) ||
	    (h->hidden != 128 && h->hidden != 256) || h->pos_pad != SCORER_POS_PAD)
		return err_set(KVT_E_INVAL, "scorer: head_dim %u, hidden %u: no kernel for these", h->k_dim,
			       h->hidden);
	if (a->dtype != KVT_DTYPE_F16 && a->dtype != KVT_DTYPE_BF16)
		return err_set(KVT_E_INVAL, "dtype: %u, the GPU scores f16 and bf16 only", a->dtype);
	if ((uint64_t)a->lane + a->lanes > (uint64_t)h->layers * h->heads)
		return err_set(KVT_E_INVAL, "lanes: %u from %u, the scorer has %u", a->lanes, a->lane,
			       h->layers * h->heads);
	return 0;
}

int kern_score(struct kvtier_cuda *g, const struct scorer_hdr *h, const struct score_args *a, void *stream)
{
	struct score_args args = *a;
	uint64_t tiles;
	int r = check(h, a);

	if (r || !a->n || !a->lanes)
		return r;
	tiles = (uint64_t)a->lanes * (a->n / TILE_ROWS + 1);
	if (a->n > INT32_MAX || tiles > INT32_MAX)
		return err_set(KVT_E_INVAL, "rows: %u of %u lanes are too many for one call", a->n, a->lanes);
	return cuda_launch(g, kernel_of(h), (unsigned)MIN(tiles, (uint64_t)g->sms), 1, BLOCK,
			   SCORE_SHARED(g->major == 9 ? SCORE_STAGES_90 : SCORE_STAGES_80, h->k_dim,
					scorer_vecs(h->k_dim, h->hidden).floats),
			   &args, stream);
}
