/* faultmeter MB LOG [SECONDS]: touches the pages of MB of memory in an order that visits each once before any twice,
 * and writes "touch US UNIX_MS" for every touch that took more than 5 us, which in memory that is there is rare.
 * After a move these are the demand faults, as the program sees them. Between touches it works for about 50 us. */
#include "meter.h"

int main(int argc, char **argv)
{
	if (argc < 3)
		return fprintf(stderr, "usage: faultmeter MB LOG [SECONDS]\n"), 2;
	size_t pages = strtoul(argv[1], 0, 10) * 256;
	uint64_t *mem = filled(pages / 256);
	FILE *log = open_log(argv[2]);
	int64_t end = now_ns() + (int64_t)(1e9 * seconds_from(argc, argv, 3));
	/* A stride that shares no factor with the number of pages (a multiple of 256) visits them all, far apart. */
	size_t stride = (pages * 5 / 8) | 1, at = 0;
	while (stride % 3 == 0 || stride % 5 == 0 || stride % 7 == 0)
		stride += 2;
	uint64_t seed = GOLDEN;
	fprintf(log, "ready %d\n", getpid());
	for (;;) {
		int64_t from = now_ns();
		uint64_t v = *(volatile uint64_t *)&mem[at * 512];
		int64_t took = now_ns() - from;
		if (v != (at + 1) * GOLDEN)
			return fprintf(log, "corrupt %zu\n", at), 3;
		if (took > 5000)
			fprintf(log, "touch %.2f %.3f\n", took / 1e3, unix_ms());
		at = (at + stride) % pages;
		for (int64_t until = from + took + 50000; (from = now_ns()) < until;)
			rnd(&seed);
		if (from > end)
			return 0;
	}
}
