/* SPDX-License-Identifier: MIT */
/* plot as PNG: a page of inks, one byte a pixel, with the inks' colours as its palette. */
#include <errno.h>
#include <png.h>
#include <stdlib.h>
#include <string.h>
#include "daemon/ctl/plot.h"
#include "shm/util.h"

static void png_box(struct page *g, uint32_t x, uint32_t y, uint32_t w, uint32_t h, unsigned ink)
{
	uint8_t *pixel = g->to;

	for (uint32_t j = y; j < y + h && j < g->h; j++)
		for (uint32_t i = x; i < x + w && i < g->w; i++)
			pixel[(size_t)j * g->w + i] = (uint8_t)ink;
}

static void png_cells(struct page *g, uint32_t x, uint32_t y, uint32_t w, uint32_t h, const uint8_t *ink)
{
	uint8_t *pixel = g->to;

	for (uint32_t j = 0; j < h; j++)
		memcpy(pixel + (size_t)(y + j) * g->w + x, ink + (size_t)j * w, w);
}

static void png_letters(struct page *g, uint32_t x, uint32_t y, enum plot_anchor a, const char *s)
{
	uint32_t width = (uint32_t)strlen(s) * PAGE_LETTER * g->scale, back = a == ANCHOR_END      ? width
									      : a == ANCHOR_MIDDLE ? width / 2
												   : 0;

	x = x > back ? x - back : 0;
	for (; *s; s++, x += PAGE_LETTER * g->scale)
		for (unsigned j = 0; j < 7; j++)
			for (unsigned i = 0; i < 5; i++)
				if (plot_glyph(*s, j) >> i & 1)
					png_box(g, x + i * g->scale, y + j * g->scale, g->scale, g->scale,
						INK_TEXT);
}

/* To where encode() began; errno says why, if a write failed. */
static void __attribute__((noreturn)) on_error(png_structp png, png_const_charp what)
{
	*(int *)png_get_error_ptr(png) = errno;
	png_longjmp(png, 1);
}

static void on_warning(png_structp png, png_const_charp what)
{
}

static int encode(const struct page *g, FILE *f)
{
	int cause = 0;
	png_structp png = png_create_write_struct(PNG_LIBPNG_VER_STRING, &cause, on_error, on_warning);
	png_infop info = png ? png_create_info_struct(png) : NULL;
	png_color palette[INKS];

	if (!info) {
		png_destroy_write_struct(&png, NULL);
		return -ENOMEM;
	}
	errno = 0;
	if (setjmp(png_jmpbuf(png))) { /* nothing of this function changed since */
		png_destroy_write_struct(&png, &info);
		return ferror(f) && cause ? -cause : -ENOMEM;
	}
	for (unsigned i = 0; i < INKS; i++) {
		uint8_t rgb[3];

		plot_rgb(i, rgb);
		palette[i] = (png_color){rgb[0], rgb[1], rgb[2]};
	}
	png_init_io(png, f);
	png_set_IHDR(png, info, g->w, g->h, 8, PNG_COLOR_TYPE_PALETTE, PNG_INTERLACE_NONE,
		     PNG_COMPRESSION_TYPE_DEFAULT, PNG_FILTER_TYPE_DEFAULT);
	png_set_PLTE(png, info, palette, INKS);
	png_write_info(png, info);
	for (uint32_t y = 0; y < g->h; y++)
		png_write_row(png, (png_const_bytep)g->to + (size_t)y * g->w);
	png_write_end(png, info);
	png_destroy_write_struct(&png, &info);
	return 0;
}

int plot_png(const struct plot *p, uint32_t width, FILE *f)
{
	struct page g = {.w = width, .scale = width < 1000 ? 1 : 2};
	_cleanup_free_ uint8_t *pixel = NULL;

	g.h = plot_draw(p, &g);
	pixel = malloc((size_t)g.w * g.h);
	if (!pixel)
		return -ENOMEM;
	memset(pixel, INK_PAPER, (size_t)g.w * g.h);
	g.to = pixel;
	g.box = png_box;
	g.cells = png_cells;
	g.text = png_letters;
	return plot_draw(p, &g) ? encode(&g, f) : -ENOMEM;
}
