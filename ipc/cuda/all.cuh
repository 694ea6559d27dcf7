/* SPDX-License-Identifier: MIT */
/* One translation unit: kvtier-cuda.fatbin. */
#include "ipc/cuda/gather.cu"
#include "ipc/cuda/scatter.cu"
#include "ipc/cuda/compact.cu"
#if __has_include("ipc/cuda/score.cu")
#include "ipc/cuda/score.cu"
#endif
#include "ipc/cuda/recall_pages.cu"
#include "ipc/cuda/recall.cu"
#include "ipc/cuda/recall_pick.cu"
