/* The porter: lets a connection, which was made elsewhere and nobody has accepted yet, into the queue of whoever listens here.
 *
 * It sees what comes in by a device while a daemon has it there. A segment that carries the daemon's secret in an option (the
 * form is in src/socket/callers.rs) becomes the last one of a handshake that this kernel takes for its own. All else passes. */
#include "packet.h"

enum { NEXT = -1, DROP = 2 };

/* Kind 253 is for experiments (RFC 4727); whoever does not know it skips it. */
#define KNOCK 253
#define LISTENING 10

/* The kernel's struct bpf_tcp_req_attrs. */
struct attributes {
  __u32 rcv_tsval;
  __u32 rcv_tsecr;
  __u16 mss;
  __u8 rcv_wscale;
  __u8 snd_wscale;
  __u8 ecn_ok;
  __u8 wscale_ok;
  __u8 sack_ok;
  __u8 tstamp_ok;
  __u8 usec_ts_ok;
  __u8 reserved[3];
};

struct knock {
  __u8 kind;
  __u8 length;
  __u16 pad;
  __u32 secret[2];
  struct attributes attributes;
};

static struct bpf_sock *(*const sk_lookup_tcp)(void *, struct bpf_sock_tuple *, __u32 size, __u64 netns, __u64 flags) = (void *)BPF_FUNC_sk_lookup_tcp;
static long (*const sk_release)(void *) = (void *)BPF_FUNC_sk_release;
/* bpf_sk_assign_tcp_reqsk: the loader knows its number in this kernel. See src/socket/callers.rs. */
static long (*const assign)(struct __sk_buff *, void *socket, void *attributes, int size) = (void *)0x7ffe;

SEC("classifier")
int porter(struct __sk_buff *skb)
{
  struct packet p;
  struct knock knock;
  struct bpf_sock_tuple ends = {};
  __u64 secret;
  __u32 size;
  /* The loader writes the secret in its place. */
  asm volatile("%0 = 0x5ec2e75ec2e75ec2 ll" : "=r"(secret));
  parse(skb, &p);
  if (!p.family || p.kind != PORTS || p.proto != IPPROTO_TCP)
    return NEXT;
  if (skb_load(skb, p.l4 + 20, &knock, sizeof knock))
    return NEXT;
  __u64 said = (__u64)knock.secret[1] << 32 | knock.secret[0];
  if (knock.kind != KNOCK || knock.length != sizeof knock || said != secret)
    return NEXT;
  if (p.family == 4) {
    ends.ipv4.saddr = *(__be32 *)p.src;
    ends.ipv4.daddr = *(__be32 *)p.dst;
    ends.ipv4.sport = p.sport;
    ends.ipv4.dport = p.dport;
    size = sizeof ends.ipv4;
  } else {
    __builtin_memcpy(ends.ipv6.saddr, p.src, 16);
    __builtin_memcpy(ends.ipv6.daddr, p.dst, 16);
    ends.ipv6.sport = p.sport;
    ends.ipv6.dport = p.dport;
    size = sizeof ends.ipv6;
  }
  struct bpf_sock *socket = sk_lookup_tcp(skb, &ends, size, BPF_F_CURRENT_NETNS, 0);
  if (!socket)
    return DROP;
  /* Who is let in already is not let in again. */
  long failed = socket->state != LISTENING || assign(skb, socket, &knock.attributes, sizeof knock.attributes);
  sk_release(socket);
  return failed ? DROP : NEXT;
}

char LICENCE[] SEC("license") = "GPL";
