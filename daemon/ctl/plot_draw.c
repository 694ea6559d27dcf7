/* SPDX-License-Identifier: MIT */
/* plot: where things stand on a page, whatever it is drawn on. */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "daemon/ctl/plot.h"
#include "shm/util.h"

#define LEFT 54u /* all of these times the page's scale */
#define RIGHT 30u
#define LINE 12u
#define MARGIN 6u
#define TICK 3u
#define PANEL_HEIGHT 200u
#define BAND_MOST 16u
#define SWATCH 8u

uint32_t plot_panel_width(uint32_t page_width)
{
	return page_width - (LEFT + RIGHT) * (page_width < 1000 ? 1 : 2);
}

static void box(struct page *g, uint32_t x, uint32_t y, uint32_t w, uint32_t h, unsigned ink)
{
	if (g->box)
		g->box(g, x, y, w, h, ink);
}

/* What does not fit is cut. */
static void text(struct page *g, uint32_t x, uint32_t y, enum plot_anchor a, const char *s)
{
	char cut[256];
	uint32_t room = a == ANCHOR_START ? (g->w - x) / (PAGE_LETTER * g->scale) : (uint32_t)sizeof(cut) - 1;

	snprintf(cut, sizeof(cut), "%.*s", (int)MIN(room, (uint32_t)sizeof(cut) - 1), s);
	if (g->text)
		g->text(g, x, y, a, cut);
}

/* Returns where the next thing goes. */
static uint32_t draw_legend(struct page *g, const struct plot_panel *q, uint32_t y)
{
	uint32_t s = g->scale, x = MARGIN * s;
	char line[100];

	if (q->scores) {
		text(g, x, y, ANCHOR_START, "least");
		x += 6 * PAGE_LETTER * s;
		for (unsigned i = 0; i < PLOT_LEVELS; i++, x += 4 * s)
			box(g, x, y, 4 * s, 7 * s, INK_LEVEL + i);
		snprintf(line, sizeof(line), "most of its lane");
		if (q->least <= q->most)
			snprintf(line, sizeof(line), "most of its lane; scores %.3g to %.3g", q->least,
				 q->most);
		text(g, x + PAGE_LETTER * s, y, ANCHOR_START, line);
		return y + LINE * s;
	}
	for (unsigned k = 0; k < PLOT_CLASSES; k++) {
		uint32_t n = (SWATCH + 3 + PAGE_LETTER * ((uint32_t)strlen(plot_class_names[k]) + 2)) * s;

		if (x > MARGIN * s && x + n > g->w) {
			x = MARGIN * s;
			y += LINE * s;
		}
		box(g, x, y, SWATCH * s, 7 * s, k);
		text(g, x + (SWATCH + 3) * s, y, ANCHOR_START, plot_class_names[k]);
		x += n;
	}
	return y + LINE * s;
}

static uint32_t draw_axis(struct page *g, const struct plot *p, const struct plot_panel *q, uint32_t y,
			  uint32_t w)
{
	uint32_t s = g->scale, v;
	char label[16];

	for (unsigned i = 0; plot_tick(p, q, i, MAX(w / (60 * s), 2u), &v); i++) {
		uint32_t x = LEFT * s + (uint32_t)plot_place(p, q, v, w);

		box(g, x, y, s, TICK * s, INK_TEXT);
		snprintf(label, sizeof(label), "%u", v);
		text(g, x, y + (TICK + 2) * s, ANCHOR_MIDDLE, label);
	}
	y += (TICK + 2 + LINE) * s;
	text(g, LEFT * s, y, ANCHOR_START, q->axis);
	return y + LINE * s;
}

/* Names of bands, as many as there is room for. */
static void draw_bands(struct page *g, const struct plot *p, uint32_t y, uint32_t h)
{
	uint32_t s = g->scale, free_from = y;

	for (uint32_t b = 0; b < p->bands; b++) {
		uint32_t top = y + b * (h / p->bands), mid = top + h / p->bands / 2;

		if (b && top < free_from)
			continue;
		text(g, (LEFT - 4) * s, MAX(mid, 3 * s) - 3 * s, ANCHOR_END, p->label[b]);
		free_from = top + 10 * s;
	}
}

static int draw_cells(struct page *g, const struct plot *p, const struct plot_panel *q, uint32_t x, uint32_t y,
		      uint32_t w, uint32_t h)
{
	_cleanup_free_ uint8_t *ink = malloc((size_t)w * h);

	if (!ink)
		return -ENOMEM;
	for (uint32_t j = 0; j < h; j++)
		for (uint32_t i = 0; i < w; i++)
			ink[(size_t)j * w + i] = (uint8_t)plot_ink(p, q, i, j, w, h);
	g->cells(g, x, y, w, h, ink);
	return 0;
}

uint32_t plot_draw(const struct plot *p, struct page *g)
{
	uint32_t s = g->scale, w = plot_panel_width(g->w), y = MARGIN * s;
	uint32_t band = MAX(1u, MIN(BAND_MOST, PANEL_HEIGHT / p->bands)) * s, h = band * p->bands;

	for (unsigned i = 0; i < ARRAY_SIZE(p->title); i++, y += LINE * s)
		text(g, MARGIN * s, y, ANCHOR_START, p->title[i]);
	for (unsigned k = 0; k < ARRAY_SIZE(p->panel); k++) {
		const struct plot_panel *q = &p->panel[k];

		y += LINE / 2 * s;
		text(g, MARGIN * s, y, ANCHOR_START, q->title);
		y = draw_legend(g, q, y + LINE * s);
		text(g, (LEFT - 4) * s, y, ANCHOR_END, p->lane_axis);
		y += LINE * s;
		box(g, LEFT * s - s, y - s, w + 2 * s, h + 2 * s, INK_TEXT);
		if (g->cells && draw_cells(g, p, q, LEFT * s, y, w, h))
			return 0;
		draw_bands(g, p, y, h);
		y = draw_axis(g, p, q, y + h + s, w);
	}
	return y + MARGIN * s;
}
