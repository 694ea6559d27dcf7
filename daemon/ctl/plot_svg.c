/* SPDX-License-Identifier: MIT */
/* plot as SVG: one path for each ink of a panel, made of the runs that have it. */
#include <errno.h>
#include <string.h>
#include "daemon/ctl/plot.h"
#include "shm/util.h"

static void put_fill(FILE *f, unsigned ink)
{
	uint8_t rgb[3];

	plot_rgb(ink, rgb);
	fprintf(f, "fill=\"#%02x%02x%02x\"", rgb[0], rgb[1], rgb[2]);
}

static void svg_box(struct page *g, uint32_t x, uint32_t y, uint32_t w, uint32_t h, unsigned ink)
{
	fprintf(g->to, "<rect x=\"%u\" y=\"%u\" width=\"%u\" height=\"%u\" ", x, y, w, h);
	put_fill(g->to, ink);
	fputs("/>\n", g->to);
}

static void svg_cells(struct page *g, uint32_t x, uint32_t y, uint32_t w, uint32_t h, const uint8_t *ink)
{
	bool used[INKS] = {};

	for (size_t i = 0; i < (size_t)w * h; i++)
		used[ink[i]] = true;
	for (unsigned k = 0; k < INKS; k++) {
		if (!used[k])
			continue;
		fputs("<path ", g->to);
		put_fill(g->to, k);
		fputs(" d=\"", g->to);
		for (uint32_t j = 0; j < h; j++)
			for (uint32_t i = 0, n; i < w; i += n) {
				const uint8_t *v = ink + (size_t)j * w + i;

				for (n = 1; i + n < w && v[n] == *v; n++)
					;
				if (*v == k)
					fprintf(g->to, "M%u %uh%uv1h-%uz", x + i, y + j, n, n);
			}
		fputs("\"/>\n", g->to);
	}
}

static void svg_text(struct page *g, uint32_t x, uint32_t y, enum plot_anchor a, const char *s)
{
	static const char *const anchors[] = {"start", "middle", "end"};

	fprintf(g->to, "<text x=\"%u\" y=\"%u\" text-anchor=\"%s\">", x, y + 8 * g->scale, anchors[a]);
	for (; *s; s++)
		if (*s == '<' || *s == '>' || *s == '&')
			fprintf(g->to, "&#%d;", *s);
		else
			fputc(*s < ' ' || *s > '~' ? '?' : *s, g->to);
	fputs("</text>\n", g->to);
}

int plot_svg(const struct plot *p, uint32_t width, FILE *f)
{
	struct page g = {.w = width, .scale = width < 1000 ? 1 : 2, .to = f};

	g.h = plot_draw(p, &g);
	errno = 0;
	fprintf(f,
		"<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n"
		"<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%u\" height=\"%u\" viewBox=\"0 0 %u %u\" "
		"font-family=\"monospace\" font-size=\"%u\" shape-rendering=\"crispEdges\">\n",
		g.w, g.h, g.w, g.h, 10 * g.scale);
	g.box = svg_box;
	g.cells = svg_cells;
	g.text = svg_text;
	svg_box(&g, 0, 0, g.w, g.h, INK_PAPER);
	if (!plot_draw(p, &g))
		return -ENOMEM;
	fputs("</svg>\n", f);
	return ferror(f) ? -(errno ?: EIO) : 0;
}
