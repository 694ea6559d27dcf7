/* SPDX-License-Identifier: MIT */
#pragma once
/* What score.cu and its launch (score.c) have to agree on. */
#include "shm/scorer.h"

#define SCORE_STAGES 4u /* chunks of weights in shared memory */

/* Rows that a warp takes at a time: 32 where its registers hold so many. */
#define SCORE_WARP_ROWS(dim, hidden) ((dim) == 64 && (hidden) == 128 ? 32u : 16u)

/* Bytes of shared memory: the chunks, the vectors of two lanes, RoPE's turns. */
#define SCORE_SHARED(dim, vecs) (SCORE_STAGES * SCORER_CHUNK + 2 * (vecs)*4 + (dim) / 2 * 8)
