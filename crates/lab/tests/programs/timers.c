/* timers STOPFILE: interval and POSIX timers keep their numbers, periods and payload; sleeps of every kind end when
 * they would have ended, with no EINTR; no clock goes backwards.
 *
 * A sleep may end late on a busy machine; one that was restarted from its beginning by a move ends up to its whole
 * length late. SLACK separates the two. */
#include "check.h"
#include <linux/futex.h>
#include <poll.h>
#include <semaphore.h>
#include <sys/select.h>
#include <sys/time.h>

#define SLEEP_MS 600
#define SLACK_MS 250

static volatile unsigned alarms, posix_ticks, thread_ticks;
static volatile int wrong_payload;

static void on_alarm(int sig) { (void)sig, alarms++; }
static void on_posix(int sig, siginfo_t *info, void *context)
{
	(void)sig, (void)context;
	if (info->si_value.sival_int != 4711 || info->si_code != SI_TIMER)
		wrong_payload = 1;
	posix_ticks += 1 + info->si_overrun;
}
static void on_thread_tick(int sig) { (void)sig, thread_ticks++; }

static struct timespec ms(int64_t n) { return (struct timespec){n / 1000, n % 1000 * 1000000}; }
static struct timespec in_ms(clockid_t clock, int64_t n)
{
	int64_t t = now_ns(clock) + n * 1000000;
	return (struct timespec){t / 1000000000, t % 1000000000};
}

/* One kind of sleep each; returns 0, or the errno with which it ended too early. */
static int by_nanosleep(void) { struct timespec t = ms(SLEEP_MS); return nanosleep(&t, 0) ? errno : 0; }
static int by_absolute(void) { struct timespec t = in_ms(CLOCK_MONOTONIC, SLEEP_MS); return clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, 0); }
static int by_realtime(void) { struct timespec t = in_ms(CLOCK_REALTIME, SLEEP_MS); return clock_nanosleep(CLOCK_REALTIME, TIMER_ABSTIME, &t, 0); }
static int by_boottime(void) { struct timespec t = ms(SLEEP_MS); return clock_nanosleep(CLOCK_BOOTTIME, 0, &t, 0); }
static int by_poll(void) { int r = poll(0, 0, SLEEP_MS); return r < 0 ? errno : r; }
static int by_ppoll(void) { struct timespec t = ms(SLEEP_MS); int r = ppoll(0, 0, &t, 0); return r < 0 ? errno : r; }
static int by_select(void) { struct timeval t = {0, SLEEP_MS * 1000}; int r = select(0, 0, 0, 0, &t); return r < 0 ? errno : r; }
static int by_cond(void)
{
	pthread_mutex_t m = PTHREAD_MUTEX_INITIALIZER;
	pthread_cond_t c = PTHREAD_COND_INITIALIZER;
	struct timespec t = in_ms(CLOCK_REALTIME, SLEEP_MS);
	pthread_mutex_lock(&m);
	int r = pthread_cond_timedwait(&c, &m, &t);
	return r == ETIMEDOUT ? 0 : r ? r : EAGAIN;
}
static int by_sem(void)
{
	sem_t s;
	sem_init(&s, 0, 0);
	struct timespec t = in_ms(CLOCK_REALTIME, SLEEP_MS);
	return sem_timedwait(&s, &t) == -1 && errno == ETIMEDOUT ? 0 : errno;
}
static int by_futex(void)
{
	int word = 7;
	struct timespec t = ms(SLEEP_MS);
	return syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 7, &t, 0, 0) == -1 && errno == ETIMEDOUT ? 0 : errno;
}
static int by_sigwait(void)
{
	sigset_t set;
	struct timespec t = ms(SLEEP_MS);
	sigemptyset(&set), sigaddset(&set, SIGRTMAX);
	return sigtimedwait(&set, 0, &t) == -1 && errno == EAGAIN ? 0 : errno;
}

static const struct sleeper { const char *name; int (*sleep)(void); } sleepers[] = {
	{"nanosleep", by_nanosleep}, {"absolute clock_nanosleep", by_absolute}, {"realtime clock_nanosleep", by_realtime},
	{"boottime clock_nanosleep", by_boottime}, {"poll", by_poll}, {"ppoll", by_ppoll}, {"select", by_select},
	{"pthread_cond_timedwait", by_cond}, {"sem_timedwait", by_sem}, {"futex", by_futex}, {"sigtimedwait", by_sigwait},
};
#define SLEEPERS (int)(sizeof sleepers / sizeof *sleepers)

static void *sleeper_thread(void *arg)
{
	const struct sleeper *s = arg;
	while (!stopped()) {
		int64_t from = now_ns(CLOCK_MONOTONIC);
		int r = s->sleep();
		int64_t took = (now_ns(CLOCK_MONOTONIC) - from) / 1000;
		CHECK(r == 0, "%s ended with %s after %lld us", s->name, strerror(r), (long long)took);
		CHECK(took >= SLEEP_MS * 1000 - 1000, "%s of %d ms took only %lld us", s->name, SLEEP_MS, (long long)took);
		CHECK(took < (SLEEP_MS + SLACK_MS) * 1000, "%s of %d ms took %lld us", s->name, SLEEP_MS, (long long)took);
	}
	return 0;
}

static void clocks_go_forward(void)
{
	static const clockid_t clocks[] = {CLOCK_MONOTONIC, CLOCK_MONOTONIC_RAW, CLOCK_MONOTONIC_COARSE, CLOCK_BOOTTIME, CLOCK_REALTIME};
	static int64_t last[5];
	for (int i = 0; i < 5; i++) {
		int64_t t = now_ns(clocks[i]);
		struct timespec raw;
		syscall(SYS_clock_gettime, clocks[i], &raw); /* the vDSO and the kernel must agree, too */
		int64_t r = raw.tv_sec * 1000000000ll + raw.tv_nsec;
		CHECK(t >= last[i], "clock %d went back by %lld ns", clocks[i], (long long)(last[i] - t));
		CHECK(r >= t, "clock %d: the kernel's is %lld ns behind the vDSO's", clocks[i], (long long)(t - r));
		CHECK(!last[i] || t - last[i] < 5000000000ll, "clock %d leapt by %lld ns", clocks[i], (long long)(t - last[i]));
		last[i] = r;
	}
}

int main(int argc, char **argv)
{
	start(argc, argv);
	sigset_t ticks;
	sigemptyset(&ticks), sigaddset(&ticks, SIGALRM), sigaddset(&ticks, SIGRTMIN + 1), sigaddset(&ticks, SIGRTMIN + 2);
	pthread_sigmask(SIG_BLOCK, &ticks, 0); /* only this thread takes ticks; a sleeper must see no EINTR */
	pthread_t threads[SLEEPERS];
	for (int i = 0; i < SLEEPERS; i++)
		CHECK(!pthread_create(&threads[i], 0, sleeper_thread, (void *)&sleepers[i]), "pthread_create");
	pthread_sigmask(SIG_UNBLOCK, &ticks, 0);

	signal(SIGALRM, on_alarm);
	struct sigaction act = {.sa_sigaction = on_posix, .sa_flags = SA_SIGINFO | SA_RESTART};
	sigaction(SIGRTMIN + 1, &act, 0);
	signal(SIGRTMIN + 2, on_thread_tick);
	struct itimerval real = {{0, 10000}, {0, 10000}}, virt = {{9, 0}, {5000, 0}}, got;
	SYS(setitimer(ITIMER_REAL, &real, 0));
	SYS(setitimer(ITIMER_VIRTUAL, &virt, 0));
	/* Timer numbers with a gap: the second is deleted. */
	timer_t id[4];
	struct sigevent by_process = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN + 1, .sigev_value.sival_int = 4711};
	struct sigevent none = {.sigev_notify = SIGEV_NONE};
	struct sigevent by_thread = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = SIGRTMIN + 2};
	by_thread._sigev_un._tid = gettid();
	SYS(timer_create(CLOCK_MONOTONIC, &by_process, &id[0]));
	SYS(timer_create(CLOCK_REALTIME, &none, &id[1]));
	SYS(timer_create(CLOCK_BOOTTIME, &none, &id[2]));
	SYS(timer_create(CLOCK_MONOTONIC, &by_thread, &id[3]));
	SYS(timer_delete(id[1]));
	struct itimerspec fast = {{0, 7000000}, {0, 7000000}}, slow = {{33, 0}, {4000, 0}}, left;
	SYS(timer_settime(id[0], 0, &fast, 0));
	SYS(timer_settime(id[2], 0, &slow, 0));
	SYS(timer_settime(id[3], 0, &fast, 0));
	int64_t armed = now_ns(CLOCK_BOOTTIME);
	ready();
	do {
		/* The clock is read outside the counters, so that being preempted in between only adds time. */
		int64_t from = now_ns(CLOCK_MONOTONIC);
		unsigned a = alarms, p = posix_ticks, t = thread_ticks;
		while (now_ns(CLOCK_MONOTONIC) - from < 60000000)
			clocks_go_forward();
		unsigned alarms_now = alarms, posix_now = posix_ticks, thread_now = thread_ticks;
		int64_t elapsed = now_ns(CLOCK_MONOTONIC) - from;
		CHECK(alarms_now > a, "ITIMER_REAL stopped");
		CHECK(alarms_now - a <= elapsed / 10000000 + 2, "ITIMER_REAL: %u ticks in %lld us", alarms_now - a, (long long)elapsed / 1000);
		CHECK(posix_now > p, "a POSIX timer stopped");
		CHECK(posix_now - p <= elapsed / 7000000 + 3, "a POSIX timer: %u ticks in %lld us", posix_now - p, (long long)elapsed / 1000);
		CHECK(thread_now > t, "a timer to one thread stopped");
		CHECK(!wrong_payload, "a timer's signal had another payload");
		getitimer(ITIMER_REAL, &got);
		EQ("period of ITIMER_REAL", got.it_interval.tv_usec, 10000);
		getitimer(ITIMER_VIRTUAL, &got);
		EQ("period of ITIMER_VIRTUAL", got.it_interval.tv_sec, 9);
		CHECK(got.it_value.tv_sec > 4000 && got.it_value.tv_sec <= 5000, "ITIMER_VIRTUAL has %ld s left", (long)got.it_value.tv_sec);
		SYS(timer_gettime(id[2], &left));
		EQ("period of a slow timer", left.it_interval.tv_sec, 33);
		int64_t want = 4000000 - (now_ns(CLOCK_BOOTTIME) - armed) / 1000000;
		int64_t have = left.it_value.tv_sec * 1000 + left.it_value.tv_nsec / 1000000;
		CHECK(have > want - 100 && have < want + 100, "a slow timer has %lld ms left, not %lld", (long long)have, (long long)want);
		CHECK(timer_gettime(id[1], &left) == -1 && errno == EINVAL, "a deleted timer is there");
		timer_t again; /* creating one more still works */
		SYS(timer_create(CLOCK_MONOTONIC, &none, &again));
		SYS(timer_delete(again));
	} while (next_round());
	for (int i = 0; i < SLEEPERS; i++)
		pthread_join(threads[i], 0);
	return finish();
}
