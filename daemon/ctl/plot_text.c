/* SPDX-License-Identifier: MIT */
/* plot for a terminal: two pixels a character in colour, one without. */
#include <string.h>
#include "daemon/ctl/plot.h"
#include "shm/util.h"

/* Without colour: a letter for each class, and a ramp for levels. */
static const char letters[PLOT_CLASSES + 1] = "DdMmn.*", ramp[] = ".:-=+*#%@";

static char letter_of(unsigned ink)
{
	if (ink < PLOT_CLASSES)
		return letters[ink];
	if (ink >= INK_NONE)
		return ' ';
	return ramp[(ink - INK_LEVEL) * (sizeof(ramp) - 2) / (PLOT_LEVELS - 1)];
}

/* The nearest of the 6 x 6 x 6 colours of a terminal with 256. */
static unsigned cube(const uint8_t rgb[3])
{
	unsigned v = 0;

	for (int i = 0; i < 3; i++)
		v = v * 6 + (rgb[i] < 48 ? 0 : rgb[i] < 115 ? 1 : (rgb[i] - 35u) / 40);
	return 16 + v;
}

static void set_colour(FILE *f, enum plot_colour colour, int what, unsigned ink)
{
	uint8_t rgb[3];

	plot_rgb(ink, rgb);
	if (colour == COLOUR_TRUE)
		fprintf(f, "\033[%d;2;%u;%u;%um", what, rgb[0], rgb[1], rgb[2]);
	else
		fprintf(f, "\033[%d;5;%um", what, cube(rgb));
}

/* Upper halves of characters are the text's colour, lower ones the ground's. */
static void put_line(const struct plot *p, const struct plot_panel *q, uint32_t line, uint32_t w,
		     uint32_t lines, enum plot_colour colour, FILE *f)
{
	unsigned up = INKS, low = INKS;

	for (uint32_t x = 0; x < w; x++) {
		unsigned a, b;

		if (colour == COLOUR_NONE) {
			fputc(letter_of(plot_ink(p, q, x, line, w, lines)), f);
			continue;
		}
		a = plot_ink(p, q, x, 2 * line, w, 2 * lines);
		b = plot_ink(p, q, x, 2 * line + 1, w, 2 * lines);
		if (a != up)
			set_colour(f, colour, 38, a);
		if (b != low)
			set_colour(f, colour, 48, b);
		up = a;
		low = b;
		fputs("\u2580", f);
	}
	fputs(colour ? "\033[0m\n" : "\n", f);
}

static void put_swatch(unsigned ink, enum plot_colour colour, FILE *f)
{
	if (colour) {
		set_colour(f, colour, 38, ink);
		fputs("\u2588\033[0m", f);
	} else {
		fputc(letter_of(ink), f);
	}
}

static void put_legend(const struct plot_panel *q, uint32_t width, enum plot_colour colour, FILE *f)
{
	uint32_t at = 0;

	if (q->scores) {
		unsigned n = colour ? PLOT_LEVELS / 2 : sizeof(ramp) - 1;

		fputs("least ", f);
		for (unsigned i = 0; i < n; i++)
			put_swatch(INK_LEVEL + (i * (PLOT_LEVELS - 1) + n - 2) / (n - 1), colour, f);
		fputs(" most of its lane\n", f);
		if (q->least <= q->most)
			fprintf(f, "scores from %.3g to %.3g\n", q->least, q->most);
		return;
	}
	for (unsigned k = 0; k < PLOT_CLASSES; k++) {
		uint32_t n = 2 + (uint32_t)strlen(plot_class_names[k]);

		if (at && at + 2 + n > width) {
			fputc('\n', f);
			at = 0;
		}
		at += (uint32_t)fprintf(f, "%s", at ? "  " : "") + n;
		put_swatch(k, colour, f);
		fprintf(f, " %s", plot_class_names[k]);
	}
	fputc('\n', f);
}

static void put_axis(const struct plot *p, const struct plot_panel *q, uint32_t w, FILE *f)
{
	char line[512], label[24];
	uint32_t free_from = 0, v;

	memset(line, ' ', sizeof(line));
	for (unsigned i = 0; plot_tick(p, q, i, MAX(w / 10, 2u), &v); i++) {
		uint32_t at = (uint32_t)plot_place(p, q, v, w),
			 n = (uint32_t)snprintf(label, sizeof(label), "|%u", v);

		if (at < free_from || at + n > w)
			continue;
		memcpy(line + at, label, n);
		free_from = at + n + 1;
	}
	fprintf(f, "%*s%.*s\n", (int)PLOT_TEXT_MARGIN, "", (int)free_from, line);
	fprintf(f, "%*s%.*s\n", (int)PLOT_TEXT_MARGIN, "", (int)w, q->axis);
}

int plot_text(const struct plot *p, uint32_t width, uint32_t lines, enum plot_colour colour, FILE *f)
{
	uint32_t w = MIN(width, 500u) - PLOT_TEXT_MARGIN;

	lines = MIN(lines, p->bands);
	for (unsigned i = 0; i < ARRAY_SIZE(p->title); i++)
		if (p->title[i][0])
			fprintf(f, "%.*s\n", (int)width, p->title[i]);
	for (unsigned k = 0; k < ARRAY_SIZE(p->panel); k++) {
		const struct plot_panel *q = &p->panel[k];

		fprintf(f, "\n%.*s\n", (int)width, q->title);
		put_legend(q, width, colour, f);
		fprintf(f, "%*s\n", (int)PLOT_TEXT_MARGIN - 1, p->lane_axis);
		for (uint32_t y = 0; y < lines; y++) {
			fprintf(f, "%*.7s ", (int)PLOT_TEXT_MARGIN - 1,
				p->label[(uint64_t)y * p->bands / lines]);
			put_line(p, q, y, w, lines, colour, f);
		}
		put_axis(p, q, w, f);
	}
	return ferror(f) ? -EIO : 0;
}
