/* hold MB LOG [SECONDS]: fills MB of memory, writes "ready PID" to LOG, touches nothing more and sleeps; at the end (or
 * on SIGTERM) reads all of it and writes "intact" or "corrupt PAGE". What a drain alone costs is measured with it. */
#include "meter.h"
#include <signal.h>

int main(int argc, char **argv)
{
	if (argc < 3)
		return fprintf(stderr, "usage: hold MB LOG [SECONDS]\n"), 2;
	size_t pages = strtoul(argv[1], 0, 10) * 256;
	uint64_t *mem = filled(pages / 256);
	FILE *log = open_log(argv[2]);
	double seconds = seconds_from(argc, argv, 3);
	sigset_t term;
	sigemptyset(&term), sigaddset(&term, SIGTERM);
	sigprocmask(SIG_BLOCK, &term, 0);
	fprintf(log, "ready %d\n", getpid());
	sigtimedwait(&term, 0, &(struct timespec){(time_t)seconds, 0});
	for (size_t p = 0; p < pages; p++)
		if (mem[p * 512] != (p + 1) * GOLDEN || mem[p * 512 + 511] != (p + 1) * GOLDEN + 511 * 0x0101010101010101ull)
			return fprintf(log, "corrupt %zu\n", p), 3;
	fprintf(log, "intact\n");
	return 0;
}
