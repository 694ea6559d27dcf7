/* SPDX-License-Identifier: MIT */
/* What leaves DRAM under pressure: of rows that are worth as much, as many of each lane. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
#include "core_harness.h"
#include "daemon/internal.h"
#include "daemon/pressure.h"

#define ROWS 1300u
#define LANES 6u

struct giving {
	struct give *give;
	uint64_t target, need;
	bool drop;
};

/* A slice. What has gone is not needed any more. */
static void give_slice(struct core *c, void *arg)
{
	struct giving *g = arg;
	uint64_t gone = g->drop ? c->stat.squeeze_dropped_bytes : c->stat.squeeze_demoted_bytes;

	g->need = g->target - MIN(g->target, gone);
	if (g->need)
		give_some(c, g->give, g->need, g->drop);
}

static void lanes_of(struct core *c, void *arg)
{
	struct core_seq_stat st;
	uint32_t at = 0;

	if (core_seq_next(c, &at, &st))
		core_seq_lanes(c, st.handle, arg, LANES);
}

/* All rows of one worth, all but a few in DRAM; half of the bytes go. */
static void half_goes(bool drop)
{
	struct giving g = {.drop = drop};
	uint64_t all = 0, end;
	struct core_lane_stat lane[LANES] = {0};
	struct kvtier_budget b = {.size = sizeof(b), .device_rows = KVT_ROWS_ALL, .manual = 1};
	struct harness h;
	struct runtime rt;
	struct rt_seq q;

	harness_init(&h, true);
	h.cfg.pressure_shrink = false;
	assert_true(harness_start(&h));
	assert_int_equal(rt_open(&rt, h.sock[0], LANES / RT_HEADS), 0);
	assert_int_equal(rt_prepare(&q, &rt, 1, ROWS, 64, ROWS), 0);
	assert_int_equal(rt_seq_open(&q, KVT_EPHEMERAL, &b), 0);
	assert_int_equal(rt_append(&q, ROWS), 0);
	for (uint32_t l = 0; l < LANES; l++)
		for (uint32_t i = 0; i < ROWS; i++)
			*rt_score(&q, l, i) = 50;
	assert_int_equal(rt_plan(&q, 20, KVT_ROWS_ALL, 0, NULL), 0);
	g.give = give_new(h.cfg.tenants);
	assert_non_null(g.give);
	give_start(g.give);
	g.target = g.need = harness_stat(&h).bytes[KVT_TIER_DRAM] / 2;
	assert_true(g.target > 0);
	for (end = now_ns() + UINT64_C(20000000000); g.need && now_ns() < end;)
		harness_call(&h, give_slice, &g);
	assert_int_equal(g.need, 0);
	if (!drop) /* what was chosen is on its way */
		while (harness_stat(&h).bytes[KVT_TIER_DRAM] > g.target + (256u << 10) && now_ns() < end)
			usleep(1000);
	harness_call(&h, lanes_of, lane);
	for (uint32_t l = 0; l < LANES; l++)
		all += lane[l].dram;
	for (uint32_t l = 0; l < LANES; l++)
		assert_in_range(lane[l].dram + 192, all / LANES, all / LANES + 384); /* a page and a half */
	give_free(g.give);
	rt_seq_free(&q, true);
	rt_close(&rt);
	harness_stop(&h);
	harness_rm(h.dir);
}

static void every_lane_drops_as_much(void **state)
{
	half_goes(true);
}

static void every_lane_moves_as_much(void **state)
{
	half_goes(false);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(every_lane_drops_as_much),
		cmocka_unit_test(every_lane_moves_as_much),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
