/* load KIND LOG [SECONDS [filtered]]: repeats one piece of work and writes "sample US UNIX_MS" for each repetition (of about 20 ms).
 * KIND is `cpu` (arithmetic and memory in the caches, no system call), `syscalls` (getppid, read, clock_gettime by
 * system call, sched_yield: none is notified), `files` (open, fstat, close) or `forks` (fork, exit, wait). With `filtered`
 * it runs under a seccomp filter that allows everything: the least that any filter costs. */
#include "meter.h"
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>

static void cpu(void)
{
	static uint64_t table[8192];
	uint64_t s = GOLDEN;
	for (int i = 0; i < 6000000; i++) {
		uint64_t r = rnd(&s);
		table[r & 8191] += r * 3;
	}
	__asm__ volatile("" ::"r"(table) : "memory");
}
static int zero;
static void syscalls(void)
{
	char c;
	struct timespec t;
	for (int i = 0; i < 20000; i++) {
		syscall(SYS_getppid);
		if (read(zero, &c, 1) != 1)
			exit(1);
		syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &t);
		syscall(SYS_sched_yield);
	}
}
static void files(void)
{
	struct stat st;
	for (int i = 0; i < 8000; i++) {
		int fd = open("/etc/passwd", O_RDONLY);
		if (fd < 0 || fstat(fd, &st))
			exit(1);
		close(fd);
	}
}
static void forks(void)
{
	for (int i = 0; i < 100; i++) {
		pid_t pid = fork();
		if (!pid)
			_exit(7);
		int status;
		if (waitpid(pid, &status, 0) != pid || status != 7 << 8)
			exit(1);
	}
}

int main(int argc, char **argv)
{
	static const struct { const char *name; void (*work)(void); } kinds[] = {{"cpu", cpu}, {"syscalls", syscalls}, {"files", files}, {"forks", forks}};
	void (*work)(void) = 0;
	for (int i = 0; argc > 2 && i < 4; i++)
		if (!strcmp(argv[1], kinds[i].name))
			work = kinds[i].work;
	if (!work)
		return fprintf(stderr, "usage: load cpu|syscalls|files|forks LOG [SECONDS [filtered]]\n"), 2;
	FILE *log = open_log(argv[2]);
	struct sock_filter allow[] = {BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
	struct sock_fprog filter = {1, allow};
	if (argc > 4 && (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter)))
		return perror("seccomp"), 1;
	zero = open("/dev/zero", O_RDONLY);
	int64_t end = now_ns() + (int64_t)(1e9 * seconds_from(argc, argv, 3)), from = now_ns();
	fprintf(log, "ready %d\n", getpid());
	while (from < end) {
		work();
		int64_t now = now_ns();
		fprintf(log, "sample %.1f %.3f\n", (now - from) / 1e3, unix_ms());
		from = now_ns();
	}
	return 0;
}
