/* SPDX-License-Identifier: MIT */
/* The directory of a sequence, and segments shared by all sequences of the process: see direct.h. */
#include <pthread.h>
#include <string.h>
#include <sys/queue.h>
#include "ipc/client/client.h"
#include "ipc/cuda/direct.h"

#define NO_LANE_YET UINT32_MAX
#define FAR (1u << 28) /* positions are below */

/* ---- segments: one of each per process and GPU ------------------------------------------------- */

struct direct_segment {
	LIST_ENTRY(direct_segment) entry;
	struct kvtier_cuda *g;
	const void *owner;
	uint32_t number, refs;
	struct seg seg;
	uint64_t addr;
};
/* What one view holds: in use, or waiting for the GPU. */
struct direct_held {
	struct direct_segment *s;
	uint32_t number;
	bool used;
	void *event; /* not NULL: to be let go of when it is over */
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static LIST_HEAD(, direct_segment) segments = LIST_HEAD_INITIALIZER(segments);

/* lock held */
static struct direct_segment *find_segment(const struct cuda_direct *d, uint32_t number)
{
	struct direct_segment *s;

	LIST_FOREACH(s, &segments, entry)
		if (s->g == d->g && s->owner == d->src.owner && s->number == number) {
			s->refs++;
			return s;
		}
	return NULL;
}

static void unmap(struct direct_segment *s)
{
	if (s->addr && !s->g->d->ctx_push(s->g->ctx)) {
		(void)s->g->d->host_unregister(s->seg.addr);
		cuda_leave(s->g);
	}
	seg_close(&s->seg);
	free(s);
}

static void put_segment(struct direct_segment *s)
{
	bool last;

	pthread_mutex_lock(&lock);
	last = !--s->refs;
	if (last)
		LIST_REMOVE(s, entry);
	pthread_mutex_unlock(&lock);
	if (last)
		unmap(s);
}

static int map_segment(struct cuda_direct *d, uint32_t number, struct direct_segment **ret)
{
	struct direct_segment *s = calloc(1, sizeof(*s));
	int r;

	if (!s)
		return err_set(KVT_E_NOMEM, "segment: out of memory");
	*s = (struct direct_segment){
		.g = d->g, .owner = d->src.owner, .number = number, .refs = 1, .seg = SEG_INIT};
	r = d->src.map(d->src.arg, number, &s->seg);
	if (!r)
		r = cuda_try(d->g,
			     d->g->d->host_register(s->seg.addr, s->seg.size,
						    CUDA_HOST_MAPPED | CUDA_HOST_READ_ONLY),
			     "segment: cuMemHostRegister");
	if (!r) {
		r = cuda_try(d->g, d->g->d->host_address(&s->addr, s->seg.addr, 0),
			     "segment: cuMemHostGetDevicePointer");
		if (r)
			(void)d->g->d->host_unregister(s->seg.addr);
	}
	if (r) {
		s->addr = 0;
		unmap(s);
		return r;
	}
	*ret = s;
	return 0;
}

/* A reference. The map call and the registration take long and need no lock; two at once: one is for nothing.
 */
static int get_segment(struct cuda_direct *d, uint32_t number, struct direct_segment **ret)
{
	struct direct_segment *s, *other;
	int r;

	pthread_mutex_lock(&lock);
	s = find_segment(d, number);
	pthread_mutex_unlock(&lock);
	if (s) {
		*ret = s;
		return 0;
	}
	r = map_segment(d, number, &s);
	if (r)
		return r;
	pthread_mutex_lock(&lock);
	other = find_segment(d, number);
	if (!other)
		LIST_INSERT_HEAD(&segments, s, entry);
	pthread_mutex_unlock(&lock);
	if (other)
		unmap(s);
	*ret = other ? other : s;
	return 0;
}

/* ---- what a view holds of them ---------------------------------------------------------------------- */

static void let_go(struct cuda_direct *d, uint32_t i)
{
	if (d->held[i].event)
		(void)d->g->d->event_destroy(d->held[i].event);
	put_segment(d->held[i].s);
	d->held[i] = d->held[--d->n_held];
}

static struct direct_held *hold(struct cuda_direct *d, uint32_t number, int *ret_error)
{
	struct direct_segment *s;

	*ret_error = 0;
	for (uint32_t i = 0; i < d->n_held; i++)
		if (d->held[i].number == number)
			return &d->held[i];
	if (d->n_held == d->room_held) {
		uint32_t room = d->room_held ? d->room_held * 2 : 8;
		struct direct_held *v = reallocarray(d->held, room, sizeof(*v));

		if (!v) {
			*ret_error = err_set(KVT_E_NOMEM, "segments: out of memory");
			return NULL;
		}
		d->held = v;
		d->room_held = room;
	}
	*ret_error = get_segment(d, number, &s);
	if (*ret_error)
		return NULL;
	d->held[d->n_held] = (struct direct_held){.s = s, .number = number};
	return &d->held[d->n_held++];
}

int view_address(struct cuda_direct *d, uint32_t segment, uint64_t off, uint64_t n, uint64_t *ret)
{
	struct direct_held *h;
	int r;

	h = hold(d, segment, &r);
	if (!h)
		return r;
	h->used = true;
	if (off > h->s->seg.size || n > h->s->seg.size - off)
		return err_set(KVT_E_PROTO, "segment %u: bytes [%llu, +%llu), it has %zu", segment,
			       (unsigned long long)off, (unsigned long long)n, h->s->seg.size);
	*ret = h->s->addr + off;
	return 0;
}

/* Those that no entry names: the stream may read them still. */
static void release_unused(struct cuda_direct *d, void *stream)
{
	for (uint32_t i = 0; i < d->n_held; i++) {
		struct direct_held *h = &d->held[i];

		if (h->used && h->event) { /* wanted again */
			(void)d->g->d->event_destroy(h->event);
			h->event = NULL;
		}
		if (h->used || h->event || d->g->d->event_create(&h->event, 2 /* no timing */))
			continue;
		if (d->g->d->event_record(h->event, stream)) {
			(void)d->g->d->event_destroy(h->event);
			h->event = NULL;
		}
	}
}

static void reap(struct cuda_direct *d)
{
	for (uint32_t i = d->n_held; i-- > 0;)
		if (d->held[i].event && !d->held[i].used && !d->g->d->event_query(d->held[i].event))
			let_go(d, i);
}

bool view_yield(struct cuda_direct *d, void *stream)
{
	const struct direct_hdr *h = d->dir.addr;
	const struct direct_page *e = h ? (const struct direct_page *)(h + 1) : NULL;
	uint32_t used = h ? MIN(atomic_load_explicit(&h->used, memory_order_acquire), h->capacity) : 0;
	bool pending = false;

	for (uint32_t i = 0; i < d->n_held; i++)
		d->held[i].used = false;
	for (uint32_t i = 0; i < used; i++) {
		uint64_t place = atomic_load_explicit(&e[i].place, memory_order_relaxed);

		for (uint32_t k = 0; place && k < d->n_held; k++)
			d->held[k].used |= d->held[k].number == direct_segment(place);
	}
	release_unused(d, stream);
	reap(d);
	for (uint32_t i = 0; i < d->n_held; i++)
		pending |= d->held[i].event != NULL;
	return pending;
}

/* ---- the directory ----------------------------------------------------------------------------------------
 */

static const struct direct_hdr *header(const struct cuda_direct *d)
{
	return d->dir.addr;
}

static const struct direct_page *entry(const struct cuda_direct *d, uint32_t slot)
{
	return (const struct direct_page *)(header(d) + 1) + slot;
}

int view_new(struct kvtier_cuda *g, const struct direct_source *src, const struct cuda_lane *lane,
	     uint32_t lanes, struct cuda_direct **ret)
{
	struct cuda_direct *d = calloc(1, sizeof(*d));

	if (d)
		d->lane = malloc(lanes * sizeof(*lane));
	if (!d || !d->lane) {
		free(d);
		return err_set(KVT_E_NOMEM, "directory: out of memory");
	}
	memcpy(d->lane, lane, lanes * sizeof(*lane));
	d->g = g;
	d->src = *src;
	d->lanes = lanes;
	d->dir = (struct seg)SEG_INIT;
	*ret = d;
	return 0;
}

int view_take(struct cuda_direct *d, struct seg *dir)
{
	const struct direct_hdr *h = dir->addr;

	if (dir->size < sizeof(*h) || h->magic != DIRECT_MAGIC ||
	    h->capacity > (dir->size - sizeof(*h)) / sizeof(struct direct_page))
		return err_set(KVT_E_PROTO, "directory: %zu bytes that are none", dir->size);
	seg_close(&d->dir);
	d->dir = *dir;
	*dir = (struct seg)SEG_INIT;
	view_forget(d);
	return 0;
}

void view_forget(struct cuda_direct *d)
{
	d->complete = false;
	for (uint32_t i = 0; i < d->used; i++)
		d->seen[i] = (struct direct_seen){.lane = NO_LANE_YET};
}

bool view_still(const struct cuda_direct *d)
{
	return d->complete && atomic_load_explicit(&header(d)->moved, memory_order_acquire) == d->moved;
}

static int make_room(struct cuda_direct *d, uint32_t used)
{
	uint32_t room = MAX(d->room, 256u);
	struct direct_seen *v;

	while (room < used)
		room *= 2;
	if (room > d->room) {
		v = reallocarray(d->seen, room, sizeof(*v));
		if (!v)
			return err_set(KVT_E_NOMEM, "directory: out of memory");
		d->seen = v;
		d->room = room;
	}
	for (; d->used < used; d->used++)
		d->seen[d->used] = (struct direct_seen){.lane = NO_LANE_YET};
	return 0;
}

/* Copy an entry once and check the copy. PROTO: it cannot be, unless it is just changing. */
static int take_entry(struct cuda_direct *d, uint32_t slot, struct direct_seen *seen, struct find_page *ret)
{
	const struct direct_page *e = entry(d, slot);
	struct direct_page p;
	uint32_t rows = 0;

	memcpy(&p, (const void *)e, sizeof(p));
	*seen = (struct direct_seen){.place = atomic_load_explicit(&e->place, memory_order_relaxed),
				     .serial = p.serial,
				     .lane = p.lane,
				     .limit = p.limit};
	memcpy(seen->dead, p.dead, sizeof(seen->dead));
	for (uint32_t w = 0; p.span <= DIRECT_SPAN && w < p.span; w++)
		rows += (uint32_t)__builtin_popcountll(p.pos[w]);
	if (p.lane >= d->lanes || !p.rows || p.rows > FIND_PAGE || !p.span || p.span > DIRECT_SPAN ||
	    rows != p.rows || p.first >= FAR)
		return err_set(KVT_E_PROTO,
			       "directory: entry %u: %u rows of %u bits in %u words from %u on, lane %u of %u",
			       slot, p.rows, rows, p.span, p.first, p.lane, d->lanes);
	*ret = (struct find_page){
		.lane = p.lane, .first = p.first, .limit = p.limit, .span = p.span, .rows = p.rows};
	memcpy(ret->dead, p.dead, sizeof(ret->dead));
	memcpy(ret->pos, p.pos, p.span * sizeof(p.pos[0]));
	if (!seen->place)
		return 0;
	return view_address(d, direct_segment(seen->place), direct_off(seen->place),
			    (uint64_t)p.rows * (d->lane[p.lane].k_bytes + d->lane[p.lane].v_bytes), &ret->k);
}

/* Is the entry as it was? All that can change of one lies in its first cache line. */
static bool unchanged(const struct direct_page *e, const struct direct_seen *old)
{
	bool same = atomic_load_explicit(&e->place, memory_order_acquire) == old->place &&
		    e->serial == old->serial && e->limit == old->limit;

	return same && !memcmp((const void *)e->dead, old->dead, sizeof(old->dead));
}
_Static_assert(offsetof(struct direct_page, dead) + sizeof(((struct direct_page *)0)->dead) <= 64, "one line");

/* One entry: hand it over when it is news. */
static int look_at(struct cuda_direct *d, uint32_t slot, view_page_fn page, void *arg, bool *changed)
{
	const struct direct_page *e = entry(d, slot);
	struct direct_seen now = {.lane = NO_LANE_YET}, *old = &d->seen[slot];
	struct find_page p;
	int r = 0;

	if (unchanged(e, old))
		return 0;
	if (atomic_load_explicit(&e->place, memory_order_acquire))
		r = take_entry(d, slot, &now, &p);
	if (!r && now.place)
		r = page(arg, slot, old->place != now.place || old->serial != now.serial, &p);
	if (r)
		return r;
	*changed |= now.place || old->place;
	*old = now;
	return 0;
}

/* Segments that the entries name; the others wait until the stream has passed. */
static int sort_segments(struct cuda_direct *d, void *stream)
{
	uint64_t at;
	int r = 0;

	for (uint32_t i = 0; i < d->n_held; i++)
		d->held[i].used = false;
	for (uint32_t i = 0; i < d->used && !r; i++)
		if (d->seen[i].place)
			r = view_address(d, direct_segment(d->seen[i].place), 0, 1, &at);
	if (!r)
		release_unused(d, stream);
	return r;
}

int view_look(struct cuda_direct *d, view_page_fn page, void *arg, void *stream, bool *ret_changed)
{
	const struct direct_hdr *h = header(d);
	uint64_t moved = atomic_load_explicit(&h->moved, memory_order_acquire);
	uint32_t used = MIN(atomic_load_explicit(&h->used, memory_order_acquire), h->capacity);
	int r = make_room(d, used);

	*ret_changed = false;
	reap(d);
	for (uint32_t i = 0; i < used && !r; i++)
		r = look_at(d, i, page, arg, ret_changed);
	for (uint32_t i = used; i < d->used && !r; i++) { /* the daemon has ended it */
		*ret_changed |= d->seen[i].place != 0;
		d->seen[i] = (struct direct_seen){.lane = NO_LANE_YET};
	}
	/* What was being changed meanwhile is nobody's fault: recalls of this view will not be believed. */
	if ((r == KVT_E_PROTO || r == KVT_E_NOENT) && atomic_load_explicit(&h->moved, memory_order_acquire) != moved)
		r = KVT_AGAIN;
	if (r) {
		view_forget(d);
		return r;
	}
	if (moved != d->moved || !d->complete)
		r = sort_segments(d, stream);
	d->moved = moved;
	d->complete = !r;
	return r;
}

void view_end(struct cuda_direct *d)
{
	if (!d)
		return;
	while (d->n_held)
		let_go(d, d->n_held - 1);
	seg_close(&d->dir);
	free(d->lane);
	free(d->held);
	free(d->seen);
	free(d);
}
