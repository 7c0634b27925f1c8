/* What the workloads share: a log that is written line by line, and the two clocks. Times of day in a log are
 * CLOCK_REALTIME in ms, which the driver and every node of a lab agree on; durations are CLOCK_MONOTONIC. */
#ifndef METER_H
#define METER_H
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

static inline int64_t now_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ll + t.tv_nsec;
}
static inline double unix_ms(void)
{
	struct timespec t;
	clock_gettime(CLOCK_REALTIME, &t);
	return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}
static inline FILE *open_log(const char *path)
{
	FILE *log = fopen(path, "w");
	if (!log) {
		perror(path);
		exit(1);
	}
	setvbuf(log, 0, _IOLBF, 0);
	return log;
}
static inline double seconds_from(int argc, char **argv, int at) { return argc > at ? atof(argv[at]) : 1e9; }

#define GOLDEN 0x9E3779B97F4A7C15ull
/* Memory that no zero-page or same-page trick makes cheaper: every word differs. Each page starts with (index+1)*GOLDEN. */
static inline uint64_t *filled(size_t megabytes)
{
	size_t pages = megabytes * 256;
	uint64_t *mem = mmap(0, pages * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (mem == MAP_FAILED) {
		perror("mmap");
		exit(1);
	}
	for (size_t p = 0; p < pages; p++) {
		uint64_t v = (p + 1) * GOLDEN;
		for (size_t w = 0; w < 512; w++, v += 0x0101010101010101ull)
			mem[p * 512 + w] = v;
	}
	return mem;
}
static inline uint64_t rnd(uint64_t *s)
{
	*s ^= *s << 13, *s ^= *s >> 7, *s ^= *s << 17;
	return *s;
}
#endif
