/* SPDX-License-Identifier: MIT */
/*
 * One sequence, one lane, from append to acknowledgement, with everything that may come between: shm/plan.h and
 * shm/ctl.h as the daemon (words.c, manager*.c, plan.c, mover_out.c, mover_in.c, seq.c, leave.c, open.c, request.c) and the
 * client library (rows.c, plan.c, apply.c, fork.c, call.c) follow them. How a plan becomes visible is peek.pml's
 * matter; here its tables are there at once. A slice of the event loop, and a call of the library where it holds its lock, is
 * one step; workers, moving rows in the region, and the two words of an acknowledgement are several.
 *
 * Rows have contents: 1 + row + ROWS * version, 0 for none; a row that is appended again after a truncate is another
 * version. The region has CAP slots and one to stage in. What is below the device is what was really copied.
 *
 * Checked, always: a row below the device has the contents that its runtime appended; after a plan was applied every
 * resident row's slot has them too; a client that keeps the rules is never ended; no row leaves the tiers without
 * being counted. And in the end (no invalid end state): every request for a plan is answered by a plan that becomes READY,
 * every truncate and fork by a reply or its deadline, and daemon and client agree on what is resident.
 *
 * Bounds: ROWS rows, TRUNCATES, FORKS, REQUESTS, MISSES (a promotion or a write fails), NACKS, TIMEOUTS (a reply comes too
 * late), CLIENT_DEATHS and DAEMON_DEATHS at most, each at any time; the sequence is leased and resumed. Any row may be
 * kept, demoted, dropped or promoted by a plan.
 *
 * MUTANT 1  READY is set while a worker still copies (manager_moved() before the last reference is gone)
 *        2  plan_current() takes CANCELLED for ready
 *        3  want_plan() cancels a READY plan
 *        4  open_fork() cancels a READY plan
 *        5  truncate_begin() does not ask whether a plan is applied and not acknowledged
 *        6  after a truncate without an answer the client goes on (limbo)
 *        7  the nack words are stored after slot.acked
 *        8  a client's death in the middle of a plan costs no trust (distrust())
 *        9  a plan is begun while a READY one is not acknowledged
 *       10  poll_len() does not ask for the epoch of a length
 *       11  a row whose page could not be read keeps its bit (mover_lost())
 *       12  slot.acked is stored before the rows have moved
 *       13  a resumed sequence keeps the client's old idea of what was acknowledged
 *       14  seq_step() does not wait for workers
 *       15  a truncate or fork that cancels a plan forgets that it was asked for
 */
#ifndef MUTANT
#define MUTANT 0
#endif
#ifndef ROWS
#define ROWS 3
#endif
#ifndef START
#define START 2
#endif
#ifndef TRUNCATES
#define TRUNCATES 0
#endif
#ifndef FORKS
#define FORKS 0
#endif
#ifndef REQUESTS
#define REQUESTS 1
#endif
#ifndef PLANS /* that the daemon makes of itself */
#define PLANS 1
#endif
#ifndef MISSES
#define MISSES 0
#endif
#ifndef NACKS
#define NACKS 0
#endif
#ifndef TIMEOUTS
#define TIMEOUTS 0
#endif
#ifndef CLIENT_DEATHS
#define CLIENT_DEATHS 0
#endif
#ifndef DAEMON_DEATHS
#define DAEMON_DEATHS 0
#endif

#define CAP ROWS
#define ALL ((1 << ROWS) - 1)
#define below(n) ((1 << (n)) - 1)
#define has(bits, r) (((bits) >> (r)) & 1)
#define rank(bits, r) ((has(bits, 0) && (r) > 0) + (has(bits, 1) && (r) > 1) + (has(bits, 2) && (r) > 2))
#define code(r) (1 + (r) + ROWS * version)

mtype = { EMPTY, DECIDED, READY, CANCELLED };
mtype = { TRUNCATE, FORK, REQUEST, RESUME };

/* ---- shared memory ---- */
byte hdr_id, hdr_epoch, hdr_wm, t_after, t_in;
mtype hdr_state = EMPTY;
byte len_epoch, len_rows = START, slot_acked;
bool slot_nack;
byte region[CAP + 1];

/* ---- messages, of one connection ---- */
chan request = [2] of { mtype, byte, byte };     /* type, rows, cookie */
chan reply = [2] of { byte, byte, byte, byte };  /* cookie, epoch or plan id, rows, connection */

/* ---- what really is: for the checks alone ---- */
byte truth[ROWS], version;

/* ---- the daemon's memory ---- */
byte d_epoch, d_rows = START, ix_rows = START, dev = below(START), low, gone, stored[ROWS];
byte plan_id, d_acked, wanted, cut = ROWS + 1;
bool p_live, p_over, p_saving, p_missed, p_asked;
mtype p_phase = EMPTY; /* EMPTY: none, DECIDED: moves, READY */
byte p_id, p_epoch, p_wm, p_after, p_out, p_in, p_drop;
byte refs, generation; /* workers; of the daemon's life */
bool attached = true;  /* the sequence has a client */

/* ---- connections ---- */
byte conn = 1;         /* the one that the daemon serves; another number: a later one */
bool eof;              /* the client of `conn` is gone */

/* ---- bounds ---- */
byte truncates, forks, requests, plans, misses, nacks, timeouts, client_deaths, daemon_deaths;

/* ================= the mover: a worker with one plan ================= */

proctype mover(byte life)
{
	byte r, buf, out, in, of_epoch, slots;
	bool stop;

	atomic { out = p_out; in = p_in; of_epoch = p_epoch; slots = dev }
	do
	:: r < ROWS && has(out, r) ->
		/* gather(), out_run() */
		if
		:: atomic { life != generation -> goto dead }
		:: atomic { life == generation -> buf = region[rank(slots, r)] }
		fi;
		/* out_done(): on the loop. What is written now belongs to whatever plan comes after, or to none. */
		if
		:: atomic { life != generation -> goto dead }
		:: atomic { life == generation && p_over && MUTANT != 14 -> stop = true } /* -ECANCELED */
		:: atomic { life == generation && !(p_over && MUTANT != 14) -> stop = false }
		fi;
		/* out_end() */
		if
		:: atomic { life != generation -> goto dead }
		:: atomic { life == generation ->
			if
			:: stop
			:: !stop && misses < MISSES && !p_saving -> misses++; p_missed = true
			:: !stop && of_epoch == d_epoch -> low = low | (1 << r); stored[r] = buf
			:: !stop && of_epoch != d_epoch
			fi;
			stop = false;
			buf = 0 }
		fi;
		r++
	:: r < ROWS && !has(out, r) && has(in, r) ->
		/* in_run(), scatter(); in_finish() */
		if
		:: atomic { life != generation -> goto dead }
		:: atomic { life == generation ->
			if
			:: misses < MISSES && has(low, r) ->
				misses++;
				p_missed = true;
				if
				:: of_epoch == d_epoch && MUTANT != 11 ->
					low = low & ~(1 << r);
					gone = gone | (1 << r)
				:: of_epoch == d_epoch && MUTANT == 11 -> low = low & ~(1 << r)
				:: else
				fi
			:: region[CAP] = stored[r]
			fi }
		fi;
		r++
	:: r < ROWS && !has(out, r) && !has(in, r) -> r++
	:: r >= ROWS -> break
	od;
	atomic {
		if
		:: life == generation -> refs--
		:: else
		fi
	};
dead:	skip
}

/* ================= the daemon: one slice of its loop after another ================= */

#define extend() dev = dev | (below(d_rows) & ~below(ix_rows)); ix_rows = d_rows

inline applied(nacked)
{
	if
	:: nacked
	:: else ->
		dev = p_after | (dev & ~below(p_wm));
		low = low & ~p_drop;
		gone = gone | p_drop
	fi;
	p_over = true
}

inline cancel()
{
	if
	:: p_live && !p_over ->
		p_over = true;
		if
		:: p_id -> hdr_state = CANCELLED
		:: else
		fi
	:: else
	fi
}

/* plan_redo(): it is cancelled, but what it was asked for is not forgotten */
inline redo()
{
	if
	:: p_live && !p_over && p_asked && MUTANT != 15 -> wanted = plan_id + 1
	:: else
	fi;
	cancel()
}

/* poll_acked(), poll_len() */
inline poll()
{
	if
	:: slot_acked != d_acked ->
		assert(slot_acked <= plan_id && slot_acked >= d_acked); /* else the client is ended */
		d_acked = slot_acked;
		if
		:: p_live && !p_over && p_id == d_acked ->
			assert(p_phase == READY || slot_nack);
			if
			:: p_phase == READY -> applied(slot_nack)
			:: else -> cancel()
			fi
		:: else
		fi
	:: else
	fi;
	if
	:: len_epoch < d_epoch && MUTANT != 10
	:: else ->
		assert(MUTANT == 10 || len_epoch == d_epoch && len_rows >= d_rows); /* else the client is ended */
		d_rows = len_rows
	fi
}

/* seq_step() as far as it acts on what waited */
inline step()
{
	if
	:: p_live && refs && MUTANT != 14
	:: else ->
		if
		:: p_live && p_over ->
			p_live = false; p_over = false; p_phase = EMPTY; p_id = 0; p_missed = false;
			p_saving = false; p_asked = false; p_after = 0; p_out = 0; p_in = 0; p_drop = 0; p_epoch = 0; p_wm = 0
		:: else
		fi;
		if
		:: !p_live && cut <= ROWS ->
			dev = dev & below(cut); low = low & below(cut); gone = gone & below(cut);
			if
			:: ix_rows > cut -> ix_rows = cut
			:: else
			fi;
			cut = ROWS + 1
		:: else
		fi
	fi
}

/* manager_plan(), plan_decide(), publish(): any decision */
inline decide()
{
	extend();
	p_live = true; p_over = false; p_missed = false; p_epoch = d_epoch; p_wm = d_rows;
	select(p_after : 0 .. ALL);
	select(p_drop : 0 .. ALL);
	p_after = p_after & (dev | low) & below(p_wm);
	p_in = p_after & ~dev;
	/* one slot to stage in */
	if
	:: p_in & (p_in - 1) -> p_after = p_after & dev; p_in = 0
	:: else
	fi;
	p_drop = p_drop & dev & ~p_after & ~low;
	p_out = dev & ~p_after & ~low & ~p_drop;
	plan_id++;
	p_id = plan_id;
	hdr_id = p_id; hdr_epoch = p_epoch; hdr_wm = p_wm; t_after = p_after; t_in = p_in;
	if
	:: p_out || p_in ->
		p_phase = DECIDED;
		hdr_state = DECIDED;
		refs++;
		run mover(generation)
	:: else ->
		p_phase = READY;
		hdr_state = READY
	fi
}

/* Nothing left the tiers that was not counted. */
#define conserved (cut <= ROWS || (((dev | low | gone) & below(ix_rows)) == below(ix_rows)))
/* What lies below is what was appended: where a cut is pending, below it. */
#define sound(r) (!has(low, r) || r >= d_rows || r >= cut || stored[r] == truth[r])

proctype daemon()
{
	mtype type;
	byte n, cookie, first;

end:	do
	/* on_again(), on_wake(), the poll at 100 ms: seq_poll() */
	:: atomic { attached && !eof && (slot_acked != d_acked || ((len_epoch == d_epoch || MUTANT == 10) && len_rows != d_rows)) ->
		poll(); step() }

	/* manager_consider() */
	:: atomic { attached && (!p_live || (MUTANT == 9 && p_phase == READY && !p_over)) && cut > ROWS && d_rows &&
			(wanted || plans < PLANS) && !eof ->
		if
		:: wanted -> wanted = 0; p_asked = true
		:: else -> plans++; p_asked = false
		fi;
		decide() }

	/* manager_moved() */
	:: atomic { p_live && p_phase == DECIDED && (!refs || (MUTANT == 1 && !p_missed)) ->
		if
		:: p_over
		:: !p_over && p_missed && !p_saving -> cancel(); wanted = plan_id + 1 /* manager_again() */
		:: else ->
			p_phase = READY;
			if
			:: p_saving -> applied(false)
			:: else -> hdr_state = READY
			fi
		fi;
		step() }

	/* request_handle(), after drain_ring() */
	:: atomic { nempty(request) && !eof ->
		request ? type, n, cookie;
		if
		:: attached -> poll(); step()
		:: else
		fi;
		if
		:: type == TRUNCATE -> /* seq_truncate() */
			assert(n <= d_rows);
			d_epoch++;
			d_rows = n;
			if
			:: n < cut -> cut = n
			:: else
			fi;
			redo();
			step();
			reply ! cookie, d_epoch, d_rows, conn
		:: type == FORK -> /* open_fork() */
			if
			:: MUTANT == 4 || p_phase != READY -> redo()
			:: else
			fi;
			step();
			reply ! cookie, 0, 0, conn
		:: type == REQUEST -> /* want_plan() */
			if
			:: MUTANT == 3 || p_phase != READY -> cancel()
			:: else
			fi;
			wanted = plan_id + 1;
			reply ! cookie, wanted, 0, conn;
			step()
		:: type == RESUME -> /* open_resume() comes below, when it is detached */
			assert(false)
		fi;
		type = 0; n = 0; cookie = 0 }

	/* client_end(): seq_last_words(), seq_unbind(), seq_leave() with distrust() */
	:: atomic { eof && attached ->
		poll();
		attached = false;
		if
		:: p_live && !p_over && p_phase == READY && MUTANT != 8 ->
			extend();
			first = 0;
			do
			:: first < p_wm && has(dev, first) == has(p_after, first) -> first++
			:: else -> break
			od;
			if
			:: first < p_wm ->
				dev = dev & below(first);
				gone = gone | (below(ix_rows) & ~dev & ~low)
			:: else
			fi;
			first = 0
		:: else
		fi;
		cancel();
		wanted = 0;
		do
		:: request ? _, _, _
		:: empty(request) -> break
		od;
		step() }

	/* seq_save(): a plan that nobody applies */
	:: atomic { eof && !attached && !p_live && cut > ROWS && (dev || d_rows > ix_rows) ->
		extend();
		p_live = true; p_over = false; p_saving = true; p_missed = false; p_asked = false; p_id = 0; p_epoch = d_epoch;
		p_wm = d_rows; p_after = 0; p_in = 0; p_drop = 0; p_out = dev & ~low; p_phase = DECIDED;
		if
		:: p_out -> refs++; run mover(generation)
		:: else
		fi }
	/* open_resume(), detached: a new connection, a new slot, a new plan area, a new region */
	:: atomic { eof && !attached && !p_live && !dev && d_rows == ix_rows && cut > ROWS ->
		eof = false;
		attached = true;
		conn++;
		len_epoch = d_epoch; len_rows = d_rows; slot_acked = 0; slot_nack = false;
		plan_id = 0; d_acked = 0; hdr_id = 0; hdr_state = EMPTY; hdr_wm = 0; hdr_epoch = 0; t_after = 0; t_in = 0;
		first = 0;
		do
		:: first <= CAP -> region[first] = 0; first++
		:: else -> break
		od;
		first = 0;
		run client(conn) }

	/* It dies: what is left is what lies below, and the client's end of the connection is dead. */
	:: atomic { daemon_deaths < DAEMON_DEATHS && attached && !eof && cut > ROWS ->
		daemon_deaths++;
		generation++;
		refs = 0;
		p_live = false; p_over = false; p_phase = EMPTY; p_id = 0; p_missed = false; p_asked = false;
		p_after = 0; p_out = 0; p_in = 0; p_drop = 0; p_epoch = 0; p_wm = 0;
		wanted = 0;
		dev = 0;
		gone = (gone | ~low) & below(d_rows);
		ix_rows = d_rows;
		do
		:: request ? _, _, _
		:: empty(request) -> break
		od;
		attached = false;
		eof = true }
	od
}

/* ================= the client ================= */

/* The words of its slot: of a connection that is no more nobody reads them. */
#define alive (conn == mine && !eof)

proctype client(byte mine)
{
	byte epoch, rows, res, acked, applied_id, cookie, got_cookie, got_a, got_rows, got_conn, want_id, cut_to, r;
	byte s_after, s_in, s_wm, s_id, now, moved[CAP];
	bool limbo;

	atomic {
		epoch = len_epoch; rows = len_rows;
		if
		:: mine == 1 -> res = below(rows) /* as the test begins: nothing below */
		:: MUTANT == 13 -> acked = 2
		:: else
		fi }

	do
	/* It is killed, or sees that the daemon is gone; another comes. */
	:: atomic { !alive -> goto out }
	:: atomic { client_deaths < CLIENT_DEATHS && alive -> client_deaths++; eof = true; goto out }

	/* kvtier_seq_append() */
	:: atomic { alive && !limbo && rows < ROWS && rank(res, rows) < CAP ->
		truth[rows] = code(rows);
		region[rank(res, rows)] = code(rows);
		res = res | (1 << rows);
		rows++;
		len_epoch = epoch; len_rows = rows }

	/* kvtier_plan_apply(): plan_current() ... */
	:: atomic { alive && !limbo && !applied_id && hdr_id > acked && hdr_epoch == epoch && hdr_wm <= rows &&
			(hdr_state == READY || (MUTANT == 2 && hdr_state == CANCELLED)) ->
		s_id = hdr_id; s_after = t_after; s_in = t_in; s_wm = hdr_wm;
#if MUTANT == 12
		acked = s_id; slot_nack = false; slot_acked = s_id;
#endif
	   }
		/* ... then the rows move, without a look at the daemon ... */
		atomic {
			if
			:: conn != mine -> goto out
			:: else
			fi;
			now = (s_after & below(s_wm)) | (res & ~below(s_wm));
			r = 0;
			do
			:: r < ROWS ->
				if
				:: has(now, r) && has(s_in, r) && r < s_wm -> moved[rank(now, r)] = region[CAP]
				:: has(now, r) && !(has(s_in, r) && r < s_wm) ->
					moved[rank(now, r)] = region[rank(res, r)]
				:: else
				fi;
				r++
			:: else -> break
			od;
			r = 0;
			do
			:: r < CAP ->
				region[r] = moved[r];
				moved[r] = 0;
				r++
			:: else -> break
			od;
			region[CAP] = 0; /* punched */
			r = 0;
			res = now;
			do
			:: r < ROWS ->
				assert(!has(res, r) || region[rank(res, r)] == truth[r]);
				r++
			:: else -> break
			od;
			r = 0; now = 0;
			applied_id = s_id; s_id = 0; s_after = 0; s_in = 0; s_wm = 0 }

	/* kvtier_plan_ack(): plan_current(), plan_acked() */
	:: atomic { alive && applied_id && !limbo ->
		if
		:: hdr_id == applied_id && hdr_state == READY && hdr_epoch == epoch ->
			acked = applied_id; slot_nack = false; slot_acked = applied_id
		:: else
		fi;
		applied_id = 0 }

	/* ... or refused as a whole: the nack words, then slot.acked */
	:: atomic { alive && nacks < NACKS && !limbo && !applied_id && hdr_id > acked && hdr_epoch == epoch &&
			hdr_state == READY ->
		nacks++;
		s_id = hdr_id;
		acked = s_id;
#if MUTANT == 7
		slot_acked = s_id
#else
		slot_nack = true
#endif
	   }
		atomic {
			if
			:: conn != mine -> goto out
			:: else
			fi;
#if MUTANT == 7
			slot_nack = true;
#else
			slot_acked = s_id;
#endif
			s_id = 0 }

	/* kvtier_seq_truncate(): truncate_begin(), the request ... */
	:: atomic { alive && (truncates < TRUNCATES || limbo) && rows && (!applied_id || MUTANT == 5) && nfull(request) ->
		if
		:: !limbo -> truncates++; cut_to = rows - 1
		:: else /* asked for again, for the same rows */
		fi;
		cookie++;
		request ! TRUNCATE, cut_to, cookie }
		do
		:: atomic { !alive -> goto out }
		:: atomic { alive && nempty(reply) ->
			reply ? got_cookie, got_a, got_rows, got_conn;
			if
			:: got_conn == mine && got_cookie == cookie -> /* ... forget_rows() */
				limbo = false;
				epoch = got_a; rows = got_rows; res = res & below(rows);
				version++;
				r = rows;
				do
				:: r < ROWS -> truth[r] = 0; r++
				:: else -> break
				od;
				r = 0;
				len_epoch = epoch; len_rows = rows;
				cut_to = 0; got_a = 0; got_rows = 0; got_cookie = 0; got_conn = 0;
				break
			:: else
			fi }
		:: atomic { alive && timeouts < TIMEOUTS ->
			timeouts++;
			limbo = (MUTANT != 6);
			break }
		od

	/* kvtier_seq_fork(): hold() until the reply or the deadline */
	:: atomic { alive && !limbo && forks < FORKS && !applied_id && nfull(request) ->
		forks++;
		cookie++;
		request ! FORK, 0, cookie }
		do
		:: atomic { !alive -> goto out }
		:: atomic { alive && nempty(reply) ->
			reply ? got_cookie, got_a, got_rows, got_conn;
			if
			:: got_conn == mine && got_cookie == cookie ->
				got_a = 0; got_rows = 0; got_cookie = 0; got_conn = 0;
				break
			:: else
			fi }
		:: atomic { alive && timeouts < TIMEOUTS -> timeouts++; break }
		od

	/* kvtier_plan_request(), then kvtier_plan_wait() for it, applying what comes */
	:: atomic { alive && !limbo && !want_id && requests < REQUESTS && !applied_id && rows && nfull(request) ->
		requests++;
		cookie++;
		request ! REQUEST, 0, cookie }
		do
		:: atomic { !alive -> goto out }
		:: atomic { alive && nempty(reply) ->
			reply ? got_cookie, got_a, got_rows, got_conn;
			if
			:: got_conn == mine && got_cookie == cookie ->
				want_id = got_a;
				got_a = 0; got_rows = 0; got_cookie = 0; got_conn = 0;
				break
			:: else
			fi }
		:: atomic { alive && timeouts < TIMEOUTS -> timeouts++; break }
		od
	:: atomic { alive && want_id && !limbo && acked >= want_id -> want_id = 0 }

	/* All is done: what was asked for has come, and both agree. */
	:: atomic { alive && !limbo && !want_id && !applied_id && requests == REQUESTS && truncates == TRUNCATES &&
			forks == FORKS && rows == ROWS && !p_live && plans == PLANS && empty(request) && cut > ROWS &&
			slot_acked == d_acked && len_rows == d_rows && len_epoch == d_epoch && !wanted ->
		assert((dev | (below(d_rows) & ~below(ix_rows))) == res);
		break }
	od;
out:	skip
}

proctype watch()
{
	byte r;

end:	do
	:: atomic { !conserved -> assert(false) }
	:: atomic { !(sound(0) && sound(1) && sound(2)) -> assert(false) }
	od
}

init
{
	atomic {
		truth[0] = 1; region[0] = 1;
		truth[1] = 2; region[1] = 2;
		run daemon();
		run watch();
		run client(1)
	}
}
