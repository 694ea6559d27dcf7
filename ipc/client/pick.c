/* SPDX-License-Identifier: MIT */
/* Which of a turn's tokens speak for it: the last one and those least like what is already there. */
#include <string.h>
#include "ipc/client/client.h"

#define WIDE 8 /* floats at once, in whatever registers there are */

static float distance(const float *a, const float *b, uint32_t dim)
{
	float x __attribute__((vector_size(WIDE * sizeof(float)))),
		y __attribute__((vector_size(WIDE * sizeof(float))));
	float sum __attribute__((vector_size(WIDE * sizeof(float)))) = {0}, all = 0;
	uint32_t d = 0;

	for (; d + WIDE <= dim; d += WIDE) {
		memcpy(&x, a + d, sizeof(x));
		memcpy(&y, b + d, sizeof(y));
		x -= y;
		sum += x * x;
	}
	for (; d < dim; d++)
		all += (a[d] - b[d]) * (a[d] - b[d]);
	for (uint32_t i = 0; i < WIDE; i++)
		all += sum[i];
	return all;
}

uint32_t pick_farthest(const float *x, size_t stride, uint32_t dim, uint32_t n, uint32_t k, float *near,
		       uint32_t *pick)
{
	uint32_t got = 0, next = n - 1;

	while (got < MIN(n, k)) {
		const float *from = x + next * stride;
		float most = -1;

		pick[got++] = next;
		if (got == MIN(n, k))
			break;
		for (uint32_t i = 0; i < n; i++) {
			float d = distance(x + i * stride, from, dim);

			if (got == 1 || d < near[i])
				near[i] = d;
		}
		for (uint32_t i = 0; i < got; i++)
			near[pick[i]] = -1;
		for (uint32_t i = 0; i < n; i++)
			if (near[i] > most) {
				most = near[i];
				next = i;
			}
		if (most < 0) /* no number: whichever comes first */
			for (next = 0; near[next] == -1; next++)
				;
	}
	return got;
}
