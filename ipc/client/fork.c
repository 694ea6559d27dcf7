/* SPDX-License-Identifier: MIT */
/*
 * A child sequence. Its device rows are the parent's resident rows below the
 * prefix; packing makes them the first slots of every lane, so each plane is
 * one copy. They are in place before the daemon hears of the child, because it
 * may move them from its first moment.
 */
#include <string.h>
#include "ipc/client/client.h"

static void copy_plane(const struct kvtier_seq *from, struct kvtier_seq *to, uint32_t layer, uint32_t lane,
		       bool v, uint32_t n)
{
	const struct kvtier_layout *a = &from->layouts[layer], *b = &to->layouts[layer];
	size_t bytes = plane_bytes(from, layer, v), sa = v ? a->v_row_stride : a->k_row_stride,
	       sb = v ? b->v_row_stride : b->k_row_stride;
	const char *src = plane_slot(from, layer, lane, v, 0);
	char *dst = plane_slot(to, layer, lane, v, 0);

	if (sa == bytes && sb == bytes) {
		memcpy(dst, src, n * bytes);
		return;
	}
	for (uint32_t i = 0; i < n; i++)
		memcpy(dst + i * sb, src + i * sa, bytes);
}

/* The child's bitmaps below prefix, and how many rows each lane gets. */
static int take_residency(const struct kvtier_seq *parent, struct kvtier_seq *child, uint32_t prefix,
			  uint32_t *n)
{
	for (uint32_t layer = 0, lane = 0; layer < parent->n_layers; layer++)
		for (; lane < parent->m->first_lane[layer + 1]; lane++) {
			uint64_t *bits = child->resident + (size_t)lane * child->words;

			for (uint32_t w = 0; w < BITS_WORDS(prefix); w++)
				bits[w] = rows_word(parent, lane, w, prefix);
			n[lane] = bits_rank(bits, prefix);
			if (n[lane] > child->layouts[layer].cap)
				return err_set(
					KVT_E_NOSPC,
					"layer %u: %u rows of the parent, must be at most the child's cap %u",
					layer, n[lane], child->layouts[layer].cap);
		}
	return 0;
}

static int copy_rows(const struct kvtier_seq *parent, struct kvtier_seq *child, uint32_t prefix)
{
	_cleanup_free_ uint32_t *n = calloc((size_t)parent->lanes * 2, sizeof(*n));
	int r;

	if (!n)
		return err_set(KVT_E_NOMEM, "fork: out of memory");
	r = take_residency(parent, child, prefix, n);
	if (!r)
		r = planes_commit(child, n + parent->lanes, n);
	if (r)
		return r;
	for (uint32_t layer = 0, lane = 0; layer < parent->n_layers; layer++)
		for (; lane < parent->m->first_lane[layer + 1]; lane++) {
			copy_plane(parent, child, layer, lane, false, n[lane]);
			if (plane_bytes(parent, layer, true))
				copy_plane(parent, child, layer, lane, true, n[lane]);
		}
	return 0;
}

/* Hold what is resident in the parent, from the copy to the daemon's answer. */
static int hold(struct kvtier_seq *parent, uint32_t prefix)
{
	int r;

	pthread_mutex_lock(&parent->c->lock);
	r = seq_gate(parent);
	if (!r && (parent->busy || parent->applied))
		r = err_set(KVT_E_BUSY, "fork: %s",
			    parent->busy ? "another call is at work on the parent"
					 : "an applied plan must be acknowledged first");
	if (!r && prefix > parent->rows)
		r = err_set(KVT_E_INVAL, "prefix: %u, must be at most the parent's %u rows", prefix,
			    parent->rows);
	if (!r)
		parent->busy = SEQ_HELD;
	pthread_mutex_unlock(&parent->c->lock);
	return r;
}

int kvtier_seq_fork(struct kvtier_seq *parent, uint32_t prefix, const struct kvtier_seq_opts *opts,
		    struct kvtier_seq **ret)
{
	struct kvtier_seq_opts o;
	struct kvtier_seq *s = NULL;
	int r;

	if (!parent || !ret)
		return err_set(KVT_E_INVAL, "%s: NULL, must be given", parent ? "ret" : "parent");
	if (forked(parent->c))
		return err_forked();
	r = seq_on_host(parent, "another sequence");
	if (!r)
		r = opts_take(&o, sizeof(o), opts, "opts");
	if (!r && prefix > o.max_rows)
		r = err_set(KVT_E_INVAL, "prefix: %u, must be at most max_rows %u", prefix, o.max_rows);
	if (!r)
		r = seq_new(parent->c, parent->m, &o, NULL, &s);
	if (r)
		return r;
	r = planes_mapped(parent);
	if (!r)
		r = planes_mapped(s);
	if (!r)
		r = hold(parent, prefix);
	if (!r) {
		r = copy_rows(parent, s, prefix);
		if (!r)
			r = seq_ask(s, &o, W_OP_FORK, parent, prefix);
		pthread_mutex_lock(&parent->c->lock);
		parent->busy = SEQ_IDLE;
		pthread_mutex_unlock(&parent->c->lock);
	}
	if (r) {
		seq_discard(s);
		return r;
	}
	*ret = s;
	return 0;
}
