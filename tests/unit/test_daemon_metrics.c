/* SPDX-License-Identifier: MIT */
/* What Prometheus is told: nothing of core_stat is forgotten, names follow the rules, numbers are the fields'.
 */
#include <ctype.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>
#include "daemon/metrics.h"
#include "shm/util.h"

static void cover(uint8_t *seen, uint32_t off, uint32_t size)
{
	for (uint32_t i = off; i < off + size; i++) {
		if (seen[i])
			fail_msg("byte %u of core_stat is in two rows", i);
		seen[i] = 1;
	}
}

/* Whoever adds a field exports it or says why not. Bytes that nobody names must be what the compiler left. */
static void every_field_is_exported_or_left_out_with_a_reason(void **state)
{
	uint8_t *seen = calloc(1, sizeof(struct core_stat));
	uint32_t run = 0;

	for (unsigned i = 0; i < metrics_n; i++)
		cover(seen, metrics_table[i].off, metrics_table[i].size);
	for (unsigned i = 0; i < metrics_n_left_out; i++) {
		cover(seen, metrics_left_out[i].off, metrics_left_out[i].size);
		assert_true(strlen(metrics_left_out[i].why) > 5);
	}
	for (uint32_t i = 0; i <= sizeof(struct core_stat); i++) {
		if (i < sizeof(struct core_stat) && !seen[i]) {
			run++;
			continue;
		}
		/* Padding is shorter than a word and ends where a word begins. */
		if (run && (run >= 8 || (i % 4 && i < sizeof(struct core_stat))))
			fail_msg("core_stat: bytes %u to %u are neither in metrics_table nor in "
				 "metrics_left_out",
				 i - run, i - 1);
		run = 0;
	}
	free(seen);
}

static bool ends(const char *s, const char *with)
{
	return strlen(s) > strlen(with) && !strcmp(s + strlen(s) - strlen(with), with);
}

static void check_names(const struct metric *table, unsigned n)
{
	for (unsigned i = 0; i < n; i++) {
		const struct metric *m = &table[i];

		if (strncmp(m->name, "kvtier_", 7) ||
		    strspn(m->name, "abcdefghijklmnopqrstuvwxyz_") != strlen(m->name))
			fail_msg("%s: not kvtier_ and small letters", m->name);
		if (ends(m->name, "_total") != (m->type == METRIC_COUNTER))
			fail_msg("%s: counters and nothing else end in _total", m->name);
		if (m->unit == METRIC_NS && !ends(m->name, "_seconds"))
			fail_msg("%s: times are in seconds", m->name);
		if (m->unit == METRIC_PERMILLE && !ends(m->name, "_ratio"))
			fail_msg("%s: shares are ratios", m->name);
		if (m->type == METRIC_HISTOGRAM && m->size != sizeof(struct histogram))
			fail_msg("%s: not a histogram", m->name);
		if (m->label && strcmp(m->label, "tier") && strcmp(m->label, "reason"))
			fail_msg("%s: label %s: not among those that are bounded", m->name, m->label);
		for (unsigned k = 0; k < i; k++) {
			bool same = !strcmp(m->name, table[k].name);

			if (same && strcmp(m->name, m[-1].name))
				fail_msg("%s: its rows are apart", m->name);
			if (same && (!m->label || !strcmp(m->value, table[k].value)))
				fail_msg("%s: a sample twice", m->name);
		}
	}
}

static void names_follow_the_conventions(void **state)
{
	check_names(metrics_table, metrics_n);
	check_names(metrics_probes, metrics_n_probes);
	for (unsigned i = 0; i < metrics_n_probes; i++)
		for (unsigned k = 0; k < metrics_n; k++)
			assert_string_not_equal(metrics_probes[i].name, metrics_table[k].name);
}

static void assert_line(const char *text, const char *line)
{
	char whole[256];

	snprintf(whole, sizeof(whole), "\n%s\n", line);
	if (!strstr(text, whole))
		fail_msg("missing: %s", line);
}

static void values_come_in_base_units(void **state)
{
	struct core_stat *s = calloc(1, sizeof(*s));
	struct probes_stat p = {.on = true, .lost = 5};
	size_t n = 0;
	char *text;

	s->uptime_ns = 1500000001;
	s->clients = UINT64_MAX;
	s->rows_demoted[KVT_TIER_NVME] = 77;
	s->miss_corrupt = 3;
	s->marks[KVT_TIER_DRAM].min = 15;
	s->tier[KVT_TIER_NVME].offline = true;
	s->tier[KVT_TIER_DRAM].node = -1;
	strcpy(s->policy, "kvp");
	text = metrics_text(s, &p, &n);
	assert_non_null(text);
	assert_int_equal(strlen(text), n);
	assert_line(text, "kvtier_uptime_seconds 1.500000001");
	assert_line(text, "kvtier_clients 18446744073709551615");
	assert_line(text, "kvtier_rows_demoted_total{tier=\"nvme\"} 77");
	assert_line(text, "kvtier_rows_demoted_total{tier=\"dram\"} 0");
	assert_line(text, "kvtier_misses_total{reason=\"corrupt\"} 3");
	assert_line(text, "kvtier_tier_free_min_ratio{tier=\"dram\"} 0.015");
	assert_line(text, "kvtier_tier_offline{tier=\"nvme\"} 1");
	assert_line(text, "kvtier_tier_numa_node{tier=\"dram\"} -1");
	assert_line(text, "kvtier_policy_info{policy=\"kvp\"} 1");
	assert_line(text, "kvtier_bpf_up 1");
	assert_line(text, "kvtier_bpf_lost_events_total 5");
	assert_line(text, "kvtier_disk_read_duration_seconds_count 0");
	assert_line(text, "# TYPE kvtier_rows_demoted_total counter");
	assert_line(text, "# TYPE kvtier_plan_duration_seconds histogram");
	free(text);
	free(s);
}

static void histograms_are_cumulative_and_exact(void **state)
{
	struct core_stat *s = calloc(1, sizeof(*s));
	struct probes_stat p = {};
	size_t n;
	char *text;

	histogram_add(&s->plan_ns, 5);                 /* in the first */
	histogram_add(&s->plan_ns, 1023);              /* still */
	histogram_add(&s->plan_ns, 1024);              /* the second */
	histogram_add(&s->plan_ns, UINT64_C(1) << 40); /* past the last */
	histogram_add_n(&s->refault_rows[KVT_TIER_DRAM], 300, 10);
	text = metrics_text(s, &p, &n);
	assert_non_null(text);
	assert_line(text, "kvtier_plan_duration_seconds_bucket{le=\"1.023e-06\"} 2");
	assert_line(text, "kvtier_plan_duration_seconds_bucket{le=\"2.047e-06\"} 3");
	assert_line(text, "kvtier_plan_duration_seconds_bucket{le=\"137.438953471\"} 3");
	assert_line(text, "kvtier_plan_duration_seconds_bucket{le=\"+Inf\"} 4");
	assert_line(text, "kvtier_plan_duration_seconds_count 4");
	assert_line(text, "kvtier_plan_duration_seconds_sum 1099.511629828");
	assert_line(text, "kvtier_refault_distance_rows_bucket{tier=\"dram\",le=\"255\"} 0");
	assert_line(text, "kvtier_refault_distance_rows_bucket{tier=\"dram\",le=\"511\"} 10");
	assert_line(text, "kvtier_refault_distance_rows_sum{tier=\"dram\"} 3000");
	free(text);
	free(s);
}

static void only_loopback_and_paths_are_listened_on(void **state)
{
	static const char *const good[] = {"", "/run/kvtier/metrics.sock", "127.0.0.1:1", "127.0.0.1:65535",
					   "[::1]:9753"};
	static const char *const bad[] = {"0.0.0.0:9753",   "[::]:9753",
					  "127.0.0.2:9753", "localhost:9753",
					  "127.0.0.1",      "127.0.0.1:",
					  "127.0.0.1:0",    "127.0.0.1:65536",
					  "127.0.0.1:+1",   "127.0.0.1:80x",
					  "metrics.sock",   ":9753",
					  "9753",           "127.0.0.1:99999999999999999999"};
	char err[256], longest[200];

	for (unsigned i = 0; i < ARRAY_SIZE(good); i++)
		assert_int_equal(metrics_where(good[i], err, sizeof(err)), 0);
	for (unsigned i = 0; i < ARRAY_SIZE(bad); i++) {
		assert_int_equal(metrics_where(bad[i], err, sizeof(err)), -EINVAL);
		assert_non_null(strstr(err, "127.0.0.1:PORT"));
		assert_int_equal(metrics_listen(bad[i], err, sizeof(err)), -EINVAL);
	}
	memset(longest, 'a', sizeof(longest));
	longest[0] = '/';
	longest[108] = 0;
	assert_int_equal(metrics_where(longest, err, sizeof(err)), -EINVAL);
	longest[107] = 0;
	assert_int_equal(metrics_where(longest, err, sizeof(err)), 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(every_field_is_exported_or_left_out_with_a_reason),
		cmocka_unit_test(names_follow_the_conventions),
		cmocka_unit_test(values_come_in_base_units),
		cmocka_unit_test(histograms_are_cumulative_and_exact),
		cmocka_unit_test(only_loopback_and_paths_are_listened_on),
	};

	return cmocka_run_group_tests_name("metrics", tests, NULL, NULL);
}
