/* SPDX-License-Identifier: MIT */
/* Who is best on how many lanes: within every resample against the best of the others, whoever that is. */
#include <errno.h>
#include <math.h>
#include <string.h>
#include "policy/eval/report.h"
#include "shm/util.h"

/* The least of v over the policies in `among`, its place, and the least without it. */
struct least {
	float first, second;
	uint32_t at;
};

static struct least find_least(const float *v, const bool *among, uint32_t n)
{
	struct least l = {INFINITY, INFINITY, UINT32_MAX};

	for (uint32_t p = 0; p < n; p++) {
		if (!among[p] || isnan(v[p]))
			continue;
		if (v[p] < l.first) {
			l.second = l.first;
			l.first = v[p];
			l.at = p;
		} else {
			l.second = MIN(l.second, v[p]);
		}
	}
	return l;
}

/* v[p] less the least of the others. */
static float ahead(const float *v, const struct least *l, uint32_t p)
{
	return v[p] - (l->at == p ? l->second : l->first);
}

struct wins_room {
	float *point, *mean; /* [policies], [resamples][policies] of a lane */
	struct least *least; /* [resamples] */
	float *scratch;      /* [resamples] */
	bool among[AMONG][RIVALS_MAX];
};

static void lane_wins(const struct slice *s, uint32_t policies, struct wins_room *m, int among,
		      struct wins (*wins)[AMONG])
{
	struct least point = find_least(m->point, m->among[among], policies);

	for (uint32_t b = 0; b < s->boot.resamples; b++)
		m->least[b] = find_least(m->mean + (size_t)b * policies, m->among[among], policies);
	for (uint32_t p = 0; p < policies; p++) {
		struct wins *w = &wins[p][among];
		float by = ahead(m->point, &point, p);

		if (!isfinite(by))
			continue;
		w->lanes++;
		if (by >= 0)
			continue;
		w->lowest++;
		for (uint32_t b = 0; b < s->boot.resamples; b++)
			m->scratch[b] = ahead(m->mean + (size_t)b * policies, &m->least[b], p);
		w->sure += boot_interval(by, m->scratch, s->boot.resamples).hi < 0;
	}
}

int slice_wins(const struct report *r, const struct slice *s, struct wins (*wins)[AMONG], struct interval *lane)
{
	uint32_t policies = r->table->policies, n = s->boot.resamples;
	_cleanup_free_ float *mean = malloc((size_t)n * policies * sizeof(*mean));
	_cleanup_free_ float *scratch = malloc(n * sizeof(*scratch));
	_cleanup_free_ struct least *least = malloc(n * sizeof(*least));
	float point[RIVALS_MAX];
	struct wins_room m = {.point = point, .mean = mean, .least = least, .scratch = scratch};

	if (!mean || !scratch || !least)
		return -ENOMEM;
	for (uint32_t p = 0; p < policies; p++) {
		m.among[AMONG_STAR][p] = r->rivals->r[p].role == RIVAL_STAR;
		m.among[AMONG_TRAINED][p] =
			r->rivals->r[p].role == RIVAL_STAR || r->rivals->r[p].role == RIVAL_TRAINED;
	}
	memset(wins, 0, policies * sizeof(*wins));
	for (uint32_t l = 0; l < r->table->lanes; l++) {
		int e = boot_means(&s->boot, s->regret + (size_t)l * s->clusters * policies, policies, point,
				   mean);

		if (e < 0)
			return e;
		for (int among = 0; among < AMONG; among++)
			lane_wins(s, policies, &m, among, wins);
		for (uint32_t p = 0; lane && p < policies; p++) {
			for (uint32_t b = 0; b < n; b++)
				scratch[b] = mean[(size_t)b * policies + p];
			lane[(size_t)l * policies + p] = boot_interval(point[p], scratch, n);
		}
	}
	return 0;
}
