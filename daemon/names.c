/* SPDX-License-Identifier: MIT */
/*
 * Sequences by name: for whoever opens one by (owner, key), for whoever resumes one by (owner, key, secret).
 * The second table answers without looking at what has the key but another secret, so that the time it takes
 * says nothing of it. Both hash with SipHash-2-4 (Aumasson, Bernstein 2012) under a key of this process:
 * clients choose their keys, and could otherwise choose them to meet in one chain, or to learn from its length
 * who else is in it. A list of the keys' first halves is for operators, who name a sequence by the beginning of
 * its key: it lies close together, so that 10,000 of them take microseconds and not each a cache miss.
 */
#include <endian.h>
#include <openssl/crypto.h>
#include <string.h>
#include <sys/random.h>
#include "daemon/internal.h"
#include "shm/trial.h"
#include "shm/util.h"

#define FIRST_SIZE 256u

static uint64_t rotl(uint64_t x, int n)
{
	return x << n | x >> (64 - n);
}

static void sip_round(uint64_t v[4])
{
	v[0] += v[1];
	v[2] += v[3];
	v[1] = rotl(v[1], 13) ^ v[0];
	v[3] = rotl(v[3], 16) ^ v[2];
	v[0] = rotl(v[0], 32);
	v[2] += v[1];
	v[0] += v[3];
	v[1] = rotl(v[1], 17) ^ v[2];
	v[3] = rotl(v[3], 21) ^ v[0];
	v[2] = rotl(v[2], 32);
}

/* Of whole words: the length is always the same for one table, and is hashed like any other word. */
static uint64_t sip(const uint64_t key[2], const uint64_t *word, unsigned n)
{
	uint64_t v[4] = {key[0] ^ 0x736f6d6570736575u, key[1] ^ 0x646f72616e646f6du,
			 key[0] ^ 0x6c7967656e657261u, key[1] ^ 0x7465646279746573u};

	for (unsigned i = 0; i <= n; i++) {
		uint64_t m = i < n ? word[i] : (uint64_t)n << 59; /* bytes, modulo 256, in the highest byte */

		v[3] ^= m;
		sip_round(v);
		sip_round(v);
		v[0] ^= m;
	}
	v[2] ^= 0xff;
	for (int i = 0; i < 4; i++)
		sip_round(v);
	return v[0] ^ v[1] ^ v[2] ^ v[3];
}

/* secret NULL: the table of keys. */
static uint32_t place(const struct names *n, uint64_t owner, const uint8_t key[16], const uint8_t *secret)
{
	uint64_t word[7] = {owner};

	memcpy(&word[1], key, 16);
	if (secret)
		memcpy(&word[3], secret, 32);
	return (uint32_t)sip(n->seed, word, secret ? 7 : 3) & (n->size - 1);
}

static void link_in(struct names *n, struct seq *s)
{
	struct seq **k = &n->by_key[place(n, s->tenant_hash, s->key, NULL)],
		   **x = &n->by_secret[place(n, s->tenant_hash, s->key, s->secret_hash)];

	s->next_key = *k;
	*k = s;
	s->next_secret = *x;
	*x = s;
}

static void free_tables(struct names *n)
{
	free(n->by_key);
	free(n->by_secret);
	n->by_key = n->by_secret = NULL;
}

static int grow(struct names *n)
{
	struct names to = *n;

	to.size = n->size ? 2 * n->size : FIRST_SIZE;
	if (!n->size && getrandom(to.seed, sizeof(to.seed), 0) != sizeof(to.seed))
		return -EIO;
	to.by_key = calloc(to.size, sizeof(*to.by_key));
	to.by_secret = calloc(to.size, sizeof(*to.by_secret));
	if (!to.by_key || !to.by_secret) {
		free_tables(&to);
		return n->size ? 0 : -ENOMEM; /* longer chains will do */
	}
	for (uint32_t i = 0; i < n->size; i++)
		for (struct seq *s = n->by_key[i], *next; s; s = next) {
			next = s->next_key;
			link_in(&to, s);
		}
	free_tables(n);
	*n = to;
	return 0;
}

static uint64_t head_of(const uint8_t key[16])
{
	uint64_t v;

	memcpy(&v, key, sizeof(v));
	return be64toh(v);
}

/* The first n hex digits of the key are these. */
static bool key_begins(const uint8_t key[16], const uint8_t *prefix, size_t n)
{
	return !memcmp(key, prefix, n / 2) && !(n % 2 && (key[n / 2] ^ prefix[n / 2]) & 0xf0);
}

static int list(struct names *n, struct seq *s)
{
	if (n->count == n->room) {
		uint32_t room = n->room ? 2 * n->room : FIRST_SIZE;
		struct name *more = realloc(n->all, room * sizeof(*more));

		if (!more)
			return -ENOMEM;
		n->all = more;
		n->room = room;
	}
	s->name = n->count;
	n->all[n->count++] = (struct name){head_of(s->key), s};
	return 0;
}

int names_add(struct names *n, struct seq *s)
{
	int r = n->count >= n->size ? grow(n) : 0;

	if (!r)
		r = list(n, s);
	if (!r)
		link_in(n, s);
	return r;
}

void names_del(struct names *n, struct seq *s)
{
	struct seq **k = &n->by_key[place(n, s->tenant_hash, s->key, NULL)],
		   **x = &n->by_secret[place(n, s->tenant_hash, s->key, s->secret_hash)];

	while (*k != s)
		k = &(*k)->next_key;
	*k = s->next_key;
	while (*x != s)
		x = &(*x)->next_secret;
	*x = s->next_secret;
	n->all[s->name] = n->all[--n->count];
	n->all[s->name].seq->name = s->name;
}

struct seq *names_find(const struct names *n, uint64_t owner, const uint8_t key[16])
{
	struct seq *s = n->size ? n->by_key[place(n, owner, key, NULL)] : NULL;

	while (s && (s->tenant_hash != owner || memcmp(s->key, key, 16)))
		s = s->next_key;
	return s;
}

struct seq *names_resume(const struct names *n, uint64_t owner, const uint8_t key[16], const uint8_t secret[32])
{
	struct seq *s = n->size ? n->by_secret[place(n, owner, key, secret)] : NULL;

	if (planted("resume-by-key") && n->size)
		s = names_find(n, owner, key);
	while (s && (s->tenant_hash != owner || CRYPTO_memcmp(s->key, key, 16) ||
		     CRYPTO_memcmp(s->secret_hash, secret, 32)))
		s = s->next_secret;
	return s;
}

struct seq *names_next(const struct names *n, const uint8_t prefix[16], unsigned digits, uint32_t *cursor)
{
	uint64_t head = head_of(prefix), mask = digits < 16 ? ~(~UINT64_C(0) >> 4 * digits) : ~UINT64_C(0);

	while (*cursor < n->count) {
		const struct name *k = &n->all[(*cursor)++];

		if ((k->head ^ head) & mask)
			continue;
		if (digits <= 16 || key_begins(k->seq->key, prefix, digits))
			return k->seq;
	}
	return NULL;
}

void names_free(struct names *n)
{
	free_tables(n);
	free(n->all);
	n->all = NULL;
}
