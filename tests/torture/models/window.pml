/* SPDX-License-Identifier: MIT */
/*
 * shm/window.h: the four counts of an exchange window. The daemon: window_poll() with look(), window_reserve(),
 * window_stage(), window_drained(), window_take(), window_taken() (daemon/window*.c, mover_out.c). The client: what ipc/cuda/
 * launches on its stream and the words that follow it there (kvt_gather, kvt_scatter, kvt_word).
 *
 * Every page takes one of PLACES places of its ring; a plan has PAGES pages out and RECORDS in. A page is two words, the
 * plan's id and its number, written and read one by one. Any plan but the last may be cancelled at any time, and the next one
 * begins as soon as no worker of the daemon is at work. What the GPU was given it carries out whenever it likes, in order on one
 * stream; a plan may be given to another stream than the last one.
 *
 * Checked: the daemon copies the page that was announced, the GPU reads the record that was announced, while the plan
 * still is; cursors of a client that keeps the rules are never impossible; the last plan comes through.
 *
 * MUTANT 1  a page is written without regard to plan_hdr.taken
 *        2  taken is given back before the page is copied
 *        3  a client starts on the next plan while its GPU still writes for the cancelled one
 *        4  the daemon does not compare the plan in a cursor
 *        5  a record is written without regard to seq_slot.drained
 *        6  drained is announced before the record is read
 */
#ifndef MUTANT
#define MUTANT 0
#endif
#ifndef PLACES
#define PLACES 2
#endif
#ifndef PAGES
#define PAGES 3
#endif
#ifndef RECORDS
#define RECORDS 3
#endif
#ifndef PLANS
#define PLANS 2
#endif

mtype = { GATHER, SCATTER };

typedef page { byte plan; byte nth };

/* plan_hdr, seq_slot, the rings */
byte hdr_id, hdr_taken, hdr_staged;
bool hdr_cancelled;
page gathered, drained;
page out_ring[PLACES], in_ring[PLACES];

chan stream[2] = [PLACES] of { mtype, byte, byte };
byte id; /* the daemon's plan */
bool over, finished;

/* A worker of the daemon: one job at a time. */
byte job_nth, busy; /* 1 copies a page, 2 writes a record */
byte taken, next_out, announced, staged, used;

active proctype worker()
{
	page got;

end:	do
	:: atomic { busy == 1 -> got.plan = out_ring[job_nth % PLACES].plan }
		/* window_take(), window_taken() */
		atomic {
			got.nth = out_ring[job_nth % PLACES].nth;
			assert(over || (got.plan == id && got.nth == job_nth)); /* else: client_mutated */
			got.plan = 0; got.nth = 0;
			if
			:: over
			:: else ->
				taken = job_nth + 1;
				hdr_taken = taken
			fi;
			busy = 0; job_nth = 0 }
	:: atomic { busy == 2 -> in_ring[job_nth % PLACES].plan = id }
		atomic {
			in_ring[job_nth % PLACES].nth = job_nth;
			if
			:: over
			:: else ->
				staged = job_nth + 1;
				hdr_staged = staged
			fi;
			busy = 0; job_nth = 0 }
	od
}

active proctype daemon()
{
	page seen_out, seen_in;
	byte begun; /* records */

	do
	/* plan_begin_window(), plan_publish() */
	:: atomic { (id == 0 || over) && !busy && id < PLANS ->
		hdr_id = 0 }
		atomic {
			id++;
			over = false;
			taken = 0; next_out = 0; announced = 0; staged = 0; used = 0; begun = 0;
			hdr_taken = 0; hdr_staged = 0; hdr_cancelled = false }
		hdr_id = id

	/* window_poll() */
	:: atomic { gathered.plan != seen_out.plan || gathered.nth != seen_out.nth ->
		assert(gathered.plan > seen_out.plan || (gathered.plan == seen_out.plan && gathered.nth > seen_out.nth));
		assert(gathered.plan <= id);
		seen_out.plan = gathered.plan; seen_out.nth = gathered.nth;
		if
		:: !over && (gathered.plan == id || MUTANT == 4) ->
			assert(gathered.nth <= PAGES);
			announced = gathered.nth
		:: else
		fi }
	:: atomic { drained.plan != seen_in.plan || drained.nth != seen_in.nth ->
		assert(drained.plan > seen_in.plan || (drained.plan == seen_in.plan && drained.nth > seen_in.nth));
		assert(drained.plan <= id);
		seen_in.plan = drained.plan; seen_in.nth = drained.nth;
		if
		:: !over && drained.plan == id ->
			assert(drained.nth <= staged);
			used = drained.nth
		:: else
		fi }

	/* next_page() with window_waits(); window_reserve() */
	:: atomic { !over && !busy && next_out < announced ->
		busy = 1;
		job_nth = next_out;
		next_out++;
#if MUTANT == 2
		hdr_taken = next_out;
#endif
	   }
	:: atomic { !over && !busy && id && begun < RECORDS && (begun - used < PLACES || MUTANT == 5) ->
		busy = 2;
		job_nth = begun;
		begun++ }

	/* plan_cancel() */
	:: atomic { id && id < PLANS && !over && hdr_id -> over = true; hdr_cancelled = true }
	/* window_settled() */
	:: atomic { id == PLANS && !over && taken == PAGES && used == RECORDS -> finished = true; break }
	od
}

#define still(n) (hdr_id == (n) && !hdr_cancelled)

active proctype client()
{
	byte mine, pages, records, t;

	do
	/* a plan is seen: its copies begin when those of the last one have ended */
	:: atomic { hdr_id && hdr_id != mine && !hdr_cancelled && ((empty(stream[0]) && empty(stream[1])) || MUTANT == 3) ->
		mine = hdr_id; pages = 0; records = 0 }
	:: mine && pages < PAGES ->
		t = hdr_taken;
		if
		:: atomic { still(mine) && (pages - t < PLACES || MUTANT == 1) && nfull(stream[mine % 2]) ->
			stream[mine % 2] ! GATHER, mine, pages;
			pages++ }
		:: else
		fi;
		t = 0
	:: mine && records < RECORDS ->
		t = hdr_staged;
		if
		:: atomic { still(mine) && records < t && nfull(stream[mine % 2]) ->
			stream[mine % 2] ! SCATTER, mine, records;
			records++ }
		:: else
		fi;
		t = 0
	:: finished -> break
	od
}

active [2] proctype gpu()
{
	byte which = _pid - 3;
	mtype what;
	byte plan, nth;
	page got;

end:	do
	:: stream[which] ? <what, plan, nth> -> /* it stays in the stream until it is done */
		if
		:: what == GATHER ->
			out_ring[nth % PLACES].plan = plan;
			out_ring[nth % PLACES].nth = nth;
			atomic {
				gathered.plan = plan; gathered.nth = nth + 1;
				stream[which] ? what, plan, nth }
		:: what == SCATTER ->
#if MUTANT == 6
			drained.plan = plan; drained.nth = nth + 1;
#endif
			got.plan = in_ring[nth % PLACES].plan;
			atomic {
				got.nth = in_ring[nth % PLACES].nth;
				assert(!still(plan) || (got.plan == plan && got.nth == nth));
				got.plan = 0; got.nth = 0 }
			atomic {
				drained.plan = plan; drained.nth = nth + 1;
				stream[which] ? what, plan, nth }
		fi;
		what = 0; plan = 0; nth = 0
	od
}
