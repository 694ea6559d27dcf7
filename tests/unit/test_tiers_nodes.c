/* SPDX-License-Identifier: MIT */
/* The DRAM tier on a host with several nodes, which is made up: whose pages go where, and when they do not. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "shm/util.h"
#include "tiers/tier.h"

#define MIB (UINT64_C(1) << 20)
#define OPS (&tier_dram_ops)
#define PAGE (1u << 20)

static struct {
	int err, calls, id[64];
} asked;

static int note_wish(void *addr, size_t bytes, int id)
{
	assert_non_null(addr);
	assert_true(bytes >= 2 * MIB);
	if (asked.calls < 64)
		asked.id[asked.calls] = id;
	asked.calls++;
	return asked.err;
}

/* Nodes 0, 2 and 5; 0 and 5 are close to each other. Node 2 has half of the memory. */
static const struct tier_nodes three = {
	.n = 3,
	.id = {0, 2, 5},
	.memory = {1 << 20, 2 << 20, 1 << 20},
	.distance = {{10, 30, 12}, {30, 10, 20}, {12, 20, 10}},
	.near = note_wish,
};

static struct tier *open_tier(uint64_t size, uint64_t segment, int node)
{
	struct tier_cfg cfg = {
		.size = size, .segment = segment, .node = node, .nodes = &three, .no_huge = true};
	struct tier *t = NULL;
	char err[128] = "";

	memset(&asked, 0, sizeof(asked));
	assert_int_equal(OPS->open(&t, &cfg, err, sizeof(err)), 0);
	return t;
}

/* A page that should lie there; its node's index, or -errno. */
static int put_page(struct tier *t, int want, uint64_t owner, tier_addr *ret)
{
	struct tier_io io = {.op = TIER_WRITE,
			     .bytes = PAGE,
			     .near = (uint8_t)(want + 1),
			     .owner = owner,
			     .room = UINT64_MAX},
		       *p = &io, *done;
	int r = OPS->prepare(t, &io);

	if (r < 0)
		return r - 100;
	memset(io.buf, want + 7, PAGE);
	OPS->submit(t, &p, 1);
	assert_int_equal(OPS->reap(t, &done, 1), 1);
	OPS->release(t, &io);
	*ret = io.addr;
	return OPS->where(t, io.addr);
}

static struct tier_stat stat_of(struct tier *t)
{
	uint64_t capacity = 0, used = 0, freed = 0, resident = 0;
	struct tier_stat st;

	OPS->stat(t, &st);
	for (uint32_t i = 0; i < st.nodes; i++) {
		capacity += st.at[i].capacity;
		used += st.at[i].used;
		freed += st.at[i].free;
		resident += st.at[i].resident;
	}
	assert_int_equal(capacity, st.capacity);
	assert_int_equal(used, st.used);
	assert_int_equal(freed, st.free);
	assert_int_equal(resident, st.resident);
	return st;
}

static void capacity_is_divided_by_memory(void **state)
{
	struct tier *t = open_tier(42 * MIB, 4 * MIB, TIER_NODE_CLIENT);
	struct tier_stat st = stat_of(t);

	assert_int_equal(st.nodes, 3);
	assert_int_equal(st.at[0].id, 0);
	assert_int_equal(st.at[1].id, 2);
	assert_int_equal(st.at[2].id, 5);
	assert_int_equal(st.at[1].capacity, 20 * MIB);
	assert_int_equal(st.at[2].capacity, 10 * MIB);
	assert_int_equal(st.at[0].capacity, 12 * MIB); /* and what does not divide */
	assert_int_equal(st.node, -1);
	OPS->close(t);
}

static void pages_go_where_they_should_then_to_the_nearest(void **state)
{
	static const int expect[] = {2, 2, 2, 2, 2, 2, 2, 2, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1};
	struct tier *t = open_tier(32 * MIB, 4 * MIB, TIER_NODE_CLIENT);
	tier_addr at[32];
	struct tier_stat st;

	for (unsigned i = 0; i < ARRAY_SIZE(expect); i++)
		assert_int_equal(put_page(t, 2, 0, &at[i]), expect[i]);
	st = stat_of(t);
	assert_int_equal(st.at[2].used, 8 * MIB);
	assert_int_equal(st.at[2].free, 0);
	assert_int_equal(st.at[0].used, 8 * MIB);
	assert_int_equal(st.at[1].used, 2 * MIB);
	assert_int_equal(st.at[2].fallbacks, 10);
	assert_int_equal(st.at[0].fallbacks + st.at[1].fallbacks, 0);
	/* Every segment was placed as it was made: two on node 5, two on node 0, one on node 2. */
	assert_int_equal(asked.calls, 5);
	for (int i = 0; i < 5; i++)
		assert_int_equal(asked.id[i], i < 2 ? 5 : i < 4 ? 0 : 2);
	/* Room on the node that is wanted: the next page comes there again. */
	OPS->free(t, at[3], PAGE);
	assert_int_equal(put_page(t, 2, 0, &at[3]), 2);
	OPS->close(t);
}

static void all_of_the_capacity_can_be_used_from_one_node(void **state)
{
	struct tier *t = open_tier(16 * MIB, 4 * MIB, TIER_NODE_CLIENT);
	unsigned n = 0;
	tier_addr at[32];

	while (n < 32 && put_page(t, 0, 0, &at[n]) >= 0)
		n++;
	assert_int_equal(n, 16);
	assert_int_equal(stat_of(t).free, 0);
	for (unsigned i = 0; i < n; i++)
		OPS->free(t, at[i], PAGE);
	assert_int_equal(stat_of(t).used, 0);
	OPS->close(t);
}

static void shunned_nodes_come_last(void **state)
{
	struct tier *t = open_tier(16 * MIB, 4 * MIB, TIER_NODE_CLIENT);
	tier_addr at;

	OPS->shun(t, 1 << 0 | 1 << 2);
	assert_int_equal(put_page(t, 0, 0, &at), 1); /* though 5 is nearer to 0 */
	OPS->shun(t, 7);                             /* no other has room to speak of either */
	assert_int_equal(put_page(t, 2, 0, &at), 2);
	OPS->shun(t, 0);
	assert_int_equal(put_page(t, 0, 0, &at), 0);
	OPS->close(t);
}

static void without_a_wish_the_emptiest_node_is_taken(void **state)
{
	struct tier *t = open_tier(32 * MIB, 4 * MIB, TIER_NODE_CLIENT);
	unsigned on[3] = {0};
	tier_addr at;

	for (unsigned i = 0; i < 32; i++) {
		int node = put_page(t, -1, 0, &at);

		assert_in_range(node, 0, 2);
		on[node]++;
		if (i < 8)
			assert_int_equal(node, 1);
	}
	assert_int_equal(on[0], 8);
	assert_int_equal(on[1], 16);
	assert_int_equal(stat_of(t).at[0].fallbacks, 0);
	OPS->close(t);
}

static void owners_have_segments_on_each_node(void **state)
{
	struct tier *t = open_tier(64 * MIB, 4 * MIB, TIER_NODE_CLIENT);
	struct tier_owner st;
	tier_addr at[4];

	assert_int_equal(OPS->hold(t, 77, true), 0);
	assert_int_equal(put_page(t, 0, 77, &at[0]), 0);
	assert_int_equal(put_page(t, 1, 77, &at[1]), 1);
	assert_int_equal(put_page(t, 1, 78, &at[2]), 1);
	assert_int_equal(put_page(t, 1, 0, &at[3]), 1);
	assert_int_not_equal(tier_segment(at[0]), tier_segment(at[1]));
	assert_int_not_equal(tier_segment(at[1]), tier_segment(at[2]));
	OPS->owner_stat(t, 77, &st);
	assert_int_equal(st.segments, 2);
	assert_int_equal(st.used, 2 * PAGE);
	OPS->free(t, at[0], PAGE);
	OPS->free(t, at[1], PAGE);
	OPS->owner_stat(t, 77, &st);
	assert_int_equal(st.empty, 2);
	OPS->hold(t, 77, false);
	OPS->owner_stat(t, 77, &st);
	assert_int_equal(st.segments, 0);
	assert_int_equal(stat_of(t).at[1].used, 2 * PAGE);
	OPS->close(t);
}

static void one_node_or_none_is_as_before(void **state)
{
	struct tier *t = open_tier(16 * MIB, 4 * MIB, 5);
	struct tier_stat st = stat_of(t);
	tier_addr at;

	assert_int_equal(st.nodes, 1);
	assert_int_equal(st.node, 5);
	assert_int_equal(put_page(t, 0, 0, &at), -1);
	assert_int_equal(asked.id[0], 5);
	OPS->close(t);

	t = open_tier(16 * MIB, 4 * MIB, TIER_NODE_OFF);
	assert_int_equal(put_page(t, 1, 0, &at), -1);
	assert_int_equal(asked.calls, 0);
	OPS->stat(t, &st);
	assert_int_equal(st.nodes, 0);
	OPS->close(t);
}

static void a_kernel_that_refuses_costs_placement_only(void **state)
{
	struct tier *t = open_tier(16 * MIB, 4 * MIB, TIER_NODE_CLIENT);
	tier_addr at;

	asked.err = -EPERM;
	assert_int_equal(put_page(t, 1, 0, &at), 1);
	assert_int_equal(stat_of(t).place_err, -EPERM);
	OPS->close(t);
}

static void a_node_that_is_not_there_is_refused(void **state)
{
	struct tier_cfg cfg = {.size = 16 * MIB, .node = 3, .nodes = &three};
	struct tier *t = NULL;
	char err[128] = "";

	assert_int_equal(OPS->open(&t, &cfg, err, sizeof(err)), -EINVAL);
	assert_string_equal(err, "dram node: 3 is not a memory node of this host (highest is 5)");
	assert_null(t);
}

/* A churn of pages of all sizes: no count drifts, every page keeps its bytes. */
static void counts_hold_under_churn(void **state)
{
	enum { N = 200 };
	struct tier *t = open_tier(48 * MIB, 4 * MIB, TIER_NODE_CLIENT);
	tier_addr at[N];
	uint32_t bytes[N] = {0}, seed = 3;
	struct tier_stat st;

	for (unsigned round = 0; round < 4000; round++) {
		unsigned i = (seed = seed * 1664525 + 1013904223) >> 8;
		struct tier_io io = {.op = TIER_WRITE}, *p = &io, *done;

		i %= N;
		if (bytes[i]) {
			OPS->free(t, at[i], bytes[i]);
			bytes[i] = 0;
			continue;
		}
		io.bytes = 1 + (seed >> 4) % TIER_MAX_PAGE;
		io.near = (uint8_t)(seed >> 28) % 5; /* 4: a node that is not there */
		io.owner = seed >> 30;
		io.room = UINT64_MAX;
		if (OPS->prepare(t, &io) < 0)
			continue;
		OPS->submit(t, &p, 1);
		assert_int_equal(OPS->reap(t, &done, 1), 1);
		OPS->release(t, &io);
		at[i] = io.addr;
		bytes[i] = io.bytes;
	}
	st = stat_of(t);
	assert_int_equal(st.errors, 0);
	for (unsigned i = 0; i < N; i++)
		if (bytes[i])
			OPS->free(t, at[i], bytes[i]);
	assert_int_equal(stat_of(t).used, 0);
	OPS->close(t);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(capacity_is_divided_by_memory),
		cmocka_unit_test(pages_go_where_they_should_then_to_the_nearest),
		cmocka_unit_test(all_of_the_capacity_can_be_used_from_one_node),
		cmocka_unit_test(shunned_nodes_come_last),
		cmocka_unit_test(without_a_wish_the_emptiest_node_is_taken),
		cmocka_unit_test(owners_have_segments_on_each_node),
		cmocka_unit_test(one_node_or_none_is_as_before),
		cmocka_unit_test(a_kernel_that_refuses_costs_placement_only),
		cmocka_unit_test(a_node_that_is_not_there_is_refused),
		cmocka_unit_test(counts_hold_under_churn),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
