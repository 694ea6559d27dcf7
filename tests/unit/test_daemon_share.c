/* SPDX-License-Identifier: MIT */
/* Sequences that share their device budgets: who gets more, what all together hold, who goes and who stays out.
 */
#include "growing_fixture.h"

#include "policy/calibrate.h"

#define OWN (LANES * BUDGET)
#define SLACK 64u

static const struct calibrate_shape table_shape = {.lanes = LANES, .knots = 2, .lengths = 1, .distances = 1};

static void begin_shared(struct fixture *f)
{
	_cleanup_free_ uint8_t *image = NULL;
	float *table;

	prepare(f);
	f->h.cfg.adaptive = CONFIG_ADAPTIVE_TENANT;
	image = make_image(shape(WEIGHTS_KVP, 2), calibrate_bytes(&table_shape), 21);
	table = (float *)(image + ((struct weights_header *)image)->calib_off);
	calibrate_begin(table, &table_shape);
	for (uint32_t l = 0; l < LANES; l++) {
		const float lane[5] = {1, 0.5f, 4.5f, 0, 1};

		memcpy(table + calibrate_head(&table_shape) + l * calibrate_stride(&table_shape), lane,
		       sizeof(lane));
	}
	weights_image_seal(image, image_size(image));
	assert_int_equal(weights_image_write(image, f->file), 0);
	start(f);
}

/* A sequence that the daemon plans by itself. */
static void open_auto(struct runtime *rt, struct rt_seq *q, uint32_t id, uint32_t rows)
{
	static const struct kvtier_budget b = {.size = sizeof(b),
					       .device_rows = BUDGET,
					       .dram_rows = KVT_ROWS_ALL,
					       .slack_rows = SLACK,
					       .policy = "kvp"};

	assert_int_equal(rt_prepare(q, rt, id, MOST, MOST, MOST), 0);
	assert_int_equal(rt_seq_open(q, KVT_EPHEMERAL, &b), 0);
	append(q, rows);
}

static uint32_t resident(const struct rt_seq *q)
{
	uint32_t sum = 0;

	for (uint32_t l = 0; l < LANES; l++)
		sum += (uint32_t)kvtier_seq_resident(q->s, l, NULL, 0);
	return sum;
}

#define MANY 4u

/* Sequences that are followed together; NULL: gone. What was seen of them is one moment's. */
struct group {
	struct fixture *f;
	struct rt_seq *q[MANY];
	uint64_t handle[MANY];
	struct core_seq_stat stat[MANY];
	uint64_t held, brought; /* of those that share */
	uint32_t sharing;
	bool idle; /* no plan is under way, and who shares has what the ledger says */
};

static void look(struct core *c, void *arg)
{
	struct group *g = arg;

	for (uint32_t i = 0; i < MANY; i++)
		if (g->q[i])
			assert_int_equal(core_seq_stat(c, g->handle[i], &g->stat[i]), 0);
}

/* Apply what is ready, then look. */
static void turn(struct group *g)
{
	for (uint32_t i = 0; i < MANY; i++) {
		struct kvtier_plan p = {.size = sizeof(p)};

		if (!g->q[i])
			continue;
		g->handle[i] = rt_info(g->q[i]).handle;
		if (kvtier_plan_peek(g->q[i]->s, &p) == 1 && p.state == KVT_PLAN_READY) {
			assert_int_equal(kvtier_plan_apply(g->q[i]->s, &p), 0);
			assert_int_equal(kvtier_plan_ack(g->q[i]->s, p.id, NULL), 0);
		}
	}
	harness_call(&g->f->h, look, g);
	g->held = g->brought = g->sharing = 0;
	g->idle = true;
	for (uint32_t i = 0; i < MANY; i++) {
		const struct core_seq_stat *st = &g->stat[i];

		if (!g->q[i])
			continue;
		g->idle &= !strcmp(st->plan_state, "none");
		if (!st->shared)
			continue;
		g->sharing++;
		g->held += st->device_held;
		g->brought += st->device_brought;
		g->idle &= resident(g->q[i]) <= st->device_held + LANES * SLACK;
	}
}

/*
 * Until all is quiet, `sharing` sequences share and the first holds `least` to `most` rows. At no moment do
 * they hold more than they brought, unless one has gone just before.
 */
static void until(struct group *g, uint32_t sharing, uint64_t least, uint64_t most, bool gone)
{
	uint64_t end = now_ns() + UINT64_C(20000000000), held;

	do {
		if (now_ns() > end)
			fail_msg("%u share, the first holds %llu of %llu", g->sharing,
				 (unsigned long long)g->stat[0].device_held, (unsigned long long)g->held);
		turn(g);
		if (!gone)
			assert_true(g->held <= g->brought);
		held = g->stat[0].shared ? g->stat[0].device_held : resident(g->q[0]);
		usleep(300);
	} while (!g->idle || g->sharing != sharing || held < least || held > most || g->held > g->brought);
}

static void end(struct group *g, uint32_t i)
{
	rt_seq_free(g->q[i], false);
	g->q[i] = NULL;
}

/* The longer of two has more rows that are worth something, whoever was there first. */
static void rows_move_between_sequences(void **state)
{
	for (uint32_t first = 0; first < 2; first++) {
		struct rt_seq many, few;
		struct fixture f;
		struct group g = {.f = &f, .q = {&many, &few}};
		struct core_seq_stat *st = g.stat;

		begin_shared(&f);
		for (uint32_t i = 0; i < 2; i++)
			open_auto(&f.rt, g.q[i ^ first], 3 + i, i ^ first ? 250 : 1700);
		until(&g, 2, OWN * 21 / 20, 2 * OWN, false);
		assert_int_equal(g.brought, 2 * OWN);
		assert_in_range(g.held, 2 * OWN * 9 / 10, 2 * OWN);
		assert_true(st[1].device_held < OWN * 19 / 20 && st[1].device_least >= BUDGET / 4);
		assert_int_equal(resident(&many), st[0].device_held);
		assert_int_equal(resident(&few), st[1].device_held);
		end(&g, 1); /* and what it had given goes with it */
		until(&g, 1, OWN, OWN, true);
		assert_int_equal(resident(&many), OWN);
		end(&g, 0);
		finish(&f);
	}
}

static void equal_sequences_keep_equal_budgets(void **state)
{
	struct rt_seq q[3];
	struct fixture f;
	struct group g = {.f = &f, .q = {&q[0], &q[1], &q[2]}};

	begin_shared(&f);
	for (uint32_t i = 0; i < 3; i++)
		open_auto(&f.rt, &q[i], 3 + i, 700);
	for (uint32_t round = 0; round < 3; round++) {
		until(&g, 3, OWN, OWN, false);
		for (uint32_t i = 0; i < 3; i++) {
			assert_int_equal(g.stat[i].device_held, OWN);
			append(&q[i], 2 * SLACK);
		}
	}
	for (uint32_t i = 0; i < 3; i++)
		end(&g, i);
	finish(&f);
}

/* Truncation and the end of a client give rows back as closing does; a resident sequence is planned for it. */
static void rows_come_back(void **state)
{
	struct rt_seq many, few, more;
	struct fixture f;
	struct group g = {.f = &f, .q = {&many, &few}};
	struct runtime other;

	begin_shared(&f);
	open_auto(&f.rt, &many, 3, 1700);
	open_auto(&f.rt, &few, 4, 250);
	until(&g, 2, OWN * 21 / 20, 2 * OWN, false);
	assert_int_equal(kvtier_seq_truncate(few.s, 0), 0); /* nothing is left that a plan could be for */
	few.rows = 0;
	until(&g, 1, OWN, OWN, true);
	append(&few, 300);
	until(&g, 2, OWN * 21 / 20, 2 * OWN, false);
	end(&g, 1);
	until(&g, 1, OWN, OWN, true);

	connect_as(&f, 0, &other);
	open_auto(&other, &more, 5, 250);
	g.q[1] = &more;
	until(&g, 2, OWN * 21 / 20, 2 * OWN, false);
	g.q[1] = NULL;
	rt_close(&other);
	until(&g, 1, OWN, OWN, true);
	more.s = NULL; /* gone with its connection */
	free(more.lay);
	free(more.salts);
	end(&g, 0);
	finish(&f);
}

/* Who plans on request only, belongs to another tenant or has another model's lanes stays by himself. */
static void others_stay_by_themselves(void **state)
{
	struct rt_seq many, few, manual, foreign;
	struct fixture f;
	struct group g = {.f = &f, .q = {&many, NULL, &manual, &foreign}};
	struct runtime other;
	struct kvtier_plan p;

	begin_shared(&f);
	connect_as(&f, 1, &other);
	open_seq(&f, &manual, 5);
	append(&manual, 250);
	plan(&manual, "kvp", &p);
	open_auto(&f.rt, &many, 3, 1700);
	open_auto(&other, &foreign, 3, 250);
	until(&g, 2, OWN, OWN, false);
	open_auto(&f.rt, &few, 4, 250);
	g.q[1] = &few;
	until(&g, 3, OWN * 21 / 20, 2 * OWN, false);
	assert_false(g.stat[2].shared);
	assert_true(g.stat[2].adaptive); /* over its lanes */
	assert_int_equal(resident(&manual), OWN);
	assert_int_equal(g.stat[2].plan_id, p.id);
	assert_int_equal(g.stat[3].device_held, OWN);
	assert_int_equal(resident(&foreign), OWN);
	/* Who turns to planning on request leaves. */
	plan(&few, "kvp", NULL);
	until(&g, 2, OWN, OWN, true);
	assert_false(g.stat[1].shared);
	assert_int_equal(resident(&few), OWN);
	for (uint32_t i = 0; i < 4; i++)
		end(&g, i);
	rt_close(&other);
	finish(&f);
}

static void freeze(struct core *c, void *arg)
{
	core_freeze(c, *(bool *)arg);
}

static void set_adaptive(struct core *c, void *arg)
{
	char err[256];

	assert_int_equal(core_reload(c, arg, err, sizeof(err)), 0);
}

/* Frozen, nothing changes hands; set to lanes, everybody gets his own back; and on again. */
static void switches_are_obeyed(void **state)
{
	struct rt_seq many, few, late;
	struct fixture f;
	struct group g = {.f = &f, .q = {&many, &few}};
	struct config cfg;
	bool on = true;
	uint64_t held, plans;

	begin_shared(&f);
	cfg = f.h.cfg;
	open_auto(&f.rt, &many, 3, 400);
	open_auto(&f.rt, &few, 4, 250);
	until(&g, 2, OWN / 2, 2 * OWN, false);
	held = g.stat[0].device_held;
	plans = g.stat[0].plans;
	harness_call(&f.h, freeze, &on);
	append(&many, 1000); /* planned and counted, not published */
	do
		turn(&g);
	while (g.stat[0].plans == plans);
	assert_int_equal(g.stat[0].device_held, held);
	open_auto(&f.rt, &late, 5, 250);
	g.q[2] = &late;
	do
		turn(&g);
	while (!g.stat[2].plans);
	assert_false(g.stat[2].shared);
	end(&g, 2);
	on = false;
	harness_call(&f.h, freeze, &on);
	append(&many, 200);
	until(&g, 2, OWN * 21 / 20, 2 * OWN, false);
	cfg.adaptive = CONFIG_ADAPTIVE_LANES;
	harness_call(&f.h, set_adaptive, &cfg);
	append(&few, 2 * SLACK);
	until(&g, 0, OWN, OWN, true);
	assert_int_equal(resident(&few), OWN);
	cfg.adaptive = CONFIG_ADAPTIVE_TENANT;
	harness_call(&f.h, set_adaptive, &cfg);
	append(&few, 2 * SLACK);
	append(&many, 2 * SLACK);
	until(&g, 2, OWN * 21 / 20, 2 * OWN, false);
	end(&g, 0);
	end(&g, 1);
	finish(&f);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(rows_move_between_sequences),
		cmocka_unit_test(equal_sequences_keep_equal_budgets),
		cmocka_unit_test(rows_come_back),
		cmocka_unit_test(others_stay_by_themselves),
		cmocka_unit_test(switches_are_obeyed),
	};

	return cmocka_run_group_tests_name("daemon/share", tests, NULL, NULL);
}
