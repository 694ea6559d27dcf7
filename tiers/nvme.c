/* SPDX-License-Identifier: MIT */
/*
 * The NVMe tier: an append-only log of packed pages in container files, moved by
 * io_uring. This file is the ops table; the rest of the room is one file per
 * concern: nvme_page (prepare to release), nvme_dir (files), nvme_format (bytes on disk),
 * nvme_stage (staging memory), nvme_req (requests), nvme_log (segments and places), nvme_seal (durability),
 * nvme_clean (cleaner), nvme_scan (restart), uring and pool_io (engines).
 */
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>

#include "tiers/nvme.h"

#define DEFAULT_SEGMENT (UINT64_C(64) << 20)
#define DEFAULT_STAGING (UINT64_C(32) << 20)
#define MIN_STAGING (UINT64_C(8) << 20)
#define MAX_STAGING (UINT64_C(1) << 30) /* one registered buffer */
#define MIN_SEGMENT (UINT64_C(256) << 10)
#define MIN_SEGMENTS 8u
#define MAX_SEGMENTS 0xffffffu /* tier_addr has 24 bits for them */
#define FILE_BYTES (UINT64_C(1) << 40)
#define MAPS_PERIOD_NS 1000000000u

/* ---- opening ---------------------------------------------------------------------- */

static int bad(char *err, size_t errsize, const char *field, uint64_t value, const char *limit)
{
	snprintf(err, errsize, "nvme %s: %llu: %s", field, (unsigned long long)value, limit);
	return -EINVAL;
}

static int configure(struct nvme *t, const struct tier_cfg *cfg, const struct nvme_knobs *knobs, char *err,
		     size_t errsize)
{
	t->segment_bytes = cfg->segment ? cfg->segment : DEFAULT_SEGMENT;
	t->store_bytes = cfg->size;
	t->depth = cfg->depth ? cfg->depth : 32;
	t->pace = cfg->pace;
	t->deadline_ms = cfg->deadline_ms ? cfg->deadline_ms : 10000;
	if (!cfg->path || !*cfg->path || strlen(cfg->path) >= sizeof(t->path))
		return bad(err, errsize, "path length", cfg->path ? strlen(cfg->path) : 0, "must be 1 to 255");
	if (t->segment_bytes % KVT_UNIT || t->segment_bytes < MIN_SEGMENT ||
	    t->segment_bytes > (uint64_t)NVME_MAX_UNITS * KVT_UNIT)
		return bad(err, errsize, "segment", t->segment_bytes, "must be 256K to 64M, in steps of 4K");
	if (cfg->size / t->segment_bytes < MIN_SEGMENTS)
		return bad(err, errsize, "size", cfg->size, "must be at least 8 segments");
	if (cfg->size / t->segment_bytes > MAX_SEGMENTS)
		return bad(err, errsize, "size", cfg->size, "must be at most 16777215 segments");
	if (t->depth > 4096)
		return bad(err, errsize, "depth", t->depth, "must be 1 to 4096");
	if (cfg->staging > MAX_STAGING)
		return bad(err, errsize, "staging", cfg->staging, "must be at most 1G");
	memcpy(t->path, cfg->path, strlen(cfg->path) + 1);
	t->units = (uint32_t)(t->segment_bytes / KVT_UNIT);
	t->segments = (uint32_t)(cfg->size / t->segment_bytes);
	t->file_segments =
		knobs->file_segments ? knobs->file_segments : (uint32_t)(FILE_BYTES / t->segment_bytes);
	t->file_segments = MIN(t->file_segments, t->segments);
	if (DIV_UP(t->segments, t->file_segments) > NVME_MAX_FILES)
		return bad(err, errsize, "size", cfg->size, "must be at most 64 containers of 1 TiB");
	t->files = (unsigned)DIV_UP(t->segments, t->file_segments);
	return 0;
}

static int open_engine(struct nvme *t, const struct tier_cfg *cfg, const struct nvme_knobs *knobs)
{
	struct io_cfg io = {t->fd, t->files, t->depth, t->arena, t->arena_bytes, t->event_fd};
	const struct io_ops *ops = knobs->engine ? knobs->engine : cfg->no_uring ? &io_pool_ops : &io_uring_ops;
	const char *direct = t->direct ? "" : "O_DIRECT refused: buffered I/O; ";
	char note[80] = "", why[64] = "";
	int r = ops->open(&t->engine, &io, note, sizeof(note));

	if (r < 0 && ops == &io_uring_ops) {
		snprintf(why, sizeof(why), "io_uring refused (%s): threads; ", strerror(-r));
		r = io_pool_ops.open(&t->engine, &io, note, sizeof(note));
	} else if (cfg->no_uring) {
		snprintf(why, sizeof(why), "io_uring off by configuration: threads; ");
	}
	if (r < 0)
		return r;
	r = snprintf(t->stat.note, sizeof(t->stat.note), "%s%s%s", direct, why, note);
	if (!*note && r >= 2 && r < (int)sizeof(t->stat.note))
		t->stat.note[r - 2] = '\0'; /* the last "; " */
	return 0;
}

static void destroy(struct nvme *t)
{
	nvme_log_close(t);
	nvme_stage_close(t);
	nvme_dir_close(t);
	close_fdp(&t->event_fd);
	for (struct nvme_req *r; (r = TAILQ_FIRST(&t->orphans));) {
		TAILQ_REMOVE(&t->orphans, r, link);
		free(r->owned);
		free(r);
	}
	free(t->cleaner.table_buf);
	free(t->pos);
	free(t);
}

static struct nvme *new_nvme(void)
{
	struct nvme *t = calloc(1, sizeof(*t));

	if (!t)
		return NULL;
	t->tier.ops = &tier_nvme_ops;
	t->direct = true;
	t->dir_fd = -1;
	memset(t->fd, 0xff, sizeof(t->fd));
	t->done_tail = &t->done;
	TAILQ_INIT(&t->inflight);
	TAILQ_INIT(&t->orphans);
	TAILQ_INIT(&t->ready);
	TAILQ_INIT(&t->closing);
	TAILQ_INIT(&t->announce);
	TAILQ_INIT(&t->dirty);
	io_queue_init(&t->outbox);
	t->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	t->pos = malloc(NVME_MAX_POS_WORDS * sizeof(*t->pos));
	return t;
}

int nvme_open_with(struct tier **ret, const struct tier_cfg *cfg, const struct nvme_knobs *knobs, char *err,
		   size_t errsize)
{
	struct nvme *t = new_nvme();
	int r = t && t->pos ? 0 : -ENOMEM;

	*err = '\0';
	if (!r && t->event_fd < 0)
		r = -errno;
	if (!r)
		r = configure(t, cfg, knobs, err, errsize);
	if (!r)
		r = nvme_dir_open(t, cfg, err, errsize);
	if (!r)
		r = nvme_log_open(t);
	if (!r)
		r = nvme_stage_open(t, MAX(cfg->staging ? cfg->staging : DEFAULT_STAGING, MIN_STAGING));
	if (!r)
		r = open_engine(t, cfg, knobs);
	if (r < 0) {
		if (!*err)
			snprintf(err, errsize, "nvme path %s: %s", cfg->path ? cfg->path : "", strerror(-r));
		if (t)
			destroy(t);
		return r;
	}
	if (t->scanned) {
		nvme_head_pump(t);
		nvme_kick(t);
	}
	*ret = &t->tier;
	return 0;
}

static int nvme_open(struct tier **ret, const struct tier_cfg *cfg, char *err, size_t errsize)
{
	static const struct nvme_knobs none;

	return nvme_open_with(ret, cfg, &none, err, errsize);
}

/* Wait for a completion, or for the deadline of the oldest request. */
static void wait_some(struct nvme *t)
{
	struct pollfd pfd = {.fd = t->event_fd, .events = POLLIN};
	eventfd_t v;

	if (poll(&pfd, 1, (int)MIN(t->deadline_ms, 100u)) == 1)
		(void)eventfd_read(t->event_fd, &v);
	nvme_drain(t);
	nvme_check_deadline(t);
}

/* Tiers whose device never answered, kept reachable for ever. Owner thread. */
static struct nvme *stuck;

static void nvme_close(struct tier *tier)
{
	struct nvme *t = tier ? nvme(tier) : NULL;

	if (!t)
		return;
	t->can_move = false; /* start nothing new */
	while (!t->offline && !TAILQ_EMPTY(&t->inflight))
		wait_some(t);
	if (t->engine->ops->close(t->engine, t->offline ? 100 : t->deadline_ms) < 0) {
		/* The kernel may still write to the staging memory: it, and all that points to it, stays. */
		nvme_dir_close(t);
		t->next_stuck = stuck;
		stuck = t;
		return;
	}
	destroy(t);
}

/* ---- the whole tier ------------------------------------------------------------------ */

static bool sealing(const struct nvme *t)
{
	if (t->sealer.step != STEP_IDLE || !TAILQ_EMPTY(&t->closing))
		return true;
	for (uint32_t i = 0; i < t->segments; i++) {
		const struct nvme_seg *s = &t->seg[i];

		if (s->state == NVME_CLOSING &&
		    (!s->prepared || (t->cleaner.outstanding && t->cleaner.to == s)))
			return true;
	}
	return false;
}

static void close_used(struct nvme *t, struct nvme_stream *st)
{
	if (st->seg && st->seg->cursor > NVME_DATA_UNIT)
		nvme_stream_close(t, st);
}

/*
 * -EIO: now, or earlier for pages that still live, something could not be written that the restart needs.
 * -EBUSY: writes were prepared and not submitted, their segments stay open.
 */
static int nvme_sync(struct tier *tier)
{
	struct nvme *t = nvme(tier);
	bool can_move = t->can_move;
	uint32_t errors = t->seal_errors;

	t->can_move = false;
	for (unsigned i = 0; i < 2 * t->streams; i++)
		close_used(t, &t->stream[i % 2][i / 2]);
	close_used(t, &t->cold);
	nvme_drain(t);
	while (!t->offline && sealing(t))
		wait_some(t);
	if (!t->offline)
		nvme_maps_start(t, true);
	nvme_kick(t);
	while (!t->offline && t->sealer.step != STEP_IDLE)
		wait_some(t);
	t->can_move = can_move;
	if (t->done)
		(void)eventfd_write(t->event_fd, 1);
	if (t->offline || t->seal_errors != errors)
		return -EIO;
	for (uint32_t i = 0; i < t->segments; i++)
		if (t->seg[i].state == NVME_SEALED && t->seg[i].unsealed)
			return -EIO;
	for (uint32_t i = 0; i < t->segments; i++)
		if (t->seg[i].state == NVME_CLOSING)
			return -EBUSY;
	return 0;
}

static struct nvme_stream *stream_of(struct nvme *t, const struct nvme_seg *s)
{
	for (unsigned i = 0; i < 2 * t->streams; i++)
		if (t->stream[i % 2][i / 2].seg == s)
			return &t->stream[i % 2][i / 2];
	return t->cold.seg == s ? &t->cold : NULL;
}

static int nvme_durable(struct tier *tier, tier_addr addr, bool soon)
{
	struct nvme *t = nvme(tier);
	uint32_t unit;
	struct nvme_seg *s = nvme_resolve(t, addr, &unit);
	struct nvme_stream *st;

	if (!s)
		return -ESTALE;
	if (s->state == NVME_SEALED)
		return s->unsealed ? -EIO : 1;
	if (t->offline)
		return -EIO;
	if (soon && s->state == NVME_OPEN && (st = stream_of(t, s))) {
		nvme_stream_close(t, st);
		nvme_seal_pump(t);
		nvme_kick(t);
	}
	return 0;
}

static uint64_t nvme_seals(struct tier *tier)
{
	const struct nvme *t = nvme(tier);

	return t->seals + t->offline;
}

static int nvme_event_fd(struct tier *tier)
{
	return nvme(tier)->event_fd;
}

/* What is wrong comes first, what this host lacks after it. */
static void say(const struct nvme *t, char note[sizeof(t->stat.note)])
{
	static const char *const op[] = {[IO_READ] = "read", [IO_WRITE] = "write", [IO_SYNC] = "flush"};
	char text[256];
	int n = 0;

	if (t->offline)
		n = snprintf(text, sizeof(text), "offline: no answer in %u ms; ", t->deadline_ms);
	if (t->failed_requests)
		n += snprintf(text + n, sizeof(text) - (size_t)n, "%llu requests failed, last a %s: %s; ",
			      (unsigned long long)t->failed_requests, op[t->last_op], strerror(-t->last_error));
	if (!n)
		return;
	strcpy(text + n - (*t->stat.note ? 0 : 2), t->stat.note);
	snprintf(note, sizeof(t->stat.note), "%.*s", (int)sizeof(t->stat.note) - 1, text);
}

/* Capacity is what pages can fill: without the cleaner's reserve, heads, maps, and a sixty-fourth for tables.
 */
static void nvme_stat(struct tier *tier, struct tier_stat *ret)
{
	struct nvme *t = nvme(tier);
	uint64_t data = t->units - NVME_DATA_UNIT - 1 - t->units / 64;

	*ret = t->stat;
	ret->capacity = (t->segments - t->reserve) * data * KVT_UNIT;
	ret->used = t->live_units * KVT_UNIT;
	ret->free = ret->capacity > ret->used ? ret->capacity - ret->used : 0;
	ret->overhead = t->arena_bytes + (uint64_t)t->segments * (t->units - data) * KVT_UNIT;
	ret->offline = t->offline;
	ret->huge = t->huge;
	ret->io_uring = t->engine->ops == &io_uring_ops;
	ret->node = -1;
	say(t, ret->note);
}

static void nvme_tick(struct tier *tier,
		      bool (*moved)(void *arg, const struct page_meta *m, tier_addr from, tier_addr to),
		      void *arg)
{
	struct nvme *t = nvme(tier);
	uint64_t now = now_ns();

	nvme_check_deadline(t);
	t->can_move = moved != NULL;
	t->cleaner.nothing = false;
	nvme_drain(t);
	if (t->offline)
		return;
	if (moved)
		nvme_clean_announce(t, moved, arg);
	if (now - t->maps_ns >= MAPS_PERIOD_NS) {
		t->maps_ns = now;
		nvme_maps_start(t, false);
	}
	nvme_clean_pump(t);
	nvme_seal_pump(t);
	nvme_kick(t);
}

const struct tier_ops tier_nvme_ops = {
	.name = "nvme",
	.caps = TIER_CAP_DURABLE | TIER_CAP_ASYNC,
	.open = nvme_open,
	.close = nvme_close,
	.scan = nvme_scan,
	.prepare = nvme_prepare,
	.submit = nvme_submit,
	.reap = nvme_reap,
	.release = nvme_release,
	.free = nvme_free,
	.sync = nvme_sync,
	.durable = nvme_durable,
	.seals = nvme_seals,
	.event_fd = nvme_event_fd,
	.stat = nvme_stat,
	.tick = nvme_tick,
};
