/* The little of the kernel's BPF interface that steer.bpf.c uses, so that it compiles from linux-libc-dev alone. */
#pragma once

#include <linux/bpf.h>
#include <linux/types.h>

#define SEC(name) __attribute__((section(name), used))
#define INLINE static inline __attribute__((always_inline))

/* Maps are described to the loader by the types of these members (BTF). */
#define UINT(name, value) int(*name)[value]
#define TYPE(name, value) typeof(value) *name

static void *(*const map_lookup)(void *map, const void *key) = (void *)BPF_FUNC_map_lookup_elem;
static long (*const map_update)(void *map, const void *key, const void *value, __u64 flags) = (void *)BPF_FUNC_map_update_elem;
static __u64 (*const ktime_coarse)(void) = (void *)BPF_FUNC_ktime_get_coarse_ns;
static long (*const skb_store)(struct __sk_buff *, __u32 at, const void *from, __u32 length, __u64 flags) = (void *)BPF_FUNC_skb_store_bytes;
static long (*const skb_load)(const struct __sk_buff *, __u32 at, void *to, __u32 length) = (void *)BPF_FUNC_skb_load_bytes;
static long (*const skb_pull)(struct __sk_buff *, __u32 length) = (void *)BPF_FUNC_skb_pull_data;
static long (*const l3_csum_replace)(struct __sk_buff *, __u32 at, __u64 from, __u64 to, __u64 flags) = (void *)BPF_FUNC_l3_csum_replace;
static long (*const l4_csum_replace)(struct __sk_buff *, __u32 at, __u64 from, __u64 to, __u64 flags) = (void *)BPF_FUNC_l4_csum_replace;
static __s64 (*const csum_diff)(const void *from, __u32 from_size, const void *to, __u32 to_size, __u32 seed) = (void *)BPF_FUNC_csum_diff;
static long (*const skb_change_type)(struct __sk_buff *, __u32 type) = (void *)BPF_FUNC_skb_change_type;
static long (*const redirect)(__u32 ifindex, __u64 flags) = (void *)BPF_FUNC_redirect;
static long (*const redirect_peer)(__u32 ifindex, __u64 flags) = (void *)BPF_FUNC_redirect_peer;
static long (*const redirect_neigh)(__u32 ifindex, void *params, int plen, __u64 flags) = (void *)BPF_FUNC_redirect_neigh;
static long (*const get_tunnel_key)(struct __sk_buff *, struct bpf_tunnel_key *, __u32 size, __u64 flags) = (void *)BPF_FUNC_skb_get_tunnel_key;
static long (*const set_tunnel_key)(struct __sk_buff *, const struct bpf_tunnel_key *, __u32 size, __u64 flags) = (void *)BPF_FUNC_skb_set_tunnel_key;

#define htons(x) __builtin_bswap16(x)
#define ntohs(x) __builtin_bswap16(x)
