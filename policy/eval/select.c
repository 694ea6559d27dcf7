/* SPDX-License-Identifier: MIT */
/* Choosing on validation what the test split is then compared with. */
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include "policy/eval/select.h"
#include "shm/util.h"

#define HEADER "lane,policy,regret"

/* Mean over clusters of the mean over a cluster's items; sum and count are [clusters] of scratch. */
static double mean_regret(const struct eval_set *set, const struct eval_table *t, uint32_t lane,
			  uint32_t policy, double *sum, double *count)
{
	double total = 0, clusters = 0;

	memset(sum, 0, set->clusters * sizeof(*sum));
	memset(count, 0, set->clusters * sizeof(*count));
	for (uint32_t i = 0; i < t->items; i++) {
		uint32_t c = set->doc[set->item[i].doc].cluster;
		float v = eval_at(t, i, lane, policy)[METRIC_REGRET];

		if (isnan(v))
			continue;
		sum[c] += v;
		count[c]++;
	}
	for (uint32_t c = 0; c < set->clusters; c++) {
		total += count[c] > 0 ? sum[c] / count[c] : 0;
		clusters += count[c] > 0;
	}
	return clusters > 0 ? total / clusters : INFINITY;
}

int select_best(uint32_t *chosen, float *regret, const struct eval_set *set, const struct rivals *rivals,
		const struct eval_table *table)
{
	_cleanup_free_ double *room = calloc(2ul * set->clusters, sizeof(*room));

	if (!room)
		return -ENOMEM;
	for (uint32_t lane = 0; lane < table->lanes; lane++) {
		double least = INFINITY;

		chosen[lane] = UINT32_MAX;
		for (uint32_t p = 0; p < rivals->n; p++) {
			double v;

			if (rivals->r[p].role != RIVAL_STAR)
				continue;
			v = mean_regret(set, table, lane, p, room, room + set->clusters);
			if (chosen[lane] != UINT32_MAX && v >= least)
				continue;
			least = v;
			chosen[lane] = p;
		}
		regret[lane] = (float)least;
	}
	return 0;
}

int select_write(const char *path, const uint32_t *chosen, const float *regret, const struct rivals *rivals,
		 const uint32_t *lane, uint32_t lanes, char *err, size_t errsize)
{
	FILE *f = fopen(path, "we");
	int r = 0;

	if (f) {
		fprintf(f, HEADER "\n");
		for (uint32_t i = 0; i < lanes; i++)
			fprintf(f, "%u,%s,%.6g\n", lane[i], rivals->r[chosen[i]].name, (double)regret[i]);
		r = ferror(f) ? -EIO : 0;
		if (fclose(f) != 0)
			r = -errno;
	} else {
		r = -errno;
	}
	if (r < 0)
		snprintf(err, errsize, "%s: %s", path, strerror(-r));
	return r;
}

static int parse_line(uint32_t *chosen, const char *line, const struct rivals *rivals, const uint32_t *lane,
		      uint32_t lanes, char *why, size_t size)
{
	char name[RIVAL_NAME];
	unsigned at;

	if (sscanf(line, "%u,%31[^,],", &at, name) != 2) {
		snprintf(why, size, "not lane,policy,regret");
		return -EINVAL;
	}
	for (uint32_t p = 0; p < rivals->n; p++) {
		if (rivals->r[p].role != RIVAL_STAR || strcmp(rivals->r[p].name, name) != 0)
			continue;
		for (uint32_t i = 0; i < lanes; i++)
			if (lane[i] == at)
				chosen[i] = p;
		return 0;
	}
	snprintf(why, size, "policy: %s, no heuristic of that name is evaluated", name);
	return -EINVAL;
}

int select_read(uint32_t *chosen, const char *path, const struct rivals *rivals, const uint32_t *lane,
		uint32_t lanes, char *err, size_t errsize)
{
	FILE *f = fopen(path, "re");
	char line[256], why[128] = "";
	unsigned number = 0;
	int r = 0;

	if (!f) {
		snprintf(err, errsize, "%s: %s", path, strerror(errno));
		return -errno;
	}
	memset(chosen, 0xff, lanes * sizeof(*chosen));
	while (r == 0 && fgets(line, sizeof(line), f)) {
		line[strcspn(line, "\r\n")] = 0;
		if (++number == 1 && strcmp(line, HEADER) != 0) {
			snprintf(why, sizeof(why), "header: must be " HEADER);
			r = -EINVAL;
		} else if (number > 1) {
			r = parse_line(chosen, line, rivals, lane, lanes, why, sizeof(why));
		}
	}
	fclose(f);
	for (uint32_t i = 0; r == 0 && i < lanes; i++) {
		if (chosen[i] != UINT32_MAX)
			continue;
		snprintf(why, sizeof(why), "lane: %u is missing", lane[i]);
		r = -EINVAL;
	}
	if (r < 0)
		snprintf(err, errsize, "%s: line %u: %s", path, number, why);
	return r;
}

void select_fill(struct eval_table *table, const struct rivals *rivals, const uint32_t *chosen)
{
	int best = rival_find(rivals, HOW_BEST);

	for (uint32_t i = 0; best >= 0 && i < table->items; i++)
		for (uint32_t lane = 0; lane < table->lanes; lane++)
			memcpy(eval_at(table, i, lane, (uint32_t)best), eval_at(table, i, lane, chosen[lane]),
			       METRICS * sizeof(float));
}
