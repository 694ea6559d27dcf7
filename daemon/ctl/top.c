/* SPDX-License-Identifier: MIT */
/* kvtierctl top: the terminal, and the loop that feeds it. */
#include <curses.h>
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <term.h>
#undef lines /* of term.h */
#undef columns
#include "daemon/ctl/top.h"
#include "shm/util.h"

#define TICK_NS 100000000u /* events are shown, and a signal heeded, after at most this */
#define LIVE_TIMEOUT_MS 1000u

static volatile sig_atomic_t ended;

static void on_signal(int sig)
{
	ended = sig;
}

/* ---- once ------------------------------------------------------------------------------- */

static void print_canvas(const struct canvas *c, int until)
{
	for (int y = 0; y < until; y++) {
		const char *line = c->text + (size_t)y * (size_t)c->w;
		int n = c->w;

		while (n && line[n - 1] == ' ')
			n--;
		printf("%.*s\n", n, line);
	}
}

/* A frame as high as it takes to show every sequence, without the line of keys. */
static int print_frame(struct top_model *m, struct top_ui *ui)
{
	struct top_layout l = top_layout(24, m->status.own, m->status.tiers, m->tenants, m->feeding);
	size_t h = (size_t)l.seqs + ui->shown + m->tenants + 16;
	const char *width = getenv("COLUMNS");
	int w = width ? atoi(width) : 80;
	struct canvas c = {};

	h += h / 4 + h / 6; /* what the layout gives to stream and tenants */
	if (h > 1000000 || canvas_size(&c, MIN(MAX(w, 80), 500), (int)h))
		return ctl_fail(CTL_UNREACHABLE, "out of memory");
	top_draw(&c, m, ui);
	l = top_layout((int)h, m->status.own, m->status.tiers, m->tenants, m->feeding);
	print_canvas(&c, l.seqs + 2 + (int)MIN(ui->shown, (size_t)l.seq_lines));
	if (l.feed_lines) {
		int n = (int)MIN(m->events, (uint64_t)MIN(l.feed_lines, TOP_EVENTS));
		struct canvas stream = {.w = c.w, .h = n + 1, .text = c.text + (size_t)l.feed * (size_t)c.w};

		print_canvas(&stream, n + 1);
	}
	canvas_free(&c);
	return CTL_OK;
}

static int top_once(struct top_model *m, struct top_ui *ui)
{
	int r = top_model_once(m);

	if (!r && top_order(m, ui))
		r = ctl_fail(CTL_UNREACHABLE, "out of memory");
	if (!r && m->ctl->json) {
		json_t *j = top_json(m);

		ctl_print_json(j);
		json_decref(j);
	} else if (!r) {
		r = print_frame(m, ui);
	}
	return r;
}

/* ---- live ------------------------------------------------------------------------------- */

static int key_of(int k)
{
	switch (k) {
	case KEY_UP:
		return KEY_GO_UP;
	case KEY_DOWN:
		return KEY_GO_DOWN;
	case KEY_PPAGE:
		return KEY_PAGE_UP;
	case KEY_NPAGE:
		return KEY_PAGE_DOWN;
	case KEY_HOME:
		return KEY_FIRST;
	case KEY_END:
		return KEY_LAST;
	case KEY_BACKSPACE:
	case 8:
	case 127:
		return KEY_ERASE;
	case KEY_ENTER:
	case '\n':
	case '\r':
		return KEY_RETURN;
	case 27:
		return KEY_ESCAPE;
	}
	return k >= 0x20 && k < 0x7f ? k : KEY_NONE;
}

static void show(const struct canvas *c)
{
	static const chtype attr[] = {[ATTR_NONE] = A_NORMAL,
				      [ATTR_BOLD] = A_BOLD,
				      [ATTR_BAR] = A_REVERSE,
				      [ATTR_SELECTED] = A_STANDOUT};

	erase(); /* also the corner, which is not written below */
	for (int y = 0; y < c->h; y++) {
		move(y, 0);
		for (int x = 0; x < c->w; x++) {
			size_t i = (size_t)y * (size_t)c->w + (size_t)x;

			/* The cell in the corner cannot be written without scrolling on some terminals. */
			if (y == c->h - 1 && x == c->w - 1)
				break;
			addch((chtype)(unsigned char)c->text[i] | attr[c->attr[i]]);
		}
	}
	refresh();
}

/* Every key that is there. False when the terminal is gone. */
static bool take_keys(struct top_model *m, struct top_ui *ui, bool *redraw)
{
	int k;

	while (!ui->quit && (k = getch()) != ERR) {
		if (k == KEY_RESIZE)
			clearok(curscr, TRUE); /* whatever the terminal made of the old picture goes */
		else if (key_of(k) != KEY_NONE || ui->mode == MODE_HELP)
			top_key(m, ui, key_of(k));
		*redraw = true;
	}
	return !ui->quit;
}

static void live(struct top_model *m, struct top_ui *ui)
{
	uint64_t generation = UINT64_MAX, drawn = 0;
	struct canvas c = {};
	bool redraw = true;

	while (!ended) {
		struct pollfd p = {.fd = STDIN_FILENO, .events = POLLIN};
		uint64_t wait;

		if (!ui->paused)
			redraw |= top_model_step(m);
		if (m->generation != generation && !top_order(m, ui))
			generation = m->generation;
		if (redraw && now_ns() - drawn >= TICK_NS / 2) {
			if (!canvas_size(&c, COLS, LINES)) {
				top_draw(&c, m, ui);
				show(&c);
			}
			drawn = now_ns();
			redraw = false;
		}
		wait = ui->paused ? TICK_NS : top_model_wait(m, TICK_NS);
		if (redraw)
			wait = MIN(wait, (uint64_t)TICK_NS / 2);
		if (poll(&p, 1, (int)DIV_UP(wait, 1000000u)) > 0 && p.revents & (POLLHUP | POLLERR | POLLNVAL))
			break;
		if (!take_keys(m, ui, &redraw))
			break;
		if (p.revents)
			drawn = 0; /* a key's effect is seen at once */
	}
	canvas_free(&c);
}

/* NULL: top can run here; else why not. */
static const char *unfit(void)
{
	int r;

	if (!isatty(STDIN_FILENO) || !isatty(STDOUT_FILENO))
		return "needs a terminal";
	if (setupterm(NULL, STDOUT_FILENO, &r) != OK)
		return "this TERM is not known";
	if (!cursor_address || !clear_screen)
		return "this TERM cannot place a cursor";
	return NULL;
}

int ctl_top(struct ctl *c, unsigned argc, const char *const argv[])
{
	struct sigaction sa = {.sa_handler = on_signal};
	struct top_ui ui = {.sort = COL_ROWS, .down = true};
	const char *why = c->once ? NULL : unfit();
	struct top_model m;
	SCREEN *screen;
	int r = CTL_OK;

	(void)argc;
	(void)argv;
	if (why)
		return ctl_fail(CTL_USAGE, "top: %s; kvtierctl top --once prints one frame as text", why);
	if (c->json && !c->once)
		return ctl_fail(CTL_USAGE, "top: --json only with --once");
	top_model_init(&m, c);
	if (c->once) {
		r = top_once(&m, &ui);
		goto done;
	}
	c->timeout_ms = MIN(c->timeout_ms, LIVE_TIMEOUT_MS); /* keys wait as long */
	screen = newterm(NULL, stdout, stdin);
	if (!screen) {
		r = ctl_fail(CTL_USAGE, "top: the terminal cannot be set up");
		goto done;
	}
	sigaction(SIGTERM, &sa, NULL);
	sigaction(SIGINT, &sa, NULL);
	sigaction(SIGHUP, &sa, NULL);
	cbreak();
	noecho();
	nonl();
	keypad(stdscr, TRUE);
	nodelay(stdscr, TRUE);
	set_escdelay(25);
	curs_set(0);
	live(&m, &ui);
	endwin();
	delscreen(screen);
	ctl_fail_into(NULL, 0);
done:
	free(ui.order);
	top_model_free(&m);
	return r;
}
