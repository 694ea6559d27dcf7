/* SPDX-License-Identifier: MIT */
/* Nodes of memory: what is read of the host, and a daemon on a host with two of them, which is made up. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
#include <errno.h>
#include <sys/stat.h>
#include "core_harness.h"
#include "daemon/nodes.h"

/* ---- what the host says ------------------------------------------------------------------- */

static void put(const char *root, const char *path, const char *text)
{
	char full[256];
	FILE *f;

	snprintf(full, sizeof(full), "%s%s", root, path);
	for (char *p = full + 1; (p = strchr(p, '/')); p++) {
		*p = 0;
		mkdir(full, 0700);
		*p = '/';
	}
	f = fopen(full, "w");
	assert_non_null(f);
	fputs(text, f);
	fclose(f);
}

#define NODE "/sys/devices/system/node/"

/* Four nodes: 0 and 3 have memory and processors, 1 has processors only, 5 memory only, such as CXL has. */
static void four_nodes(char root[32])
{
	strcpy(root, "/tmp/kvt.XXXXXX");
	assert_non_null(mkdtemp(root));
	put(root, NODE "online", "0-1,3,5\n");
	put(root, NODE "has_memory", "0,3,5\n");
	put(root, NODE "node0/meminfo", "Node 0 MemTotal:        1048576 kB\nNode 0 MemFree: 5 kB\n");
	put(root, NODE "node3/meminfo", "Node 3 MemTotal:        2097152 kB\n");
	put(root, NODE "node5/meminfo", "Node 5 MemTotal:        4194304 kB\n");
	put(root, NODE "node0/distance", "10 21 31 17\n");
	put(root, NODE "node1/distance", "21 10 12 40\n");
	put(root, NODE "node3/distance", "31 12 10 24\n");
	put(root, NODE "node5/distance", "17 40 24 10\n");
	put(root, NODE "node0/cpulist", "0-1,8\n");
	put(root, NODE "node1/cpulist", "2\n");
	put(root, NODE "node3/cpulist", "4-5\n");
	put(root, NODE "node5/cpulist", "\n");
	put(root, "/proc/self/status", "Name:\tx\nMems_allowed:\tff\nMems_allowed_list:\t0-7\n");
}

static void the_host_is_read(void **state)
{
	struct nodes n;
	char root[32];

	four_nodes(root);
	assert_int_equal(nodes_open(&n, root), 0);
	assert_int_equal(n.table.n, 3);
	assert_int_equal(n.table.id[0], 0);
	assert_int_equal(n.table.id[1], 3);
	assert_int_equal(n.table.id[2], 5);
	assert_int_equal(n.table.memory[1], UINT64_C(2) << 30);
	assert_int_equal(n.table.distance[0][0], 10);
	assert_int_equal(n.table.distance[0][1], 31);
	assert_int_equal(n.table.distance[0][2], 17);
	assert_int_equal(n.table.distance[2][1], 24);
	assert_int_equal(n.cpus, 9);
	assert_int_equal(n.of_cpu[0], 0);
	assert_int_equal(n.of_cpu[8], 0);
	assert_int_equal(n.of_cpu[2], 1); /* its own node has no memory: node 3 is the nearest */
	assert_int_equal(n.of_cpu[3], -1);
	assert_int_equal(n.of_cpu[4], 1);
	nodes_close(&n);
	harness_rm(root);
}

static void a_cpuset_leaves_fewer(void **state)
{
	struct nodes n;
	char root[32];

	four_nodes(root);
	put(root, "/proc/self/status", "Name:\tx\nMems_allowed_list:\t3,5\n");
	assert_int_equal(nodes_open(&n, root), 0);
	assert_int_equal(n.table.n, 2);
	assert_int_equal(n.table.id[0], 3);
	assert_int_equal(n.of_cpu[0], 1); /* of what is left node 5 is nearest to node 0 */
	nodes_close(&n);
	harness_rm(root);
}

static void a_host_that_says_nothing_has_none(void **state)
{
	char root[] = "/tmp/kvt.XXXXXX";
	struct nodes n;
	bool firm;

	assert_non_null(mkdtemp(root));
	assert_int_equal(nodes_open(&n, root), 0);
	assert_int_equal(n.table.n, 0);
	assert_int_equal(nodes_of_process(&n, getpid(), &firm), -1);
	nodes_close(&n);
	harness_rm(root);
}

static void processes_have_nodes(void **state)
{
	uint64_t set[128] = {0};
	unsigned first = 0;
	struct nodes n;
	char root[32];
	bool firm;

	/* Every processor that we may run on belongs to node 3. */
	four_nodes(root);
	put(root, NODE "node0/cpulist", "\n");
	put(root, NODE "node1/cpulist", "\n");
	put(root, NODE "node3/cpulist", "0-8191\n");
	assert_int_equal(nodes_open(&n, root), 0);
	assert_int_equal(nodes_of_process(&n, getpid(), &firm), 1);
	assert_true(firm);
	assert_int_equal(nodes_of_process(&n, 0, &firm), -1);
	assert_false(firm);
	nodes_close(&n);
	/* Where it may run on two nodes, the processor that it was last on decides. */
	assert_int_equal(sched_getaffinity(0, sizeof(set), (cpu_set_t *)set), 0);
	first = bits_next(set, 0, 8192);
	if (bits_next(set, first + 1, 8192) < 8192) {
		char text[64], path[64];

		snprintf(text, sizeof(text), "%u\n", first);
		put(root, NODE "node0/cpulist", text);
		snprintf(text, sizeof(text), "%u-8191\n", first + 1);
		put(root, NODE "node3/cpulist", text);
		snprintf(path, sizeof(path), "/proc/%d/stat", getpid());
		assert_int_equal(nodes_open(&n, root), 0);
		assert_int_equal(nodes_of_process(&n, getpid(), &firm), -1); /* no such file there */
		assert_false(firm);
		put(root, path,
		    "1 (a b) c) S 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 "
		    "31 32 33 34 35 36 37 38 0 40\n");
		assert_int_equal(nodes_of_process(&n, getpid(), &firm), n.of_cpu[0]);
		nodes_close(&n);
	}
	harness_rm(root);
}

static void lists_are_parsed(void **state)
{
	uint64_t bits[2] = {0};

	nodes_parse_list("0,2-4,63-64,127-9999\n", bits, 128);
	assert_int_equal(bits[0], UINT64_C(0x800000000000001d));
	assert_int_equal(bits[1], UINT64_C(0x8000000000000001));
	memset(bits, 0, sizeof(bits));
	nodes_parse_list("", bits, 128);
	nodes_parse_list("x", bits, 128);
	nodes_parse_list("5-", bits, 128); /* 5 to nothing */
	nodes_parse_list("9-7", bits, 128);
	assert_int_equal(bits[0] | bits[1], 0);
}

/* ---- a daemon with two ----------------------------------------------------------------------- */

static _Atomic int whereabouts; /* of every client */
static _Atomic bool held;       /* to that node */
static _Atomic int wishes, refusal;

static int made_up(const struct nodes *n, pid_t pid, bool *ret_firm)
{
	*ret_firm = held;
	return whereabouts;
}

static int wish(void *addr, size_t bytes, int id)
{
	wishes++;
	return refusal;
}

static const struct nodes two = {
	.table = {.n = 2,
		  .id = {0, 1},
		  .memory = {1 << 30, 1 << 30},
		  .distance = {{10, 20}, {20, 10}},
		  .near = wish},
	.of_process = made_up,
};

static const struct kvtier_budget keep_all = {
	.size = sizeof(keep_all), .device_rows = KVT_ROWS_ALL, .manual = 1, .policy = "client"};

struct fixture {
	struct harness h;
	struct runtime rt;
};

static void begin_with(struct fixture *f, bool nvme, uint64_t dram, const char *fault)
{
	harness_init(&f->h, nvme);
	f->h.nodes = &two;
	f->h.cfg.dram_size = dram;
	f->h.cfg.dram_segment = UINT64_C(4) << 20;
	strcpy(f->h.cfg.dram_fault, fault);
	/* Places are of sizes: a node may have no room for a page long before its last byte. */
	if (nvme)
		f->h.cfg.dram_marks = (struct config_watermarks){10, 150, 200};
	whereabouts = 1;
	held = false;
	wishes = refusal = 0;
	assert_true(harness_start(&f->h));
	assert_int_equal(rt_open(&f->rt, f->h.sock[0], 4), 0);
}

static void begin(struct fixture *f, bool nvme, uint64_t dram)
{
	begin_with(f, nvme, dram, "");
}

/* A sequence of 1000 rows, 800 of them in dram: 1 MiB. */
static void begin_seq(struct fixture *f, struct rt_seq *q, uint32_t id)
{
	struct kvtier_plan p;

	assert_int_equal(rt_prepare(q, &f->rt, id, 1200, 1200, 4096), 0);
	assert_int_equal(rt_seq_open(q, KVT_EPHEMERAL, &keep_all), 0);
	assert_int_equal(rt_append(q, 1000), 0);
	assert_int_equal(rt_plan(q, 200, KVT_ROWS_ALL, 0, &p), 0);
	assert_int_equal(p.rows_out, 800 * f->rt.lanes);
}

/* All rows come back, each as it was written. */
static void assert_rows(struct rt_seq *q)
{
	struct kvtier_plan p;

	assert_int_equal(rt_plan(q, KVT_ROWS_ALL, KVT_ROWS_ALL, 0, &p), 0);
	assert_int_equal(p.rows_in, 800 * q->rt->lanes);
	assert_int_equal(rt_wrong(q), 0);
}

static void finish(struct fixture *f)
{
	rt_close(&f->rt);
	harness_stop(&f->h);
	harness_rm(f->h.dir);
}

static const struct tier_node_stat *node(const struct core_stat *st, unsigned i)
{
	return &st->tier[KVT_TIER_DRAM].at[i];
}

/* Until node i has no page, for ten seconds at most. */
static struct core_stat wait_empty(struct fixture *f, unsigned i)
{
	struct core_stat st = harness_stat(&f->h);

	for (int k = 0; k < 1000 && node(&st, i)->used; k++) {
		usleep(10000);
		st = harness_stat(&f->h);
	}
	return st;
}

static void pages_come_to_their_clients_node(void **state)
{
	struct core_stat st;
	struct fixture f;
	struct rt_seq q;

	begin(&f, false, UINT64_C(64) << 20);
	begin_seq(&f, &q, 1);
	st = harness_stat(&f.h);
	assert_int_equal(st.tier[KVT_TIER_DRAM].nodes, 2);
	assert_int_equal(node(&st, 0)->used, 0);
	assert_true(node(&st, 1)->used >= 800 * f.rt.lanes * (RT_K + RT_V));
	assert_int_equal(node(&st, 1)->capacity, UINT64_C(32) << 20);
	assert_int_equal(st.node_fallbacks, 0);
	assert_string_equal(st.numa, "client, 2 nodes");
	/* Rings, plans, the region, one segment. */
	assert_int_equal(wishes, 4);
	assert_rows(&q);
	rt_seq_free(&q, false);
	finish(&f);
}

static void pages_follow_a_client_that_is_held_elsewhere(void **state)
{
	struct core_stat st;
	struct fixture f;
	struct rt_seq q;

	begin(&f, false, UINT64_C(64) << 20);
	begin_seq(&f, &q, 1);
	/* One that only happens to run elsewhere is not followed: two ticks later all is as it was. */
	whereabouts = 0;
	usleep(600000);
	st = harness_stat(&f.h);
	assert_int_equal(node(&st, 0)->used, 0);
	assert_int_equal(st.migrated_pages, 0);
	held = true;
	st = wait_empty(&f, 1);
	assert_int_equal(node(&st, 1)->used, 0);
	assert_int_equal(node(&st, 0)->used, st.tier[KVT_TIER_DRAM].used);
	assert_int_equal(st.migrated_pages, 7 * f.rt.lanes);
	assert_int_equal(st.migrated_bytes, 800 * f.rt.lanes * (RT_K + RT_V));
	/* The quota's account is what it was. */
	assert_int_equal(st.bytes[KVT_TIER_DRAM], st.tier[KVT_TIER_DRAM].used);
	assert_rows(&q);
	st = harness_stat(&f.h);
	assert_int_equal(st.miss_corrupt + st.miss_io + st.miss_stale, 0);
	rt_seq_free(&q, false);
	finish(&f);
}

static void what_found_no_room_comes_when_there_is_some(void **state)
{
	struct core_stat st;
	struct rt_seq q[10];
	struct fixture f;

	begin(&f, false, UINT64_C(16) << 20); /* eight sequences fill a node */
	for (uint32_t i = 0; i < 10; i++)
		begin_seq(&f, &q[i], i + 1);
	st = harness_stat(&f.h);
	assert_true(st.node_fallbacks >= 100);
	assert_int_equal(st.node_fallbacks, node(&st, 1)->fallbacks);
	assert_true(node(&st, 0)->used > 1 << 20);
	/* Six go: what went elsewhere fits, below the high mark. */
	for (uint32_t i = 0; i < 6; i++)
		rt_seq_free(&q[i], false);
	st = wait_empty(&f, 0);
	assert_int_equal(node(&st, 0)->used, 0);
	assert_true(st.migrated_pages > 50);
	for (uint32_t i = 6; i < 10; i++) {
		assert_rows(&q[i]);
		rt_seq_free(&q[i], false);
	}
	st = harness_stat(&f.h);
	assert_int_equal(st.miss_corrupt + st.miss_io + st.miss_stale, 0);
	finish(&f);
}

static void pages_of_a_fork_stay_while_it_lives(void **state)
{
	struct kvtier_seq_opts o;
	struct rt_seq q, child;
	struct core_stat st;
	struct fixture f;

	begin(&f, false, UINT64_C(64) << 20);
	begin_seq(&f, &q, 1);
	assert_int_equal(rt_prepare(&child, &f.rt, 2, 1200, 1200, 4096), 0);
	o = rt_opts(&child, KVT_EPHEMERAL, &keep_all);
	assert_int_equal(kvtier_seq_fork(q.s, 600, &o, &child.s), 0);
	whereabouts = 0;
	held = true;
	usleep(800000);
	st = harness_stat(&f.h);
	assert_true(node(&st, 1)->used > 0); /* the shared ones */
	assert_true(st.migrated_pages > 0);  /* and those behind the fork's rows */
	rt_seq_free(&child, false);
	st = wait_empty(&f, 1);
	assert_int_equal(node(&st, 1)->used, 0);
	assert_rows(&q);
	rt_seq_free(&q, false);
	finish(&f);
}

static void a_page_that_does_not_verify_is_not_carried(void **state)
{
	struct core_stat st;
	struct fixture f;
	struct rt_seq q;

	begin_with(&f, false, UINT64_C(64) << 20, "seed=3,flip=1000");
	begin_seq(&f, &q, 1);
	whereabouts = 0;
	held = true;
	st = wait_empty(&f, 1);
	assert_int_equal(st.migrated_pages, 0);
	assert_int_equal(st.miss_corrupt, 7 * f.rt.lanes);
	assert_int_equal(st.tier[KVT_TIER_DRAM].used, 0);
	rt_seq_free(&q, false);
	finish(&f);
}

static void a_crowded_node_is_emptied_though_the_tier_has_room(void **state)
{
	struct core_stat st;
	struct rt_seq q[18];
	struct fixture f;

	begin(&f, true, UINT64_C(32) << 20);
	for (uint32_t i = 0; i < 18; i++)
		begin_seq(&f, &q[i], i + 1);
	for (int k = 0; k < 500; k++) {
		st = harness_stat(&f.h);
		if (st.rows_demoted[KVT_TIER_NVME] && node(&st, 1)->free >= node(&st, 1)->capacity / 1000 * 150)
			break;
		usleep(10000);
	}
	assert_true(node(&st, 1)->free >= node(&st, 1)->capacity / 1000 * 150);
	assert_true(st.rows_demoted[KVT_TIER_NVME] > 0);
	assert_true(st.tier[KVT_TIER_DRAM].free > st.tier[KVT_TIER_DRAM].capacity / 5);
	for (uint32_t i = 0; i < 18; i++) {
		assert_rows(&q[i]);
		rt_seq_free(&q[i], false);
	}
	finish(&f);
}

static void a_kernel_that_refuses_is_told_of(void **state)
{
	struct core_stat st;
	struct fixture f;
	struct rt_seq q;

	begin(&f, false, UINT64_C(64) << 20);
	refusal = -EPERM;
	begin_seq(&f, &q, 1);
	for (int k = 0; k < 200 && !strstr(st.numa, "refused"); k++) {
		usleep(10000);
		st = harness_stat(&f.h);
	}
	assert_string_equal(st.numa, "client, 2 nodes, refused: Operation not permitted");
	assert_rows(&q);
	rt_seq_free(&q, false);
	finish(&f);
}

static void a_client_of_no_node_is_served(void **state)
{
	struct core_stat st;
	struct fixture f;
	struct rt_seq q;

	begin(&f, false, UINT64_C(64) << 20);
	rt_close(&f.rt);
	whereabouts = -1;
	assert_int_equal(rt_open(&f.rt, f.h.sock[0], 4), 0);
	begin_seq(&f, &q, 1);
	st = harness_stat(&f.h);
	assert_true(node(&st, 0)->used && node(&st, 1)->used);
	assert_int_equal(st.node_fallbacks, 0);
	assert_rows(&q);
	rt_seq_free(&q, false);
	finish(&f);
}

int main(int argc, char *argv[])
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(the_host_is_read),
		cmocka_unit_test(a_cpuset_leaves_fewer),
		cmocka_unit_test(a_host_that_says_nothing_has_none),
		cmocka_unit_test(processes_have_nodes),
		cmocka_unit_test(lists_are_parsed),
		cmocka_unit_test(pages_come_to_their_clients_node),
		cmocka_unit_test(pages_follow_a_client_that_is_held_elsewhere),
		cmocka_unit_test(what_found_no_room_comes_when_there_is_some),
		cmocka_unit_test(pages_of_a_fork_stay_while_it_lives),
		cmocka_unit_test(a_page_that_does_not_verify_is_not_carried),
		cmocka_unit_test(a_crowded_node_is_emptied_though_the_tier_has_room),
		cmocka_unit_test(a_kernel_that_refuses_is_told_of),
		cmocka_unit_test(a_client_of_no_node_is_served),
	};

	if (argc > 1)
		cmocka_set_test_filter(argv[1]);
	return cmocka_run_group_tests(tests, NULL, NULL);
}
