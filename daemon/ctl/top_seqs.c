/* SPDX-License-Identifier: MIT */
/* top: the table of sequences: its columns, their order, what is filtered, what is chosen. */
#include <stdio.h>
#include <string.h>
#include "daemon/ctl/table.h"
#include "daemon/ctl/top.h"
#include "shm/util.h"

static const struct {
	const char *head;
	int width;
	bool left;
	int from;      /* shown on screens at least this wide */
	size_t offset; /* in struct top_seq: of a text (left) or of a uint64_t */
} columns[TOP_COLUMNS] = {
	[COL_HANDLE] = {"HANDLE", 18, true, 0, offsetof(struct top_seq, handle)},
	[COL_KEY] = {"KEY", 8, true, 100, offsetof(struct top_seq, key)},
	[COL_TENANT] = {"TENANT", 8, true, 100, offsetof(struct top_seq, tenant)},
	[COL_CLIENT] = {"CLIENT", 10, true, 80, offsetof(struct top_seq, client)},
	[COL_MODEL] = {"MODEL", 16, true, 140, offsetof(struct top_seq, model)},
	[COL_POLICY] = {"POLICY", 12, true, 140, offsetof(struct top_seq, policy)},
	[COL_ROWS] = {"ROWS", 5, false, 0, offsetof(struct top_seq, rows)},
	[COL_DEVICE] = {"DEV", 5, false, 0, offsetof(struct top_seq, tier_rows[0])},
	[COL_DRAM] = {"DRAM", 5, false, 0, offsetof(struct top_seq, tier_rows[1])},
	[COL_NVME] = {"NVME", 5, false, 0, offsetof(struct top_seq, tier_rows[2])},
	[COL_DROPPED] = {"DROP", 5, false, 100, offsetof(struct top_seq, dropped)},
	[COL_BUDGET] = {"BUDGT", 5, false, 80, offsetof(struct top_seq, budget)},
	[COL_PINNED] = {"PIN", 5, false, 120, offsetof(struct top_seq, pinned)},
	[COL_REFAULTS] = {"REFLT", 5, false, 0, offsetof(struct top_seq, refaults)},
	[COL_PLANS] = {"PLANS", 5, false, 80, offsetof(struct top_seq, plans)},
	[COL_STALL] = {"STALL", 7, false, 120, offsetof(struct top_seq, stall)},
	[COL_STATE] = {"STATE", 8, true, 80, offsetof(struct top_seq, state)},
};

const char *top_column_name(enum top_column c)
{
	return columns[c].head;
}

static const char *text_of(const struct top_seq *s, enum top_column c)
{
	return (const char *)s + columns[c].offset;
}

static uint64_t number_of(const struct top_seq *s, enum top_column c)
{
	uint64_t v;

	memcpy(&v, (const char *)s + columns[c].offset, sizeof(v));
	return v;
}

static bool passes(const struct top_seq *s, const char *filter)
{
	return !*filter || strcasestr(s->key, filter) || strcasestr(s->tenant, filter) ||
	       strcasestr(s->model, filter) || strcasestr(s->client, filter) || strcasestr(s->handle, filter);
}

struct sorting {
	const struct top_seq *seqs;
	const struct top_ui *ui;
};

static int compare(const void *a, const void *b, void *arg)
{
	const struct sorting *by = arg;
	const struct top_seq *x = &by->seqs[*(const uint32_t *)a], *y = &by->seqs[*(const uint32_t *)b];
	enum top_column c = by->ui->sort;
	int r;

	if (columns[c].left) {
		r = strcmp(text_of(x, c), text_of(y, c));
	} else {
		uint64_t u = number_of(x, c), v = number_of(y, c);

		r = u < v ? -1 : u > v;
	}
	if (by->ui->down)
		r = -r;
	return r ?: strcmp(x->handle, y->handle); /* so that equals stand still */
}

int top_order(const struct top_model *m, struct top_ui *ui)
{
	struct sorting by = {m->seqs, ui};
	uint32_t *order = realloc(ui->order, MAX(m->n_seqs, (size_t)1) * sizeof(*order));
	size_t i;

	if (!order)
		return -ENOMEM;
	ui->order = order;
	ui->shown = 0;
	for (i = 0; i < m->n_seqs; i++)
		if (passes(&m->seqs[i], ui->filter))
			order[ui->shown++] = (uint32_t)i;
	qsort_r(order, ui->shown, sizeof(*order), compare, &by);
	for (i = 0; i < ui->shown; i++)
		if (!strcmp(m->seqs[order[i]].handle, ui->selected))
			ui->at = i;
	if (ui->at >= ui->shown)
		ui->at = ui->shown ? ui->shown - 1 : 0;
	*ui->selected = 0;
	if (ui->shown)
		snprintf(ui->selected, sizeof(ui->selected), "%s", m->seqs[order[ui->at]].handle);
	return 0;
}

static void draw_cells(struct canvas *c, int y, const struct top_seq *s, const struct top_ui *ui,
		       enum top_attr a)
{
	int x = 0;

	for (unsigned k = 0; k < TOP_COLUMNS; k++) {
		int w = columns[k].width;
		const char *cell;

		if (c->w < columns[k].from || x + w > c->w)
			continue;
		if (!s)
			cell = columns[k].head;
		else if (columns[k].left)
			cell = text_of(s, k);
		else if (k == COL_BUDGET && s->budget == UINT64_MAX)
			cell = "all";
		else if (k == COL_STALL)
			cell = !s->stall ? "-" : fmt_ns(s->stall);
		else
			cell = fmt_count(number_of(s, k));
		canvas_put(c, y, x, !s && k == ui->sort ? ATTR_BAR : a, columns[k].left ? "%-*.*s" : "%*.*s", w,
			   w, cell);
		if (s && columns[k].left && (int)strlen(cell) > w && k != COL_KEY)
			canvas_put(c, y, x + w - 1, a, "~");
		x += w + 1;
	}
}

void top_draw_seqs(struct canvas *c, const struct top_layout *l, const struct top_model *m, struct top_ui *ui)
{
	size_t lines = (size_t)l->seq_lines;
	int x;

	canvas_attr(c, l->seqs, ATTR_BOLD);
	x = canvas_put(c, l->seqs, 0, ATTR_BOLD, "SEQUENCES %zu of %zu, by %s %s", ui->shown, m->n_seqs,
		       columns[ui->sort].head, ui->down ? "down" : "up");
	if (*ui->filter)
		x = canvas_put(c, l->seqs, x, ATTR_BOLD, ", filter \"%s\"", ui->filter);
	if (!m->generation)
		canvas_put(c, l->seqs, x, ATTR_BOLD, ", being listed: %zu", m->n_coming);
	canvas_attr(c, l->seqs + 1, ATTR_BOLD);
	draw_cells(c, l->seqs + 1, NULL, ui, ATTR_BOLD);
	ui->page = lines;
	if (ui->at < ui->first)
		ui->first = ui->at;
	if (lines && ui->at >= ui->first + lines)
		ui->first = ui->at - lines + 1;
	if (ui->first + lines > ui->shown)
		ui->first = ui->shown > lines ? ui->shown - lines : 0;
	for (size_t i = 0; i < lines && ui->first + i < ui->shown; i++) {
		enum top_attr a = ui->first + i == ui->at ? ATTR_SELECTED : ATTR_NONE;
		int y = l->seqs + 2 + (int)i;

		canvas_attr(c, y, a);
		draw_cells(c, y, &m->seqs[ui->order[ui->first + i]], ui, a);
	}
}
