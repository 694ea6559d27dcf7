/* SPDX-License-Identifier: MIT */
/*
 * top: what is asked of the daemon, and when.
 *
 * What one refresh costs the daemon: one `status` (a sum that it keeps anyway) and one page of `ls`
 * per hundred sequences, each page one slice of its event loop. Pages are asked one by one, and between
 * two of them as long goes by as the last one took: the list takes at most half of what the daemon
 * could answer. A list begins an interval after the last one was complete: 10,000 sequences are a hundred
 * pages, and take as long as they take. The feed is read from memory and costs the daemon nothing.
 */
#include <stdio.h>
#include <string.h>
#include <time.h>
#include "daemon/ctl/top.h"
#include "shm/util.h"

#define RETRY_NS 500000000u
#define PAGE_GAP_NS 2000000u

void top_model_init(struct top_model *m, struct ctl *c)
{
	*m = (struct top_model){.ctl = c,
				.interval_ns = (uint64_t)(c->interval * 1e9),
				.feed_seg = SEG_INIT,
				.keep_raw = c->json};
}

static void unfeed(struct top_model *m)
{
	if (m->feeding)
		seg_close(&m->feed_seg);
	m->feed_seg = (struct seg)SEG_INIT;
	m->feeding = false;
}

void top_model_free(struct top_model *m)
{
	unfeed(m);
	free(m->seqs);
	free(m->coming);
	json_decref(m->raw_status);
	json_decref(m->raw_seqs);
}

/* After an answer that did not come or could not be read, nothing on this connection can be trusted. */
static void hang_up(struct top_model *m)
{
	close_fdp(&m->ctl->fd);
	m->ctl->fd = -1;
	unfeed(m);
	m->feed_refused = false;
	m->listing = false;
	m->gone = true;
	m->next_status = now_ns() + RETRY_NS;
}

/* The feed is the admin socket's alone: a tenant is refused, and has no stream. */
static int open_feed(struct top_model *m)
{
	int r;

	if (m->feeding || m->feed_refused || m->status.own)
		return CTL_OK;
	r = ctl_feed_open(m->ctl, true, &m->feed_seg, &m->feed);
	m->feeding = !r;
	m->feed_refused = r == CTL_REFUSED;
	return m->feed_refused ? CTL_OK : r;
}

static int ask_status(struct top_model *m)
{
	static const char *const argv[] = {"status"};
	json_t *j = NULL;
	int r = ctl_call(m->ctl, 1, argv, &j, NULL);

	if (r)
		return r;
	top_read_status(&m->status, j, m->seen ? &m->status : NULL);
	if (m->keep_raw) {
		json_decref(m->raw_status);
		m->raw_status = json_incref(j);
	}
	json_decref(j);
	m->seen = true;
	top_sum_tenants(m);
	if (m->gone) {
		m->gone = false;
		m->next_list = 0;
	}
	m->next_status = now_ns() + m->interval_ns;
	return open_feed(m);
}

static int keep_page(struct top_model *m, const json_t *list)
{
	size_t n = json_array_size(list), i;
	const json_t *o;

	if (m->n_coming + n > m->cap_coming) {
		size_t cap = MAX(2 * m->cap_coming, m->n_coming + n);
		struct top_seq *more = realloc(m->coming, cap * sizeof(*more));

		if (!more)
			return ctl_fail(CTL_UNREACHABLE, "out of memory");
		m->coming = more;
		m->cap_coming = cap;
	}
	json_array_foreach(list, i, o) top_read_seq(&m->coming[m->n_coming++], o);
	if (m->keep_raw)
		json_array_extend(m->raw_seqs, (json_t *)list);
	return CTL_OK;
}

static void begin_list(struct top_model *m)
{
	m->listing = true;
	m->n_coming = 0;
	strcpy(m->cursor, "0");
	if (m->keep_raw) {
		json_decref(m->raw_seqs);
		m->raw_seqs = json_array();
	}
}

/* The complete list becomes the one that is shown; its memory takes the next. */
static void end_list(struct top_model *m)
{
	struct top_seq *old = m->seqs;

	m->seqs = m->coming;
	m->n_seqs = m->n_coming;
	m->coming = old;
	m->cap_coming = 0;
	free(TAKE_PTR(m->coming));
	m->listing = false;
	m->generation++;
	top_sum_tenants(m);
}

static int ask_page(struct top_model *m)
{
	const char *argv[] = {"ls", m->cursor};
	uint64_t began = now_ns(), took;
	const json_t *next;
	json_t *j = NULL;
	int r;

	if (!m->listing)
		begin_list(m);
	r = ctl_call(m->ctl, 2, argv, &j, NULL);
	took = now_ns() - began;
	if (!r)
		r = keep_page(m, json_object_get(j, "seqs"));
	next = json_object_get(j, "next");
	if (!r && json_is_integer(next)) {
		snprintf(m->cursor, sizeof(m->cursor), "%lld", (long long)json_integer_value(next));
		m->next_list = now_ns() + MAX(took, PAGE_GAP_NS);
	} else if (!r) {
		end_list(m);
		m->next_list = now_ns() + m->interval_ns;
	}
	json_decref(j);
	return r;
}

static bool read_feed(struct top_model *m)
{
	uint64_t before = m->events + m->lost;

	/* Bounded: a daemon at full load must not keep the screen from being drawn. */
	for (unsigned i = 0; m->feeding && i < 65536; i++) {
		if (feed_read(&m->feed, &m->event[m->events % TOP_EVENTS], &m->lost) != 1)
			break;
		m->events++;
	}
	return m->events + m->lost != before;
}

bool top_model_step(struct top_model *m)
{
	uint64_t now = now_ns();
	bool changed = read_feed(m);
	int r = CTL_OK;

	ctl_fail_into(m->why, sizeof(m->why));
	if (now >= m->next_status)
		r = ask_status(m);
	else if (!m->gone && now >= m->next_list)
		r = ask_page(m);
	else
		return changed;
	if (r)
		hang_up(m);
	return true;
}

uint64_t top_model_wait(const struct top_model *m, uint64_t most)
{
	uint64_t now = now_ns(), next = m->gone ? m->next_status : MIN(m->next_status, m->next_list);

	return next <= now ? 0 : MIN(next - now, most);
}

int top_model_once(struct top_model *m)
{
	struct timespec nap = {.tv_sec = (time_t)(m->interval_ns / 1000000000u),
			       .tv_nsec = (long)(m->interval_ns % 1000000000u)};
	int r = ask_status(m);

	if (r)
		return r;
	nanosleep(&nap, NULL);
	r = ask_status(m);
	do
		r = r ?: ask_page(m);
	while (!r && m->listing);
	read_feed(m);
	return r;
}

void top_model_ask(struct top_model *m, unsigned argc, const char *const argv[], char *said, size_t size)
{
	json_t *j = NULL;
	int r;

	ctl_fail_into(m->why, sizeof(m->why));
	r = m->gone ? CTL_UNREACHABLE : ctl_call(m->ctl, argc, argv, &j, NULL);
	json_decref(j);
	if (!r)
		snprintf(said, size, "done: %s %s", argv[0], argv[1]);
	else if (r == CTL_REFUSED)
		snprintf(said, size, "refused: %s", m->why);
	else
		snprintf(said, size, "not done: %s", m->why);
	if (r && r != CTL_REFUSED && !m->gone)
		hang_up(m);
}
