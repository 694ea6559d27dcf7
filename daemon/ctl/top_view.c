/* SPDX-License-Identifier: MIT */
/* top: the model as a screen. */
#include <stdio.h>
#include <string.h>
#include "daemon/ctl/table.h"
#include "daemon/ctl/top.h"
#include "shm/util.h"

static const char *per_s(double v)
{
	return fmt_count((uint64_t)(v + 0.5));
}

/* ---- host ---------------------------------------------------------------------------- */

static void draw_host(struct canvas *c, const struct top_model *m, const struct top_ui *ui)
{
	const struct top_status *s = &m->status;
	int x = 0;

	canvas_attr(c, 0, ATTR_BAR);
	if (m->gone) {
		canvas_put(c, 0, 0, ATTR_BAR, "daemon gone, retrying: %s", m->why);
		return;
	}
	if (!m->seen) {
		canvas_put(c, 0, 0, ATTR_BAR, "asking the daemon ...");
		return;
	}
	x = canvas_put(c, 0, x, ATTR_BAR, "kvtierd %s up %s", s->version, fmt_age(s->uptime_ns / 1000000000u));
	/* What is out of the ordinary stands first: a narrow screen cuts the end. */
	x = canvas_put(c, 0, x, ATTR_BAR, "%s%s%s%s", s->frozen ? " FROZEN" : "",
		       s->draining ? " DRAINING" : "", ui->paused ? " PAUSED" : "",
		       strcmp(s->mode, "observe") ? "" : " OBSERVE");
	if (s->own)
		x = canvas_put(c, 0, x, ATTR_BAR, ", tenant %s", s->tenant);
	else
		x = canvas_put(c, 0, x, ATTR_BAR, ", clients %s", fmt_count(s->clients));
	canvas_put(c, 0, x, ATTR_BAR, ", seqs %s, orphans %s, policy %s", fmt_count(s->seqs),
		   fmt_count(s->orphans), s->policy);
}

static void draw_latencies(struct canvas *c, const struct top_status *s)
{
	static const char *const waits[TOP_WAITS] = {"read", "write", "uring", "reclaim", "fault", "sched"};
	int x = canvas_put(c, 2, 0, ATTR_NONE, "p99");

	for (unsigned i = 0; i < s->tiers; i++)
		if (s->tier[i].sized)
			x = canvas_put(c, 2, x, ATTR_NONE, "  %s r %s w %s", s->tier[i].name,
				       fmt_ns(s->tier[i].read_p99), fmt_ns(s->tier[i].write_p99));
	canvas_put(c, 2, x, ATTR_NONE, "  loop max %s", fmt_ns(s->loop_max));
	if (!s->probed)
		return;
	if (!s->probes_on) {
		canvas_put(c, 3, 0, ATTR_NONE, "kernel probes off: %s", s->probes_off);
		return;
	}
	x = canvas_put(c, 3, 0, ATTR_NONE, "kernel p99");
	for (unsigned i = 0; i < TOP_WAITS; i++)
		x = canvas_put(c, 3, x, ATTR_NONE, "  %s %s", waits[i], fmt_ns(s->wait_p99[i]));
}

static void draw_plans(struct canvas *c, const struct top_status *s)
{
	int x = canvas_put(c, 1, 0, ATTR_NONE, "plans %s/s", per_s(s->plans_s));

	if (!s->own && c->w >= 100)
		x = canvas_put(c, 1, x, ATTR_NONE, " p50 %s", fmt_ns(s->plan_p50));
	if (!s->own)
		x = canvas_put(c, 1, x, ATTR_NONE, " p99 %s last %s max %s  refaults %s/s", fmt_ns(s->plan_p99),
			       fmt_ns(s->plan_last), fmt_ns(s->plan_max), per_s(s->refaults_s));
	canvas_put(c, 1, x, ATTR_NONE, " drops %s/s miss %s/s", per_s(s->dropped_s), per_s(s->misses_s));
}

/* ---- tiers and tenants ------------------------------------------------------------------ */

static const char *marks(const struct top_tier *t)
{
	static char b[64];

	snprintf(b, sizeof(b), "%g/%g/%g", (double)t->mark[0] / 10, (double)t->mark[1] / 10,
		 (double)t->mark[2] / 10);
	return b;
}

static void draw_tiers(struct canvas *c, int y, const struct top_status *s)
{
	bool wide = c->w >= 100 && !s->own;

	canvas_attr(c, y, ATTR_BOLD);
	canvas_put(c, y, 0, ATTR_BOLD, s->own ? "%-6s %5s %8s" : "%-6s %5s %8s %8s %5s %8s %6s %8s %6s %8s%s",
		   "TIER", "ROWS", s->own ? "BYTES" : "USED", "SIZE", "FREE%", "MARKS%", "IN/s", "INTO/s",
		   "OUT/s", "FROM/s", wide ? "  REFLT/s   READ50  WRITE50" : "");
	for (unsigned i = 0; i < s->tiers; i++) {
		const struct top_tier *t = &s->tier[i];
		int x = canvas_put(c, ++y, 0, ATTR_NONE, "%-6s %5s %8s", t->name, fmt_count(t->rows),
				   fmt_bytes(t->sized ? t->used : t->bytes));

		if (s->own)
			continue;
		if (t->sized)
			x = canvas_put(c, y, x, ATTR_NONE, " %8s %5.1f %8s",
				       t->offline ? "OFFLINE" : fmt_bytes(t->capacity),
				       t->capacity ? 100.0 * (double)t->free / (double)t->capacity : 0,
				       marks(t));
		else
			x = canvas_put(c, y, x, ATTR_NONE, " %8s %5s %8s", "-", "-", "-");
		x = canvas_put(c, y, x, ATTR_NONE, " %6s %8s %6s %8s", per_s(t->demoted_s),
			       fmt_bytes((uint64_t)t->write_s), per_s(t->promoted_s),
			       fmt_bytes((uint64_t)t->read_s));
		if (wide)
			canvas_put(c, y, x, ATTR_NONE, "  %7s %8s %8s", per_s(t->refaults_s),
				   fmt_ns(t->read_p50), fmt_ns(t->write_p50));
	}
}

/* How much of its limit a tenant has; "-": it has none. */
static const char *share(const struct top_tenant *t, unsigned tier)
{
	static char b[2][16];

	if (!t->most[tier] || t->most[tier] >= (uint64_t)INT64_MAX)
		return "-";
	snprintf(b[tier % 2], sizeof(b[0]), "%.0f",
		 100.0 * (double)t->tier_bytes[tier] / (double)t->most[tier]);
	return b[tier % 2];
}

static void draw_tenants(struct canvas *c, const struct top_layout *l, const struct top_model *m)
{
	int y = l->tenants, more = (int)m->tenants - l->tenant_lines, x;
	bool wide = c->w >= 100;

	canvas_attr(c, y, ATTR_BOLD);
	x = canvas_put(c, y, 0, ATTR_BOLD, "%-16s %5s %5s %8s %8s %8s %8s %5s %5s%s", "TENANT", "SEQS", "ROWS",
		       "REGIONS", "DEVICE", "DRAM", "NVME", "DROP", "REFLT", wide ? " DRAM% NVME%" : "");
	if (more > 0)
		canvas_put(c, y, x, ATTR_BOLD, "  and %d%s more", more, m->tenants_cut ? "+" : "");
	for (int i = 0; i < l->tenant_lines; i++) {
		const struct top_tenant *t = &m->tenant[i];

		x = canvas_put(c, ++y, 0, ATTR_NONE, "%-16.16s %5s %5s %8s %8s %8s %8s %5s %5s", t->name,
			       fmt_count(t->seqs), fmt_count(t->rows), fmt_bytes(t->region_bytes),
			       fmt_bytes(t->tier_bytes[0]), fmt_bytes(t->tier_bytes[1]),
			       fmt_bytes(t->tier_bytes[2]), fmt_count(t->dropped), fmt_count(t->refaults));
		if (wide)
			canvas_put(c, y, x, ATTR_NONE, " %5s %5s", share(t, 1), share(t, 2));
	}
}

/* ---- stream and the last line ------------------------------------------------------------- */

static void draw_feed(struct canvas *c, const struct top_layout *l, const struct top_model *m)
{
	uint64_t n = MIN(MIN(m->events, (uint64_t)TOP_EVENTS), (uint64_t)l->feed_lines);
	int x;

	if (!l->feed_lines)
		return;
	canvas_attr(c, l->feed, ATTR_BOLD);
	x = canvas_put(c, l->feed, 0, ATTR_BOLD, "DECISIONS");
	if (m->lost)
		canvas_put(c, l->feed, x, ATTR_BOLD, " (%s went by unseen)", fmt_count(m->lost));
	for (uint64_t i = 0; i < n; i++) {
		char line[160];

		event_text(&m->event[(m->events - n + i) % TOP_EVENTS], line, sizeof(line));
		canvas_put(c, l->feed + 1 + (int)i, 0, ATTR_NONE, "%s", line);
	}
}

static void draw_foot(struct canvas *c, int y, const struct top_ui *ui)
{
	canvas_attr(c, y, ATTR_BAR);
	switch (ui->mode) {
	case MODE_FILTER:
		canvas_put(c, y, 0, ATTR_BAR, "filter (key, tenant, model, client): %s_", ui->input);
		break;
	case MODE_INTERVAL:
		canvas_put(c, y, 0, ATTR_BAR, "seconds between two looks (0.1 to 3600): %s_", ui->input);
		break;
	case MODE_ARGS:
		canvas_put(c, y, 0, ATTR_BAR, "%s %s, %s: %s_", ui->verb, ui->target,
			   strcmp(ui->verb, "demote") ? "POS ROWS" : "device rows a lane to keep (0)",
			   ui->input);
		break;
	case MODE_CONFIRM:
		canvas_put(c, y, 0, ATTR_BAR, "%s %s%s%s%s%s? y/n%s", ui->verb, ui->target,
			   ui->args > 0 ? " " : "", ui->args > 0 ? ui->arg[0] : "", ui->args > 1 ? " " : "",
			   ui->args > 1 ? ui->arg[1] : "",
			   strcmp(ui->verb, "drop") ? "" : "  Its rows are freed, this cannot be undone.");
		break;
	default:
		if (*ui->said)
			canvas_put(c, y, 0, ATTR_BAR, "%s", ui->said);
		else
			canvas_put(c, y, 0, ATTR_BAR,
				   "s sort / filter p pin d demote P promote D drop space pause h help q quit");
	}
}

static void draw_help(struct canvas *c)
{
	static const char *const lines[] = {
		"Up Down PgUp PgDn Home End   choose a sequence (also k j g G)",
		"s S   sort by the next column, the one before     r   turn the order round",
		"/     show only sequences whose key, tenant, model or client holds a text;",
		"      Return keeps it, Esc undoes it, an empty text shows all",
		"p u   pin or unpin rows of the chosen sequence: asks for POS ROWS",
		"d     demote it: asks how many device rows a lane stay",
		"P     promote it        D     drop it",
		"      Each of these asks once more; anything but y changes nothing.",
		"space pause or go on    i     seconds between two looks     q     quit",
		"",
		"IN and INTO: rows and bytes a second written to a tier; OUT and FROM: rows",
		"promoted, bytes read from it. MARKS%: free space at which it is made free,",
		"min/low/high. BUDGT: device rows a lane. REFLT: rows that came back.",
	};

	for (unsigned i = 0; i < ARRAY_SIZE(lines); i++)
		canvas_put(c, (int)i + 1, 1, ATTR_NONE, "%s", lines[i]);
	canvas_attr(c, 0, ATTR_BAR);
	canvas_put(c, 0, 0, ATTR_BAR, "kvtierctl top: keys");
	canvas_attr(c, c->h - 1, ATTR_BAR);
	canvas_put(c, c->h - 1, 0, ATTR_BAR, "any key goes back");
}

void top_draw(struct canvas *c, const struct top_model *m, struct top_ui *ui)
{
	const struct top_status *s = &m->status;
	struct top_layout l = top_layout(c->h, s->own, s->tiers, m->tenants, m->feeding || m->events);

	if (c->w < TOP_MIN_W || c->h < TOP_MIN_H) {
		canvas_put(c, 0, 0, ATTR_NONE, "needs %dx%d, is %dx%d", TOP_MIN_W, TOP_MIN_H, c->w, c->h);
		return;
	}
	if (ui->mode == MODE_HELP) {
		draw_help(c);
		return;
	}
	draw_host(c, m, ui);
	if (m->seen) {
		draw_plans(c, s);
		if (!s->own)
			draw_latencies(c, s);
		draw_tiers(c, l.tiers, s);
		draw_tenants(c, &l, m);
		top_draw_seqs(c, &l, m, ui);
		draw_feed(c, &l, m);
	}
	draw_foot(c, l.foot, ui);
}
