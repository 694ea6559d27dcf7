/* SPDX-License-Identifier: MIT */
/*
 * Reading .kvp files: the checks, in the order of the file, each with its own
 * line. The file is read, not mapped: a mapping of a file that somebody
 * truncates later would raise SIGBUS in the middle of scoring.
 */
#include "policy/weights.h"
#include "shm/trial.h"
#include "shm/util.h"

#include <fcntl.h>
#include <openssl/sha.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

static int __attribute__((format(printf, 3, 4))) refuse(char *err, size_t errsize, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(err, errsize, fmt, ap);
	va_end(ap);
	return -EBADMSG;
}

static int check_u64(const char *field, uint64_t v, uint64_t must, char *err, size_t errsize)
{
	if (v == must)
		return 0;
	return refuse(err, errsize, "%s: %llu, must be %llu", field, (unsigned long long)v,
		      (unsigned long long)must);
}

/* `size` is what the file system, or the caller, says the file has. */
static int check_header(const struct weights_header *h, uint64_t size, struct weights_layout *layout, char *err,
			size_t errsize)
{
	static const uint8_t zeros[sizeof(h->reserved1)];
	uint64_t end;
	int r;

	if (memcmp(h->magic, WEIGHTS_MAGIC, 8) != 0)
		return refuse(err, errsize, "magic: not %s, this is no weight file", WEIGHTS_MAGIC);
	r = check_u64("version", h->version, WEIGHTS_VERSION, err, errsize);
	if (r == 0)
		r = check_u64("header_size", h->header_size, WEIGHTS_HEADER, err, errsize);
	if (r == 0)
		r = check_u64("total_size", h->total_size, size, err, errsize);
	if (r == 0 && size > WEIGHTS_MAX_BYTES)
		r = refuse(err, errsize, "total_size: %llu, must be at most %llu", (unsigned long long)size,
			   (unsigned long long)WEIGHTS_MAX_BYTES);
	if (r == 0)
		r = weights_check_shape(h, err, errsize);
	if (r == 0)
		r = weights_lay_out(layout, h);
	if (r == 0)
		r = check_u64("lane_off", h->lane_off, WEIGHTS_HEADER, err, errsize);
	if (r == 0)
		r = check_u64("lane_stride", h->lane_stride, layout->stride, err, errsize);
	if (r < 0)
		return r;
	end = WEIGHTS_HEADER + (uint64_t)h->layers * h->heads * layout->stride;
	if (h->calib_size % 4 != 0 || h->calib_size > WEIGHTS_MAX_BYTES)
		return refuse(err, errsize, "calib_size: %llu, must be a multiple of 4 up to %llu",
			      (unsigned long long)h->calib_size, (unsigned long long)WEIGHTS_MAX_BYTES);
	r = check_u64("calib_off", h->calib_off, h->calib_size ? end : 0, err, errsize);
	if (r == 0)
		r = check_u64("total_size", h->total_size, end + h->calib_size, err, errsize);
	if (r == 0 && memcmp(h->reserved1, zeros, sizeof(zeros)) != 0)
		r = refuse(err, errsize, "reserved1: not zero, must be 0");
	return r;
}

static bool all_finite(const void *p, uint64_t count, uint32_t elem, uint64_t *bad)
{
	const uint16_t *half = p;
	const uint32_t *word = p;

	for (uint64_t i = 0; i < count; i++) {
		if (elem == 2 ? (half[i] & 0x7f80) == 0x7f80 : (word[i] & 0x7f800000) == 0x7f800000) {
			*bad = i;
			return false;
		}
	}
	return true;
}

static int check_finite(const struct weights *w, char *err, size_t errsize)
{
	uint64_t bad;

	if (planted("weights-infinite-accepted"))
		return 0;
	for (uint32_t lane = 0; lane < w->lanes; lane++) {
		if (all_finite(weights_at(w, lane, 0), w->layout.params, w->layout.elem, &bad))
			continue;
		for (uint32_t t = 0; t < w->layout.count; t++) {
			const struct weights_tensor *x = &w->layout.tensor[t];

			if (!all_finite(weights_at(w, lane, t), (uint64_t)x->rows * x->cols, w->layout.elem,
					&bad))
				return refuse(err, errsize,
					      "layer %u head %u %s[%llu]: not finite, every weight must be",
					      lane / w->h.heads, lane % w->h.heads, x->name,
					      (unsigned long long)bad);
		}
	}
	if (!all_finite(w->image + w->h.calib_off, w->h.calib_size / 4, 4, &bad))
		return refuse(err, errsize, "calibration[%llu]: not finite, every value must be",
			      (unsigned long long)bad);
	return 0;
}

static int check_digest(const struct weights *w, char *err, size_t errsize)
{
	uint8_t digest[SHA256_DIGEST_LENGTH];

	if (!SHA256(w->image + WEIGHTS_DIGESTED, w->h.total_size - WEIGHTS_DIGESTED, digest))
		return -ENOMEM;
	if (memcmp(digest, w->h.digest, sizeof(digest)) == 0 || planted("weights-hash-skipped"))
		return 0;
	return refuse(err, errsize,
		      "digest: SHA-256 is %02x%02x%02x%02x..., the header says %02x%02x%02x%02x...", digest[0],
		      digest[1], digest[2], digest[3], w->h.digest[0], w->h.digest[1], w->h.digest[2],
		      w->h.digest[3]);
}

/* A header that passed becomes an object whose image has its header in place and the rest to be filled. */
static int begin(struct weights **ret, const void *header, uint64_t size, char *err, size_t errsize)
{
	struct weights *w = calloc(1, sizeof(*w));
	int r;

	if (!w)
		return -ENOMEM;
	memcpy(&w->h, header, sizeof(w->h));
	r = check_header(&w->h, size, &w->layout, err, errsize);
	if (r == 0) {
		w->lanes = w->h.layers * w->h.heads;
		w->image = aligned_alloc(WEIGHTS_ALIGN, ALIGN_UP(size, (uint64_t)WEIGHTS_ALIGN));
		r = w->image ? 0 : -ENOMEM;
	}
	if (r < 0) {
		weights_free(w);
		return r;
	}
	memcpy(w->image, header, sizeof(w->h));
	*ret = w;
	return 0;
}

static int finish(struct weights **ret, struct weights *w, char *err, size_t errsize)
{
	int r = check_digest(w, err, errsize);

	if (r == 0)
		r = check_finite(w, err, errsize);
	if (r < 0) {
		weights_free(w);
		return r;
	}
	*ret = w;
	return 0;
}

int weights_parse(struct weights **ret, const void *buf, size_t size, char *err, size_t errsize)
{
	struct weights *w;
	int r;

	if (size < WEIGHTS_HEADER)
		return refuse(err, errsize, "size: %zu bytes, must be at least %u", size, WEIGHTS_HEADER);
	r = begin(&w, buf, size, err, errsize);
	if (r < 0)
		return r;
	memcpy(w->image + WEIGHTS_HEADER, (const char *)buf + WEIGHTS_HEADER, size - WEIGHTS_HEADER);
	return finish(ret, w, err, errsize);
}

/* 0, -errno, or -EBADMSG when the file ends before `size` bytes. */
static int read_all(int fd, uint8_t *buf, uint64_t size, uint64_t off)
{
	while (size > 0) {
		ssize_t n = pread(fd, buf, MIN(size, (uint64_t)64 << 20), (off_t)off);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		if (n == 0)
			return -EBADMSG;
		buf += n;
		off += (uint64_t)n;
		size -= (uint64_t)n;
	}
	return 0;
}

static int load_fd(struct weights **ret, int fd, char *err, size_t errsize)
{
	uint8_t header[WEIGHTS_HEADER] __attribute__((aligned(8)));
	struct weights *w;
	struct stat st;
	int r;

	if (fstat(fd, &st) < 0)
		return -errno;
	if (!S_ISREG(st.st_mode))
		return refuse(err, errsize, "type: not a regular file, must be one");
	if (st.st_size < WEIGHTS_HEADER)
		return refuse(err, errsize, "size: %lld bytes, must be at least %u", (long long)st.st_size,
			      WEIGHTS_HEADER);
	r = read_all(fd, header, sizeof(header), 0);
	if (r == 0)
		r = begin(&w, header, (uint64_t)st.st_size, err, errsize);
	if (r < 0)
		return r;
	r = read_all(fd, w->image + WEIGHTS_HEADER, w->h.total_size - WEIGHTS_HEADER, WEIGHTS_HEADER);
	if (r < 0) {
		if (r == -EBADMSG)
			refuse(err, errsize, "size: file ends before total_size %llu",
			       (unsigned long long)w->h.total_size);
		weights_free(w);
		return r;
	}
	return finish(ret, w, err, errsize);
}

int weights_load(struct weights **ret, const char *path, char *err, size_t errsize)
{
	/* O_NONBLOCK: opening a fifo must not hang; it is refused as no regular file. */
	_cleanup_close_ int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
	char why[256] = "";
	int r;

	r = fd < 0 ? -errno : load_fd(ret, fd, why, sizeof(why));
	if (r < 0)
		snprintf(err, errsize, "%s: %s", path, *why ? why : strerror(-r));
	return r;
}

void weights_free(struct weights *w)
{
	if (!w)
		return;
	free(w->image);
	free(w);
}

const void *weights_at(const struct weights *w, uint32_t lane, uint32_t t)
{
	return w->image + w->h.lane_off + lane * w->h.lane_stride + w->layout.tensor[t].off;
}
