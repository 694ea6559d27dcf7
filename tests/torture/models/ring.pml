/* SPDX-License-Identifier: MIT */
/*
 * shm/ring.c: ring_push(), ring_pop(), ring_sleep(), ring_awake(), and how their callers sleep:
 * events_wait() with clear_wakeups() and events_drain() in ipc/client/event.c, drain_ring() in daemon/session.c.
 *
 * Cursors wrap at CURSORS instead of 2^32, the ring holds ENTRIES. Memory is weaker than x86 and than what C11
 * allows a compiler to make of it where that matters here:
 *  - a store waits in a buffer and becomes visible at any later time, stores to two words in any order, unless
 *    the later one is RELEASE or stronger;
 *  - a load may be done before an earlier load of the same thread unless that one is ACQUIRE or stronger, and
 *    after a later store unless that one is RELEASE or stronger;
 *  - a SEQ_CST load waits for the thread's SEQ_CST stores.
 * The orders that shm/ring.c names stand below; a mutant weakens one of them or is another mistake.
 *
 * Checked: every item arrives, once, in order and whole; nobody sleeps while there is something to do (a state
 * without a way on is an error: spin reports an invalid end state).
 *
 * MUTANT 1  the tail is stored before the entry is
 *        2  ring_push() stores the tail with release only
 *        3  ring_sleep() stores the flag with release only
 *        4  ring_sleep() does not look at the tail again
 *        5  ring_pop() loads the tail relaxed
 *        6  ring_pop() stores the head relaxed
 *        7  ring_push() takes a ring with ENTRIES entries for one with room
 *        8  events_wait() clears its wake-ups after it drained
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
#ifndef ITEMS
#define ITEMS 10
#endif

#define RELAXED 0
#define ACQUIRE 1
#define RELEASE 1
#define SEQ_CST 2

/* ring_push() */
#if MUTANT == 1
#define PUSH_TAIL_STORE RELAXED
#elif MUTANT == 2
#define PUSH_TAIL_STORE RELEASE
#else
#define PUSH_TAIL_STORE SEQ_CST
#endif
/* ring_pop() */
#if MUTANT == 5
#define POP_TAIL_LOAD RELAXED
#else
#define POP_TAIL_LOAD ACQUIRE
#endif
#if MUTANT == 6
#define POP_HEAD_STORE RELAXED
#else
#define POP_HEAD_STORE RELEASE
#endif
/* ring_sleep() */
#if MUTANT == 3
#define SLEEP_FLAG_STORE RELEASE
#else
#define SLEEP_FLAG_STORE SEQ_CST
#endif
#if MUTANT == 7
#define ROOM ((ENTRIES) + 1)
#else
#define ROOM (ENTRIES)
#endif

#define dist(a, b) (((a) + CURSORS - (b)) % CURSORS)
#define next(a) (((a) + 1) % CURSORS)

/* What is visible: struct ring_shared, and the eventfd (or stream, or edge of one) that wakes the consumer. */
byte head, tail, need_wakeup, event;
byte entry[ENTRIES];

/* What is not yet: one store at most to each word. */
bool p_entry_due, p_tail_due, c_head_due, c_flag_due;
byte p_entry_at, p_entry, p_tail, c_head, c_flag, c_flag_order;

/* The stores of both sides become visible. */
active proctype memory()
{
end:
	do
	:: atomic { p_entry_due -> entry[p_entry_at] = p_entry; p_entry_due = false; p_entry = 0; p_entry_at = 0 }
	:: atomic { p_tail_due && (PUSH_TAIL_STORE == RELAXED || !p_entry_due) ->
		tail = p_tail; p_tail_due = false; p_tail = 0 }
	:: atomic { c_head_due -> head = c_head; c_head_due = false; c_head = 0 }
	:: atomic { c_flag_due && (c_flag_order == RELAXED || !c_head_due) ->
		need_wakeup = c_flag; c_flag_due = false; c_flag = 0; c_flag_order = 0 }
	od
}

active proctype producer()
{
	byte pos, peer, item = 1, h;
	bool sleeps;

	do
	:: item <= ITEMS ->
		/* ring_push() */
		if
		:: dist(pos, peer) == ROOM % CURSORS ->
			/* full: -EAGAIN, and the caller comes back when the head has moved */
			atomic { dist(pos, head) < ROOM -> h = head }
			assert(dist(pos, h) <= ROOM);
			peer = h; h = 0
		:: else
		fi;
		/* A later store to the same word waits for the earlier one; a new entry is not stored before the
		 * tail that the previous one needs, which only makes the buffer smaller. */
		atomic { !p_entry_due && !p_tail_due ->
			p_entry_due = true; p_entry_at = pos % ENTRIES; p_entry = item }
		pos = next(pos);
		atomic { !p_tail_due -> p_tail_due = true; p_tail = pos }
		if
		:: PUSH_TAIL_STORE == SEQ_CST -> !p_tail_due
		:: else
		fi;
		if
		:: need_wakeup ->
			/* atomic_exchange() drains the buffer */
			atomic { !p_tail_due && !p_entry_due -> sleeps = need_wakeup; need_wakeup = 0 }
			if
			:: sleeps -> event = 1 /* events_dirty(), client_notify(): write the eventfd */
			:: else
			fi;
			sleeps = false
		:: else
		fi;
		item++
	:: else -> break
	od
}

active proctype consumer()
{
	byte pos, peer, want = 1, got, t, early_at, early;
	bool is_early, nothing, late;

	do
	:: want <= ITEMS ->
		/* ring_awake(), relaxed */
		atomic { !c_flag_due -> c_flag_due = true; c_flag = 0; c_flag_order = RELAXED }
		nothing = false;
		do
		:: !nothing ->
			/* ring_pop() */
			if
			:: pos == peer ->
				if
				:: POP_TAIL_LOAD == RELAXED ->
					is_early = true; early = entry[pos % ENTRIES]
				:: true
				fi;
				t = tail;
				assert(dist(t, pos) <= ENTRIES);
				peer = t;
				nothing = (t == pos);
				t = 0
			:: else
			fi;
			if
			:: nothing -> is_early = false; early = 0
			:: else ->
				late = false;
				if
				:: is_early -> got = early; is_early = false; early = 0
				:: else ->
					if
					:: got = entry[pos % ENTRIES]
					:: POP_HEAD_STORE == RELAXED -> late = true
					fi
				fi;
				atomic { !c_head_due -> c_head_due = true; c_head = next(pos) }
				if
				:: late -> got = entry[pos % ENTRIES]
				:: else
				fi;
				pos = next(pos);
				assert(got == want);
				got = 0;
				want++
			fi
		:: else -> break
		od;
		/* ring_sleep() */
		atomic { !c_flag_due -> c_flag_due = true; c_flag = 1; c_flag_order = SLEEP_FLAG_STORE }
		if
		:: SLEEP_FLAG_STORE == SEQ_CST -> !c_flag_due
		:: else
		fi;
		if
		:: MUTANT == 4 || tail == pos ->
			if
			:: want > ITEMS -> break
			:: else
			fi;
			/* ppoll(), sd_event_wait(); then clear_wakeups(), or the edge is taken */
#if MUTANT == 8
			event = 0;
			event
#else
			atomic { event -> event = 0 }
#endif
		:: else /* ring_awake() comes next anyway */
		fi
	:: else -> break
	od
}
