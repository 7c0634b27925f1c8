/* Descriptor numbers that are another file's every few microseconds: two files with names, two whose names are gone
 * (with the same name), two pieces of memory (with the same name), a directory, two eventfds. What a number was a moment
 * ago, and will be again in a moment, must not come to it. Also pairs of numbers of one file, which share its offset in
 * one moment and have one each in the next, and memory whose mode changes. */
#include "check.h"
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>

enum { FIRST = 40, SLOTS = 16, PAIRS = 4, FIRST_PAIR = 80, KEPT = 90, BYTES = 64 };

enum kind { NAMED_A, NAMED_B, NAMELESS_A, NAMELESS_B, MEMORY_A, MEMORY_B, DIRECTORY, EVENT_A, EVENT_B, KINDS };

static const char *const called[] = {
	"a", "b", "no name, c", "no name, d", "memory e", "memory f", "a directory", "an eventfd of 7", "an eventfd of 8",
};
static const enum kind alternating[SLOTS][2] = {
	{ NAMED_A, NAMED_B },     { NAMED_B, NAMED_A },   { NAMED_A, DIRECTORY }, { NAMED_A, NAMED_B },
	{ NAMED_B, NAMED_A },     { NAMED_A, NAMED_B },   { NAMED_B, NAMED_A },   { NAMED_A, NAMED_B },
	{ NAMED_B, NAMED_A },     { NAMED_A, NAMED_B },   { NAMED_B, NAMED_A },   { NAMED_A, NAMED_B },
	{ NAMELESS_A, NAMELESS_B }, { MEMORY_A, MEMORY_B }, { EVENT_A, EVENT_B },   { NAMED_B, EVENT_A },
};

static ino_t directory;

static char letter(enum kind kind) { return (char)('a' + kind); }

static void fill(int fd, enum kind kind)
{
	char bytes[BYTES];
	memset(bytes, letter(kind), sizeof bytes);
	EQ("bytes written", write(fd, bytes, sizeof bytes), sizeof bytes);
	EQ("the start", lseek(fd, 0, SEEK_SET), 0);
}

static int make(enum kind kind)
{
	int fd;
	switch (kind) {
	case NAMED_A:
	case NAMED_B:
		return SYS(open(called[kind], O_RDONLY));
	case NAMELESS_A:
	case NAMELESS_B:
		fd = SYS(open("nameless", O_RDWR | O_CREAT | O_TRUNC, 0600));
		SYS(unlink("nameless"));
		fill(fd, kind);
		return fd;
	case MEMORY_A:
	case MEMORY_B:
		fd = SYS(memfd_create("memory", 0));
		fill(fd, kind);
		return fd;
	case DIRECTORY:
		return SYS(open(".", O_RDONLY | O_DIRECTORY));
	default:
		return SYS(eventfd(kind == EVENT_A ? 7 : 8, EFD_NONBLOCK));
	}
}

static void check(int fd, enum kind kind)
{
	char bytes[BYTES + 1];
	struct stat stat;
	uint64_t count;
	switch (kind) {
	case DIRECTORY:
		SYS(fstat(fd, &stat));
		CHECK(S_ISDIR(stat.st_mode) && stat.st_ino == directory, "%d is %s no more", fd, called[kind]);
		break;
	case EVENT_A:
	case EVENT_B:
		CHECK(read(fd, &count, 8) == 8, "%d is %s no more", fd, called[kind]);
		EQ(called[kind], count, kind == EVENT_A ? 7 : 8);
		EQ("written", write(fd, &count, 8), 8);
		break;
	default:
		CHECK(pread(fd, bytes, sizeof bytes, 0) == BYTES, "%d is %s no more", fd, called[kind]);
		for (int at = 0; at < BYTES; at++)
			CHECK(bytes[at] == letter(kind), "%d is %s no more: '%c'", fd, called[kind], bytes[at]);
	}
}

static void check_pair(int pair, int shared)
{
	int one = FIRST_PAIR + 2 * pair;
	SYS(lseek(one, 5, SEEK_SET));
	EQ("the second number's offset", lseek(one + 1, 0, SEEK_CUR), shared ? 5 : 0);
	SYS(lseek(one, 0, SEEK_SET));
}

/* The second number of a pair: the first one's description, or one of its own. */
static void join(int pair, int shared)
{
	int one = FIRST_PAIR + 2 * pair, fd = shared ? one : SYS(open(called[NAMED_A], O_RDONLY));
	EQ("the second number", dup2(fd, one + 1), one + 1);
	if (!shared)
		SYS(close(fd));
}

int main(int argc, char **argv)
{
	unsigned turn[SLOTS] = { 0 }, pair_turn = 0;
	mode_t memory_mode = 0600;
	struct stat stat;
	start(argc, argv);
	for (enum kind kind = NAMED_A; kind <= NAMED_B; kind++) {
		int fd = SYS(open(called[kind], O_RDWR | O_CREAT | O_TRUNC, 0600));
		fill(fd, kind);
		SYS(close(fd));
	}
	SYS(lstat(".", &stat));
	directory = stat.st_ino;
	for (int slot = 0; slot < SLOTS; slot++) {
		int fd = make(alternating[slot][0]);
		EQ("the number", dup2(fd, FIRST + slot), FIRST + slot);
		SYS(close(fd));
	}
	for (int pair = 0; pair < PAIRS; pair++) {
		int fd = SYS(open(called[NAMED_A], O_RDONLY));
		EQ("the first number", dup2(fd, FIRST_PAIR + 2 * pair), FIRST_PAIR + 2 * pair);
		SYS(close(fd));
		join(pair, pair & 1);
	}
	int kept = make(MEMORY_A);
	EQ("the kept memory's number", dup2(kept, KEPT), KEPT);
	SYS(close(kept));
	ready();
	do {
		pair_turn++;
		for (int pair = 0; pair < PAIRS; pair++)
			join(pair, (pair + pair_turn) & 1);
		for (int slot = 0; slot < SLOTS; slot++) {
			memory_mode ^= 0011;
			SYS(fchmod(KEPT, memory_mode));
			check(KEPT, MEMORY_A);
			SYS(fstat(KEPT, &stat));
			EQ("the kept memory's mode", stat.st_mode & 07777, memory_mode);
			for (int other = 0; other < SLOTS; other++)
				check(FIRST + other, alternating[other][turn[other] & 1]);
			check_pair(slot % PAIRS, (slot + pair_turn) & 1);
			SYS(close(FIRST + slot));
			int fd = make(alternating[slot][++turn[slot] & 1]);
			EQ("the number", dup2(fd, FIRST + slot), FIRST + slot);
			SYS(close(fd));
		}
	} while (next_round());
	return finish();
}
