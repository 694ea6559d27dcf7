/* SPDX-License-Identifier: MIT */
/* Reading calibration tables and looking scores up in them. */
#include "policy/calibrate.h"
#include "shm/crc.h"
#include "shm/file.h"
#include "shm/util.h"

#include <assert.h>
#include <fcntl.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#define FIXED_WORDS 6u
#define MOST_LANES (1u << 20)
#define MOST_KNOTS 4096u
#define FILE_MAGIC "KVTCALIB"

struct file_head {
	char magic[8];
	uint32_t version, crc; /* crc of all that follows it */
	uint64_t size;
	char policy[32], model[64];
};
static_assert(sizeof(struct file_head) == 120, "layout is the format");

static int __attribute__((format(printf, 3, 4))) refuse(char *err, size_t errsize, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(err, errsize, fmt, ap);
	va_end(ap);
	return -EBADMSG;
}

static size_t buckets(const struct calibrate_shape *s)
{
	return (size_t)s->lengths * s->distances;
}

size_t calibrate_stride(const struct calibrate_shape *s)
{
	return 1 + buckets(s) * 2 * s->knots;
}

size_t calibrate_head(const struct calibrate_shape *s)
{
	return FIXED_WORDS + s->lengths - 1 + s->distances - 1;
}

uint64_t calibrate_bytes(const struct calibrate_shape *s)
{
	return (calibrate_head(s) + (uint64_t)s->lanes * calibrate_stride(s)) * sizeof(float);
}

void calibrate_begin(float *table, const struct calibrate_shape *s)
{
	const float fixed[FIXED_WORDS] = {CALIBRATE_MAGIC, CALIBRATE_VERSION, (float)s->lanes,
					  (float)s->knots, (float)s->lengths, (float)s->distances};

	memcpy(table, fixed, sizeof(fixed));
	table += FIXED_WORDS;
	for (uint32_t i = 0; i + 1 < s->lengths; i++)
		*table++ = s->length_edge[i];
	for (uint32_t i = 0; i + 1 < s->distances; i++)
		*table++ = s->distance_edge[i];
}

/* A whole number from 1 to max, as a float from a file. */
static int count_of(uint32_t *ret, const char *field, float f, uint32_t max, char *err, size_t errsize)
{
	if (!(f >= 1 && f <= (float)max && f == floorf(f)))
		return refuse(err, errsize, "calibration: %s: %g, must be a whole number from 1 to %u", field,
			      (double)f, max);
	*ret = (uint32_t)f;
	return 0;
}

static int check_edges(float *to, const float *edge, uint32_t n, const char *field, char *err, size_t errsize)
{
	for (uint32_t i = 0; i < n; i++) {
		if (!(edge[i] > 0 && edge[i] < 1e9f) || (i && edge[i] <= edge[i - 1]))
			return refuse(err, errsize, "calibration: %s edge %u: %g, must be above %g", field, i,
				      (double)edge[i], i ? (double)edge[i - 1] : 0.0);
		to[i] = edge[i];
	}
	return 0;
}

static int check_lane(const float *p, const struct calibrate_shape *s, uint32_t lane, char *err, size_t errsize)
{
	for (size_t i = 0; i < calibrate_stride(s); i++)
		if (!isfinite(p[i]))
			return refuse(err, errsize, "calibration: lane %u word %zu: not finite", lane, i);
	if (p[0] < 0)
		return refuse(err, errsize, "calibration: lane %u sensitivity: %g, must not be negative", lane,
			      (double)p[0]);
	for (size_t b = 0; b < buckets(s); b++) {
		const float *score = p + 1 + b * 2 * s->knots, *value = score + s->knots;

		for (uint32_t k = 0; k < s->knots; k++) {
			if (value[k] < 0)
				return refuse(err, errsize,
					      "calibration: lane %u value %u: %g, must not be negative", lane,
					      k, (double)value[k]);
			if (k && (score[k] < score[k - 1] || value[k] < value[k - 1]))
				return refuse(err, errsize,
					      "calibration: lane %u knot %u: below the knot before it", lane,
					      k);
		}
	}
	return 0;
}

int calibrate_parse(struct calibration *ret, const void *table, uint64_t size, uint32_t lanes, char *err,
		    size_t errsize)
{
	struct calibration c = {.owned = NULL};
	struct calibrate_shape *s = &c.shape;
	const float *f = table;
	int r;

	if (size % sizeof(float) || size < FIXED_WORDS * sizeof(float))
		return refuse(err, errsize, "calibration: %llu bytes, must be a multiple of 4 from 24 on",
			      (unsigned long long)size);
	if (f[0] != CALIBRATE_MAGIC)
		return refuse(err, errsize, "calibration: magic: %g, must be %.0f", (double)f[0],
			      (double)CALIBRATE_MAGIC);
	if (f[1] != CALIBRATE_VERSION)
		return refuse(err, errsize, "calibration: version: %g, must be %g", (double)f[1],
			      (double)CALIBRATE_VERSION);
	r = count_of(&s->lanes, "lanes", f[2], MOST_LANES, err, errsize);
	if (r == 0)
		r = count_of(&s->knots, "knots", f[3], MOST_KNOTS, err, errsize);
	if (r == 0)
		r = count_of(&s->lengths, "lengths", f[4], CALIBRATE_MAX_BUCKETS, err, errsize);
	if (r == 0)
		r = count_of(&s->distances, "distances", f[5], CALIBRATE_MAX_BUCKETS, err, errsize);
	if (r < 0)
		return r;
	if (s->lanes != lanes)
		return refuse(err, errsize, "calibration: lanes: %u, must be %u", s->lanes, lanes);
	if (size != calibrate_bytes(s))
		return refuse(err, errsize, "calibration: %llu bytes, must be %llu", (unsigned long long)size,
			      (unsigned long long)calibrate_bytes(s));
	r = check_edges(s->length_edge, f + FIXED_WORDS, s->lengths - 1, "length", err, errsize);
	if (r == 0)
		r = check_edges(s->distance_edge, f + FIXED_WORDS + s->lengths - 1, s->distances - 1,
				"distance", err, errsize);
	c.lane = f + calibrate_head(s);
	for (uint32_t lane = 0; r == 0 && lane < s->lanes; lane++)
		r = check_lane(c.lane + lane * calibrate_stride(s), s, lane, err, errsize);
	if (r == 0)
		*ret = c;
	return r;
}

static uint32_t bucket(const float *edge, uint32_t n, uint32_t x)
{
	uint32_t b = 0;

	while (b + 1 < n && (float)x >= edge[b])
		b++;
	return b;
}

static float look_up(const float *score, const float *value, uint32_t knots, float s)
{
	uint32_t low = 0, high = knots - 1; /* score[low] <= s < score[high] */
	float width;

	if (!(s > score[0]))
		return value[0];
	if (s >= score[high])
		return isfinite(s) ? value[high] : value[0];
	while (high - low > 1) {
		uint32_t mid = (low + high) / 2;

		if (score[mid] <= s)
			low = mid;
		else
			high = mid;
	}
	width = score[high] - score[low]; /* above 0 */
	if (!isfinite(width))             /* so far apart that only their halves' distance is a number */
		return value[low] + (s / 2 - score[low] / 2) / (score[high] / 2 - score[low] / 2) *
					    (value[high] - value[low]);
	return value[low] + (s - score[low]) / width * (value[high] - value[low]);
}

float calibrate_value(const struct calibration *c, uint32_t lane, float score, uint32_t distance, uint32_t n)
{
	const struct calibrate_shape *s = &c->shape;
	uint32_t b = bucket(s->length_edge, s->lengths, n) * s->distances +
		     bucket(s->distance_edge, s->distances, distance);
	const float *p = c->lane + lane * calibrate_stride(s) + 1 + (size_t)b * 2 * s->knots;

	return look_up(p, p + s->knots, s->knots, score);
}

void calibrate_values(const struct calibration *c, uint32_t lane, const float *scores, const uint32_t *pos,
		      uint32_t first_pos, uint32_t count, uint32_t n, float *values)
{
	for (uint32_t i = 0; i < count; i++) {
		uint32_t p = pos ? pos[i] : first_pos + i;

		values[i] = calibrate_value(c, lane, scores[i], p < n ? n - 1 - p : 0, n);
	}
}

float calibrate_sensitivity(const struct calibration *c, uint32_t lane)
{
	return c->lane[lane * calibrate_stride(&c->shape)];
}

void calibrate_drop(struct calibration *c)
{
	if (!c)
		return;
	free(c->owned);
	memset(c, 0, sizeof(*c));
}

static int read_all(int fd, void *buf, size_t n)
{
	char *p = buf;

	while (n > 0) {
		ssize_t k = read(fd, p, n);

		if (k < 0 && errno == EINTR)
			continue;
		if (k <= 0)
			return k < 0 ? -errno : -EBADMSG;
		p += k;
		n -= (size_t)k;
	}
	return 0;
}

static int read_table(int fd, uint64_t size, struct calibration *ret, uint32_t lanes, char *err, size_t errsize)
{
	_cleanup_free_ float *table = NULL;
	struct file_head h;
	uint32_t crc;
	int r = read_all(fd, &h, sizeof(h));

	if (r < 0)
		return r;
	if (memcmp(h.magic, FILE_MAGIC, 8) != 0 || h.version != 1)
		return refuse(err, errsize, "magic and version: must be " FILE_MAGIC " and 1");
	if (h.size != size || size > (uint64_t)1 << 32)
		return refuse(err, errsize, "size: %llu, must be %llu", (unsigned long long)h.size,
			      (unsigned long long)size);
	if (h.policy[31] || h.model[63])
		return refuse(err, errsize, "policy and model: must end with NUL");
	table = malloc(size - sizeof(h) + 1);
	if (!table)
		return -ENOMEM;
	r = read_all(fd, table, size - sizeof(h));
	if (r < 0)
		return r;
	crc = crc32c(0, &h.size, sizeof(h) - offsetof(struct file_head, size));
	crc = crc32c(crc, table, size - sizeof(h));
	if (crc != h.crc)
		return refuse(err, errsize, "CRC32C: %08x, the header says %08x", crc, h.crc);
	r = calibrate_parse(ret, table, size - sizeof(h), lanes, err, errsize);
	if (r < 0)
		return r;
	memcpy(ret->policy, h.policy, sizeof(h.policy));
	memcpy(ret->model, h.model, sizeof(h.model));
	ret->owned = TAKE_PTR(table);
	return 0;
}

int calibrate_load(struct calibration *ret, const char *path, uint32_t lanes, char *err, size_t errsize)
{
	_cleanup_close_ int fd = open(path, O_RDONLY | O_CLOEXEC);
	char line[200] = "cannot be read";
	struct stat st;
	int r;

	if (fd < 0 || fstat(fd, &st) < 0) {
		r = -errno;
		snprintf(err, errsize, "%s: %s", path, strerror(-r));
		return r;
	}
	if (!S_ISREG(st.st_mode) || (uint64_t)st.st_size < sizeof(struct file_head))
		r = refuse(line, sizeof(line), "too short for a calibration file");
	else
		r = read_table(fd, (uint64_t)st.st_size, ret, lanes, line, sizeof(line));
	if (r < 0)
		snprintf(err, errsize, "%s: %s", path, line);
	return r;
}

int calibrate_write(const char *path, const float *table, const struct calibrate_shape *s, const char *policy,
		    const char *model)
{
	struct file_head h = {.magic = FILE_MAGIC, .version = 1};
	size_t bytes = calibrate_bytes(s);

	h.size = sizeof(h) + bytes;
	snprintf(h.policy, sizeof(h.policy), "%s", policy);
	snprintf(h.model, sizeof(h.model), "%s", model);
	h.crc = crc32c(0, &h.size, sizeof(h) - offsetof(struct file_head, size));
	h.crc = crc32c(h.crc, table, bytes);
	return file_replace(path, (struct file_part[]){{&h, sizeof(h)}, {table, bytes}}, 2);
}
