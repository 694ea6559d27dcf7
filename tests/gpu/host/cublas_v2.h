/* SPDX-License-Identifier: MIT */
#pragma once
/* The one product of cuBLAS that the trainer uses, by a CPU BLAS. See cuda_runtime.h beside this. */
#include "cuda_runtime.h"

enum cublasStatus_t { CUBLAS_STATUS_SUCCESS = 0, CUBLAS_STATUS_ALLOC_FAILED = 3 };
enum cublasOperation_t { CUBLAS_OP_N = 0, CUBLAS_OP_T = 1 };
enum cublasComputeType_t { CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_32F_FAST_TF32 };
enum cudaDataType_t { CUDA_R_32F };
enum { CUBLAS_GEMM_DEFAULT = -1, CUBLAS_ATOMICS_NOT_ALLOWED = 0 };
typedef struct host_blas *cublasHandle_t;

cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb,
					  int m, int n, int k, const void *alpha, const void *a,
					  cudaDataType_t a_type, int lda, long long stride_a, const void *b,
					  cudaDataType_t b_type, int ldb, long long stride_b, const void *beta,
					  void *c, cudaDataType_t c_type, int ldc, long long stride_c,
					  int batch, cublasComputeType_t compute, int algo);
#define cublasCreate(handle) (*(handle) = NULL, CUBLAS_STATUS_SUCCESS)
#define cublasDestroy(handle) ((void)(handle))
#define cublasSetStream(handle, stream) CUBLAS_STATUS_SUCCESS
#define cublasSetAtomicsMode(handle, mode) CUBLAS_STATUS_SUCCESS
#define cublasSetWorkspace(handle, p, size) CUBLAS_STATUS_SUCCESS
#define cublasGetStatusString(e) "cuBLAS"
