/* SPDX-License-Identifier: MIT */
/* top: what a key does. Nothing is changed in the daemon without a y to a question. */
#include <stdio.h>
#include <string.h>
#include "daemon/ctl/top.h"
#include "shm/util.h"

static void select_line(const struct top_model *m, struct top_ui *ui, size_t at)
{
	ui->at = ui->shown ? MIN(at, ui->shown - 1) : 0;
	*ui->selected = 0;
	if (ui->shown)
		snprintf(ui->selected, sizeof(ui->selected), "%s", m->seqs[ui->order[ui->at]].handle);
}

static void sort_by(const struct top_model *m, struct top_ui *ui, int step)
{
	ui->sort = (enum top_column)(((int)ui->sort + step + TOP_COLUMNS) % TOP_COLUMNS);
	ui->down = ui->sort >= COL_ROWS && ui->sort != COL_STATE; /* names up, numbers down */
	top_order(m, ui);
	snprintf(ui->said, sizeof(ui->said), "sorted by %s", top_column_name(ui->sort));
}

/* The question names the sequence that was chosen when the key was hit, whatever the table does meanwhile. */
static void ask_about(struct top_ui *ui, const char *verb, enum top_mode mode)
{
	if (!*ui->selected) {
		snprintf(ui->said, sizeof(ui->said), "%s: no sequence is chosen", verb);
		return;
	}
	ui->verb = verb;
	ui->args = 0;
	memcpy(ui->target, ui->selected, sizeof(ui->target));
	ui->mode = mode;
}

static void list_key(struct top_model *m, struct top_ui *ui, int key)
{
	switch (key) {
	case 'q':
		ui->quit = true;
		break;
	case 'h':
	case '?':
		ui->mode = MODE_HELP;
		break;
	case KEY_GO_UP:
	case 'k':
		select_line(m, ui, ui->at ? ui->at - 1 : 0);
		break;
	case KEY_GO_DOWN:
	case 'j':
		select_line(m, ui, ui->at + 1);
		break;
	case KEY_PAGE_UP:
		select_line(m, ui, ui->at > ui->page ? ui->at - ui->page : 0);
		break;
	case KEY_PAGE_DOWN:
		select_line(m, ui, ui->at + ui->page);
		break;
	case KEY_FIRST:
	case 'g':
		select_line(m, ui, 0);
		break;
	case KEY_LAST:
	case 'G':
		select_line(m, ui, SIZE_MAX);
		break;
	case 's':
	case '>':
		sort_by(m, ui, 1);
		break;
	case 'S':
	case '<':
		sort_by(m, ui, -1);
		break;
	case 'r':
		ui->down = !ui->down;
		top_order(m, ui);
		break;
	case '/':
		memcpy(ui->was_filter, ui->filter, sizeof(ui->filter));
		memcpy(ui->input, ui->filter, sizeof(ui->input));
		ui->mode = MODE_FILTER;
		break;
	case KEY_ESCAPE:
		*ui->filter = 0;
		top_order(m, ui);
		break;
	case 'i':
		ui->mode = MODE_INTERVAL;
		break;
	case ' ':
		ui->paused = !ui->paused;
		break;
	case 'p':
		ask_about(ui, "pin", MODE_ARGS);
		break;
	case 'u':
		ask_about(ui, "unpin", MODE_ARGS);
		break;
	case 'd':
		ask_about(ui, "demote", MODE_ARGS);
		break;
	case 'P':
		ask_about(ui, "promote", MODE_CONFIRM);
		break;
	case 'D':
		ask_about(ui, "drop", MODE_CONFIRM);
		break;
	}
}

/* pin and unpin take POS ROWS, demote KEEP or nothing; the daemon judges the numbers. */
static void take_args(struct top_ui *ui)
{
	unsigned least = strcmp(ui->verb, "demote") ? 2 : 0, most = least ?: 1;
	char *save = NULL;

	ui->args = 0;
	for (char *s = strtok_r(ui->input, " ", &save); s; s = strtok_r(NULL, " ", &save)) {
		if (ui->args < most)
			snprintf(ui->arg[ui->args], sizeof(ui->arg[0]), "%s", s);
		ui->args++;
	}
	if (ui->args >= least && ui->args <= most) {
		ui->mode = MODE_CONFIRM;
		return;
	}
	ui->mode = MODE_LIST;
	snprintf(ui->said, sizeof(ui->said), "%s takes %s: nothing done", ui->verb,
		 least ? "two numbers, POS ROWS" : "at most one number");
}

static void take_interval(struct top_model *m, struct top_ui *ui)
{
	char *end;
	double v = strtod(ui->input, &end);

	ui->mode = MODE_LIST;
	if (end == ui->input || *end || !(v >= 0.1 && v <= 3600)) {
		snprintf(ui->said, sizeof(ui->said), "interval: must be a number from 0.1 to 3600");
		return;
	}
	m->interval_ns = (uint64_t)(v * 1e9);
	m->next_status = MIN(m->next_status, now_ns() + m->interval_ns);
	m->next_list = MIN(m->next_list, now_ns() + m->interval_ns);
	snprintf(ui->said, sizeof(ui->said), "a look every %g s", v);
}

static void input_key(struct top_model *m, struct top_ui *ui, int key)
{
	size_t n = strlen(ui->input);
	bool filtering = ui->mode == MODE_FILTER;

	if (key == KEY_ESCAPE) {
		ui->mode = MODE_LIST;
		memcpy(ui->input, ui->was_filter, sizeof(ui->input));
	} else if (key == KEY_ERASE) {
		ui->input[n ? n - 1 : 0] = 0;
	} else if (key >= 0x20 && key < 0x7f && n + 1 < sizeof(ui->input)) {
		ui->input[n] = (char)key;
		ui->input[n + 1] = 0;
	}
	if (filtering) {
		memcpy(ui->filter, ui->input, sizeof(ui->filter));
		top_order(m, ui);
	}
	if (key == KEY_RETURN) {
		if (filtering)
			ui->mode = MODE_LIST;
		else if (ui->mode == MODE_INTERVAL)
			take_interval(m, ui);
		else
			take_args(ui);
	}
	if (ui->mode != MODE_FILTER && (key == KEY_RETURN || key == KEY_ESCAPE))
		*ui->input = 0;
}

static void confirm_key(struct top_model *m, struct top_ui *ui, int key)
{
	const char *argv[] = {ui->verb, ui->target, ui->arg[0], ui->arg[1]};

	ui->mode = MODE_LIST;
	if (key == 'y')
		top_model_ask(m, 2 + ui->args, argv, ui->said, sizeof(ui->said));
	else
		snprintf(ui->said, sizeof(ui->said), "%s: not done", ui->verb);
}

void top_key(struct top_model *m, struct top_ui *ui, int key)
{
	*ui->said = 0;
	switch (ui->mode) {
	case MODE_LIST:
		list_key(m, ui, key);
		break;
	case MODE_HELP:
		ui->mode = MODE_LIST;
		break;
	case MODE_CONFIRM:
		confirm_key(m, ui, key);
		break;
	default:
		input_key(m, ui, key);
	}
}
