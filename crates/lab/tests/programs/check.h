/* What every program here does alike. A program is run as `PROGRAM STOPFILE [ARG…]`. It sets something up, prints
 * "ready", and then in rounds builds state, dwells (so that a move is likely to hit just then) and compares. While it
 * goes it prints "round N" about every 20 ms, which tells the driver that it still works where it is now. When
 * STOPFILE exists it prints "ok ROUNDS" and exits 0. The first difference is printed with its line; then it exits 1.
 * Nothing here knows of nodes or moves: natively every program prints "ok". */
#ifndef CHECK_H
#define CHECK_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* A difference: say which, and end at once, whichever thread or child found it. */
#define CHECK(cond, ...)                                                                       \
	do {                                                                                   \
		if (!(cond)) {                                                                 \
			int err_ = errno;                                                      \
			char msg_[512];                                                        \
			int n_ = snprintf(msg_, 200, "%s:%d: %.120s: ", __FILE_NAME__, __LINE__, #cond); \
			n_ = n_ > 199 ? 199 : n_;                                              \
			n_ += snprintf(msg_ + n_, sizeof msg_ - n_ - 40, __VA_ARGS__);         \
			n_ = n_ > 471 ? 471 : n_;                                              \
			n_ += snprintf(msg_ + n_, 40, " (errno %d, pid %d)\n", err_, getpid()); \
			if (write(1, msg_, n_) != n_)                                          \
				_exit(2);                                                      \
			_exit(1);                                                              \
		}                                                                              \
	} while (0)

/* EQ(what, got, wanted): the usual comparison, in numbers. */
#define EQ(what, got, wanted)                                                                  \
	do {                                                                                   \
		long long g_ = (long long)(got), w_ = (long long)(wanted);                     \
		CHECK(g_ == w_, "%s is %lld (%#llx), was %lld (%#llx)", what, g_, g_, w_, w_); \
	} while (0)

/* SYS(call): a call that must not fail. */
#define SYS(call)                                                    \
	({                                                           \
		__typeof__(call) r_ = (call);                        \
		CHECK(r_ != (__typeof__(call))-1, "%s", strerror(errno)); \
		r_;                                                  \
	})

static const char *stop_file;
static unsigned long rounds;
static int64_t last_print_ns, start_ns;

static inline int64_t now_ns(clockid_t clock)
{
	struct timespec t;
	clock_gettime(clock, &t);
	return t.tv_sec * 1000000000ll + t.tv_nsec;
}

static inline void start(int argc, char **argv)
{
	if (argc < 2) {
		fprintf(stderr, "usage: %s STOPFILE [ARG…] (see check.h)\n", argv[0]);
		exit(2);
	}
	stop_file = argv[1];
	setvbuf(stdout, 0, _IOLBF, 0);
	start_ns = now_ns(CLOCK_MONOTONIC);
}

/* The stop file is looked for by a raw call: under the program's own seccomp filter that is all it needs. */
static inline int stopped(void) { return syscall(SYS_access, stop_file, F_OK) == 0; }

static inline void say(const char *text)
{
	size_t n = strlen(text);
	if (write(1, text, n) != (ssize_t)n)
		_exit(2);
}

static inline void ready(void) { say("ready\n"); }

/* The end of a round: reports progress; false when it is time to stop. */
static inline int next_round(void)
{
	int64_t now = now_ns(CLOCK_MONOTONIC);
	rounds++;
	if (now - last_print_ns > 20000000) {
		char line[40];
		snprintf(line, sizeof line, "round %lu\n", rounds);
		say(line);
		last_print_ns = now;
	}
	CHECK(now - start_ns < 300000000000ll, "nobody made %s within 300 s", stop_file);
	return !stopped();
}

static inline int finish(void)
{
	char line[40];
	snprintf(line, sizeof line, "ok %lu\n", rounds);
	say(line);
	return 0;
}

/* Time for a move to come: every other time on the CPU, every other time asleep. Lengthened by nothing. */
static inline void dwell_ms(int ms)
{
	static __thread unsigned turn;
	int64_t end = now_ns(CLOCK_MONOTONIC) + ms * 1000000ll;
	if (turn++ & 1) {
		while (now_ns(CLOCK_MONOTONIC) < end)
			;
	} else {
		struct timespec until = {end / 1000000000, end % 1000000000};
		while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, 0) == EINTR)
			; /* its own timers may interrupt it */
	}
}

/* A small generator with a state of the caller's own. */
static inline uint64_t rnd(uint64_t *s)
{
	*s ^= *s << 13, *s ^= *s >> 7, *s ^= *s << 17;
	return *s;
}
#endif
