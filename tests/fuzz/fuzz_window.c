/* SPDX-License-Identifier: MIT */
/* Sessions as in fuzz_session.c, of clients with GPUs: plans go through the window, whose headers and cursors
 * lie. */
#include "tests/fuzz/session_ops.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	run_input(data, size, true);
	return 0;
}
