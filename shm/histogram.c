/* SPDX-License-Identifier: MIT */
#include "shm/histogram.h"

uint64_t histogram_count(const struct histogram *h)
{
	uint64_t n = 0;

	for (unsigned i = 0; i < HISTOGRAM_BUCKETS; i++)
		n += h->bucket[i];
	return n;
}

uint64_t histogram_quantile(const struct histogram *h, double q)
{
	double want = q * (double)histogram_count(h), below = 0;

	for (unsigned i = 0; i < HISTOGRAM_BUCKETS; i++) {
		double n = (double)h->bucket[i], from = i ? (double)(UINT64_C(1) << i) : 0;

		if (n > 0 && below + n >= want) {
			double to = (double)(UINT64_C(2) << i);

			return (uint64_t)(from + (to - from) * (want - below) / n);
		}
		below += n;
	}
	return 0;
}

void histogram_since(const struct histogram *now, const struct histogram *before, struct histogram *ret)
{
	for (unsigned i = 0; i < HISTOGRAM_BUCKETS; i++)
		ret->bucket[i] = now->bucket[i] - before->bucket[i];
	ret->sum = now->sum - before->sum;
}
