/* SPDX-License-Identifier: MIT */
#include "tiers/device_check.h"
#include "tiers/tier.h"

#include <errno.h>
#include <stdbool.h>

static int plane(struct device_plane *ret, uint64_t size, uint64_t off, uint32_t stride, uint32_t width)
{
	if (!width) {
		*ret = (struct device_plane){.slots = UINT64_MAX};
		return 0;
	}
	if (stride < width || off > size || size - off < width)
		return -ERANGE;
	*ret = (struct device_plane){
		.off = off,
		.stride = stride,
		.width = width,
		.slots = (size - off - width) / stride + 1,
	};
	return 0;
}

int device_planes(struct device_plane ret[2], uint64_t size, const struct device_lane *l, uint32_t rows)
{
	int r;

	if (rows * ((uint64_t)l->k_bytes + l->v_bytes) > TIER_MAX_PAGE)
		return -ERANGE;
	r = plane(&ret[0], size, l->k_off, l->k_stride, l->k_bytes);
	return r < 0 ? r : plane(&ret[1], size, l->v_off, l->v_stride, l->v_bytes);
}

/* Ascending slots, so the last one bounds them all. */
int device_slots(const struct device_plane p[2], const uint32_t *slots, uint32_t n)
{
	bool bad = false;

	for (uint32_t i = 1; i < n; i++)
		bad |= slots[i] <= slots[i - 1];
	if (bad)
		return -EINVAL;
	return slots[n - 1] < p[0].slots && slots[n - 1] < p[1].slots ? 0 : -ERANGE;
}

int device_range(const struct device_plane p[2], uint32_t rows, const uint32_t *pick, uint32_t first,
		 uint32_t n)
{
	uint64_t end = (uint64_t)first + n;

	if (end > p[0].slots || end > p[1].slots || (!pick && n > rows))
		return -ERANGE;
	for (uint32_t i = 0; pick && i < n; i++)
		if (pick[i] >= rows)
			return -ERANGE;
	return 0;
}

uint32_t device_run(const uint32_t *v, uint32_t n)
{
	uint32_t r = 1;

	while (r < n && v[r] == v[0] + r)
		r++;
	return r;
}
