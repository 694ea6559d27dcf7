/* SPDX-License-Identifier: MIT */
/* What a network says of places that training never reached. */
#include "policy/train/net.h"
#include "shm/util.h"

#include <math.h>
#include <string.h>

/* Knots after `last` say what it says, in each of the tensor's `tables` of `knots` knots of `width` floats. */
static void level(float *t, uint32_t tables, uint32_t knots, uint32_t width, uint32_t last)
{
	for (uint32_t i = 0; i < tables; i++, t += (size_t)knots * width)
		for (uint32_t k = last + 1; k < knots; k++)
			memcpy(t + (size_t)k * width, t + (size_t)last * width, width * sizeof(*t));
}

void net_flatten(const struct net *n, uint32_t farthest, float *params)
{
	const struct weights_header *h = &n->h;
	bool prior = h->kind == WEIGHTS_POSITION;
	uint32_t octave = prior ? h->pos_dim : h->octave;
	uint32_t last = (uint32_t)((float)octave * log2f(1.0f + (float)farthest));

	if (prior) {
		level(params + n->at[POSITION_DIST], 1, h->pos_rows, 1, last);
		level(params + n->at[POSITION_INDEX], 1, h->pos_rows, 1, last);
		return;
	}
	if (h->pos_kind == WEIGHTS_POS_LOG2)
		level(params + n->at[KVP_POS], 1, h->pos_rows, h->pos_dim, last);
	if (h->dist_rows)
		level(params + n->at[KVP_DIST], 2 * h->rank, h->dist_rows, 1, last);
}
