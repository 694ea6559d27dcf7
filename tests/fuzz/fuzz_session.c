/* SPDX-License-Identifier: MIT */
/*
 * Whole sessions with a real core: up to three clients of two tenants send messages, write words, entries and
 * cursors, leave and come back. The core must stay sound (the sanitizers watch), answer in well-formed
 * messages, come to rest after every step, and keep nothing of any of them.
 */
#include "tests/fuzz/session_ops.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	run_input(data, size, false);
	return 0;
}
