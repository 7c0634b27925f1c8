/* sweep MB LOG [SECONDS]: reads MB of memory from end to end, again and again, with a checksum of every byte (about
 * 5 us a page, so that a network that carries 1 GiB/s can keep up), and writes "chunk INDEX US UNIX_MS" for every
 * 4 MiB, with the time at which the chunk was done. */
#include "meter.h"
#define CHUNK_PAGES 1024

static uint32_t checksum(const uint8_t *page) /* FNV-1a */
{
	uint32_t h = 2166136261u;
	for (int i = 0; i < 4096; i++)
		h = (h ^ page[i]) * 16777619u;
	return h;
}

int main(int argc, char **argv)
{
	if (argc < 3)
		return fprintf(stderr, "usage: sweep MB LOG [SECONDS]\n"), 2;
	size_t pages = strtoul(argv[1], 0, 10) * 256;
	if (pages < CHUNK_PAGES || pages % CHUNK_PAGES)
		return fprintf(stderr, "sweep: MB is a multiple of 4\n"), 2;
	const uint8_t *mem = (const uint8_t *)filled(pages / 256);
	uint32_t *sums = calloc(pages / CHUNK_PAGES, sizeof *sums);
	FILE *log = open_log(argv[2]);
	int64_t end = now_ns() + (int64_t)(1e9 * seconds_from(argc, argv, 3));
	fprintf(log, "ready %d\n", getpid());
	for (int first = 1; now_ns() < end; first = 0)
		for (size_t c = 0; c < pages / CHUNK_PAGES; c++) {
			int64_t from = now_ns();
			uint32_t sum = 0;
			for (size_t p = 0; p < CHUNK_PAGES; p++)
				sum = sum * 31 + checksum(mem + (c * CHUNK_PAGES + p) * 4096);
			if (first)
				sums[c] = sum;
			else if (sums[c] != sum)
				return fprintf(log, "corrupt %zu\n", c), 3;
			fprintf(log, "chunk %zu %.1f %.3f\n", c, (now_ns() - from) / 1e3, unix_ms());
		}
	return 0;
}
