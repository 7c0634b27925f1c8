/* credentials STOPFILE [nobody|caps|seccomp]: user, groups, capabilities, no_new_privs, secure bits and the program's
 * own seccomp filter are as they were: never more, never less. Started as root. `nobody` (default) gives up everything,
 * `caps` keeps two capabilities as an ordinary user, `seccomp` forbids itself some calls. */
#include "check.h"
#include <grp.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <linux/securebits.h>
#include <stddef.h>
#include <sys/fsuid.h>
#include <sys/prctl.h>
#include <sys/stat.h>

#define UID 65534
#define GID 65534
static const gid_t groups[] = {100, 4242, 65534};
static int with_caps, with_seccomp;
static struct __user_cap_data_struct caps_before[2];
static int bounding_before[64], ambient_before[64];

static void get_caps(struct __user_cap_data_struct data[2])
{
	struct __user_cap_header_struct head = {_LINUX_CAPABILITY_VERSION_3, 0};
	SYS(syscall(SYS_capget, &head, data));
}
static void set_caps(uint64_t effective, uint64_t permitted, uint64_t inheritable)
{
	struct __user_cap_header_struct head = {_LINUX_CAPABILITY_VERSION_3, 0};
	struct __user_cap_data_struct data[2] = {{effective, permitted, inheritable}, {effective >> 32, permitted >> 32, inheritable >> 32}};
	SYS(syscall(SYS_capset, &head, data));
}
#define BIT(c) (1ull << (c))

static void give_up(void)
{
	SYS(setgroups(3, groups));
	SYS(prctl(PR_CAPBSET_DROP, CAP_SYS_MODULE)), SYS(prctl(PR_CAPBSET_DROP, CAP_SYS_TIME));
	if (with_caps) {
		SYS(prctl(PR_SET_SECUREBITS, SECBIT_KEEP_CAPS | SECBIT_NO_SETUID_FIXUP));
	}
	SYS(setresgid(GID, GID, GID)), SYS(setresuid(UID, UID, UID));
	if (with_caps) {
		uint64_t keep = BIT(CAP_NET_BIND_SERVICE) | BIT(CAP_IPC_LOCK);
		set_caps(BIT(CAP_IPC_LOCK), keep, keep);
		SYS(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_IPC_LOCK, 0, 0));
	}
	SYS(prctl(PR_SET_DUMPABLE, 1));
	if (with_seccomp) {
		SYS(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
		struct sock_filter code[] = {
			BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
			BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_mkdirat, 0, 1), BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | 77),
			BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_chdir, 0, 1), BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP | 5),
			/* A filter that is hostile to a restorer: no new memory that is executable, no ptrace, no setuid. */
			BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_setresuid, 0, 1), BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | 78),
			BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_prctl, 0, 1), BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | 79),
			BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
		struct sock_fprog program = {sizeof code / sizeof *code, code};
		SYS(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program));
		struct sock_filter second[] = {BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
					       BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_acct, 0, 1), BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | 80),
					       BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
		struct sock_fprog on_top = {sizeof second / sizeof *second, second};
		SYS(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &on_top));
	}
	get_caps(caps_before);
	for (int c = 0; c < 64 && !with_seccomp; c++) {
		bounding_before[c] = prctl(PR_CAPBSET_READ, c);
		ambient_before[c] = prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_IS_SET, c, 0, 0);
	}
}

/* Fields of /proc/self/status: they can be read even where prctl is forbidden. */
static void status_line(const char *field, char *out, size_t size)
{
	FILE *f = fopen("/proc/self/status", "r");
	char line[512];
	*out = 0;
	while (fgets(line, sizeof line, f))
		if (!strncmp(line, field, strlen(field)) && line[strlen(field)] == ':')
			snprintf(out, size, "%s", line);
	fclose(f);
}
static const char *const fields[] = {"Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp"};
#define FIELDS (int)(sizeof fields / sizeof *fields)
static char status_before[FIELDS][512];

static volatile int trapped;
static void on_sys(int sig, siginfo_t *info, void *context)
{
	(void)sig, (void)context;
	trapped = info->si_syscall == SYS_chdir && info->si_errno == 5;
}

static void as_it_was(void)
{
	uid_t r, e, s;
	gid_t list[8];
	SYS(getresuid(&r, &e, &s));
	CHECK(r == UID && e == UID && s == UID, "users are %d %d %d", r, e, s);
	SYS(getresgid(&r, &e, &s));
	CHECK(r == GID && e == GID && s == GID, "groups are %d %d %d", r, e, s);
	EQ("number of groups", getgroups(8, list), 3);
	for (int i = 0; i < 3; i++)
		EQ("supplementary group", list[i], groups[i]);
	struct __user_cap_data_struct caps[2];
	get_caps(caps);
	CHECK(!memcmp(caps, caps_before, sizeof caps), "effective capabilities are %#x, were %#x", caps[0].effective, caps_before[0].effective);
	if (!with_seccomp) {
		EQ("no_new_privs", prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0), 0);
		EQ("secure bits", prctl(PR_GET_SECUREBITS), with_caps ? SECBIT_KEEP_CAPS | SECBIT_NO_SETUID_FIXUP : 0);
		for (int c = 0; c < 64; c++) {
			CHECK(prctl(PR_CAPBSET_READ, c) == bounding_before[c], "capability %d in the bounding set", c);
			CHECK(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_IS_SET, c, 0, 0) == ambient_before[c], "ambient capability %d", c);
		}
	}
	for (int i = 0; i < FIELDS; i++) {
		char now[512];
		status_line(fields[i], now, sizeof now);
		CHECK(!strcmp(now, status_before[i]), "%.60s was %.60s", now, status_before[i]);
	}
	/* What it may not do, it may not do. */
	CHECK(open("/etc/shadow", O_RDONLY) == -1 && errno == EACCES, "it may read /etc/shadow");
	CHECK(setresuid(0, 0, 0) == -1 && errno == (with_seccomp ? 78 : EPERM), "it may become root");
	CHECK(kill(1, SIGKILL) == -1 && (errno == EPERM || errno == ESRCH), "it may kill PID 1");
	if (with_seccomp) {
		CHECK(mkdirat(AT_FDCWD, "never", 0700) == -1 && errno == 77, "its filter let mkdirat through");
		CHECK(prctl(PR_GET_DUMPABLE) == -1 && errno == 79, "its filter let prctl through");
		CHECK(syscall(SYS_acct, 0) == -1 && errno == 80, "its second filter is gone");
		trapped = 0;
		syscall(SYS_chdir, "/");
		CHECK(trapped, "its filter's SIGSYS did not come");
	}
	/* What it makes is its own. */
	struct stat st;
	int fd = SYS(open("credentials-file", O_CREAT | O_RDWR, 0600));
	SYS(fstat(fd, &st));
	EQ("owner of a new file", st.st_uid, UID);
	EQ("group of a new file", st.st_gid, GID);
	close(fd), SYS(unlink("credentials-file"));
}

int main(int argc, char **argv)
{
	start(argc, argv);
	with_caps = argc > 2 && !strcmp(argv[2], "caps"), with_seccomp = argc > 2 && !strcmp(argv[2], "seccomp");
	/* A directory of its own, since `nobody` may not write where it was started. */
	SYS(mkdir("nobodys", 0700)), SYS(chown("nobodys", UID, GID));
	int dir = SYS(open("nobodys", O_RDONLY | O_DIRECTORY));
	struct sigaction act = {.sa_sigaction = on_sys, .sa_flags = SA_SIGINFO};
	sigaction(SIGSYS, &act, 0);
	SYS(fchdir(dir)), close(dir);
	give_up();
	for (int i = 0; i < FIELDS; i++)
		status_line(fields[i], status_before[i], sizeof status_before[i]);
	ready();
	do {
		as_it_was();
		dwell_ms(3);
	} while (next_round());
	return finish();
}
