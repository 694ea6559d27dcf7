/* SPDX-License-Identifier: MIT */
/* Rows that were just written take their slots; a word tells the host how far the stream has come. */
#include "ipc/cuda/common.cuh"

/* A lane per blockIdx.y. */
KERNEL(4) kvt_extend(struct extend_args a)
{
	uint32_t lane = blockIdx.y, first = at<const uint32_t>(a.count)[lane];
	uint32_t *slot_of = at<uint32_t>(a.maps.slot_of) + (uint64_t)lane * a.maps.map_rows;
	uint32_t *pos_of = at<uint32_t>(a.maps.pos_of) + (uint64_t)lane * a.maps.map_slots;

	for (uint32_t i = blockIdx.x * BLOCK + threadIdx.x; i < a.n; i += gridDim.x * BLOCK) {
		slot_of[a.pos + i] = first + i;
		pos_of[first + i] = a.pos + i;
	}
}

/* Kernels of one stream run in order and what they wrote is in place when they end; the release makes it so for
 * the host too. */
KERNEL(1) kvt_word(struct word_args a)
{
	if (threadIdx.x == 0) {
		__threadfence_system();
		store_release_system(at<uint64_t>(a.addr), a.value);
	}
}
