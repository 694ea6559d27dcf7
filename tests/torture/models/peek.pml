/* SPDX-License-Identifier: MIT */
/*
 * shm/plan.c: plan_begin(), plan_publish(), plan_set_state() against plan_peek() with copy_header(), and
 * plan_still(). The header is a seqlock whose sequence word is `id`.
 *
 * Four words stand for all: id, state, one field of the header, one word of the tables; plan n writes n. The
 * writer's stores wait in a buffer of PENDING and become visible in any order, except that two to one word keep
 * theirs, that a release waits for all before it, and a fence for all. The reader's loads happen in their order, as
 * acquire and its fence have it; without the fence a load of the tables may come late.
 *
 * Checked: a plan that plan_peek() shows has its own header; what was read of its tables is its own when plan_still()
 * says so afterwards; a reader in the end sees the newest plan.
 *
 * MUTANT 1  plan_begin() has no fence between hiding the id and the tables
 *        2  plan_publish() stores the id relaxed
 *        3  plan_header() fills the header after plan_publish()
 *        4  copy_header() does not look at the id again
 *        5  plan_still() has no fence: what it vouches for may be read after it looked
 *        6  plan_begin() leaves the old id visible
 *
 * With its fields stored relaxed the header would still be whole: the fence before them orders enough.
 */
#ifndef MUTANT
#define MUTANT 0
#endif
#ifndef PLANS
#define PLANS 3
#endif

#define EMPTY 0
#define DECIDED 1
#define CANCELLED 3

#define ID 0
#define STATE 1
#define FIELD 2
#define TABLE 3
#define PENDING 5

byte word[4];

/* Stores not yet visible, the oldest first. */
byte due, due_at[PENDING], due_value[PENDING];
bool due_release[PENDING];

inline store(at, value, release)
{
	atomic { due < PENDING -> due_at[due] = at; due_value[due] = value; due_release[due] = release; due++ }
}

/* May the i-th become visible? */
#define same(i, k) (due_at[i] == due_at[k])
#define free_1 (due > 1 && !due_release[1] && !same(1, 0))
#define free_2 (due > 2 && !due_release[2] && !same(2, 0) && !same(2, 1))
#define free_3 (due > 3 && !due_release[3] && !same(3, 0) && !same(3, 1) && !same(3, 2))
#define free_4 (due > 4 && !due_release[4] && !same(4, 0) && !same(4, 1) && !same(4, 2) && !same(4, 3))

inline reveal(n)
{
	d_step {
		word[due_at[n]] = due_value[n];
		i = n;
		do
		:: i + 1 < due ->
			due_at[i] = due_at[i + 1];
			due_value[i] = due_value[i + 1];
			due_release[i] = due_release[i + 1];
			i++
		:: else -> break
		od;
		due--;
		due_at[due] = 0;
		due_value[due] = 0;
		due_release[due] = false;
		i = 0
	}
}

active proctype memory()
{
	byte i;

end:
	do
	:: due > 0 -> reveal(0)
	:: atomic { free_1 -> reveal(1) }
	:: atomic { free_2 -> reveal(2) }
	:: atomic { free_3 -> reveal(3) }
	:: atomic { free_4 -> reveal(4) }
	od
}

active proctype writer()
{
	byte n = 1;

	do
	:: n <= PLANS ->
		/* plan_begin() */
#if MUTANT != 6
		store(ID, 0, true);
#endif
#if MUTANT != 1
		due == 0; /* fence(memory_order_seq_cst) */
#endif
		store(STATE, EMPTY, true);
#if MUTANT != 3
		store(FIELD, n, true);
#endif
		store(TABLE, n, false);
		/* plan_publish() */
		store(STATE, DECIDED, true);
		store(ID, n, MUTANT != 2);
#if MUTANT == 3
		store(FIELD, n, true);
#endif
		/* plan_set_state(): else the client acknowledged it, and looks no more */
		if
		:: n < PLANS -> store(STATE, CANCELLED, true)
		:: else
		fi;
		n++
	:: else -> break
	od
}

active proctype reader()
{
	byte id, state, field, table, again;
	bool late;

	do
	:: /* plan_peek() */
		id = word[ID];
		if
		:: id == 0 -> skip
		:: else ->
			state = word[STATE];
			field = word[FIELD];
			if
			:: MUTANT != 4 && word[ID] != id -> skip /* tries again */
			:: else ->
				assert(field == id);
				assert(state == DECIDED || state == CANCELLED);
				late = false;
				if
				:: table = word[TABLE]
				:: MUTANT == 5 -> late = true
				fi;
				/* plan_still() */
				again = word[STATE];
				if
				:: word[ID] == id && (again == CANCELLED) == (state == CANCELLED) ->
					if
					:: late -> table = word[TABLE]
					:: else
					fi;
					/* of one that was cancelled the tables are nobody's business */
					assert(state == CANCELLED || table == id);
					if
					:: id == PLANS -> break
					:: else
					fi
				:: else
				fi
			fi
		fi;
		id = 0; state = 0; field = 0; table = 0; again = 0; late = false
	od
}
