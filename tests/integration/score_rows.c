/* SPDX-License-Identifier: MIT */
/*
 * Helper of tests/runtime: one lane's rows through an untrained policy.
 * usage: score_rows POLICY DTYPE(1 f32, 2 f16, 3 bf16) DIM ROWS ISA|best < K plane, V plane > float32 scores
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "policy/policy.h"
#include "shm/util.h"

int main(int argc, char **argv)
{
	const struct policy_ops *ops = argc == 6 ? policy_find(argv[1]) : NULL;
	struct policy_cfg cfg = {.layers = 1, .heads = 1, .seed = 1};
	struct policy *p = NULL;
	struct policy_batch b;
	size_t row, plane;
	char err[160] = "", *rows;
	float *scores;

	if (!ops) {
		fprintf(stderr, "usage: score_rows POLICY DTYPE DIM ROWS ISA\n");
		return 2;
	}
	cfg.dtype = (enum row_dtype)atoi(argv[2]);
	cfg.k_dim = cfg.v_dim = (uint32_t)atoi(argv[3]);
	cfg.isa = strcmp(argv[5], "best") ? argv[5] : NULL;
	b = (struct policy_batch){.n = (uint32_t)atoi(argv[4])};
	b.total = b.n;
	row = cfg.k_dim * (cfg.dtype == ROW_F32 ? 4u : 2u);
	plane = row * b.n;
	rows = malloc(2 * plane + 1);
	scores = calloc(b.n + 1, sizeof(*scores));
	if (!rows || !scores || fread(rows, 1, 2 * plane, stdin) != 2 * plane) {
		fprintf(stderr, "score_rows: %zu bytes of rows are needed\n", 2 * plane);
		return 1;
	}
	b.k = rows;
	b.v = rows + plane;
	b.k_stride = b.v_stride = row;
	if (ops->init(&p, &cfg, err, sizeof(err)) < 0 || ops->score(p, &b, scores) < 0) {
		fprintf(stderr, "score_rows: %s\n", err);
		return 1;
	}
	ops->free(p);
	return fwrite(scores, sizeof(*scores), b.n, stdout) != b.n;
}
