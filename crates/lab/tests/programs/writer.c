/* writer STOPFILE [MB [SEED]]: writes without pause, against a model. A tenth of MB (default 64) takes most of the writes;
 * pages are dropped and written again, the heap grows and shrinks, a mapping grows downwards, others come and go. Whoever
 * sees a page that is older than its last write says so at once. */
#include "check.h"
#include <sys/mman.h>

#define PAGE 4096ul
static uint64_t *mem, *model;
static size_t pages;
static uint64_t seed = 88172645463325252ull;
static char *growing, *guest;
static size_t grown, guests;
static void *heap[64];

static void page_as_written(size_t p)
{
	uint64_t *q = mem + p * 512, m = model[p];
	EQ("the first word of a page", q[0], m);
	EQ("a word inside", q[1 + p * 37 % 510], m * 3);
	EQ("the last word", q[511], m * 7);
}
static void write_page(size_t p)
{
	uint64_t *q = mem + p * 512, m = rnd(&seed);
	model[p] = m, q[0] = m, q[1 + p * 37 % 510] = m * 3, q[511] = m * 7;
}
/* The address space changes while its pages travel. */
static void change(void)
{
	size_t h = rnd(&seed) % 64;
	if (heap[h])
		EQ("memory from malloc", *(unsigned char *)heap[h], h);
	free(heap[h]);
	heap[h] = malloc(1000 + rnd(&seed) % 200000);
	memset(heap[h], h, 1000);
	if (grown < 200)
		grown++, growing[-(long)(grown * PAGE)] = grown;
	for (size_t i = 1; i <= grown; i++)
		EQ("a page grown downwards", growing[-(long)(i * PAGE)], (char)i);
	if (guest) {
		EQ("a mapping that came", *(unsigned char *)guest, guests & 255);
		SYS(munmap(guest, 32 * PAGE));
	}
	guest = SYS(mmap(0, 32 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
	memset(guest, ++guests & 255, 16 * PAGE);
}

int main(int argc, char **argv)
{
	start(argc, argv);
	pages = (argc > 2 ? strtoul(argv[2], 0, 10) : 64) * 256;
	seed += argc > 3 ? strtoull(argv[3], 0, 10) : 0;
	mem = SYS(mmap(0, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
	model = calloc(pages, sizeof *model);
	for (size_t p = 0; p < pages; p++)
		write_page(p);
	/* Far from where others are mapped: what grows down stops 256 pages above the next mapping. */
	growing = SYS(mmap((void *)0x200000000000, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_GROWSDOWN | MAP_FIXED_NOREPLACE, -1, 0));
	ready();
	do {
		for (int i = 0; i < 20000; i++) {
			uint64_t r = rnd(&seed);
			size_t p = (r >> 32) % (r % 10 ? pages / 10 : pages);
			page_as_written(p);
			if (r >> 8 & 1)
				write_page(p);
			else if (r >> 9 % 4096 == 0)
				SYS(madvise(mem + p * 512, PAGE, MADV_DONTNEED)), model[p] = 0;
		}
		change();
	} while (next_round());
	for (size_t p = 0; p < pages; p++)
		page_as_written(p);
	return finish();
}
