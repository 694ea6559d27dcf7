/* SPDX-License-Identifier: MIT */
/*
 * shm/ring.c beside a peer that keeps no rule: it stores anything in head, tail and need_wakeup at any time.
 * ring_push() and ring_pop() hold their own cursors in private memory, load the peer's once and check it.
 *
 * Checked: an entry is read or written only where the ring has one, and as long as no -EPROTO came a consumer takes, and
 * a producer writes, at most ENTRIES entries for each cursor of the peer that it accepted: nobody is kept busy, and
 * an entry that the peer was not given back is not written. Entries are copied once and say anything.
 *
 * MUTANT 1  ring_pop() believes the tail
 *        2  ring_pop() loads the tail twice: one is checked, the other is used
 *        3  ring_push() believes the head
 *        4  ring_push() takes its own cursor back from shared memory
 */
#ifndef MUTANT
#define MUTANT 0
#endif
#ifndef ENTRIES
#define ENTRIES 2
#endif
#ifndef CURSORS
#define CURSORS 8
#endif

#define dist(a, b) (((a) + CURSORS - (b)) % CURSORS)
#define next(a) (((a) + 1) % CURSORS)

byte head, tail;

active proctype peer_of_both() /* any value: by and by, and nobody is hurried */
{
	do
	:: head = next(head)
	:: tail = next(tail)
	od
}

active proctype consumer() /* ring_pop() */
{
	byte pos, peer, t, taken;

	do
	:: pos == peer ->
		t = tail;
		taken = 0;
		if
		:: MUTANT != 1 && dist(t, pos) > ENTRIES -> break /* -EPROTO: the client ends */
		:: else
		fi;
#if MUTANT == 2
		t = tail;
#endif
		peer = t;
		t = 0
	:: else ->
		taken++;
		assert(taken <= ENTRIES);
		assert(dist(peer, pos) <= ENTRIES);
		pos = next(pos)
	od
}

active proctype producer() /* ring_push() */
{
	byte pos, peer, h;

	do
	:: dist(pos, peer) == ENTRIES ->
		h = head;
		if
		:: MUTANT != 3 && dist(pos, h) > ENTRIES -> break /* -EPROTO */
		:: else
		fi;
		peer = h; /* as long as it is full the caller gets -EAGAIN */
		h = 0
	:: else ->
		/* this entry's place was given back */
		assert(dist(pos, peer) < ENTRIES);
#if MUTANT == 4
		pos = tail;
#endif
		pos = next(pos)
	od
}
