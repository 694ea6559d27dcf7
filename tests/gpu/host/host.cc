/* SPDX-License-Identifier: MIT */
/* The runtime's calls and cuBLAS, as far as the trainer uses them: see cuda_runtime.h beside this. */
#include "cublas_v2.h"

#include <cblas.h>
#include <cstdlib>

cudaError_t cudaMalloc(void **p, size_t size)
{
	*p = aligned_alloc(256, (size + 255) / 256 * 256);
	if (!*p)
		return cudaErrorMemoryAllocation;
	memset(*p, 0xff, size);
	return cudaSuccess;
}

cudaError_t cudaMallocHost(void **p, size_t size)
{
	return cudaMalloc(p, size);
}

cudaError_t cudaFree(void *p)
{
	free(p);
	return cudaSuccess;
}

cudaError_t cudaFreeHost(void *p)
{
	return cudaFree(p);
}

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *all)
{
	*free_bytes = *all = (size_t)4 << 30;
	return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, cudaMemcpyKind, cudaStream_t)
{
	memcpy(to, from, n);
	return cudaSuccess;
}

cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
			      size_t height, cudaMemcpyKind, cudaStream_t)
{
	for (size_t i = 0; i < height; i++)
		memcpy((char *)to + i * to_pitch, (const char *)from + i * from_pitch, width);
	return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *to, int value, size_t n, cudaStream_t)
{
	memset(to, value, n);
	return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int *count)
{
	*count = 1;
	return cudaSuccess;
}

const char *cudaGetErrorString(cudaError_t)
{
	return "out of memory";
}

cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t, cublasOperation_t ta, cublasOperation_t tb, int m,
					  int n, int k, const void *alpha, const void *a, cudaDataType_t,
					  int lda, long long stride_a, const void *b, cudaDataType_t, int ldb,
					  long long stride_b, const void *beta, void *c, cudaDataType_t,
					  int ldc, long long stride_c, int batch, cublasComputeType_t, int)
{
	for (long long i = 0; i < batch; i++)
		cblas_sgemm(CblasColMajor, ta == CUBLAS_OP_T ? CblasTrans : CblasNoTrans,
			    tb == CUBLAS_OP_T ? CblasTrans : CblasNoTrans, m, n, k, *(const float *)alpha,
			    (const float *)a + i * stride_a, lda, (const float *)b + i * stride_b, ldb,
			    *(const float *)beta, (float *)c + i * stride_c, ldc);
	return CUBLAS_STATUS_SUCCESS;
}
