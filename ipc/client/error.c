/* SPDX-License-Identifier: MIT */
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include "ipc/client/client.h"

static _Thread_local char line[256];
static uint32_t generation; /* of this process: one more in every child of fork() */

const char *kvtier_last_error(void)
{
	return line;
}

int err_set(int code, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(line, sizeof(line), fmt, ap);
	va_end(ap);
	return code;
}

int err_errno(int err, const char *what)
{
	int code = KVT_E_IO;

	if (err == -ENOMEM || err == -EMFILE || err == -ENFILE)
		code = KVT_E_NOMEM;
	else if (err == -ENOSPC)
		code = KVT_E_NOSPC;
	else if (err == -EPROTO)
		code = KVT_E_PROTO;
	else if (err == -EACCES || err == -EPERM)
		code = KVT_E_PERM;
	return err_set(code, "%s: %s", what, strerrordesc_np(-err) ? strerrordesc_np(-err) : "unknown error");
}

const char *kvtier_strerror(int code)
{
	switch (code) {
	case KVT_AGAIN:
		return "nothing could be done yet";
	case KVT_E_INVAL:
		return "invalid argument";
	case KVT_E_NOMEM:
		return "out of memory";
	case KVT_E_DAEMON:
		return "daemon not reachable";
	case KVT_E_TIMEOUT:
		return "deadline passed";
	case KVT_E_VERSION:
		return "protocol versions differ";
	case KVT_E_STALE:
		return "no longer valid";
	case KVT_E_LIMIT:
		return "over a limit";
	case KVT_E_EXISTS:
		return "key already in use";
	case KVT_E_NOENT:
		return "no such sequence";
	case KVT_E_NOSPC:
		return "no space";
	case KVT_E_PERM:
		return "not allowed";
	case KVT_E_PROTO:
		return "malformed message";
	case KVT_E_MODEL:
		return "model mismatch";
	case KVT_E_FORKED:
		return "called in a child of fork";
	case KVT_E_IO:
		return "I/O error";
	case KVT_E_CORRUPT:
		return "checksum mismatch";
	case KVT_E_BUSY:
		return "busy, try later";
	case KVT_E_INTERNAL:
		return "internal error";
	case KVT_E_GPU:
		return "GPU error";
	default:
		return code >= 0 ? "success" : "unknown error";
	}
}

uint32_t kvtier_abi_version(void)
{
	return KVT_ABI_VERSION;
}

int opts_take(void *dst, size_t dst_size, const void *src, const char *what)
{
	size_t size;

	if (!src)
		return err_set(KVT_E_INVAL, "%s: NULL, must be given", what);
	memcpy(&size, src, sizeof(size));
	if (size <= sizeof(size) || size > 4096)
		return err_set(KVT_E_INVAL, "%s.size: %zu, must be sizeof the struct (%zu here)", what, size,
			       dst_size);
	for (size_t i = dst_size; i < size; i++)
		if (((const char *)src)[i])
			return err_set(KVT_E_INVAL, "%s: byte %zu is set, this library knows %zu bytes", what,
				       i, dst_size);
	memset(dst, 0, dst_size);
	memcpy(dst, src, MIN(size, dst_size));
	return 0;
}

int opts_give(void *ret, const void *src, size_t src_size, const char *what)
{
	size_t size;

	memcpy(&size, ret, sizeof(size));
	if (size <= sizeof(size) || size > 4096)
		return err_set(KVT_E_INVAL, "%s.size: %zu, must be sizeof the struct (%zu here)", what, size,
			       src_size);
	memcpy((char *)ret + sizeof(size), (const char *)src + sizeof(size),
	       MIN(size, src_size) - sizeof(size));
	return 0;
}

/* ---- fork ----------------------------------------------------------------------- */

static void in_child(void)
{
	generation++;
}

__attribute__((constructor)) static void watch_fork(void)
{
	pthread_atfork(NULL, NULL, in_child);
}

uint32_t fork_generation(void)
{
	return generation;
}

bool forked(const struct kvtier *c)
{
	return unlikely(c->fork_gen != generation);
}

int err_forked(void)
{
	return err_set(KVT_E_FORKED, "process: a child of fork(), must open its own connection");
}
