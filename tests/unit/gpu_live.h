/* SPDX-License-Identifier: MIT */
#pragma once
/* A long life of a sequence in GPU memory. */
#include "tests/unit/gpu_rt.h"

/*
 * Appends, plans of all kinds, fetches and truncates at random, with polls between them that may come at any
 * time; every so often all rows on the GPU are compared. A reason, or NULL when all was well.
 */
static inline const char *gpu_live(struct gpu_seq *q, uint32_t rounds, int (*step)(int))
{
	struct kvtier_budget b = {.size = sizeof(b), .manual = 1, .policy = "random"};
	uint64_t id = 0;
	int r;

	for (uint32_t i = 0; i < rounds; i++) {
		uint32_t n = 1 + rt_random(&q->rt) % (rt_random(&q->rt) % 4 ? 8 : 80),
			 what = rt_random(&q->rt) % 16;

		if (q->rt.rows + n <= q->rt.max_rows) {
			r = gpu_append(q, n);
			if (r && r != KVT_E_NOSPC)
				return "append";
			if (r) { /* the lanes are full: fewer rows, and wait for that */
				if (gpu_plan(q, q->rt.cap / 3, q->rt.cap / 2, KVT_ROWS_ALL, step))
					return kvtier_last_error();
				continue;
			}
		}
		if (what % 3 == 0 && kvtier_cuda_push(q->rt.s, q->stream))
			return kvtier_last_error();
		if (what == 1 || what == 2) {
			b.device_rows = rt_random(&q->rt) % (q->rt.cap * 3 / 4);
			b.dram_rows = rt_random(&q->rt) % q->rt.cap;
			b.nvme_rows = KVT_ROWS_ALL;
			b.write_through = rt_random(&q->rt) % 4 == 0;
			if (kvtier_plan_request(q->rt.s, &b, &id))
				return kvtier_last_error();
		}
		if (what == 3 && q->state.pushed) {
			uint32_t pos = rt_random(&q->rt) % q->state.pushed;

			r = kvtier_fetch(q->rt.s, pos, 1 + rt_random(&q->rt) % (q->state.pushed - pos), &id);
			if (r)
				return kvtier_last_error();
		}
		if (what == 4 && rt_random(&q->rt) % 3 == 0) {
			uint32_t to = q->rt.rows - rt_random(&q->rt) % (q->rt.rows / 2 + 1);

			if (kvtier_seq_truncate(q->rt.s, to))
				return kvtier_last_error();
			q->rt.rows = to;
			q->state.pushed = q->state.pushed < to ? q->state.pushed : to;
			q->rt.salt++;
			id = 0; /* that plan is gone, and asked for no more */
			if (gpu_wrong(q))
				return "rows after a truncate";
		}
		for (uint32_t looks = rt_random(&q->rt) % 5; looks; looks--)
			if (gpu_poll(q, step) < 0)
				return kvtier_last_error();
		if (i % 8 == 0 && gpu_wrong(q))
			return "rows";
	}
	if (kvtier_cuda_push(q->rt.s, q->stream) < 0 || gpu_follow(q, id, step) < 0)
		return kvtier_last_error();
	/* little stays, then everything comes up that fits: what was below is compared too */
	if (gpu_plan(q, q->rt.cap / 5, q->rt.cap / 5, KVT_ROWS_ALL, step) || gpu_wrong(q))
		return "few rows at the end";
	if (gpu_plan(q, q->rt.cap * 3 / 4, q->rt.cap, KVT_ROWS_ALL, step))
		return kvtier_last_error();
	return gpu_wrong(q) ? "rows at the end" : NULL;
}
