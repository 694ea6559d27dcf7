/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * From a policy's score to what a row is worth: per lane, the attention that a
 * row of this score is expected to receive from one future query (mean over the
 * query group), fitted by isotonic regression on a split of its own. Ranks within
 * a lane do not change; lanes become comparable, so that budgets can move between
 * them.
 *
 * A table holds fp32 values only, all finite, and describes itself. It is the calibration section of a
 * .kvp file, or, for policies without weights, the body of a file of its own:
 *
 *    magic 4407628, version 1, lanes, knots, lengths, distances       whole numbers
 *    edges between the buckets of length [lengths - 1], then of distance [distances - 1], in rows, ascending
 *    per lane: sensitivity, then per bucket [lengths][distances]: score[knots], value[knots]
 *
 * Bucket i of length takes sequences of edge[i - 1] <= n < edge[i] rows; distance likewise, n - 1 - position.
 * score and value ascend (equal neighbours are fine), value >= 0. Between knots a value is linear, beyond them
 * flat. Sensitivity: the mean norm of what a row of the lane contributes (VNORM), relative to the mean over
 * lanes; 1 where traces do not say.
 */
#include <stddef.h>
#include <stdint.h>

#define CALIBRATE_MAGIC 4407628.0f /* "CAL" */
#define CALIBRATE_VERSION 1.0f
#define CALIBRATE_KNOTS 64u
#define CALIBRATE_MAX_BUCKETS 4u /* of length, and of distance */

struct calibrate_shape {
	uint32_t lanes, knots, lengths, distances;
	float length_edge[CALIBRATE_MAX_BUCKETS], distance_edge[CALIBRATE_MAX_BUCKETS];
};

/* A checked table. The values stay the caller's (the weights' image, for instance) unless `owned`. */
struct calibration {
	struct calibrate_shape shape;
	const float *lane;          /* [lanes][calibrate_stride()] */
	float *owned;               /* the whole table, or NULL */
	char policy[32], model[64]; /* of a file of its own, else empty */
};

/* Floats of one lane, of the words before the first lane, and bytes of a table. */
size_t calibrate_stride(const struct calibrate_shape *s);
size_t calibrate_head(const struct calibrate_shape *s);
uint64_t calibrate_bytes(const struct calibrate_shape *s);

/*
 * Check `size` bytes that may be anything, for `lanes` lanes, and point into them (4-byte aligned; they must
 * outlive *ret). 0, or -EBADMSG with one line in err: field, value, limit.
 */
int calibrate_parse(struct calibration *ret, const void *table, uint64_t size, uint32_t lanes, char *err,
		    size_t errsize);

/*
 * Expected attention per future query of the row `distance` rows before the end of a sequence of n rows. Pure;
 * any thread. lane < shape.lanes. A score that is not finite is worth what the lowest one is.
 */
float calibrate_value(const struct calibration *c, uint32_t lane, float score, uint32_t distance, uint32_t n);
/* The same for `count` rows of one lane: scores[i] is of the row at position pos[i], or first_pos + i (pos
 * NULL). */
void calibrate_values(const struct calibration *c, uint32_t lane, const float *scores, const uint32_t *pos,
		      uint32_t first_pos, uint32_t count, uint32_t n, float *values);
float calibrate_sensitivity(const struct calibration *c, uint32_t lane);

/* One row seen by one cut: score and utility per future query. */
struct calibrate_point {
	float score, value;
	uint32_t distance, n;
};

/* Write the words before the first lane. */
void calibrate_begin(float *table, const struct calibrate_shape *s);
/*
 * Fit one lane of a table: per bucket, isotonic regression (pool adjacent violators; Ayer et al. 1955) of value
 * on score, averaged over `knots` groups of consecutive rows that are finer towards the high scores, where the
 * attention is. A bucket of fewer than 32 rows per knot takes the fit of all points. Reorders `points`. 0,
 * -EINVAL (none, or one not finite or negative) or -ENOMEM.
 */
int calibrate_fit(float *table, const struct calibrate_shape *s, uint32_t lane, float sensitivity,
		  struct calibrate_point *points, size_t count);

/*
 * A file of its own, for a policy without weights: "KVTCALIB", u32 version 1, u32 CRC32C of the rest, u64 file
 * size, policy[32], model[64] NUL-padded, then the table. Load: 0, -EBADMSG with one line in err, -ENOMEM or of
 * open and read; drop with calibrate_drop(). Write: through a temporary file beside it; 0 or -errno.
 */
int calibrate_load(struct calibration *ret, const char *path, uint32_t lanes, char *err, size_t errsize);
int calibrate_write(const char *path, const float *table, const struct calibrate_shape *s, const char *policy,
		    const char *model);
void calibrate_drop(struct calibration *c);
