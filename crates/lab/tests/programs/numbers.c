/* numbers STOPFILE: POSIX timers keep their numbers, of which most have been used up before: 5000 timers are made and
 * deleted first. Those that stay are made on two clocks, one of them set; a later one gets a number of its own. */
#include "check.h"

static int make(clockid_t clock)
{
	int id;
	struct sigevent none = {.sigev_notify = SIGEV_NONE};
	SYS(syscall(SYS_timer_create, clock, &none, &id));
	return id;
}

int main(int argc, char **argv)
{
	start(argc, argv);
	for (int i = 0; i < 5000; i++)
		SYS(syscall(SYS_timer_delete, make(CLOCK_MONOTONIC)));
	int set = make(CLOCK_MONOTONIC), unset = make(CLOCK_REALTIME);
	CHECK(set >= 0 && unset != set, "timers %d and %d", set, unset);
	struct itimerspec is, hour = {.it_value.tv_sec = 3600};
	SYS(syscall(SYS_timer_settime, set, 0, &hour, 0));
	int64_t end = now_ns(CLOCK_MONOTONIC) + 3600 * 1000000000ll;
	ready();
	do {
		SYS(syscall(SYS_timer_gettime, unset, &is));
		EQ("the timer that is not set", is.it_value.tv_sec, 0);
		SYS(syscall(SYS_timer_gettime, set, &is));
		int64_t left = is.it_value.tv_sec * 1000000000ll + is.it_value.tv_nsec;
		int64_t wanted = end - now_ns(CLOCK_MONOTONIC);
		CHECK(left - wanted < 50000000ll && wanted - left < 50000000ll, "%lld ns are left of %lld",
		      (long long)left, (long long)wanted);
		int other = make(CLOCK_BOOTTIME);
		CHECK(other != set && other != unset, "number %d is there twice", other);
		SYS(syscall(SYS_timer_delete, other));
		dwell_ms(5);
	} while (next_round());
	return finish();
}
