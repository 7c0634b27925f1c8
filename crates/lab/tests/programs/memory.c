/* memory STOPFILE [MB [SEED]]: every operation on an address space, at random, against a model of it. An arena of MB
 * (default 64) is filled; each round maps, unmaps, moves, protects, discards, forks and compares single pages and whole
 * stretches. Most of the arena is not touched for a long time, so that after a move operations meet pages that are
 * still away. Beside the arena: brk, stack growth, guard pages, locked and advised ranges, file mappings. */
#include "check.h"
#include <setjmp.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <ucontext.h>

#define PAGE 4096ul
enum kind { NONE, ANON, FILE_COW };
struct page {
	uint8_t kind, prot;     /* of the mapping */
	uint32_t file_page;     /* FILE_COW: which page of the file */
	uint64_t value;         /* the first word as it must read; 0 is a page of zeros */
	uint8_t written;        /* FILE_COW: value is ours, not the file's */
};
static struct page *model;
static size_t pages;
static char *arena;
static uint64_t seed;
static int file = -1;
#define FILE_PAGES 512u

static uint64_t *word(size_t i) { return (uint64_t *)(arena + i * PAGE); }
static uint64_t file_word(uint32_t page) { return 0xF11Eull << 32 | page; }
static uint64_t wanted(size_t i)
{
	return model[i].kind == FILE_COW && !model[i].written ? file_word(model[i].file_page) : model[i].value;
}

static sigjmp_buf fault_jump;
static volatile sig_atomic_t fault_expected, fault_seen;
static const char *doing = "nothing yet"; /* the operation, for the report of a difference */
static void *volatile provoked;           /* where a fault was last provoked */
static unsigned long faults_taken;

/* An unexpected signal: all that is known of it, and of the address. */
static void report_fault(int sig, const siginfo_t *info, const ucontext_t *context)
{
	uintptr_t at = (uintptr_t)info->si_addr, from = 0, to = 0;
	const greg_t *r = context->uc_mcontext.gregs;
	printf("unexpected signal %d: si_code %d, si_addr %p, rip %#llx, error %#llx, cr2 %#llx, trap %lld, rsp %#llx; round %lu, doing %s, "
	       "fault %lu, last provoked at %p (arena %p…%p, stack word %p)\n",
	       sig, info->si_code, info->si_addr, r[REG_RIP], r[REG_ERR], r[REG_CR2], r[REG_TRAPNO], r[REG_RSP], rounds, doing,
	       faults_taken, provoked, (void *)arena, (void *)(arena + pages * PAGE), (void *)&at);
	size_t i = (at - (uintptr_t)arena) / PAGE;
	if (at >= (uintptr_t)arena && i < pages)
		printf("the model of page %zu: kind %d, prot %d, value %#llx, written %d\n", i, model[i].kind, model[i].prot,
		       (unsigned long long)wanted(i), model[i].written);
	FILE *maps = fopen("/proc/self/maps", "r");
	char line[512], before[512] = "";
	while (maps && fgets(line, sizeof line, maps)) {
		if (sscanf(line, "%lx-%lx ", &from, &to) == 2 && to > at) {
			printf("below: %sthere:  %s", before, line);
			break;
		}
		strcpy(before, line);
	}
	fflush(stdout);
}
static void on_fault(int sig, siginfo_t *info, void *context)
{
	if (!fault_expected) {
		report_fault(sig, info, context);
		_exit(1);
	}
	CHECK((void *)((uintptr_t)info->si_addr & ~(PAGE - 1)) == provoked, "a fault at %p was provoked, signal %d is about %p", provoked, sig,
	      info->si_addr);
	fault_seen = sig, faults_taken++;
	siglongjmp(fault_jump, 1);
}
/* Does the access fault? */
static int faults(volatile uint64_t *at, int write)
{
	provoked = (void *)((uintptr_t)at & ~(PAGE - 1)), fault_seen = 0, fault_expected = 1;
	if (!sigsetjmp(fault_jump, 1)) {
		if (write)
			*at = *at;
		else
			(void)*at;
	}
	fault_expected = 0;
	return fault_seen;
}

static void compare(size_t i)
{
	if (model[i].kind == NONE || !(model[i].prot & PROT_READ))
		return;
	uint64_t *w = word(i);
	CHECK(w[0] == wanted(i), "page %zu at %p reads %#llx, should be %#llx (kind %d, prot %d)", i, (void *)w,
	      (unsigned long long)w[0], (unsigned long long)wanted(i), model[i].kind, model[i].prot);
	/* The last word says the same, so that half a page does not pass. */
	CHECK(w[511] == wanted(i), "the end of page %zu reads %#llx, should be %#llx", i, (unsigned long long)w[511], (unsigned long long)wanted(i));
	CHECK(w[256] == 0, "the middle of page %zu reads %#llx", i, (unsigned long long)w[256]);
}
static void fill(size_t i, uint64_t value)
{
	if (model[i].kind == NONE || !(model[i].prot & PROT_WRITE))
		return;
	word(i)[0] = word(i)[511] = value;
	model[i].value = value, model[i].written = 1;
}

/* A random stretch, mostly short. */
static size_t stretch(size_t *from)
{
	size_t n = 1 + rnd(&seed) % ((rnd(&seed) & 7) ? 16 : 600);
	*from = rnd(&seed) % (pages - n);
	return n;
}
static void set(size_t from, size_t n, enum kind kind, int prot)
{
	for (size_t i = from; i < from + n; i++)
		model[i] = (struct page){.kind = kind, .prot = prot};
}

static void do_map_anon(void)
{
	size_t from, n = stretch(&from);
	int prot = PROT_READ | PROT_WRITE;
	SYS(mmap(arena + from * PAGE, n * PAGE, prot, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | ((rnd(&seed) & 3) ? 0 : MAP_NORESERVE), -1, 0));
	set(from, n, ANON, prot);
	for (size_t i = from; i < from + n; i += 1 + rnd(&seed) % 4)
		fill(i, rnd(&seed));
}
static void do_map_file(void)
{
	size_t from, n = stretch(&from);
	uint32_t at = rnd(&seed) % (FILE_PAGES - 1);
	if (n > FILE_PAGES - at)
		n = FILE_PAGES - at;
	SYS(mmap(arena + from * PAGE, n * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, file, at * PAGE));
	set(from, n, FILE_COW, PROT_READ | PROT_WRITE);
	for (size_t i = from; i < from + n; i++)
		model[i].file_page = at + (i - from);
	for (size_t i = from; i < from + n; i += 1 + rnd(&seed) % 5)
		fill(i, rnd(&seed));
}
static void do_unmap(void)
{
	size_t from, n = stretch(&from);
	SYS(munmap(arena + from * PAGE, n * PAGE));
	set(from, n, NONE, 0);
	EQ("signal at an unmapped page", faults(word(from), 0), SIGSEGV);
}
static void do_protect(void)
{
	static const int prots[] = {PROT_NONE, PROT_READ, PROT_READ | PROT_WRITE, PROT_READ | PROT_WRITE};
	size_t from, n = stretch(&from);
	int prot = prots[rnd(&seed) % 4];
	for (size_t i = from; i < from + n; i++)
		if (model[i].kind == NONE)
			return;
	SYS(mprotect(arena + from * PAGE, n * PAGE, prot));
	for (size_t i = from; i < from + n; i++)
		model[i].prot = prot;
	if (!(prot & PROT_WRITE))
		EQ("signal at a protected page", faults(word(from), 1), SIGSEGV);
	if (prot == PROT_NONE)
		EQ("signal at an inaccessible page", faults(word(from), 0), SIGSEGV);
}
/* What is discarded reads as zeros, or as the file again. */
static void do_discard(void)
{
	size_t from, n = stretch(&from);
	for (size_t i = from; i < from + n; i++)
		if (model[i].kind == NONE)
			return;
	SYS(madvise(arena + from * PAGE, n * PAGE, MADV_DONTNEED));
	for (size_t i = from; i < from + n; i++)
		model[i].value = 0, model[i].written = 0;
	compare(from), compare(from + n - 1);
}
static int movable(size_t from, size_t n)
{
	if (model[from].kind == NONE) /* mremap wants one mapping: same kind, protection, and consecutive file pages */
		return 0;
	for (size_t i = from + 1; i < from + n; i++)
		if (model[i].kind != model[from].kind || model[i].prot != model[from].prot ||
		    (model[i].kind == FILE_COW && model[i].file_page != model[from].file_page + (i - from)))
			return 0;
	return 1;
}
static int mapped(size_t i)
{
	unsigned char core;
	return !mincore(word(i), PAGE, &core);
}
static void do_move(void)
{
	size_t from, n = stretch(&from), to = rnd(&seed) % (pages - n);
	if (n > 64)
		n = 64;
	if (!movable(from, n) || (to < from + n && from < to + n))
		return;
	/* EFAULT: two mappings after all. Linux 6.17 moves several at once, but not those that a userfaultfd watches, as the
	 * pages' new node does while they are away: it refuses there, and what came before has moved. Whatever was at the
	 * target was unmapped first. */
	void *r = mremap(word(from), n * PAGE, n * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, word(to));
	if (r == MAP_FAILED && errno == EFAULT) {
		int whole = 1;
		for (size_t i = 0; i < n; i++)
			if (!mapped(from + i)) {
				CHECK(whole, "mremap moved page %zu of %zu, but not those before it", i, n);
				model[to + i] = model[from + i], model[from + i].kind = NONE;
				compare(to + i);
			} else {
				whole = 0, compare(from + i);
				model[to + i].kind = mapped(to + i) ? model[to + i].kind : NONE;
			}
		return;
	}
	CHECK(r == word(to), "mremap: %s", strerror(errno));
	memcpy(&model[to], &model[from], n * sizeof *model);
	set(from, n, NONE, 0);
	compare(to), compare(to + n - 1);
}
/* The child has the parent's memory as it is now, and what it writes stays its own. */
static void do_fork(void)
{
	size_t at[24];
	for (int i = 0; i < 24; i++)
		at[i] = rnd(&seed) % pages;
	pid_t child = SYS(fork());
	if (!child) {
		for (int i = 0; i < 24; i++)
			compare(at[i]);
		for (int i = 0; i < 24; i++)
			fill(at[i], 0xC411D);
		for (int i = 0; i < 24; i++)
			compare(at[i]);
		_exit(0);
	}
	for (int i = 0; i < 8; i++)
		fill(at[i], rnd(&seed));
	int status;
	EQ("waitpid", waitpid(child, &status, 0), child);
	EQ("the forked child's status", status, 0);
	for (int i = 0; i < 24; i++)
		compare(at[i]);
}
/* A child that becomes another program while its pages are away. */
static void do_exec(void)
{
	char expected[32];
	snprintf(expected, sizeof expected, "%d", getpid());
	int out[2];
	SYS(pipe(out));
	pid_t child = SYS(fork());
	if (!child) {
		dup2(out[1], 1);
		execl("/bin/sh", "sh", "-c", "echo $PPID", (char *)0);
		_exit(9);
	}
	close(out[1]);
	char got[32] = "";
	ssize_t n = read(out[0], got, sizeof got - 1);
	int status;
	EQ("waitpid", waitpid(child, &status, 0), child);
	EQ("the shell's status", status, 0);
	CHECK(n > 1, "the shell said nothing (%zd)", n);
	got[n - 1] = 0;
	CHECK(!strcmp(got, expected), "the shell's parent is %s, not %s", got, expected);
	close(out[0]);
}
static void do_touch(void)
{
	for (int i = 0; i < 40; i++) {
		size_t p = rnd(&seed) % pages;
		compare(p);
		if (rnd(&seed) & 1)
			fill(p, rnd(&seed));
	}
}
/* System calls reach pages that are away, too. */
static void do_syscalls(void)
{
	int p[2];
	SYS(pipe(p));
	for (int i = 0; i < 8; i++) {
		size_t a = rnd(&seed) % pages, b = rnd(&seed) % pages;
		if (!(model[a].prot & PROT_READ) || !(model[b].prot & PROT_WRITE) || model[a].kind == NONE || model[b].kind == NONE)
			continue;
		EQ("write", write(p[1], word(a), PAGE), PAGE);
		EQ("read", read(p[0], word(b), PAGE), PAGE);
		model[b].value = wanted(a), model[b].written = 1;
		compare(b);
	}
	size_t gone = rnd(&seed) % pages;
	if (model[gone].kind == NONE)
		CHECK(write(p[1], word(gone), 8) == -1 && errno == EFAULT, "a system call read an unmapped page");
	close(p[0]), close(p[1]);
}

/* --- beside the arena --- */

static unsigned char *heap_base;
static size_t heap_pages;
static void heap_and_stack(void)
{
	if (!heap_base)
		heap_base = SYS(sbrk(0)), heap_base = (unsigned char *)(((uintptr_t)heap_base + 4095) & ~4095ul), SYS(brk(heap_base));
	EQ("the break", (intptr_t)sbrk(0), (intptr_t)(heap_base + heap_pages * PAGE));
	for (size_t i = 0; i < heap_pages; i++)
		EQ("a page of the heap", heap_base[i * PAGE], (unsigned char)(i * 7 + 1));
	size_t next = rnd(&seed) % 200;
	SYS(brk(heap_base + next * PAGE));
	for (; heap_pages < next; heap_pages++) {
		EQ("a new page of the heap", heap_base[heap_pages * PAGE], 0);
		heap_base[heap_pages * PAGE] = heap_pages * 7 + 1;
	}
	heap_pages = next;
}
static __attribute__((noinline)) int deep(int n) /* grows the stack downwards, page by page */
{
	volatile char frame[4096];
	frame[0] = n, frame[4095] = n;
	int below = n ? deep(n - 1) : 0;
	EQ("a stack frame", frame[0], (char)n);
	EQ("its end", frame[4095], (char)n);
	return below + 1;
}

static struct { char *at; const char *flag; int on; } advised[6];
static char *growing, *guarded, *shared_file, *huge;
/* One flag of VmFlags of the mapping that starts at (or holds) an address; the mapping as it was found. */
static char found_mapping[256], found_flags[256];
static int has_flag(const void *at, const char *flag)
{
	FILE *f = SYS(fopen("/proc/self/smaps", "r") ?: (FILE *)-1);
	char line[512];
	int inside = 0, found = 0;
	found_mapping[0] = found_flags[0] = 0;
	while (fgets(line, sizeof line, f)) {
		unsigned long a, b;
		if (sscanf(line, "%lx-%lx ", &a, &b) == 2 && strchr(line, '-') < strchr(line, ' '))
			(inside = a <= (uintptr_t)at && (uintptr_t)at < b) ? snprintf(found_mapping, sizeof found_mapping, "%.*s", (int)strcspn(line, "\n"), line) : 0;
		else if (inside && !strncmp(line, "VmFlags:", 8)) {
			snprintf(found_flags, sizeof found_flags, "%.*s", (int)strcspn(line, "\n"), line);
			char with_blank[8];
			snprintf(with_blank, sizeof with_blank, " %s ", flag);
			found = strstr(line, with_blank) != 0;
		}
	}
	fclose(f);
	return found;
}
static char *anon(size_t n, int flags)
{
	return SYS(mmap(0, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0));
}
static void make_special(void)
{
	static const struct { int advice; const char *flag; } advice[] = {
		{MADV_DONTDUMP, "dd"}, {MADV_DONTFORK, "dc"}, {MADV_WIPEONFORK, "wf"}, {MADV_HUGEPAGE, "hg"}, {MADV_NOHUGEPAGE, "nh"}};
	for (int i = 0; i < 5; i++) {
		anon(PAGE, 0);
		advised[i].at = anon(16 * PAGE, 0), advised[i].flag = advice[i].flag;
		advised[i].on = !madvise(advised[i].at, 16 * PAGE, advice[i].advice);
		memset(advised[i].at, 'a' + i, 16 * PAGE);
	}
	anon(PAGE, 0);
	advised[5].at = anon(16 * PAGE, 0), advised[5].flag = "lo";
	advised[5].on = !mlock(advised[5].at, 16 * PAGE);
	memset(advised[5].at, 'f', 16 * PAGE);
	/* Far from where others are mapped: what grows down stops 256 pages above the next mapping. */
	growing = SYS(mmap((void *)0x200000000000, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_GROWSDOWN | MAP_FIXED_NOREPLACE, -1, 0));
	memset(growing, 'g', PAGE);
	guarded = anon(9 * PAGE, 0);
	for (int i = 0; i < 9; i++)
		memset(guarded + i * PAGE, 'h', 16);
	SYS(mprotect(guarded, PAGE, PROT_NONE));
	SYS(mprotect(guarded + 8 * PAGE, PAGE, PROT_NONE));
	shared_file = SYS(mmap(0, FILE_PAGES * PAGE, PROT_READ, MAP_SHARED, file, 0)); /* as locale archives are */
	huge = anon(8 << 20, 0); /* a 2 MiB page where the kernel gives one */
	madvise(huge, 8 << 20, MADV_HUGEPAGE);
	for (size_t i = 0; i < 8 << 20; i += PAGE)
		*(uint64_t *)(huge + i) = i ^ 0xABCD;
}
static void special_as_made(void)
{
	static int grown = 0;
	for (int i = 0; i < 6; i++) {
		for (size_t o = 0; o < 16 * PAGE; o += 511)
			EQ(advised[i].flag, advised[i].at[o], 'a' + i);
		if (advised[i].on)
			CHECK(has_flag(advised[i].at, advised[i].flag), "flag %s of the mapping at %p is lost: %s, %s", advised[i].flag, (void *)advised[i].at, found_mapping, found_flags);
	}
	CHECK(has_flag(growing, "gd"), "the mapping no longer grows down");
	EQ("the growing mapping", growing[0], 'g');
	if (grown < 100) {
		grown++;
		growing[-grown * (long)PAGE] = grown;
	}
	for (int i = 1; i <= grown; i++)
		EQ("a page grown downwards", growing[-i * (long)PAGE], i);
	EQ("signal at a guard page", faults((uint64_t *)guarded, 0), SIGSEGV);
	EQ("signal at a guard page", faults((uint64_t *)(guarded + 8 * PAGE), 1), SIGSEGV);
	for (int i = 1; i < 8; i++)
		EQ("between guards", guarded[i * PAGE + 15], 'h');
	for (int i = 0; i < 20; i++) {
		uint32_t p = rnd(&seed) % FILE_PAGES;
		EQ("the shared file mapping", *(uint64_t *)(shared_file + p * PAGE), file_word(p));
		size_t o = rnd(&seed) % ((8 << 20) / PAGE) * PAGE;
		EQ("a huge page", *(uint64_t *)(huge + o), o ^ 0xABCD);
	}
}

/* What the kernel put above the stack at the start: arguments and environment. Nothing but the stop file's name is
 * looked at otherwise. */
extern char **environ;
static char *above, *above_was;
static size_t above_bytes;
static void keep_above(char **argv)
{
	char *end = argv[0];
	for (char **e = argv; *e; e++)
		end = *e + strlen(*e) + 1;
	for (char **e = environ; *e; e++)
		end = *e + strlen(*e) + 1;
	above = argv[0], above_bytes = end - above;
	above_was = malloc(above_bytes);
	memcpy(above_was, above, above_bytes);
}
static void above_as_kept(void)
{
	for (size_t i = 0; i < above_bytes; i++)
		CHECK(above[i] == above_was[i], "byte %zu of arguments and environment (%p, %zu bytes) is %d, was %d", i, (void *)above, above_bytes,
		      above[i], above_was[i]);
}

static void make_file(void)
{
	char name[] = "memory-file-XXXXXX";
	int w = SYS(mkstemp(name));
	for (uint32_t i = 0; i < FILE_PAGES; i++) {
		uint64_t page[512] = {[0] = file_word(i), [511] = file_word(i)};
		EQ("write", pwrite(w, page, PAGE, i * PAGE), PAGE);
	}
	fsync(w), close(w);
	file = SYS(open(name, O_RDONLY));
	/* It stays: pages of the mapping come from it on every node. The driver removes the directory. */
}

int main(int argc, char **argv)
{
	static const struct { void (*run)(void); const char *name; } operations[] = {
		{do_map_anon, "map_anon"}, {do_map_file, "map_file"}, {do_unmap, "unmap"}, {do_protect, "protect"},
		{do_discard, "discard"},   {do_move, "move"},         {do_fork, "fork"},   {do_touch, "touch"},
		{do_touch, "touch"},       {do_touch, "touch"},       {do_syscalls, "syscalls"}};
	start(argc, argv);
	pages = (argc > 2 ? strtoul(argv[2], 0, 10) : 64) * 256;
	seed = argc > 3 ? strtoull(argv[3], 0, 10) : 88172645463325252ull;
	char stack[65536]; /* faults are handled on a stack of their own */
	stack_t alt = {.ss_sp = stack, .ss_size = sizeof stack};
	SYS(sigaltstack(&alt, 0));
	struct sigaction act = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_ONSTACK};
	SYS(sigaction(SIGSEGV, &act, 0)), SYS(sigaction(SIGBUS, &act, 0));
	keep_above(argv);
	make_file();
	model = calloc(pages, sizeof *model);
	arena = anon(pages * PAGE, 0);
	set(0, pages, ANON, PROT_READ | PROT_WRITE);
	for (size_t i = 0; i < pages; i++)
		if (i % 16) /* some were never touched */
			fill(i, rnd(&seed));
	make_special();
	ready();
	do {
		for (int i = 0; i < 12; i++) {
			size_t next = rnd(&seed) % (sizeof operations / sizeof *operations);
			doing = operations[next].name;
			operations[next].run();
		}
		doing = "exec";
		if (rounds % 8 == 0)
			do_exec();
		doing = "compare";
		if (rounds % 32 == 31)
			for (size_t i = 0; i < pages; i++)
				compare(i);
		doing = "heap";
		heap_and_stack();
		doing = "frames";
		int frames = 30 + rnd(&seed) % 200;
		EQ("stack frames", deep(frames), frames + 1);
		doing = "special";
		special_as_made();
		above_as_kept();
	} while (next_round());
	for (size_t i = 0; i < pages; i++)
		compare(i);
	return finish();
}
