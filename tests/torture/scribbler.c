/* SPDX-License-Identifier: MIT */
/*
 * A client that writes whatever it likes into all memory that it shares: rings, slots, rows, windows, the file
 * of an imported region, which it also shortens and punches. Hung up on, it comes again.
 *
 *   scribbler SOCKET SEED     until SIGTERM, then one JSON object: {lives, hangups, writes, requests}
 *
 * Half of what it writes is noise, half is nearly right: a cursor a little off, a length that could be, the
 * handle of somebody else, an acknowledgement to come.
 */
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include "shm/bits.h"
#include "tests/unit/window_double.h"

#define LIFE_NS UINT64_C(100000000)

enum kind { HOST, WINDOW, IMPORT, KINDS };

struct life {
	enum kind kind;
	struct wlink l;
	struct wseq w; /* WINDOW */
	struct seg region;
	uint64_t region_handle, seq;
	struct seq_slot *slot;
	int file; /* IMPORT */
	uint8_t *mem;
	size_t mem_bytes;
	uint32_t rows;
};

static volatile sig_atomic_t stop;
static uint64_t rnd_state, lives, hangups, writes, requests;

static void on_term(int sig)
{
	stop = 1;
}

static uint32_t rnd(uint32_t n)
{
	rnd_state ^= rnd_state << 13;
	rnd_state ^= rnd_state >> 7;
	rnd_state ^= rnd_state << 17;
	return (uint32_t)((rnd_state >> 11) % n);
}

/* ---- a life ------------------------------------------------------------------------ */

static int open_region(struct life *v, uint64_t bytes)
{
	struct wire_region g;

	wire_init(&g.hdr, v->kind == IMPORT ? W_REGION_IMPORT : W_REGION, sizeof(g), 3);
	g.bytes = bytes;
	if (v->kind != IMPORT) {
		if (wl_call(&v->l, &g.hdr) || v->l.n_fds != 1 ||
		    seg_map(&v->region, SEG_EXCHANGE, v->l.fds[0], bytes))
			return -1;
		v->mem = v->region.addr;
		v->mem_bytes = v->region.size;
	} else {
		v->file = memfd_create("pool", MFD_CLOEXEC);
		if (v->file < 0 || ftruncate(v->file, (off_t)bytes) < 0 ||
		    sock_send(v->l.fd, &g, g.hdr.len, &v->file, 1) < 0 ||
		    sock_wait(v->l.fd, POLLIN, now_ns() + UINT64_C(5000000000)) <= 0 ||
		    sock_recv(v->l.fd, v->l.reply, sizeof(v->l.reply), v->l.fds, &v->l.n_fds) <= 0 ||
		    ((struct wire_reply *)v->l.reply)->status)
			return -1;
	}
	v->region_handle = ((struct wire_region_reply *)v->l.reply)->region;
	return 0;
}

/* Two layers of three heads, plane after plane, scores behind them. */
static int open_seq(struct life *v)
{
	const struct wire_seq_open_reply *a = (const void *)v->l.reply;
	const uint32_t cap = 256, stage = 128, max = 1024, k = v->l.k_bytes;
	uint64_t head = (uint64_t)(cap + stage) * k, off = 0;
	union wopen u;

	wire_init(&u.o.hdr, W_SEQ_OPEN, wire_seq_open_len(v->l.layers, 0), 4);
	u.o.max_rows = max;
	u.o.n_layers = v->l.layers;
	u.o.model = v->l.model;
	u.o.region = v->region_handle;
	u.o.lifetime = rnd(4) == 0;
	u.o.ttl_s = 1;
	for (int i = 0; i < 16; i++)
		u.o.key[i] = (uint8_t)rnd(256);
	u.o.budget = (struct wire_budget){
		.device_rows = 64, .dram_rows = 64, .nvme_rows = 256, .set = 1, .slack_rows = 16};
	strcpy(u.o.budget.policy, "client");
	for (uint32_t i = 0; i < v->l.layers; i++) {
		struct wire_layout *y = wire_open_layouts(&u.o) + i;

		*y = (struct wire_layout){.k_off = off,
					  .v_off = off + v->l.heads * head,
					  .k_head_stride = head,
					  .v_head_stride = head,
					  .k_row_stride = k,
					  .v_row_stride = k,
					  .cap = cap,
					  .stage = stage};
		off += 2 * v->l.heads * head;
		y->score_off = off;
		y->score_head_stride = max * sizeof(float);
		off += v->l.heads * y->score_head_stride;
	}
	if (wl_call(&v->l, &u.o.hdr))
		return -1;
	v->seq = a->seq;
	v->slot = &v->l.slots[a->slot];
	return 0;
}

static int open_window(struct life *v)
{
	struct wire_budget b = {
		.device_rows = 64, .dram_rows = 64, .nvme_rows = 256, .set = 1, .slack_rows = 16};

	strcpy(b.policy, "client");
	if (wq_make(&v->w, &v->l, rnd(1u << 30), 256, 128, 1024, 256 << 10, 256 << 10, 1) ||
	    wq_open(&v->w, W_OP_OPEN, KVT_EPHEMERAL, 0, rnd(2) ? W_OPEN_DIRECT : 0, &b))
		return -1;
	v->seq = v->w.handle;
	v->slot = v->w.slot;
	v->mem = v->w.region.addr;
	v->mem_bytes = v->w.region.size;
	return 0;
}

static int begin(struct life *v, const char *path)
{
	memset(v, 0, sizeof(*v));
	v->kind = rnd(KINDS);
	v->region = (struct seg)SEG_INIT;
	v->w.region = (struct seg)SEG_INIT;
	v->file = -1;
	if (wl_connect(&v->l, path) || wl_model(&v->l, "scribble", 0, 0, 2, 3, 64, 64))
		return -1;
	if (v->kind == WINDOW)
		return open_window(v);
	return open_region(v, 1 << 20) || open_seq(v) ? -1 : 0;
}

static void finish(struct life *v)
{
	if (v->l.wake) {
		wl_close(&v->l);
	} else {
		close_fdp(&v->l.fd);
	}
	wq_free(&v->w);
	seg_close(&v->region);
	close_fdp(&v->file);
}

/* ---- harm ------------------------------------------------------------------------------ */

static void noise(uint8_t *p, size_t size)
{
	size_t n = (size_t[]){1, 4, 8, 64, 4096}[rnd(5)], off = rnd((uint32_t)size);

	n = MIN(n, size - off);
	for (size_t i = 0; i < n; i++)
		__atomic_store_n(p + off + i, (uint8_t)rnd(256), __ATOMIC_RELAXED);
	writes++;
}

/* A word of the control segment that means something. */
static void lie(struct life *v)
{
	uint32_t *word = v->l.ctl.addr;

	writes++;
	switch (rnd(8)) {
	case 0: /* submit ring, tail */
		__atomic_fetch_add(&word[32], rnd(4), __ATOMIC_SEQ_CST);
		break;
	case 1: /* complete ring, head; the submit ring's, which is the daemon's to write */
		__atomic_fetch_add(&word[ctl_cq_off(64) / 4], rnd(3), __ATOMIC_SEQ_CST);
		__atomic_store_n(&word[0], rnd(1u << 31), __ATOMIC_SEQ_CST);
		break;
	case 2:
		__atomic_store_n(&word[32], rnd(2) ? UINT32_MAX : rnd(1u << 31), __ATOMIC_SEQ_CST);
		break;
	case 3:
		__atomic_store_n(&v->slot->acked, rnd(6), __ATOMIC_SEQ_CST);
		break;
	case 4:
		__atomic_store_n(&v->slot->gathered, (uint64_t)rnd(4) << 32 | rnd(64), __ATOMIC_SEQ_CST);
		__atomic_store_n(&v->slot->drained, (uint64_t)rnd(4) << 32 | rnd(64), __ATOMIC_SEQ_CST);
		break;
	case 5: {
		struct ring_entry e = {.type = rnd(3), .handle = rnd(2) ? v->seq + rnd(3) - 1 : rnd(1u << 30)};

		ring_push(&v->l.sq, &e);
		break;
	}
	default: /* rows as they could be */
		v->rows = MIN(v->rows + rnd(24), 1024u);
		__atomic_store_n(&v->slot->len, rnd(64) ? v->rows : seq_len_pack(rnd(2), rnd(1100)),
				 __ATOMIC_SEQ_CST);
	}
}

static void shorten(struct life *v)
{
	if (rnd(2))
		(void)!ftruncate(v->file, (off_t)rnd(2) * (1 << 20));
	else
		(void)!fallocate(v->file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 1 << 20);
	writes++;
}

static int ask(struct life *v)
{
	struct wire_plan_request m;

	wire_init(&m.hdr, W_PLAN_REQUEST, sizeof(m), 5);
	m.seq = v->seq;
	m.budget = (struct wire_budget){.device_rows = rnd(128),
					.dram_rows = rnd(128),
					.nvme_rows = rnd(512),
					.set = 1,
					.slack_rows = 16};
	requests++;
	return wl_call(&v->l, &m.hdr) == -1000 ? -1 : 0;
}

static int step(struct life *v)
{
	uint64_t one = 1;

	switch (rnd(8)) {
	case 0:
		noise(v->l.ctl.addr, v->l.ctl.size);
		break;
	case 1:
		noise((uint8_t *)v->slot, sizeof(*v->slot));
		break;
	case 2:
	case 3:
		for (int i = 0; v->mem && i < 8; i++)
			noise(v->mem, v->mem_bytes);
		if (v->kind == IMPORT)
			shorten(v);
		break;
	case 4:
		return rnd(4) ? 0 : ask(v);
	default:
		lie(v);
	}
	if (rnd(4) == 0 && write(v->l.wake, &one, sizeof(one)) < 0)
		return -1;
	return 0;
}

/* What was right for a while is harder to see through: some lives only write rows and windows at first. */
static void live(struct life *v)
{
	uint64_t end = now_ns() + LIFE_NS, calm = rnd(2) ? now_ns() + LIFE_NS / 2 : 0;
	uint64_t one = 1;

	while (!stop && now_ns() < end) {
		if (now_ns() < calm && v->mem) {
			noise(v->mem, v->mem_bytes);
			if (rnd(64) == 0 && v->rows < 200) {
				__atomic_store_n(&v->slot->len, v->rows += 8, __ATOMIC_SEQ_CST);
				if (write(v->l.wake, &one, sizeof(one)) < 0 || ask(v) < 0)
					break;
			}
		} else if (step(v) < 0) {
			hangups++;
			break;
		}
	}
}

int main(int argc, char **argv)
{
	struct life *v = malloc(sizeof(*v));

	if (argc < 2 || !v)
		return 2;
	rnd_state = (argc > 2 ? strtoull(argv[2], NULL, 10) : 11) * 0x9e3779b97f4a7c15u | 1;
	signal(SIGTERM, on_term);
	signal(SIGPIPE, SIG_IGN);
	freopen("/dev/null", "w", stderr); /* window_double.h says what it did not expect: all of it is */
	while (!stop) {
		lives++;
		if (begin(v, argv[1]) < 0)
			usleep(1000);
		else
			live(v);
		finish(v);
	}
	printf("{\"lives\": %llu, \"hangups\": %llu, \"writes\": %llu, \"requests\": %llu}\n",
	       (unsigned long long)lives, (unsigned long long)hangups, (unsigned long long)writes,
	       (unsigned long long)requests);
	free(v);
	return 0;
}
