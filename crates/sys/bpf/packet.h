/* Reading a packet's headers, and rewriting the addresses in them. Knows no tables. */
#pragma once

#include "bpf.h"
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>

#define ICMP6 58

/* What of a packet names the socket that it is for. */
enum kind {
  PORTS, /* its own ports (or, of an answered ping, its number) */
  ERROR, /* the packet inside it, which an ICMP error is about */
  LATER, /* a fragment without ports: those of the first one */
  PING,  /* nothing: an echo request */
  OTHER,
};

enum { TCP_FIN = 1, TCP_SYN = 2, TCP_RST = 4, TCP_ACK = 16 };

struct packet {
  __u8 src[16];
  __u8 dst[16];
  __u8 inner_src[16]; /* ERROR */
  __u8 inner_dst[16];
  __u32 fragment_id;
  __u16 l4;    /* where its transport header begins */
  __u16 inner; /* ERROR: where the inner packet begins */
  __be16 sport; /* ERROR: the inner packet's */
  __be16 dport;
  __u8 family; /* 4, 6; 0: neither */
  __u8 proto;  /* ERROR: the inner packet's */
  __u8 kind;
  __u8 flags; /* TCP's */
  __u8 first; /* the first of several fragments */
  __u8 ttl;
  __u8 icmp; /* ICMP's type */
};

INLINE int same(const __u8 *a, const __u8 *b)
{
  const __u64 *x = (const __u64 *)a, *y = (const __u64 *)b;
  return x[0] == y[0] && x[1] == y[1];
}

INLINE int is_zero(const __u8 *a)
{
  const __u64 *x = (const __u64 *)a;
  return !(x[0] | x[1]);
}

INLINE int is_opening(const struct packet *p)
{
  return p->kind == PORTS && p->proto == IPPROTO_TCP && (p->flags & (TCP_SYN | TCP_ACK | TCP_RST)) == TCP_SYN;
}

/* The ports at `at`, of TCP its flags, of a ping its number as the port of who has asked. */
INLINE int parse_ports(struct __sk_buff *skb, struct packet *p, __u32 at, int inner)
{
  if (p->proto == IPPROTO_TCP || p->proto == IPPROTO_UDP) {
    __be16 both[2];
    if (skb_load(skb, at, both, 4))
      return -1;
    p->sport = both[0];
    p->dport = both[1];
    if (!inner && p->proto == IPPROTO_TCP && skb_load(skb, at + 13, &p->flags, 1))
      return -1;
    return 0;
  }
  if (p->proto != IPPROTO_ICMP && p->proto != ICMP6)
    return -1;
  __u8 head[8];
  if (skb_load(skb, at, head, 8))
    return -1;
  p->icmp = head[0];
  int request = p->proto == ICMP6 ? head[0] == 128 : head[0] == 8;
  int answer = p->proto == ICMP6 ? head[0] == 129 : head[0] == 0;
  if (!request && !answer)
    return -1;
  __be16 number = *(__be16 *)(head + 4);
  p->sport = request ? number : 0;
  p->dport = request ? 0 : number;
  if (!inner && request)
    p->kind = PING;
  return 0;
}

INLINE int is_error(__u8 family, __u8 type)
{
  return family == 4 ? type == 3 || type == 11 || type == 12 : type >= 1 && type <= 4;
}

/* An ICMP error's inner packet: that names who has to be told. */
INLINE int parse_error(struct __sk_buff *skb, struct packet *p)
{
  __u32 at = p->l4 + 8, l4;
  p->inner = at;
  if (p->family == 4) {
    struct iphdr ip;
    if (skb_load(skb, at, &ip, sizeof ip) || ip.version != 4 || (ip.frag_off & htons(0x1fff)))
      return -1;
    *(__be32 *)p->inner_src = ip.saddr;
    *(__be32 *)p->inner_dst = ip.daddr;
    p->proto = ip.protocol;
    l4 = at + ip.ihl * 4;
  } else {
    struct ipv6hdr ip;
    if (skb_load(skb, at, &ip, sizeof ip) || ip.version != 6)
      return -1;
    __builtin_memcpy(p->inner_src, &ip.saddr, 16);
    __builtin_memcpy(p->inner_dst, &ip.daddr, 16);
    p->proto = ip.nexthdr;
    l4 = at + sizeof ip;
  }
  return parse_ports(skb, p, l4, 1);
}

INLINE void parse_transport(struct __sk_buff *skb, struct packet *p)
{
  p->kind = PORTS;
  if (!parse_ports(skb, p, p->l4, 0))
    return;
  p->kind = OTHER;
  int icmp = p->family == 4 ? p->proto == IPPROTO_ICMP : p->proto == ICMP6;
  if (!icmp || !is_error(p->family, p->icmp))
    return;
  if (!parse_error(skb, p))
    p->kind = ERROR;
}

/* The headers of nearly all packets, without a call: IPv4 without options, whole, TCP or UDP. */
INLINE int parse_plain(struct __sk_buff *skb, struct packet *p)
{
  void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
  struct iphdr *ip = data + ETH_HLEN;
  __u8 *l4 = (void *)(ip + 1);
  if (skb->protocol != htons(ETH_P_IP) || (void *)(l4 + 8) > end)
    return 0;
  if (*(__u8 *)ip != 0x45 || (ip->frag_off & htons(0x3fff)))
    return 0;
  if (ip->protocol == IPPROTO_TCP) {
    if ((void *)(l4 + 20) > end)
      return 0;
    p->flags = l4[13];
  } else if (ip->protocol != IPPROTO_UDP) {
    return 0;
  }
  p->family = 4;
  p->kind = PORTS;
  p->proto = ip->protocol;
  p->ttl = ip->ttl;
  p->l4 = ETH_HLEN + sizeof *ip;
  *(__be32 *)p->src = ip->saddr;
  *(__be32 *)p->dst = ip->daddr;
  p->sport = *(__be16 *)l4;
  p->dport = *(__be16 *)(l4 + 2);
  return 1;
}

/* All that steering asks. Family 0: not a packet of IP, or one cut short. */
INLINE void parse(struct __sk_buff *skb, struct packet *p)
{
  __builtin_memset(p, 0, sizeof *p);
  if (parse_plain(skb, p))
    return;
  p->kind = OTHER;
  if (skb->protocol == htons(ETH_P_IP)) {
    struct iphdr ip;
    if (skb_load(skb, ETH_HLEN, &ip, sizeof ip) || ip.version != 4 || ip.ihl < 5)
      return;
    p->family = 4;
    p->ttl = ip.ttl;
    p->proto = ip.protocol;
    *(__be32 *)p->src = ip.saddr;
    *(__be32 *)p->dst = ip.daddr;
    p->l4 = ETH_HLEN + ip.ihl * 4;
    __u16 fragment = ntohs(ip.frag_off);
    p->fragment_id = ip.id;
    if (fragment & 0x1fff) {
      p->kind = LATER;
      return;
    }
    p->first = !!(fragment & 0x2000);
  } else if (skb->protocol == htons(ETH_P_IPV6)) {
    struct ipv6hdr ip;
    if (skb_load(skb, ETH_HLEN, &ip, sizeof ip) || ip.version != 6)
      return;
    p->family = 6;
    p->ttl = ip.hop_limit;
    p->proto = ip.nexthdr;
    __builtin_memcpy(p->src, &ip.saddr, 16);
    __builtin_memcpy(p->dst, &ip.daddr, 16);
    __u32 at = ETH_HLEN + sizeof ip;
#pragma unroll
    for (int i = 0; i < 3; i++) {
      __u8 head[8];
      if (p->proto == 44) { /* fragment */
        if (skb_load(skb, at, head, 8))
          return;
        p->proto = head[0];
        p->fragment_id = *(__u32 *)(head + 4);
        __u16 fragment = ntohs(*(__be16 *)(head + 2));
        at += 8;
        if (fragment & 0xfff8) {
          p->kind = LATER;
          p->l4 = at;
          return;
        }
        p->first = fragment & 1;
      } else if (p->proto == 0 || p->proto == 43 || p->proto == 60) {
        if (skb_load(skb, at, head, 8))
          return;
        p->proto = head[0];
        at += 8 + head[1] * 8;
      }
    }
    p->l4 = at;
  } else {
    return;
  }
  parse_transport(skb, p);
}

/* Where the transport's checksum is, if it covers the addresses. */
INLINE __u32 checksum_at(const struct packet *p)
{
  if (p->kind == LATER)
    return 0;
  if (p->kind == ERROR)
    return p->family == 6 ? p->l4 + 2 : 0;
  switch (p->proto) {
  case IPPROTO_TCP:
    return p->l4 + 16;
  case IPPROTO_UDP:
    return p->l4 + 6;
  case ICMP6:
    return p->l4 + 2;
  default:
    return 0;
  }
}

/* An internet checksum after four of its bytes have changed (RFC 1624). */
INLINE __u16 summed(__u16 check, __be32 was, __be32 is)
{
  __u32 sum = (__u16)~check;
  sum += (__u16)~was + (__u16)(~was >> 16);
  sum += (__u16)is + (__u16)(is >> 16);
  sum = (sum & 0xffff) + (sum >> 16);
  sum = (sum & 0xffff) + (sum >> 16);
  return (__u16)~sum;
}

#define SRC4 (ETH_HLEN + 12)
#define DST4 (ETH_HLEN + 16)
#define SRC6 (ETH_HLEN + 8)
#define DST6 (ETH_HLEN + 24)

/* Puts another source or destination address into the packet, with all checksums that know of it. */
INLINE long rewrite(struct __sk_buff *skb, struct packet *p, int source, const __u8 *to)
{
  __u8 *from = source ? p->src : p->dst;
  __u32 sum = checksum_at(p);
  long failed;
  if (p->family == 4) {
    __be32 was = *(__be32 *)from, is = *(const __be32 *)to;
    /* A UDP checksum of zero is none. */
    __u64 zero = p->kind != ERROR && p->proto == IPPROTO_UDP ? BPF_F_MARK_MANGLED_0 : 0;
    failed = sum ? l4_csum_replace(skb, sum, was, is, BPF_F_PSEUDO_HDR | zero | 4) : 0;
    /* The sum over the whole packet does not change by these two: what the one adds the other takes away. */
    void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
    struct iphdr *ip = data + ETH_HLEN;
    if ((void *)(ip + 1) > end) {
      failed |= l3_csum_replace(skb, ETH_HLEN + 10, was, is, 4);
      failed |= skb_store(skb, source ? SRC4 : DST4, &is, 4, 0);
    } else {
      ip->check = summed(ip->check, was, is);
      if (source)
        ip->saddr = is;
      else
        ip->daddr = is;
    }
  } else {
    /* The sum over the whole packet (CHECKSUM_COMPLETE) does not change: what the one adds the other takes away. */
    __s64 difference = csum_diff(from, 16, to, 16, 0);
    failed = skb_store(skb, source ? SRC6 : DST6, to, 16, BPF_F_RECOMPUTE_CSUM);
    if (sum)
      failed |= l4_csum_replace(skb, sum, 0, difference, BPF_F_PSEUDO_HDR);
  }
  __builtin_memcpy(from, to, 16);
  return failed;
}

/* The same in the inner packet of an ICMP error. */
INLINE long rewrite_inner(struct __sk_buff *skb, struct packet *p, int source, const __u8 *to)
{
  __u8 *from = source ? p->inner_src : p->inner_dst;
  long failed;
  if (p->family == 4) {
    /* The inner header's checksum takes away what the address adds: the outer one does not change. */
    __be32 was = *(__be32 *)from, is = *(const __be32 *)to;
    failed = l3_csum_replace(skb, p->inner + 10, was, is, 4);
    failed |= skb_store(skb, p->inner + (source ? 12 : 16), &is, 4, 0);
  } else {
    __s64 difference = csum_diff(from, 16, to, 16, 0);
    failed = skb_store(skb, p->inner + (source ? 8 : 24), to, 16, 0);
    failed |= l4_csum_replace(skb, p->l4 + 2, 0, difference, 0);
  }
  __builtin_memcpy(from, to, 16);
  return failed;
}

/* One hop less to live; false: none is left. */
INLINE int age(struct __sk_buff *skb, struct packet *p)
{
  if (p->ttl <= 1)
    return 0;
  __u8 less = p->ttl - 1;
  if (p->family == 6)
    return !skb_store(skb, ETH_HLEN + 7, &less, 1, 0);
  __be16 was = htons((__u16)(p->ttl << 8)), is = htons((__u16)(less << 8));
  return !l3_csum_replace(skb, ETH_HLEN + 10, was, is, 2) && !skb_store(skb, ETH_HLEN + 8, &less, 1, 0);
}
