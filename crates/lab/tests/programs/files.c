/* files STOPFILE [shared]: descriptors of every kind that moves: numbers, flags, offsets, descriptions shared by dup,
 * O_APPEND, files deleted while open, directories half read, /dev nodes, pipes to itself, working directory and umask.
 * With `shared`, a child shares one description all the time: then the two must be moved together. */
#include "check.h"
#include <dirent.h>
#include <limits.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>

#define LINES 1000
static char work[PATH_MAX];
static int reader, dup_of_reader, reopened, appender, appender2, deleted, both, dir, null, zero, urandom, high, cloexec, pipe_fd[2];
static off_t at;
static long appended, deleted_words;

static int make(const char *name, int flags)
{
	int fd = SYS(open(name, flags | O_CREAT, 0640));
	return fd;
}

static void open_all(void)
{
	SYS(mkdir("files-dir", 0755)), SYS(chdir("files-dir"));
	CHECK(getcwd(work, sizeof work), "getcwd");
	umask(027);
	FILE *f = fopen("lines", "w");
	for (int i = 0; i < LINES; i++)
		fprintf(f, "line %08d\n", i);
	fclose(f);
	reader = SYS(open("lines", O_RDONLY));
	dup_of_reader = SYS(dup(reader));
	reopened = SYS(open("lines", O_RDONLY | O_NOATIME));
	appender = make("log", O_WRONLY | O_APPEND);
	appender2 = SYS(open("log", O_RDWR | O_APPEND | O_NONBLOCK));
	deleted = make("deleted", O_RDWR), SYS(unlink("deleted"));
	both = make("both", O_RDWR);
	for (int i = 0; i < 40; i++) {
		char name[20];
		snprintf(name, sizeof name, "entry-%02d", i);
		close(make(name, O_WRONLY));
	}
	dir = SYS(open(".", O_RDONLY | O_DIRECTORY));
	null = SYS(open("/dev/null", O_WRONLY)), zero = SYS(open("/dev/zero", O_RDONLY)), urandom = SYS(open("/dev/urandom", O_RDONLY));
	struct rlimit limit;
	getrlimit(RLIMIT_NOFILE, &limit);
	high = SYS(fcntl(reopened, F_DUPFD, limit.rlim_cur > 900 ? 900 : (int)limit.rlim_cur - 1));
	cloexec = SYS(fcntl(reopened, F_DUPFD_CLOEXEC, 700));
	SYS(pipe2(pipe_fd, O_NONBLOCK | O_CLOEXEC));
}

static void flags_as_opened(void)
{
	const struct { const char *what; int fd, flags, cloexec; } all[] = {
		{"reader", reader, O_RDONLY, 0}, {"its dup", dup_of_reader, O_RDONLY, 0}, {"reopened", reopened, O_RDONLY | O_NOATIME, 0},
		{"appender", appender, O_WRONLY | O_APPEND, 0}, {"second appender", appender2, O_RDWR | O_APPEND | O_NONBLOCK, 0},
		{"deleted file", deleted, O_RDWR, 0}, {"directory", dir, O_RDONLY | O_DIRECTORY, 0}, {"null", null, O_WRONLY, 0}, {"zero", zero, O_RDONLY, 0}, {"high dup", high, O_RDONLY | O_NOATIME, 0},
		{"close-on-exec dup", cloexec, O_RDONLY | O_NOATIME, 1}, {"pipe's read end", pipe_fd[0], O_RDONLY | O_NONBLOCK, 1},
		{"pipe's write end", pipe_fd[1], O_WRONLY | O_NONBLOCK, 1}};
	for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
		int got = SYS(fcntl(all[i].fd, F_GETFL)) & ~0100000; /* O_LARGEFILE is the C library's business */
		CHECK(got == all[i].flags, "flags of the %s are %#o, were %#o", all[i].what, got, all[i].flags);
		got = SYS(fcntl(all[i].fd, F_GETFD));
		CHECK(got == (all[i].cloexec ? FD_CLOEXEC : 0), "close-on-exec of the %s is %d", all[i].what, got);
	}
	for (int fd = pipe_fd[1] + 1; fd < 1000; fd++)
		if (fd != high && fd != cloexec)
			CHECK(fcntl(fd, F_GETFD) == -1 && errno == EBADF, "descriptor %d is open and should not be", fd);
}

static void offsets(void)
{
	char line[16] = "", wanted[32];
	if (at + 14 > LINES * 14)
		at = SYS(lseek(dup_of_reader, 0, SEEK_SET)); /* through one name, seen through the other */
	EQ("offset", lseek(reader, 0, SEEK_CUR), at);
	EQ("read", read(rounds & 1 ? reader : dup_of_reader, line, 14), 14);
	snprintf(wanted, sizeof wanted, "line %08ld\n", (long)at / 14);
	CHECK(!memcmp(line, wanted, 14), "read %.13s instead of %.13s", line, wanted);
	at += 14;
	EQ("offset of the other name", lseek(dup_of_reader, 0, SEEK_CUR), at);
	EQ("offset of the separate description", lseek(reopened, 0, SEEK_CUR), 28);
	EQ("offset of its high dup", lseek(high, 0, SEEK_CUR), 28);
}

static void appends(void)
{
	char record[17], back[17] = "";
	snprintf(record, sizeof record, "record %08ld\n", appended);
	SYS(lseek(appender2, 0, SEEK_SET)); /* O_APPEND: wherever it stands, it writes at the end */
	EQ("write", write(appended & 1 ? appender : appender2, record, 16), 16);
	EQ("pread", pread(appender2, back, 16, appended * 16), 16);
	CHECK(!memcmp(record, back, 16), "appended %.15s, found %.15s", record, back);
	appended++;
	struct stat st;
	SYS(fstat(appender, &st));
	EQ("size of the log", st.st_size, appended * 16);
	EQ("mode under the umask", st.st_mode & 0777, 0640);
}

static void deleted_file(void)
{
	struct stat st;
	SYS(fstat(deleted, &st));
	EQ("links of the deleted file", st.st_nlink, 0);
	EQ("its size", st.st_size, deleted_words * 8);
	uint64_t v = deleted_words * 0x9E3779B97F4A7C15ull, back;
	EQ("pwrite", pwrite(deleted, &v, 8, deleted_words * 8), 8);
	deleted_words++;
	for (long i = deleted_words > 50 ? deleted_words - 50 : 0; i < deleted_words; i++) {
		EQ("pread", pread(deleted, &back, 8, i * 8), 8);
		EQ("a word of the deleted file", back, i * 0x9E3779B97F4A7C15ull);
	}
	EQ("write", pwrite(both, &v, 8, 8 * (deleted_words % 512)), 8);
	EQ("read", pread(both, &back, 8, 8 * (deleted_words % 512)), 8);
	EQ("what was just written", back, v);
}

/* Reads a directory over many rounds through one descriptor; each entry must come exactly once. */
static void directory(void)
{
	static char seen[40];
	static int total;
	struct dirent64 *d;
	char buf[256];
	long n = syscall(SYS_getdents64, dir, buf, sizeof buf);
	CHECK(n >= 0, "getdents64: %s", strerror(errno));
	for (long o = 0; o < n; o += d->d_reclen) {
		int e;
		d = (struct dirent64 *)(buf + o);
		if (sscanf(d->d_name, "entry-%d", &e) == 1) {
			CHECK(!seen[e], "directory entry %s came twice", d->d_name);
			seen[e] = 1, total++;
		}
	}
	if (n == 0) {
		EQ("directory entries", total, 40);
		memset(seen, 0, sizeof seen), total = 0;
		SYS(lseek(dir, 0, SEEK_SET));
	}
}

static void devices(void)
{
	uint64_t word = 1, other = 0;
	struct stat st;
	EQ("write to null", write(null, &word, 8), 8);
	EQ("read from zero", read(zero, &word, 8), 8);
	EQ("what zero gives", word, 0);
	EQ("read from urandom", read(urandom, &word, 8), 8);
	EQ("read from urandom", read(urandom, &other, 8), 8);
	CHECK(word != other, "urandom gave %#llx twice", (unsigned long long)word);
	SYS(fstat(null, &st));
	EQ("null's device number", st.st_rdev, makedev(1, 3));
}

static void own_pipe(void)
{
	static uint32_t in, out; /* a few hundred bytes stay in the pipe all the time */
	while (in - out < 200) {
		EQ("write", write(pipe_fd[1], &in, 4), 4);
		in++;
	}
	for (int i = 0; i < 20; i++, out++) {
		uint32_t v;
		EQ("read", read(pipe_fd[0], &v, 4), 4);
		EQ("a word through the pipe", v, out);
	}
}

static void surroundings(void)
{
	char cwd[PATH_MAX];
	struct stat here, there;
	CHECK(getcwd(cwd, sizeof cwd) && !strcmp(cwd, work), "the working directory is %s, not %s", cwd, work);
	mode_t mask = umask(027);
	EQ("umask", mask, 027);
	SYS(stat("lines", &here)), SYS(fstatat(dir, "lines", &there, 0));
	EQ("a file by working directory and by descriptor", here.st_ino, there.st_ino);
	close(make("fresh", O_WRONLY)), SYS(unlink("fresh"));
}

int main(int argc, char **argv)
{
	start(argc, argv);
	pid_t child = 0;
	SYS(syscall(SYS_close_range, 3, ~0u, 0)); /* whatever was inherited */
	open_all();
	SYS(lseek(reopened, 28, SEEK_SET));
	int go[2], done[2];
	if (argc > 2 && !strcmp(argv[2], "shared")) {
		SYS(pipe2(go, O_CLOEXEC)), SYS(pipe2(done, O_CLOEXEC));
		if (!(child = SYS(fork()))) {
			char c;
			close(go[1]);
			while (read(go[0], &c, 1) == 1) { /* on each word the child moves the shared offset on by one line */
				SYS(lseek(reader, 14, SEEK_CUR));
				EQ("write", write(done[1], &c, 1), 1);
			}
			_exit(0);
		}
		SYS(close(go[0])), SYS(close(done[1]));
	}
	ready();
	do {
		offsets(), appends(), deleted_file(), directory(), devices(), own_pipe(), surroundings();
		if (child) {
			char c = 'x';
			EQ("write", write(go[1], &c, 1), 1);
			EQ("the child's answer", read(done[0], &c, 1), 1);
			at += 14;
		} else {
			flags_as_opened();
		}
		dwell_ms(4);
	} while (next_round());
	if (child) {
		int status;
		close(go[1]);
		EQ("waitpid", waitpid(child, &status, 0), child);
		EQ("the child's status", status, 0);
	}
	return finish();
}
