/* SPDX-License-Identifier: MIT */
/* The network prepared for a GPU against the reference of policy/kvp, and what no kernel serves. */
#include "kvp_double.h"

#include "policy/scorer.h"

#include <float.h>
#include <math.h>

#define ROWS 64
/* Operands rounded to bf16 against a reference that rounds nothing: shares of the scores' spread. */
#define RMS_LIMIT 6e-3
#define WORST_LIMIT 6e-2

static struct weights *random_weights(struct weights_header h, uint64_t seed)
{
	_cleanup_free_ uint8_t *image = make_image(h, 0, seed);
	struct weights *w;
	char err[256];

	assert_int_equal(weights_parse(&w, image, image_size(image), err, sizeof(err)), 0);
	return w;
}

static struct scorer_hdr *prepare(const struct weights *w)
{
	struct scorer_hdr h, *s;
	char err[256] = "";

	if (scorer_header(&h, w, err, sizeof(err)) < 0)
		fail_msg("%s", err);
	s = aligned_alloc(256, ALIGN_UP(h.bytes, 256ul));
	assert_non_null(s);
	memset(s, 0, h.bytes);
	assert_int_equal(scorer_build(s, &h, w), 0);
	assert_memory_equal(s, &h, sizeof(h));
	return s;
}

/* Multiply rows [from, to) of a batch by x. */
static void scale_rows(struct rows *r, uint32_t from, uint32_t to, uint32_t dim, enum row_dtype dtype, float x)
{
	for (uint32_t i = from; i < to; i++)
		for (uint32_t j = 0; j < dim; j++) {
			char *k = (char *)r->batch.k + i * r->batch.k_stride,
			     *v = (char *)r->batch.v + i * r->batch.v_stride;

			put_element(k, j, dtype, row_element(k, j, dtype) * x);
			put_element(v, j, dtype, row_element(v, j, dtype) * x);
		}
}

/* Mean square and largest difference of the coefficients of ROWS rows of every lane. */
static void compare(const struct weights *w, enum row_dtype dtype, const uint32_t *pos)
{
	_cleanup_free_ struct scorer_hdr *s = prepare(w);
	struct rows r = make_rows(ROWS, w->h.k_dim, w->h.v_dim, dtype, 0, 0);
	float want[2][ROWS], *coef[2] = {want[0], want[1]};
	double worst = 0, off = 0, sum = 0, squares = 0, count = ROWS * w->lanes;

	scale_rows(&r, 8, 16, w->h.k_dim, dtype, 1e-3f);
	scale_rows(&r, 16, 24, w->h.k_dim, dtype, dtype == ROW_F16 ? 1e3f : 1e6f);
	scale_rows(&r, 24, 26, w->h.k_dim, dtype, 0);
	r.batch.pos = pos;
	for (r.batch.lane = 0; r.batch.lane < w->lanes; r.batch.lane++) {
		kvp_ref_coefs(w, dtype, &r.batch, coef);
		for (uint32_t i = 0; i < ROWS; i++) {
			float got[2] = {NAN, NAN};

			scorer_eval_ref(s, r.batch.lane, dtype, (const char *)r.batch.k + i * r.batch.k_stride,
					(const char *)r.batch.v + i * r.batch.v_stride, pos[i], got);
			for (uint32_t c = 0; c < w->h.rank; c++) {
				double d = fabs(got[c] - want[c][i]);

				worst = fmax(worst, isnan(d) ? HUGE_VAL : d);
				off += d * d / w->h.rank;
			}
			assert_true(w->h.rank == 2 || isnan(got[1])); /* not written */
			sum += want[0][i];
			squares += (double)want[0][i] * want[0][i];
		}
	}
	sum /= count;
	squares = sqrt(squares / count - sum * sum);
	off = sqrt(off / count);
	print_message("# dim %u hidden %u dtype %d: off by %.1e, at most %.1e of scores that spread by %.2f\n",
		      w->h.k_dim, w->h.hidden, dtype, off, worst, squares);
	assert_true(squares > 0.05);
	assert_true(off < RMS_LIMIT * squares && worst < WORST_LIMIT * squares);
	free(r.mem);
}

static void positions(uint32_t *pos, uint32_t last)
{
	for (uint32_t i = 0; i < ROWS; i++)
		pos[i] = i < 8 ? i : (uint32_t)((uint64_t)last * i / (ROWS - 1));
}

static void published_equals_the_reference(void **state)
{
	struct weights *w = random_weights(shape_kvp(128, 128), 3);
	uint32_t pos[ROWS];

	positions(pos, 8000); /* the table ends at 6,000 */
	compare(w, ROW_BF16, pos);
	compare(w, ROW_F16, pos);
	weights_free(w);
}

static void every_served_shape_equals_the_reference(void **state)
{
	struct weights_header h = shape_trained();
	uint32_t pos[ROWS];

	positions(pos, 1u << 20);
	for (uint32_t i = 0; i < 8; i++) {
		struct weights *w;

		h.k_dim = h.v_dim = i & 1 ? 128 : 64;
		h.proj = i & 2 ? 256 : 128; /* 128 wide from 128: the projection has less rank than columns */
		h.hidden = i & 4 ? 256 : 128;
		h.rope_type = i & 1 ? WEIGHTS_ROPE_PAIRS : WEIGHTS_ROPE_HALF;
		h.pos_dim = i & 2 ? 32 : 16;
		w = random_weights(h, 20 + i);
		compare(w, i & 4 ? ROW_F16 : ROW_BF16, pos);
		weights_free(w);
	}
}

static void shipped_equals_the_reference(void **state)
{
	struct weights *w;
	uint32_t pos[ROWS];
	char err[256];

	positions(pos, 1u << 20);
	if (weights_load(&w, "policy/models/smollm2-135m-instruct.kvp", err, sizeof(err)) < 0)
		fail_msg("%s", err);
	compare(w, ROW_F16, pos);
	weights_free(w);
}

/* A row that is no number makes the least of scores, and nothing that is not finite. */
static void absurd_rows_rank_last(void **state)
{
	struct weights *w = random_weights(shape_trained(), 5);
	_cleanup_free_ struct scorer_hdr *s = prepare(w);
	struct rows r = make_rows(1, 64, 64, ROW_F16, 0, 0);
	float got[2];

	((uint16_t *)r.batch.k)[7] = 0x7c00; /* infinite */
	scorer_eval_ref(s, 0, ROW_F16, r.batch.k, r.batch.v, 3, got);
	assert_true(got[0] == -FLT_MAX && got[1] == 0);
	free(r.mem);
	weights_free(w);
}

static void layout_has_room_for_all(void **state)
{
	struct weights *w = random_weights(shape_kvp(128, 128), 3);
	_cleanup_free_ struct scorer_hdr *s = prepare(w);
	uint64_t end = 0;

	for (uint32_t t = 0; t < SCORER_TENSORS; t++) {
		assert_true(s->tensor_off[t] >= end && s->tensor_off[t] % SCORER_ALIGN == 0);
		assert_true(t >= SCORER_VECS ||
			    (s->tensor_off[t] == end && s->tensor_bytes[t] % SCORER_CHUNK == 0));
		end = s->tensor_off[t] + s->tensor_bytes[t];
	}
	assert_true(end <= s->lane_stride);
	assert_true(s->lane_off + s->lane_stride * w->lanes == s->bytes);
	/* Every element of a matrix has a place of its own. */
	for (uint32_t m = 0; m < 2; m++) {
		uint64_t bytes = s->tensor_bytes[m ? SCORER_MK : SCORER_RK];
		_cleanup_free_ uint8_t *seen = calloc(bytes / 2, 1);

		for (uint32_t i = 0; i < (m ? 256u : 128u); i++)
			for (uint32_t j = m ? 0 : i / 64 * 64; j < 128; j++) {
				size_t at = m ? scorer_at(256, i, j) : scorer_tri_at(128, i, j);

				assert_true(at < bytes / 2 && !seen[at]);
				seen[at] = 1;
			}
		assert_null(memchr(seen, 0, bytes / 2));
	}
	weights_free(w);
}

static void refuse(struct weights_header h, const char *what)
{
	struct weights *w = random_weights(h, 1);
	struct scorer_hdr s = {.id = 77};
	char err[256] = "";

	assert_int_equal(scorer_header(&s, w, err, sizeof(err)), -ENOTSUP);
	assert_non_null(strstr(err, what));
	assert_null(strchr(err, '\n'));
	assert_int_equal(s.id, 77);
	weights_free(w);
}

static void what_no_kernel_serves_is_refused(void **state)
{
	struct weights_header h;

	refuse(shape_position(), "kind position");
	refuse(shape_qfilter(64), "kind qfilter");
	refuse(shape_kvp(96, 96), "k_dim 96");
	refuse(shape_kvp(256, 256), "k_dim 256");
	refuse(shape_kvp(128, 64), "v_dim 64");
	h = shape_trained();
	h.proj = 64;
	refuse(h, "proj 64");
	h = shape_trained();
	h.hidden = 512;
	refuse(h, "hidden 512");
	h = shape_trained();
	h.pos_dim = 48;
	refuse(h, "pos_dim 48");
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(published_equals_the_reference),
		cmocka_unit_test(every_served_shape_equals_the_reference),
		cmocka_unit_test(shipped_equals_the_reference),
		cmocka_unit_test(absurd_rows_rank_last),
		cmocka_unit_test(layout_has_room_for_all),
		cmocka_unit_test(what_no_kernel_serves_is_refused),
	};

	return cmocka_run_group_tests(tests, fixture_setup, fixture_teardown);
}
