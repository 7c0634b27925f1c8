/* opsmeter MB LOG [SECONDS]: gapmeter's work (reads pages at random, checks every value; without its naps), counted:
 * writes "ops COUNT UNIX_MS" every 10 ms. A tenth of the pages takes nine tenths of the reads: a program has a hot set. */
#include "meter.h"

int main(int argc, char **argv)
{
	if (argc < 3)
		return fprintf(stderr, "usage: opsmeter MB LOG [SECONDS]\n"), 2;
	size_t pages = strtoul(argv[1], 0, 10) * 256;
	uint64_t *mem = filled(pages / 256);
	FILE *log = open_log(argv[2]);
	int64_t start = now_ns(), next = start + 10000000, end = start + (int64_t)(1e9 * seconds_from(argc, argv, 3));
	uint64_t seed = 88172645463325252ull;
	unsigned long ops = 0;
	fprintf(log, "ready %d\n", getpid());
	for (;;) {
		for (int i = 0; i < 64; i++) {
			uint64_t r = rnd(&seed);
			size_t p = (r >> 32) % (r % 10 ? pages / 10 : pages);
			if (*(volatile uint64_t *)&mem[p * 512] != (p + 1) * GOLDEN)
				return fprintf(log, "corrupt %zu\n", p), 3;
		}
		ops += 64;
		int64_t now = now_ns();
		if (now >= next) {
			fprintf(log, "ops %lu %.3f\n", ops, unix_ms());
			next = now + 10000000;
		}
		if (now > end)
			return 0;
	}
}
