/* SPDX-License-Identifier: MIT */
/*
 * Any bytes as keys, summaries' sources and queries: a search reads nothing outside them, and what it returns
 * are rows that may be recalled, each once, with every kernel.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "policy/recall.h"
#include "policy/recall_kern.h"
#include "shm/util.h"

#define RUNS 3u

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void must(int ok)
{
	if (!ok)
		abort();
}

static void search(struct recall_query *q, const struct recall_run *run, uint32_t n)
{
	void *scratch = malloc(recall_scratch(q, run, n));
	struct recall_hit *hit = malloc((q->want + 1) * sizeof(*hit));
	struct recall_seen seen;
	int got;

	must(scratch && hit);
	got = recall_search(q, run, n, scratch, hit, &seen);
	must(got >= 0 && (uint32_t)got <= q->want);
	for (int i = 0; i < got; i++) {
		must(hit[i].run < n && hit[i].row < run[hit[i].run].rows && !isnan(hit[i].score));
		must(run[hit[i].run].alive[hit[i].row / 32] >> hit[i].row % 32 & 1);
		must(!i || hit[i].run > hit[i - 1].run || hit[i].row > hit[i - 1].row);
		for (int k = 0; k < i; k++)
			must(hit[k].pos != hit[i].pos);
	}
	free(scratch);
	free(hit);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static const char *const isas[] = {"ref", "avx2", "avx512"};
	struct recall_run run[RUNS];
	struct recall_query q;
	uint32_t elem, runs = 0;
	float *queries;
	void *key[RUNS];
	static uint64_t pos[RUNS][RECALL_RUN];

	if (size < 16)
		return 0;
	q = (struct recall_query){.n = 1 + data[0] % 40,
				  .dim = 1 + data[1] % 70,
				  .scale = 0.1f + data[2],
				  .dtype = (enum row_dtype)(1 + data[3] % 3),
				  .norm = (enum recall_norm)(data[4] % 2),
				  .probe = 1 + data[5] * 999u / 255,
				  .want = data[6],
				  .before = data[10] % 3 ? data[10] : data[10] * 4u,
				  .after = data[11] % 3 ? data[11] : data[11] * 4u};
	elem = q.dtype == ROW_F32 ? 4 : 2;
	queries = malloc(q.n * q.dim * sizeof(float));
	must(queries != NULL);
	for (uint32_t i = 0; i < q.n * q.dim; i++) {
		memcpy(&queries[i], data + 8 + i * 4 % (size - 12), 4);
		if (!isfinite(queries[i]))
			queries[i] = 1;
	}
	q.q = queries;
	for (; runs < RUNS; runs++) {
		uint32_t rows = 1 + data[7 + runs] % RECALL_RUN;
		struct recall_sum *sum = malloc(recall_sum_bytes(rows, q.dim));
		char *k = malloc((size_t)rows * q.dim * elem);

		must(sum && k);
		for (size_t i = 0; i < (size_t)rows * q.dim * elem; i++)
			k[i] = (char)data[(i * (runs + 1) + runs) % size];
		recall_summarise(k, rows, q.dim, q.dtype, sum);
		run[runs] = (struct recall_run){
			.k = k, .sum = sum, .pos = pos[runs], .first = data[12 + runs], .rows = rows};
		memset(pos[runs], 0, sizeof(pos[runs]));
		for (uint32_t i = 0, at = 0; i < rows; i++, at += 1 + data[(i + 5 * runs) % size] % 63) {
			pos[runs][at / 64] |= UINT64_C(1) << at % 64;
			run[runs].span = at / 64 + 1;
		}
		for (uint32_t i = 0; i < rows; i++)
			if (data[(i + runs) % size] & 1)
				run[runs].alive[i / 32] |= 1u << i % 32;
		key[runs] = k;
	}
	if (data[4] & 2) {
		q.resident = key[0];
		q.resident_n = run[0].rows;
		q.resident_stride = q.dim * elem;
	}
	for (size_t i = 0; i < ARRAY_SIZE(isas); i++) {
		q.isa = isas[i];
		if (recall_kern(q.isa))
			search(&q, run, runs);
	}
	for (uint32_t i = 0; i < runs; i++) {
		free((void *)run[i].sum);
		free(key[i]);
	}
	free(queries);
	return 0;
}
