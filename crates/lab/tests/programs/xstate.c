/* xstate STOPFILE: threads hold patterns in all general, x87, SSE, AVX and (where the CPU has them) AVX-512 registers
 * while nothing but a counting loop runs, then compare; rounding modes and the GS base stay as set. */
#include "check.h"
#include <asm/prctl.h>
#include <cpuid.h>
#include <fenv.h>

static int have_avx, have_avx512;
static unsigned char gs_area[4][4096];

/* About 10 ms in one loop without a call or a memory access, between loading and storing the registers. */
#define SPIN "mov %[n], %%rcx\n1: dec %%rcx\n jnz 1b\n"

#define EACH16(op) op(0) op(1) op(2) op(3) op(4) op(5) op(6) op(7) op(8) op(9) op(10) op(11) op(12) op(13) op(14) op(15)
#define STR_(x) #x
#define STR(x) STR_(x)

static void hold_sse(const uint8_t *in, uint8_t *out, uint64_t n)
{
#define LOAD(i) "movups " STR(i) "*16(%[in]), %%xmm" STR(i) "\n"
#define STORE(i) "movups %%xmm" STR(i) ", " STR(i) "*16(%[out])\n"
	__asm__ volatile(EACH16(LOAD) SPIN EACH16(STORE)::[in] "r"(in), [out] "r"(out), [n] "r"(n)
			 : "rcx", "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8",
			   "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
#undef LOAD
#undef STORE
}

__attribute__((target("avx"))) static void hold_avx(const uint8_t *in, uint8_t *out, uint64_t n)
{
#define LOAD(i) "vmovups " STR(i) "*32(%[in]), %%ymm" STR(i) "\n"
#define STORE(i) "vmovups %%ymm" STR(i) ", " STR(i) "*32(%[out])\n"
	__asm__ volatile(EACH16(LOAD) SPIN EACH16(STORE) "vzeroupper\n" ::[in] "r"(in), [out] "r"(out), [n] "r"(n)
			 : "rcx", "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8",
			   "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
#undef LOAD
#undef STORE
}

#define NEXT16(op) op(16) op(17) op(18) op(19) op(20) op(21) op(22) op(23) op(24) op(25) op(26) op(27) op(28) op(29) op(30) op(31)
__attribute__((target("avx512f,avx512bw"))) static void hold_avx512(const uint8_t *in, uint8_t *out, uint64_t n)
{
#define LOAD(i) "vmovups " STR(i) "*64(%[in]), %%zmm" STR(i) "\n"
#define STORE(i) "vmovups %%zmm" STR(i) ", " STR(i) "*64(%[out])\n"
	__asm__ volatile(EACH16(LOAD) NEXT16(LOAD) "kmovq 2048(%[in]), %%k1\n kmovq 2056(%[in]), %%k7\n" SPIN
			 EACH16(STORE) NEXT16(STORE) "kmovq %%k1, 2048(%[out])\n kmovq %%k7, 2056(%[out])\n vzeroupper\n" ::[in] "r"(in),
			 [out] "r"(out), [n] "r"(n)
			 : "rcx", "memory", "cc", "k1", "k7", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8",
			   "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19",
			   "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25", "xmm26", "xmm27", "xmm28", "xmm29", "xmm30", "xmm31");
#undef LOAD
#undef STORE
}

/* rbx, rdx, rsi, r8–r15: every general register but the counter, the two pointers and the stack's. */
static void hold_general(const uint64_t *in, uint64_t *out, uint64_t n)
{
	register const uint64_t *from __asm__("rax") = in;
	register uint64_t *to __asm__("rdi") = out;
	register uint64_t count __asm__("rcx") = n;
	__asm__ volatile("mov 0(%%rax), %%rbx\n mov 8(%%rax), %%rdx\n mov 16(%%rax), %%rsi\n"
			 "mov 24(%%rax), %%r8\n mov 32(%%rax), %%r9\n mov 40(%%rax), %%r10\n mov 48(%%rax), %%r11\n"
			 "mov 56(%%rax), %%r12\n mov 64(%%rax), %%r13\n mov 72(%%rax), %%r14\n mov 80(%%rax), %%r15\n"
			 "1: dec %%rcx\n jnz 1b\n"
			 "mov %%rbx, 0(%%rdi)\n mov %%rdx, 8(%%rdi)\n mov %%rsi, 16(%%rdi)\n"
			 "mov %%r8, 24(%%rdi)\n mov %%r9, 32(%%rdi)\n mov %%r10, 40(%%rdi)\n mov %%r11, 48(%%rdi)\n"
			 "mov %%r12, 56(%%rdi)\n mov %%r13, 64(%%rdi)\n mov %%r14, 72(%%rdi)\n mov %%r15, 80(%%rdi)\n"
			 : "+c"(count)
			 : "r"(from), "r"(to)
			 : "memory", "cc", "rbx", "rdx", "rsi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15");
}

static void hold_x87(uint64_t n)
{
	long double values[6] = {1.5L, -2.25L, 3.0e4000L, 0x1.23456789abcdefp-3000L, 0.0L, 1.0L / 3}, got[6];
	__asm__ volatile("fldt 0(%[in])\n fldt 16(%[in])\n fldt 32(%[in])\n fldt 48(%[in])\n fldt 64(%[in])\n fldt 80(%[in])\n" SPIN
			 "fstpt 80(%[out])\n fstpt 64(%[out])\n fstpt 48(%[out])\n fstpt 32(%[out])\n fstpt 16(%[out])\n fstpt 0(%[out])\n" ::[in] "r"(values),
			 [out] "r"(got), [n] "r"(n)
			 : "rcx", "memory", "cc", "st", "st(1)", "st(2)", "st(3)", "st(4)", "st(5)", "st(6)", "st(7)");
	for (int i = 0; i < 6; i++)
		CHECK(!memcmp(&values[i], &got[i], 10), "x87 register %d", i);
}

static void same(const char *what, const void *a, const void *b, size_t size)
{
	for (size_t i = 0; i < size; i++)
		CHECK(((const uint8_t *)a)[i] == ((const uint8_t *)b)[i], "byte %zu of the %s registers", i, what);
}

static void *holder(void *arg)
{
	static const int roundings[] = {FE_TONEAREST, FE_UPWARD, FE_DOWNWARD, FE_TOWARDZERO};
	long me = (long)arg;
	uint64_t seed = 0x9E3779B97F4A7C15ull * (me + 1), n = 8000000;
	_Alignas(64) uint8_t in[4096], out[4096];
	fesetround(roundings[me]);
	SYS(syscall(SYS_arch_prctl, ARCH_SET_GS, gs_area[me]));
	while (!stopped()) {
		for (int i = 0; i < 4096; i += 8)
			*(uint64_t *)(in + i) = rnd(&seed);
		hold_general((uint64_t *)in, (uint64_t *)out, n), same("general", in, out, 88);
		hold_sse(in, out, n), same("SSE", in, out, 256);
		if (have_avx)
			hold_avx(in, out, n), same("AVX", in, out, 512);
		if (have_avx512)
			hold_avx512(in, out, n), same("AVX-512", in, out, 2064);
		hold_x87(n);
		EQ("rounding mode", fegetround(), roundings[me]);
		uint64_t gs;
		SYS(syscall(SYS_arch_prctl, ARCH_GET_GS, &gs));
		EQ("GS base", gs, (uintptr_t)gs_area[me]);
		*(volatile uint64_t *)gs_area[me] = seed;
		__asm__ volatile("mov %%gs:0, %0" : "=r"(gs));
		EQ("memory through GS", gs, seed);
	}
	return 0;
}

int main(int argc, char **argv)
{
	start(argc, argv);
	__builtin_cpu_init();
	have_avx = __builtin_cpu_supports("avx");
	have_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
	pthread_t threads[4];
	for (long i = 0; i < 4; i++)
		CHECK(!pthread_create(&threads[i], 0, holder, (void *)i), "pthread_create");
	ready();
	do {
		/* A pattern across a system call as well: the kernel may save it in another way. */
		register uint64_t r12 __asm__("r12") = 0x1212121212121212ull + rounds;
		__asm__ volatile("" : "+r"(r12));
		usleep(5000);
		__asm__ volatile("" : "+r"(r12));
		EQ("r12 across a sleep", r12, 0x1212121212121212ull + rounds);
	} while (next_round());
	for (int i = 0; i < 4; i++)
		pthread_join(threads[i], 0);
	return finish();
}
