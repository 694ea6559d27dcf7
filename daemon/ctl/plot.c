/* SPDX-License-Identifier: MIT */
/* kvtierctl plot: a sequence's map as a picture, in a file or in the terminal. */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>
#include "daemon/ctl/plot.h"
#include "shm/util.h"

#define FILE_WIDTH 1200u
#define TEXT_LINES 24u
#define POLICY_ROWS 4096u

/* ---- a sequence ------------------------------------------------------------------------- */

struct collect {
	struct plot *p;
	uint32_t columns, bands, first,
		selected; /* first: lane that was asked for; selected: 1 or all after it */
	uint32_t at;      /* of the lane, counted from the first */
	const struct map_info *info;
	struct map_column *col;
	uint64_t least[MAP_TIERS], most[MAP_TIERS]; /* budgets */
	int error;
};

static void on_begin(void *arg, const struct map_info *info)
{
	struct collect *k = arg;

	k->error = plot_size(k->p, info->rows, k->columns, MIN(k->selected, info->lanes - k->first), k->bands);
	k->info = info;
	for (unsigned t = 0; t < MAP_TIERS; t++) {
		k->least[t] = UINT64_MAX;
		k->most[t] = 0;
	}
}

static void on_lane(void *arg, const struct map_lane *l)
{
	struct collect *k = arg;
	char *label;

	if (k->error)
		return;
	k->at = l->lane - k->first;
	label = k->p->label[(uint64_t)k->at * k->p->bands / k->p->lanes];
	if (!*label && l->placed)
		snprintf(label, PLOT_LABEL, "%u.%u", l->layer, l->head);
	else if (!*label)
		snprintf(label, PLOT_LABEL, "%u", l->lane);
	k->p->lane_axis = l->placed ? "L.head" : "lane";
	for (unsigned t = 0; t < MAP_TIERS; t++) {
		k->least[t] = MIN(k->least[t], l->budget[t]);
		k->most[t] = MAX(k->most[t], l->budget[t]);
	}
}

static void on_run(void *arg, uint32_t from, uint32_t rows, unsigned code)
{
	struct collect *k = arg;
	enum plot_class class = code & MAP_MOVING                         ? CLASS_MOVING
				: code & MAP_DEVICE && code & ~MAP_DEVICE ? CLASS_DEVICE_COPY
				: code & MAP_DEVICE                       ? CLASS_DEVICE
				: code == MAP_DRAM                        ? CLASS_DRAM
				: code & MAP_DRAM                         ? CLASS_DRAM_COPY
				: code & MAP_NVME                         ? CLASS_NVME
									  : CLASS_DROPPED;

	if (!k->error)
		plot_add_run(k->p, k->at, from, rows, class);
}

/* Of a sequence with fewer rows than columns each row has a column of its own, with others between. */
static void on_end(void *arg, const struct map_column *col)
{
	struct collect *k = arg;

	if (k->error)
		return;
	for (uint32_t i = 0; i < k->p->cols; i++)
		k->col[i] = col[k->p->cols < k->columns ? (uint64_t)i * k->columns / MAX(k->p->rows, 1u) : i];
	k->error = plot_add_scores(k->p, &k->p->panel[1], k->at, k->col);
}

static void budget_text(char *buf, size_t size, const struct collect *k)
{
	static const char *const tiers[MAP_TIERS] = {"device", "dram", "nvme"};
	size_t n = 0;

	for (unsigned t = 0; t < MAP_TIERS && n < size; t++) {
		char most[24] = "all";

		if (k->most[t] != UINT64_MAX)
			snprintf(most, sizeof(most), "%llu", (unsigned long long)k->most[t]);
		n += (size_t)snprintf(buf + n, size - n, t ? ", %s " : "%s ", tiers[t]);
		if (n < size && k->least[t] != k->most[t])
			n += (size_t)snprintf(buf + n, size - n, "%llu to ", (unsigned long long)k->least[t]);
		if (n < size)
			n += (size_t)snprintf(buf + n, size - n, "%s", most);
	}
}

static int collect_seq(struct ctl *c, const char *seq, uint32_t columns, uint32_t bands, struct plot *p)
{
	struct collect k = {.p = p, .columns = columns, .bands = bands, .selected = 1};
	const struct map_sink sink = {&k, on_begin, on_lane, on_run, on_end};
	char budgets[120];
	struct map_info info;
	int r;

	if (c->plot.lane)
		k.first = (uint32_t)strtoul(c->plot.lane, NULL, 10);
	if (!c->plot.lane || c->plot.lane[strlen(c->plot.lane) - (*c->plot.lane != 0)] == '+')
		k.selected = UINT32_MAX;
	p->panel[1].scores = true;
	p->panel[0].axis = p->panel[1].axis = "position in the sequence, rows";
	snprintf(p->panel[0].title, sizeof(p->panel[0].title), "where rows are");
	snprintf(p->panel[1].title, sizeof(p->panel[1].title), "what rows are worth");
	k.col = calloc(columns, sizeof(*k.col));
	if (!k.col)
		return ctl_fail(CTL_USAGE, "out of memory");
	r = map_read(c, seq, c->plot.lane, columns, &info, &sink);
	free(k.col);
	if (r)
		return r;
	if (k.error)
		return ctl_fail(CTL_USAGE, "%s", strerror(-k.error));
	if (!info.rows)
		return ctl_fail(CTL_USAGE, "sequence %s has no rows yet", info.handle);
	budget_text(budgets, sizeof(budgets), &k);
	snprintf(p->title[0], sizeof(p->title[0]), "sequence %s: %u rows in %u of %u lanes, policy %s%s",
		 info.handle, info.rows, p->lanes, info.lanes, info.policy,
		 info.changed ? "; changed while it was read" : "");
	snprintf(p->title[1], sizeof(p->title[1]), "last plan: of %u rows, budgets a lane %s", info.watermark,
		 budgets);
	return CTL_OK;
}

/* ---- where it goes ------------------------------------------------------------------------ */

static bool ends_with(const char *s, const char *end)
{
	size_t n = strlen(s), k = strlen(end);

	return n > k && !strcmp(s + n - k, end);
}

/* Through a temporary file beside it, so that nobody ever reads half a picture. */
static int write_file(const struct plot *p, const char *path, uint32_t width)
{
	_cleanup_free_ char *temporary = NULL;
	mode_t mask = umask(0);
	FILE *f = NULL;
	int fd, r;

	umask(mask);
	if (asprintf(&temporary, "%s.XXXXXX", path) < 0)
		return ctl_fail(CTL_USAGE, "out of memory");
	fd = mkostemp(temporary, O_CLOEXEC);
	if (fd < 0)
		return ctl_fail(CTL_USAGE, "--out: %s: %s", path, strerror(errno));
	r = fchmod(fd, 0666 & ~mask) < 0 ? -errno : 0;
	f = r ? NULL : fdopen(fd, "w");
	if (!f)
		close(fd);
	else
		r = ends_with(path, ".svg") ? plot_svg(p, width, f) : plot_png(p, width, f);
	if (f && fflush(f) && !r)
		r = -errno;
	if (f && !r && fsync(fd) < 0 && errno != EINVAL)
		r = -errno;
	if (f && fclose(f) && !r)
		r = -errno;
	if (!r && rename(temporary, path) < 0)
		r = -errno;
	if (!r)
		return CTL_OK;
	unlink(temporary);
	return ctl_fail(CTL_USAGE, "--out: %s: %s", path, strerror(-r));
}

static enum plot_colour colour_of_terminal(void)
{
	const char *none = getenv("NO_COLOR"), *term = getenv("TERM"), *depth = getenv("COLORTERM");

	if (!isatty(STDOUT_FILENO) || (none && *none) || !term || !strcmp(term, "dumb"))
		return COLOUR_NONE;
	if (depth && (!strcmp(depth, "truecolor") || !strcmp(depth, "24bit")))
		return COLOUR_TRUE;
	return COLOUR_256;
}

static uint32_t terminal_width(void)
{
	const char *columns = getenv("COLUMNS");
	struct winsize size;

	if (columns && atoi(columns) > 0)
		return MAX(40u, MIN((uint32_t)atoi(columns), 500u));
	if (!ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) && size.ws_col >= 40)
		return MIN(size.ws_col, 500u);
	return 80;
}

int ctl_plot(struct ctl *c, unsigned argc, const char *const argv[])
{
	const char *out = c->plot.out;
	uint32_t width = c->plot.width, cols, bands = out ? PLOT_BANDS : 2 * TEXT_LINES;
	struct plot p = {};
	int r;

	if (!!c->plot.policy == (argc > 1))
		return ctl_fail(CTL_USAGE, "usage: kvtierctl plot SEQ, or kvtierctl plot --policy NAME");
	if (out && !ends_with(out, ".png") && !ends_with(out, ".svg"))
		return ctl_fail(CTL_USAGE, "--out: \"%s\", must end in .png or .svg", out);
	if (out && width && (width < 320 || width > 4096))
		return ctl_fail(CTL_USAGE, "--width: %u, must be from 320 to 4096 for a file", width);
	if (!out && width && (width < 40 || width > 500))
		return ctl_fail(CTL_USAGE, "--width: %u, must be from 40 to 500 for a terminal", width);
	if (!width)
		width = out ? FILE_WIDTH : terminal_width();
	cols = out ? plot_panel_width(width) : width - PLOT_TEXT_MARGIN;
	if (c->plot.policy)
		r = plot_policy(c, c->plot.policy, c->plot.rows ?: POLICY_ROWS, cols, bands, &p);
	else
		r = collect_seq(c, argv[1], cols, bands, &p);
	if (!r && out)
		r = write_file(&p, out, width);
	else if (!r && plot_text(&p, width, TEXT_LINES, colour_of_terminal(), stdout))
		r = ctl_fail(CTL_USAGE, "standard output: %s", strerror(errno));
	plot_free(&p);
	return r;
}
