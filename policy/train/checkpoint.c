/* SPDX-License-Identifier: MIT */
/*
 * Layout of a checkpoint: struct head, the fields that make a run what it is
 * (u64 each), per-lane words, the curve, then five vectors per lane. The CRC covers
 * all that follows the head.
 */
#include "policy/train/run.h"
#include "shm/crc.h"
#include "shm/util.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>

#define MAGIC "KVTRAIN1"
#define MAX_FIELDS 48u

struct head {
	char magic[8];
	uint32_t fields, crc;
	uint64_t size; /* bytes that follow */
	uint64_t step, validations;
	double seconds;
};

struct field {
	const char *name;
	uint64_t value; /* floats by their bits */
	bool real;
};

static uint64_t bits(float f)
{
	uint32_t word;

	memcpy(&word, &f, sizeof(word));
	return word;
}

/* Everything that the result depends on. Threads and device are not in it: what they change is rounding at
 * most. */
static uint32_t describe(struct field *f, const struct run *r)
{
	const struct run_opts *o = &r->o;
	const struct train_opts *t = &o->t;
	const struct weights_header *h = &t->shape;
	const struct field all[] = {
		{"doc-rows", o->s.doc_rows, false}, /* first: checkpoint_doc_rows() */
		{"first lane", o->s.lane_first, false},
		{"lanes", t->lanes, false},
		{"objective", t->objective, false},
		{"reward", t->reward, false},
		{"weighting", t->weighting, false},
		{"utility", o->s.utility, false},
		{"net kind", h->kind, false},
		{"k_dim", h->k_dim, false},
		{"v_dim", h->v_dim, false},
		{"proj", h->proj, false},
		{"hidden", h->hidden, false},
		{"rank", h->rank, false},
		{"keys", h->keys, false},
		{"position", h->pos_kind, false},
		{"position rows", h->pos_rows, false},
		{"position width", h->pos_dim, false},
		{"distance", h->dist_rows, false},
		{"octave", h->octave, false},
		{"steps", o->steps, false},
		{"batch", t->batch, false},
		{"rows", t->rows, false},
		{"perms", t->perms, false},
		{"lr", bits(o->lr), true},
		{"lr-min", bits(o->lr_min), true},
		{"warmup", o->warmup, false},
		{"validate", o->validate, false},
		{"ema", bits(t->ema), true},
		{"ema-start", t->ema_start, false},
		{"clip", bits(t->clip), true},
		{"weight-decay", bits(t->weight_decay), true},
		{"seed", t->seed, false},
		{"limit", o->s.limit, false},
		{"traces", r->set ? r->set->digest : 0, false},
	};

	static_assert(ARRAY_SIZE(all) <= MAX_FIELDS, "room");
	memcpy(f, all, sizeof(all));
	return ARRAY_SIZE(all);
}

struct stream {
	int fd;
	bool write;
	uint32_t crc;
	uint64_t bytes;
	int error;
};

/* Both directions go the same way through the state. */
static void pass(struct stream *s, void *buf, size_t n)
{
	char *p = buf;
	size_t left = n;

	while (left > 0 && !s->error) {
		ssize_t k = s->write ? write(s->fd, p, MIN(left, (size_t)1 << 30))
				     : read(s->fd, p, MIN(left, (size_t)1 << 30));

		if (k < 0 && errno == EINTR)
			continue;
		if (k <= 0) {
			s->error = k < 0 ? -errno : -EBADMSG;
			return;
		}
		p += k;
		left -= (size_t)k;
	}
	if (s->error)
		return;
	s->crc = crc32c(s->crc, buf, n);
	s->bytes += n;
}

static void pass_state(struct stream *s, struct run *r, float *vector)
{
	uint32_t lanes = r->o.t.lanes;

	pass(s, r->best_regret, lanes * sizeof(*r->best_regret));
	pass(s, r->best_step, lanes * sizeof(*r->best_step));
	pass(s, r->curve, r->validations * lanes * sizeof(*r->curve));
	pass(s, r->best, lanes * r->net.params * sizeof(float));
	for (uint32_t x = 0; x < 4 * lanes && !s->error; x++) {
		const struct train_backend_ops *ops = r->backend->ops;

		if (s->write)
			s->error = ops->get(r->backend, x % 4, x / 4, vector);
		pass(s, vector, r->net.params * sizeof(float));
		if (!s->write && !s->error)
			s->error = ops->set(r->backend, x % 4, x / 4, vector);
	}
}

static int write_head(int fd, const struct head *h)
{
	return pwrite(fd, h, sizeof(*h), 0) == sizeof(*h) ? 0 : -EIO;
}

int checkpoint_save(struct run *r)
{
	_cleanup_free_ float *vector = calloc(r->net.params, sizeof(*vector));
	_cleanup_free_ char *tmp = NULL;
	_cleanup_close_ int fd = -1;
	struct field f[MAX_FIELDS];
	uint64_t values[MAX_FIELDS];
	struct head h = {.magic = MAGIC, .step = r->step, .validations = r->validations, .seconds = r->seconds};
	struct stream s = {.write = true};

	if (!vector || asprintf(&tmp, "%s.part", r->o.checkpoint) < 0)
		return -ENOMEM;
	fd = open(tmp, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
	if (fd < 0) {
		s.error = -errno;
		goto out;
	}
	s.fd = fd;
	s.error = lseek(fd, sizeof(h), SEEK_SET) < 0 ? -errno : 0;
	h.fields = describe(f, r);
	for (uint32_t i = 0; i < h.fields; i++)
		values[i] = f[i].value;
	pass(&s, values, h.fields * sizeof(*values));
	pass_state(&s, r, vector);
	h.crc = s.crc;
	h.size = s.bytes;
	if (!s.error)
		s.error = write_head(fd, &h);
	if (!s.error && (fsync(fd) < 0 || rename(tmp, r->o.checkpoint) < 0))
		s.error = -errno;
	if (s.error)
		unlink(tmp);
out:
	if (s.error)
		snprintf(r->error, sizeof(r->error), "checkpoint %s: %s", r->o.checkpoint, strerror(-s.error));
	return s.error;
}

static int bad(struct run *r, const char *why)
{
	snprintf(r->error, sizeof(r->error), "checkpoint %s: %s", r->o.checkpoint, why);
	return -EBADMSG;
}

/* CRC before anything is believed. */
static int verify(struct run *r, int fd, struct head *h)
{
	char buf[65536];
	uint64_t size = 0;
	uint32_t crc = 0;
	ssize_t n;

	if (read(fd, h, sizeof(*h)) != sizeof(*h) || memcmp(h->magic, MAGIC, 8) != 0)
		return bad(r, "not one of this program");
	while ((n = read(fd, buf, sizeof(buf))) > 0) {
		crc = crc32c(crc, buf, (size_t)n);
		size += (uint64_t)n;
	}
	if (n < 0 || size != h->size)
		return bad(r, "cut short");
	if (crc != h->crc)
		return bad(r, "damaged (CRC)");
	return lseek(fd, sizeof(*h), SEEK_SET) < 0 ? -errno : 0;
}

static void name_value(char *to, size_t size, const struct field *f)
{
	uint32_t word = (uint32_t)f->value;
	float real;

	memcpy(&real, &word, sizeof(real));
	if (f->real)
		snprintf(to, size, "%g", (double)real);
	else
		snprintf(to, size, "%llu", (unsigned long long)f->value);
}

static int compare(struct run *r, struct stream *s, uint32_t fields)
{
	struct field f[MAX_FIELDS];
	uint64_t values[MAX_FIELDS];
	char was[32], is[32];
	uint32_t n = describe(f, r);

	if (fields != n)
		return bad(r, "of another version of this program");
	pass(s, values, n * sizeof(*values));
	for (uint32_t i = 0; i < n && !s->error; i++) {
		if (values[i] == f[i].value)
			continue;
		name_value(was, sizeof(was), &(struct field){f[i].name, values[i], f[i].real});
		name_value(is, sizeof(is), &f[i]);
		snprintf(r->error, sizeof(r->error),
			 "checkpoint %s: %s: %s, this run has %s; remove it or use --resume no",
			 r->o.checkpoint, f[i].name, was, is);
		return -EINVAL;
	}
	return s->error;
}

int checkpoint_load(struct run *r)
{
	_cleanup_free_ float *vector = calloc(r->net.params, sizeof(*vector));
	_cleanup_close_ int fd = open(r->o.checkpoint, O_RDONLY | O_CLOEXEC);
	uint64_t lane_bytes = (uint64_t)r->o.t.lanes * (16 + 20 * r->net.params);
	struct stream s = {.write = false};
	struct head h;
	int x;

	if (fd < 0)
		return -errno;
	if (!vector)
		return -ENOMEM;
	x = verify(r, fd, &h);
	if (x < 0)
		return x;
	s.fd = fd;
	x = compare(r, &s, h.fields);
	if (x < 0)
		return x;
	if (h.step > r->o.steps || h.validations > r->o.steps / r->o.validate + 1 ||
	    h.size != s.bytes + lane_bytes + h.validations * r->o.t.lanes * sizeof(float))
		return bad(r, "sizes do not fit together");
	r->step = h.step;
	r->validations = h.validations;
	r->seconds = h.seconds;
	pass_state(&s, r, vector);
	return s.error ? bad(r, "cannot be read") : 0;
}

uint32_t checkpoint_doc_rows(const char *path)
{
	_cleanup_close_ int fd = open(path, O_RDONLY | O_CLOEXEC);
	uint64_t rows;
	struct head h;

	if (fd < 0 || read(fd, &h, sizeof(h)) != sizeof(h) || memcmp(h.magic, MAGIC, 8) != 0 ||
	    read(fd, &rows, sizeof(rows)) != sizeof(rows))
		return 0;
	return (uint32_t)MIN(rows, (uint64_t)UINT32_MAX);
}
