/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * kvtierctl plot: data, then a picture of it. The data are cells: columns along the rows of a sequence, bands
 * of one lane each, or of several where there are many. A picture is a page of inks with one layout for PNG and
 * SVG, or lines of characters for a terminal.
 */
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include "daemon/ctl/ctl.h"
#include "daemon/ctl/map.h"

#define PLOT_BANDS 512u
#define PLOT_LABEL 24u

/* Where a row is. In this order from the top of a band down. */
enum plot_class {
	CLASS_DEVICE,
	CLASS_DEVICE_COPY, /* and in a tier below */
	CLASS_DRAM,
	CLASS_DRAM_COPY, /* and on nvme */
	CLASS_NVME,
	CLASS_DROPPED,
	CLASS_MOVING,
	PLOT_CLASSES
};

#define PLOT_LEVELS 32u

/* What a pixel may be: a class, a level from the least to the most, or: */
enum { INK_LEVEL = PLOT_CLASSES, INK_NONE = INK_LEVEL + PLOT_LEVELS, INK_PAPER, INK_TEXT, INKS };

struct plot_panel {
	char title[100];
	const char *axis;   /* what its x axis counts, with the unit */
	bool scores, log;   /* else tiers; columns lie at log2(1 + distance) */
	uint32_t *share;    /* tiers: [bands][cols][PLOT_CLASSES] rows */
	float *level;       /* scores: [bands][cols] sum over lanes of the rank in its lane, 0 to 1 */
	uint32_t *count;    /* [bands][cols] lanes that level is the sum of */
	double least, most; /* scores that were seen; least > most: none */
};

struct plot {
	char title[2][200];
	const char *lane_axis;
	uint32_t rows, cols, bands, lanes;
	char (*label)[PLOT_LABEL]; /* [bands] */
	struct plot_panel panel[2];
};

/* ---- plot_data.c: filling it ------------------------------------------------------------ */

/* 0 or -ENOMEM; what it held is freed. */
int plot_size(struct plot *p, uint32_t rows, uint32_t cols, uint32_t lanes, uint32_t bands);
void plot_free(struct plot *p);
/* Rows [from, from + n) of the i-th lane are of this class. */
void plot_add_run(struct plot *p, uint32_t i, uint32_t from, uint32_t n, enum plot_class class);
/* Scores of the i-th lane, [p->cols]: each column's mean, ranked among the lane's. 0 or -ENOMEM. */
int plot_add_scores(struct plot *p, struct plot_panel *panel, uint32_t i, const struct map_column *col);
/* The ink at x, y of a panel drawn w wide and h high. Where several rows or lanes meet in a cell, inks share
 * it. */
unsigned plot_ink(const struct plot *p, const struct plot_panel *panel, uint32_t x, uint32_t y, uint32_t w,
		  uint32_t h);
extern const char *const plot_class_names[PLOT_CLASSES];
/* Red, green and blue. Colours that differ for every kind of colour blindness, in lightness as well. */
void plot_rgb(unsigned ink, uint8_t ret[3]);
/* Marks of an axis: the i-th one's value, false: no more. Values rise; most: that many at most. */
bool plot_tick(const struct plot *p, const struct plot_panel *panel, unsigned i, unsigned most, uint32_t *ret);
/* Where on an axis of this length a value lies. */
double plot_place(const struct plot *p, const struct plot_panel *panel, uint32_t value, double length);

/* ---- plot_policy.c ------------------------------------------------------------------------ */

/* What a policy gives rows that say nothing, by position and by distance to the end of `rows` rows. */
int plot_policy(struct ctl *c, const char *name, uint32_t rows, uint32_t cols, uint32_t bands, struct plot *p);

/* ---- pages -------------------------------------------------------------------------------- */

enum plot_anchor { ANCHOR_START, ANCHOR_MIDDLE, ANCHOR_END };

/* What a layout is drawn on. Coordinates in pixels from the top left; text by the top of its letters. */
struct page {
	uint32_t w, h, scale;
	void (*box)(struct page *g, uint32_t x, uint32_t y, uint32_t w, uint32_t h, unsigned ink);
	void (*cells)(struct page *g, uint32_t x, uint32_t y, uint32_t w, uint32_t h, const uint8_t *ink);
	void (*text)(struct page *g, uint32_t x, uint32_t y, enum plot_anchor a, const char *s);
	void *to;
};
#define PAGE_LETTER 6u /* pixels from one letter to the next, times scale */

uint32_t plot_panel_width(uint32_t page_width);
/* Draw; returns the height that it takes. With g->box NULL only that. 0: out of memory. */
uint32_t plot_draw(const struct plot *p, struct page *g);
/* Write a page of this width. 0 or -errno. */
int plot_png(const struct plot *p, uint32_t width, FILE *f);
int plot_svg(const struct plot *p, uint32_t width, FILE *f);

enum plot_colour { COLOUR_NONE, COLOUR_256, COLOUR_TRUE };
/* Lines of characters; lines: of the tallest panel. */
int plot_text(const struct plot *p, uint32_t width, uint32_t lines, enum plot_colour colour, FILE *f);
#define PLOT_TEXT_MARGIN 8u /* columns of text left of a panel */

/* A letter's pixels: bit x of row y, 5 x 7; what is not printable ASCII is a question mark. */
uint8_t plot_glyph(char c, unsigned y);
