/* SPDX-License-Identifier: MIT */
/* eval_traces DIR VALID TEST ROWS: a directory of made-up traces for the tests of kvtier-eval. */
#include "tests/unit/eval_fixture.h"

int main(int argc, char **argv)
{
	if (argc != 5) {
		fprintf(stderr, "usage: eval_traces DIR VALID TEST ROWS\n");
		return 2;
	}
	return fx_write_dir(argv[1], (uint32_t)atoi(argv[2]), (uint32_t)atoi(argv[3]), (uint32_t)atoi(argv[4]))
		       ? 1
		       : 0;
}
