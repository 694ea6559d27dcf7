/* SPDX-License-Identifier: MIT */
/* plot: the data of a picture, what ink a pixel gets, and axes. */
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "daemon/ctl/plot.h"
#include "shm/util.h"

const char *const plot_class_names[PLOT_CLASSES] = {
	"device", "device, copy below", "dram", "dram, copy on nvme", "nvme", "dropped", "on its way"};

static void free_panel(struct plot_panel *q)
{
	free(q->share);
	free(q->level);
	free(q->count);
	q->share = NULL;
	q->level = NULL;
	q->count = NULL;
}

void plot_free(struct plot *p)
{
	free_panel(&p->panel[0]);
	free_panel(&p->panel[1]);
	free(p->label);
	p->label = NULL;
}

int plot_size(struct plot *p, uint32_t rows, uint32_t cols, uint32_t lanes, uint32_t bands)
{
	size_t n;
	bool ok;

	plot_free(p);
	p->rows = rows;
	p->lanes = MAX(lanes, 1u);
	p->cols = MAX(MIN(cols, rows), 1u);
	p->bands = MAX(MIN(MIN(bands, p->lanes), PLOT_BANDS), 1u);
	n = (size_t)p->cols * p->bands;
	p->label = calloc(p->bands, sizeof(*p->label));
	ok = p->label;
	for (unsigned i = 0; i < ARRAY_SIZE(p->panel); i++) {
		struct plot_panel *q = &p->panel[i];

		q->least = INFINITY;
		q->most = -INFINITY;
		if (q->scores) {
			q->level = calloc(n, sizeof(*q->level));
			q->count = calloc(n, sizeof(*q->count));
			ok = ok && q->level && q->count;
		} else {
			q->share = calloc(n * PLOT_CLASSES, sizeof(*q->share));
			ok = ok && q->share;
		}
	}
	if (!ok)
		plot_free(p);
	return ok ? 0 : -ENOMEM;
}

static uint32_t band_of(const struct plot *p, uint32_t lane)
{
	return (uint32_t)((uint64_t)lane * p->bands / p->lanes);
}

void plot_add_run(struct plot *p, uint32_t i, uint32_t from, uint32_t n, enum plot_class class)
{
	uint32_t *share = p->panel[0].share + (size_t)band_of(p, i) * p->cols * PLOT_CLASSES;

	while (n) {
		uint64_t c = (uint64_t)from * p->cols / p->rows,
			 end = ((c + 1) * p->rows + p->cols - 1) / p->cols;
		uint32_t k = MIN(n, (uint32_t)(end - from));

		share[c * PLOT_CLASSES + class] += k;
		from += k;
		n -= k;
	}
}

static int by_double(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return x < y ? -1 : x > y;
}

/* How many of v, ascending, are below x. */
static size_t below(const double *v, size_t n, double x)
{
	size_t lo = 0;

	while (lo < n) {
		size_t mid = lo + (n - lo) / 2;

		if (v[mid] < x)
			lo = mid + 1;
		else
			n = mid;
	}
	return lo;
}

int plot_add_scores(struct plot *p, struct plot_panel *panel, uint32_t i, const struct map_column *col)
{
	size_t n = 0, at = (size_t)band_of(p, i) * p->cols;
	_cleanup_free_ double *v = malloc(p->cols * sizeof(*v));

	if (!v)
		return -ENOMEM;
	for (uint32_t c = 0; c < p->cols; c++)
		if (col[c].rows) {
			v[n++] = col[c].sum / (double)col[c].rows;
			panel->least = fmin(panel->least, col[c].min);
			panel->most = fmax(panel->most, col[c].max);
		}
	qsort(v, n, sizeof(*v), by_double);
	for (uint32_t c = 0; c < p->cols; c++) {
		double mean = col[c].sum / (double)col[c].rows;
		size_t lo, hi;

		if (!col[c].rows)
			continue;
		lo = below(v, n, mean);
		hi = below(v, n, nextafter(mean, INFINITY)); /* equals share the middle of their places */
		panel->level[at + c] += n > 1 ? (float)((double)(lo + hi - 1) / 2 / (double)(n - 1)) : 0.5f;
		panel->count[at + c]++;
	}
	return 0;
}

/* ---- inks ------------------------------------------------------------------------------ */

/*
 * A place in [0, 1) for each pixel of a cell that several inks share: down a band where it is high enough to
 * show shares, else spread so that neighbours differ (multiples of irrational steps).
 */
static double place_in_cell(uint32_t x, uint32_t y, uint32_t within, uint32_t height)
{
	double whole;

	if (height > 3)
		return ((double)within + 0.5) / height;
	return modf((double)x * 0.7548776662 + (double)y * 0.5698402910 + 0.25, &whole);
}

static unsigned class_ink(const struct plot_panel *q, size_t cell, double place)
{
	const uint32_t *share = q->share + cell * PLOT_CLASSES;
	uint64_t sum = 0, seen = 0;

	for (unsigned k = 0; k < PLOT_CLASSES; k++)
		sum += share[k];
	for (unsigned k = 0; k < PLOT_CLASSES; k++) {
		seen += share[k];
		if (share[k] && (double)seen > place * (double)sum)
			return k;
	}
	return INK_NONE;
}

unsigned plot_ink(const struct plot *p, const struct plot_panel *q, uint32_t x, uint32_t y, uint32_t w,
		  uint32_t h)
{
	uint32_t band = (uint32_t)((uint64_t)y * p->bands / h), col = (uint32_t)((uint64_t)x * p->cols / w);
	uint32_t top = (uint32_t)(((uint64_t)band * h + p->bands - 1) / p->bands),
		 end = (uint32_t)(((uint64_t)(band + 1) * h + p->bands - 1) / p->bands);
	size_t cell = (size_t)band * p->cols + col;

	if (!q->scores)
		return class_ink(q, cell, place_in_cell(x, y, y - top, end - top));
	if (!q->count[cell])
		return INK_NONE;
	return INK_LEVEL + (unsigned)lrintf(q->level[cell] / (float)q->count[cell] * (PLOT_LEVELS - 1));
}

void plot_rgb(unsigned ink, uint8_t ret[3])
{
	/* Okabe and Ito's colours for figures that everybody can read, and a grey. */
	static const uint8_t class[PLOT_CLASSES][3] = {{230, 159, 0},  {240, 228, 66}, {86, 180, 233},
						       {0, 158, 115},  {0, 114, 178},  {215, 215, 215},
						       {204, 121, 167}};
	static const uint8_t scale[3][3] = {{0, 32, 77}, {124, 123, 120}, {255, 234, 70}};
	static const uint8_t other[3][3] = {{250, 250, 250}, {255, 255, 255}, {0, 0, 0}};

	if (ink < PLOT_CLASSES) {
		memcpy(ret, class[ink], 3);
	} else if (ink >= INK_NONE) {
		memcpy(ret, other[ink - INK_NONE], 3);
	} else { /* dark blue over grey to yellow: one after the other lighter */
		double t = 2.0 * (ink - INK_LEVEL) / (PLOT_LEVELS - 1);
		const uint8_t *a = scale[t < 1 ? 0 : 1], *b = scale[t < 1 ? 1 : 2];

		t -= t < 1 ? 0 : 1;
		for (int i = 0; i < 3; i++)
			ret[i] = (uint8_t)lrint(a[i] + t * (b[i] - a[i]));
	}
}

/* ---- axes --------------------------------------------------------------------------------- */

bool plot_tick(const struct plot *p, const struct plot_panel *q, unsigned i, unsigned most, uint32_t *ret)
{
	uint64_t step = 1, v;

	if (q->log) {
		for (v = i ? 1 : 0; i > 1; i--)
			v *= 10;
		*ret = (uint32_t)v;
		return v < p->rows;
	}
	for (unsigned k = 0; p->rows / step >= most; k++) /* 1, 2, 5, 10, ... */
		step = k % 3 == 1 ? step / 2 * 5 : step * 2;
	v = i * step;
	*ret = (uint32_t)v;
	return v < MAX(p->rows, 1u);
}

double plot_place(const struct plot *p, const struct plot_panel *q, uint32_t value, double length)
{
	if (q->log)
		return p->rows > 1 ? log2(1 + (double)value) / log2((double)p->rows) * length : 0;
	return (double)value / MAX(p->rows, 1u) * length;
}
