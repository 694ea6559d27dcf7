/* SPDX-License-Identifier: MIT */
/*
 * The scoring kernels against the prepared network evaluated on a CPU (policy/scorer) and against the reference
 * of policy/kvp: every network they serve, odd numbers of rows, any positions and lanes, rows scattered over
 * slots. Scores lie in poisoned memory, and nothing else of it may change. TAP. --small: few rows, for the fake
 * driver.
 */
#include <float.h>
#include <math.h>
#include "policy/kvp.h"
#include "tests/gpu/scoring.h"

/* Shares of the scores' spread: rounding on the way (tanh to 2^-11, sums in fp32), and of bf16 operands. */
#define KERNEL_RMS 1e-3
#define KERNEL_WORST 1e-2
#define NETWORK_RMS 6e-3
#define FEW_RMS 3e-2     /* of less than 100 coefficients */
#define MAX_COMPARED 600 /* rows, of a case */

struct score_case {
	enum row_dtype dtype;
	uint32_t lane, lanes, pos, n;
	uint32_t gap; /* bytes between rows */
	bool mapped;  /* rows in slots in no order */
	bool absurd;  /* some rows hold infinities, zeros, the largest numbers */
};

static unsigned tests, failures;

__attribute__((format(printf, 2, 3))) static void ok(bool good, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	printf("%s %u - ", good ? "ok" : "not ok", ++tests);
	vprintf(fmt, ap);
	printf("\n");
	fflush(stdout);
	va_end(ap);
	failures += !good;
}

/* The rows of a case: [lanes][slots] K, then the same of V, in host memory; where position pos + i lies. */
struct input {
	uint32_t row, slots;
	size_t bytes;      /* of the K or the V of all lanes */
	uint8_t *mem;      /* 2 * bytes */
	uint32_t *slot_of; /* [lanes][pos + n] */
};

static const uint8_t *input_row(const struct input *in, const struct score_case *c, uint32_t lane, uint32_t i,
				bool v)
{
	uint32_t slot = in->slot_of ? in->slot_of[(size_t)lane * (c->pos + c->n) + c->pos + i] : i;

	return in->mem + v * in->bytes + ((size_t)lane * in->slots + slot) * in->row;
}

static bool is_absurd(const struct score_case *c, uint32_t i)
{
	return c->absurd && i % 5 == 2;
}

static void fill_absurd(uint16_t *x, uint32_t dim, enum row_dtype dtype, uint32_t i)
{
	const uint16_t inf = dtype == ROW_F16 ? 0x7c00 : 0x7f80, largest = inf - 1;

	for (uint32_t j = 0; j < dim; j++)
		x[j] = i % 3 == 0 ? 0 : i % 3 == 1 ? (uint16_t)(largest | (j & 1) << 15) : x[j];
	if (i % 3 == 2)
		x[i % dim] = inf;
}

static uint32_t common_divisor(uint32_t a, uint32_t b)
{
	return b ? common_divisor(b, a % b) : a;
}

static struct input make_input(const struct net *n, const struct score_case *c)
{
	struct input in = {.row = n->dim * 2 + c->gap, .slots = c->n + 3};
	uint64_t seed = mix(random_state + c->n);

	in.bytes = (size_t)c->lanes * in.slots * in.row;
	in.mem = need(in.bytes, 2);
	memset(in.mem, 0xff, in.bytes * 2); /* NaN beside the rows */
	for (uint32_t l = 0; c->mapped && l < c->lanes; l++) {
		uint32_t *slot, step = 7;

		if (!in.slot_of)
			in.slot_of = need((size_t)c->lanes * (c->pos + c->n), 4);
		slot = in.slot_of + (size_t)l * (c->pos + c->n);
		memset(slot, 0xff, (size_t)(c->pos + c->n) * 4); /* of rows that are not asked for */
		while (common_divisor(in.slots, step) > 1)
			step++;
		for (uint32_t i = 0; i < c->n; i++)
			slot[c->pos + i] = (uint32_t)(((uint64_t)i * step + l) % in.slots);
	}
	for (uint32_t l = 0; l < c->lanes; l++)
		for (uint32_t i = 0; i < c->n; i++)
			for (uint32_t v = 0; v < 2; v++) {
				uint16_t *x = (uint16_t *)(uintptr_t)input_row(&in, c, l, i, v);

				for (uint32_t j = 0; j < n->dim; j++)
					x[j] = row_value(&seed, c->dtype, v ? 0.5f : 3.0f);
				if (is_absurd(c, i))
					fill_absurd(x, n->dim, c->dtype, i);
			}
	return in;
}

struct difference {
	double squares, worst, sum, sum2, count;
};

static void differ(struct difference *d, float got, float want)
{
	double off = fabs((double)got - want);

	d->squares += off * off;
	d->worst = fmax(d->worst, isnan(off) ? HUGE_VAL : off);
	d->sum += want;
	d->sum2 += (double)want * want;
	d->count++;
}

static double spread(const struct difference *d)
{
	return sqrt(fmax(d->sum2 / d->count - d->sum / d->count * (d->sum / d->count),
			 0.25)); /* few rows may agree */
}

/* All that was asked for was written, finite, and nothing else. */
static bool written(const struct score_case *c, const float *out, size_t lane_floats, size_t coef_floats,
		    uint32_t coefs, size_t floats)
{
	uint8_t *asked = need(floats, 1);
	bool good = true;

	for (uint32_t l = 0; l < c->lanes; l++)
		for (uint32_t k = 0; k < coefs; k++)
			for (uint32_t i = 0; i < c->n; i++) {
				size_t at = l * lane_floats + k * coef_floats + 5 + i;

				asked[at] = 1;
				if (!isfinite(out[at])) {
					if (good)
						printf("# lane %u coefficient %u row %u: %g\n", l, k, i,
						       out[at]);
					good = false;
				}
			}
	for (size_t i = 0; i < floats; i++) {
		uint32_t bits;

		memcpy(&bits, &out[i], 4);
		good &= asked[i] || bits == 0xffffffff;
	}
	free(asked);
	return good;
}

static void compare(struct gpu *u, struct net *n, const struct score_case *c)
{
	const uint32_t coefs = n->s->coefs;
	const size_t coef_floats = c->n + 11, lane_floats = coefs * coef_floats + 3,
		     floats = c->lanes * lane_floats;
	struct input in = make_input(n, c);
	uint64_t mem = gpu_new(u, in.mem, in.bytes * 2), out_mem = gpu_alloc(u, floats * 4), d_lane,
		 d_slot = in.slot_of ? gpu_new(u, in.slot_of, (size_t)c->lanes * (c->pos + c->n) * 4) : 0;
	struct cuda_lane *lane = need(c->lanes, sizeof(*lane));
	float *out = need(floats, 4);
	struct difference kernel = {0}, network = {0};
	uint32_t step = (uint32_t)DIV_UP((uint64_t)c->lanes * c->n, MAX_COMPARED);
	bool good = true;

	for (uint32_t l = 0; l < c->lanes; l++)
		lane[l] = (struct cuda_lane){.k = mem + (uint64_t)l * in.slots * in.row,
					     .v = mem + in.bytes + (uint64_t)l * in.slots * in.row,
					     .k_row = in.row,
					     .v_row = in.row,
					     .k_bytes = n->dim * 2,
					     .v_bytes = n->dim * 2};
	d_lane = gpu_new(u, lane, c->lanes * sizeof(*lane));
	MUST(u, u->d->set8(out_mem, 0xff, floats * 4, u->stream));
	MUST(u, kern_score(u->g, n->s,
			   &(struct score_args){.scorer = n->gpu,
						.rows = d_lane,
						.slot_of = d_slot,
						.out = out_mem,
						.out_lane = lane_floats,
						.out_coef = coef_floats,
						.map_rows = c->pos + c->n,
						.lane = c->lane,
						.lanes = c->lanes,
						.pos = c->pos,
						.n = c->n,
						.dtype = c->dtype,
						.out_pos0 = c->pos - 5},
			   u->stream));
	gpu_get(u, out, out_mem, floats * 4);
	good = written(c, out, lane_floats, coef_floats, coefs, floats);
	for (uint64_t at = 0; at < (uint64_t)c->lanes * c->n; at += step) {
		uint32_t l = (uint32_t)(at / c->n), i = (uint32_t)(at % c->n), pos = c->pos + i;
		const void *k = input_row(&in, c, l, i, false), *v = input_row(&in, c, l, i, true);
		float want[2], ref[2], *ref_at[2] = {&ref[0], &ref[1]};

		scorer_eval_ref(n->s, c->lane + l, c->dtype, k, v, pos, want);
		kvp_ref_coefs(n->w, c->dtype,
			      &(struct policy_batch){.lane = c->lane + l,
						     .n = 1,
						     .k = k,
						     .v = v,
						     .k_stride = in.row,
						     .v_stride = in.row,
						     .first_pos = pos},
			      ref_at);
		for (uint32_t q = 0; q < coefs; q++) {
			float got = out[l * lane_floats + q * coef_floats + 5 + i];

			if (is_absurd(c, i) &&
			    i % 3 != 0) { /* sums may overflow here and not there: finite is all */
				good &= i % 3 == 1 || (got == (q ? 0 : -FLT_MAX));
				continue;
			}
			differ(&kernel, got, want[q]);
			differ(&network, got, ref[q]);
		}
	}
	kernel.squares = sqrt(kernel.squares / kernel.count) / spread(&kernel);
	kernel.worst /= spread(&kernel);
	network.squares = sqrt(network.squares / network.count) / spread(&network);
	ok(good && kernel.squares < KERNEL_RMS && kernel.worst < KERNEL_WORST &&
		   network.squares < (network.count < 100 ? FEW_RMS : NETWORK_RMS),
	   "%s %s: rows %u from %u, lanes %u from %u%s%s: off by %.1e, at most %.1e of the spread; from "
	   "policy/kvp by %.1e",
	   n->name, c->dtype == ROW_F16 ? "f16" : "bf16", c->n, c->pos, c->lanes, c->lane,
	   c->mapped ? ", mapped" : "", c->absurd ? ", absurd rows" : "", kernel.squares, kernel.worst,
	   network.squares);
	gpu_free(u, mem);
	gpu_free(u, out_mem);
	gpu_free(u, d_lane);
	if (d_slot)
		gpu_free(u, d_slot);
	free(in.mem);
	free(in.slot_of);
	free(lane);
	free(out);
}

static void refusals(struct gpu *u, const struct net *n)
{
	struct score_args a = {.scorer = n->gpu, .lanes = net_lanes(n), .n = 1, .dtype = ROW_BF16}, b;
	struct scorer_hdr h = *n->s;

	b = a;
	b.dtype = ROW_F32;
	ok(kern_score(u->g, n->s, &b, u->stream) == KVT_E_INVAL, "float32 rows are refused");
	b = a;
	b.lane = 1;
	ok(kern_score(u->g, n->s, &b, u->stream) == KVT_E_INVAL, "lanes that the scorer lacks are refused");
	h.hidden = 512;
	ok(kern_score(u->g, &h, &a, u->stream) == KVT_E_INVAL, "a network that no kernel serves is refused");
	h = *n->s;
	h.version++;
	ok(kern_score(u->g, &h, &a, u->stream) == KVT_E_VERSION, "a scorer of another version is refused");
	b = a;
	b.n = 0;
	ok(kern_score(u->g, n->s, &b, u->stream) == 0, "no rows: nothing to do");
}

int main(int argc, char **argv)
{
	const bool small = argc > 1 && strcmp(argv[1], "--small") == 0;
	const struct score_case cases[] = {
		{ROW_BF16, 0, 1, 5, 1, 0, false, false},     {ROW_BF16, 0, 2, 5, 7, 0, false, false},
		{ROW_F16, 1, 1, 5990, 129, 16, true, false}, {ROW_BF16, 0, 2, 1000003, 127, 48, false, true},
		{ROW_F16, 0, 2, 30, 260, 0, true, true},
	};
	struct net nets[] = {
		{.name = "published 128/256", .dim = 128, .proj = 256, .hidden = 256, .rope = 1},
		{.name = "shipped 64/128", .dim = 64, .proj = 128, .hidden = 128, .trained = true, .rope = 1},
		{.name = "64/256", .dim = 64, .proj = 128, .hidden = 256, .trained = true, .rope = 2},
		{.name = "128/128", .dim = 128, .proj = 128, .hidden = 128, .trained = true, .rope = 2},
		{.name = "128/256 before RoPE",
		 .dim = 128,
		 .proj = 256,
		 .hidden = 256,
		 .trained = true,
		 .rope = 1},
	};
	struct gpu u;

	setvbuf(stdout, NULL, _IOLBF, 0);
	gpu_open(&u);
	random_state = getenv("KVT_SEED") ? strtoull(getenv("KVT_SEED"), NULL, 0) : now_ns();
	printf("# seed %llu\n", (unsigned long long)random_state);
	for (size_t i = 0; i < ARRAY_SIZE(nets); i++) {
		struct net *n = &nets[i];

		n->layers = small ? 1 : i == 0 ? 28 : i == 1 ? 30 : 5;
		n->heads = small ? 2 : i == 0 ? 4 : 3;
		net_new(&u, n);
		for (size_t k = 0; k < ARRAY_SIZE(cases); k++)
			if (!small || k % 2 || i == 0)
				compare(&u, n, &cases[k]);
		if (!small)
			compare(&u, n,
				&(struct score_case){i % 2 ? ROW_F16 : ROW_BF16, 0, net_lanes(n), 9,
						     i < 2 ? 10000 : 3001, 0, i == 1, false});
		if (i == 0)
			refusals(&u, n);
		net_free(&u, n);
	}
	printf("1..%u\n", tests);
	gpu_close(&u);
	return failures != 0;
}
