/* SPDX-License-Identifier: MIT */
#include <string.h>
#include "ipc/client/client.h"

static int build_message(const struct kvtier_model_desc *d, struct wire_model **ret)
{
	_cleanup_free_ struct wire_model *m = NULL;
	char err[WIRE_TEXT];
	int r;

	if (!d->name || !d->layers)
		return err_set(KVT_E_INVAL, "%s: NULL, must be given", d->name ? "layers" : "name");
	if (strlen(d->name) >= sizeof(m->name))
		return err_set(KVT_E_INVAL, "name: %zu bytes, must be at most %zu", strlen(d->name),
			       sizeof(m->name) - 1);
	if (!d->n_layers || d->n_layers > WIRE_MAX_LAYERS)
		return err_set(KVT_E_INVAL, "n_layers: %u, must be 1..%u", d->n_layers, WIRE_MAX_LAYERS);
	m = malloc(wire_model_len(d->n_layers));
	if (!m)
		return err_set(KVT_E_NOMEM, "model: out of memory");
	wire_init(&m->hdr, W_MODEL, wire_model_len(d->n_layers), 0);
	wire_string(m->name, sizeof(m->name), d->name);
	m->n_layers = d->n_layers;
	m->dtype = d->dtype;
	m->head_dim = d->head_dim;
	m->rope = d->rope;
	m->post_rope = d->post_rope;
	m->rope_theta = d->rope_theta;
	m->rank = d->rank;
	m->world = d->world;
	m->first_head = d->first_head;
	for (uint32_t i = 0; i < d->n_layers; i++)
		m->layer[i] = (struct wire_layer){.kind = d->layers[i].kind,
						  .kv_heads = d->layers[i].kv_heads,
						  .k_bytes = d->layers[i].k_bytes,
						  .v_bytes = d->layers[i].v_bytes,
						  .side_bytes = d->layers[i].side_bytes,
						  .window = d->layers[i].window};
	/* What the daemon would refuse is refused here, in the same words. */
	r = wire_check(m, m->hdr.len, false, err, sizeof(err));
	if (r)
		return err_set(KVT_E_INVAL, "%s", err);
	*ret = TAKE_PTR(m);
	return 0;
}

int model_ensure(struct kvtier_model *m, uint64_t deadline_ns)
{
	struct kvtier *c = m->c;
	_cleanup_free_ struct wire_model *msg = NULL;
	struct wire_model_reply reply;
	struct link *l = link_get(c);
	struct call k = {
		.reply = &reply, .reply_size = sizeof(reply), .deadline_ns = deadline_ns, .ret_link = &l};
	bool known;
	int r;

	pthread_mutex_lock(&c->lock);
	known = l && m->link_id == l->id;
	link_put_locked(l);
	pthread_mutex_unlock(&c->lock);
	if (known)
		return 0;
	/* Two threads may send it at once: the cookie is written into a copy. */
	msg = malloc(m->msg->hdr.len);
	if (!msg)
		return err_set(KVT_E_NOMEM, "model: out of memory");
	memcpy(msg, m->msg, m->msg->hdr.len);
	k.req = &msg->hdr;
	r = call_run(c, &k);
	if (r)
		return r;
	pthread_mutex_lock(&c->lock);
	if (reply.lanes == m->lanes) {
		m->handle = reply.model;
		m->link_id = l->id;
	} else {
		r = err_set(KVT_E_PROTO, "lanes: %u, must be %u", reply.lanes, m->lanes);
	}
	link_put_locked(l);
	pthread_mutex_unlock(&c->lock);
	return r;
}

int kvtier_model_register(struct kvtier *c, const struct kvtier_model_desc *d, struct kvtier_model **ret)
{
	struct kvtier_model_desc desc;
	struct kvtier_model *m;
	int r;

	if (!c || !ret)
		return err_set(KVT_E_INVAL, "%s: NULL, must be given", c ? "ret" : "c");
	if (forked(c))
		return err_forked();
	r = OPTS_TAKE(&desc, d);
	if (r)
		return r;
	m = calloc(1, sizeof(*m));
	if (!m)
		return err_set(KVT_E_NOMEM, "model: out of memory");
	r = build_message(&desc, &m->msg);
	if (r) {
		free(m);
		return r;
	}
	m->c = c;
	m->refs = 1;
	for (uint32_t i = 0; i < m->msg->n_layers; i++)
		m->first_lane[i + 1] = m->first_lane[i] + m->msg->layer[i].kv_heads;
	m->lanes = m->first_lane[m->msg->n_layers];
	pthread_mutex_lock(&c->lock);
	LIST_INSERT_HEAD(&c->models, m, entry);
	pthread_mutex_unlock(&c->lock);
	r = model_ensure(m, call_deadline(c));
	if (r) {
		kvtier_model_release(m);
		return r;
	}
	*ret = m;
	return 0;
}

void model_put_locked(struct kvtier_model *m)
{
	if (--m->refs)
		return;
	LIST_REMOVE(m, entry);
	free(m->msg);
	free(m);
}

void kvtier_model_release(struct kvtier_model *m)
{
	struct kvtier *c;

	if (!m || forked(m->c))
		return;
	c = m->c;
	pthread_mutex_lock(&c->lock);
	model_put_locked(m);
	pthread_mutex_unlock(&c->lock);
}

uint32_t layer_of(const struct kvtier_model *m, uint32_t lane)
{
	uint32_t i = 0;

	while (m->first_lane[i + 1] <= lane)
		i++;
	return i;
}

int kvtier_layout_plain(struct kvtier_model *m, uint32_t cap, uint32_t stage, uint32_t score_rows,
			uint64_t base, struct kvtier_layout *ret_layers, uint64_t *ret_bytes)
{
	uint64_t off = ALIGN_UP(base, KVT_CACHELINE), slots = (uint64_t)cap + stage;

	if (!m)
		return err_set(KVT_E_INVAL, "m: NULL, must be given");
	if (!cap || cap > WIRE_MAX_ROWS || stage > WIRE_MAX_ROWS || score_rows > WIRE_MAX_ROWS)
		return err_set(KVT_E_INVAL, "cap: %u, stage: %u, score_rows: %u, must be 1..%u, 0..%u, 0..%u",
			       cap, stage, score_rows, WIRE_MAX_ROWS, WIRE_MAX_ROWS, WIRE_MAX_ROWS);
	if (base > WIRE_MAX_REGION)
		return err_set(KVT_E_INVAL, "base: %llu, must be at most %llu", (unsigned long long)base,
			       (unsigned long long)WIRE_MAX_REGION);
	for (uint32_t i = 0; i < m->msg->n_layers; i++) {
		const struct wire_layer *d = &m->msg->layer[i];
		struct kvtier_layout l = {
			.cap = cap, .stage = stage, .k_row_stride = d->k_bytes, .v_row_stride = d->v_bytes};

		l.k_off = off;
		l.k_head_stride = slots * d->k_bytes;
		off += d->kv_heads * l.k_head_stride;
		l.v_off = off;
		l.v_head_stride = slots * d->v_bytes;
		off += d->kv_heads * l.v_head_stride;
		if (ret_layers)
			ret_layers[i] = l;
	}
	off = ALIGN_UP(off, KVT_CACHELINE);
	for (uint32_t i = 0; score_rows && i < m->msg->n_layers; i++) {
		uint64_t stride = (uint64_t)score_rows * sizeof(float);

		if (ret_layers) {
			ret_layers[i].score_off = off;
			ret_layers[i].score_head_stride = stride;
		}
		off += m->msg->layer[i].kv_heads * stride;
	}
	if (ret_bytes)
		*ret_bytes = off - base;
	return 0;
}
