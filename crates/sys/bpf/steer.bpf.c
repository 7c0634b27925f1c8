/* The programs at a node's edge: they steer packets into its nest, out of it, and on to whichever node has the socket.
 *
 * Each device has one program; all share the tables of steer.h, which the daemon writes. None depends on a daemon that runs. */
#include "packet.h"
#include "steer.h"

/* Verdicts of tcx. NEXT: whatever else there is on this device, and then the network stack. */
enum { NEXT = -1, DROP = 2 };

/* Where a packet comes from. */
enum from { NEST, LINK, OUTSIDE, PARK };

/* How its destination was found. */
enum via { NOTHING, SLICE, PORT, FLOW, LEARNED };

struct found {
  struct entry *entry;
  __u16 hop;
  __u8 action;
  __u8 via;
};

INLINE int drop(enum counter why)
{
  __u32 key = why;
  __u64 *count = map_lookup(&counters, &key);
  if (count)
    (*count)++;
  return DROP;
}

INLINE struct config *configuration(void)
{
  __u32 zero = 0;
  return map_lookup(&config_of, &zero);
}

INLINE const __u8 *inside(const struct config *c, const struct packet *p)
{
  return p->family == 4 ? c->inside4 : c->inside6;
}

INLINE const __u8 *outside(const struct config *c, const struct packet *p)
{
  return p->family == 4 ? c->outside4 : c->outside6;
}

INLINE int is_outside(const struct config *c, const struct packet *p, const __u8 *address)
{
  const __u8 *o = outside(c, p);
  return same(o, address) && !is_zero(o);
}

/* The name of the end that a packet is for. */
INLINE void destination(const struct packet *p, struct flow_key *k)
{
  __builtin_memset(k, 0, sizeof *k);
  k->proto = p->proto;
  k->family = p->family;
  if (p->kind == ERROR) {
    k->port = p->sport;
    k->peer_port = p->dport;
    __builtin_memcpy(k->peer, p->inner_dst, 16);
  } else {
    k->port = p->dport;
    k->peer_port = p->sport;
    __builtin_memcpy(k->peer, p->src, 16);
  }
}

/* The name of the end that it comes from. */
INLINE void source(const struct packet *p, struct flow_key *k)
{
  __builtin_memset(k, 0, sizeof *k);
  k->proto = p->proto;
  k->family = p->family;
  k->port = p->sport;
  k->peer_port = p->dport;
  __builtin_memcpy(k->peer, p->dst, 16);
}

INLINE __u16 slice_of(const struct config *c, __be16 port)
{
  __u32 n = ntohs(port);
  if (!c->slice_width || n < c->slice_first)
    return NOWHERE;
  __u32 slice = (n - (__u32)c->slice_first) / (__u32)c->slice_width;
  return slice < c->slices ? slice : NOWHERE;
}

INLINE void take(struct found *f, struct entry *e, enum via via)
{
  f->entry = e;
  f->hop = e->hop;
  f->action = e->action;
  f->via = via;
}

/* Who has this end? `opening`: a connection that begins is nothing that was learned before. Of datagrams only what has no
 * port was learned: there the port comes first. */
INLINE void find(const struct config *c, const struct flow_key *k, int opening, struct found *f)
{
  struct entry *e;
  int connections = k->proto == IPPROTO_TCP;
  f->entry = 0;
  f->action = FORWARD;
  if (connections && !opening && (e = map_lookup(&learned, k)))
    return take(f, e, LEARNED);
  if (c->flows && (e = map_lookup(&flows, k)))
    return take(f, e, FLOW);
  struct port_key port = {k->proto, k->family, k->port};
  if ((e = map_lookup(&ports, &port)))
    return take(f, e, PORT);
  if (!connections && (e = map_lookup(&learned, k)))
    return take(f, e, LEARNED);
  f->hop = slice_of(c, k->port);
  f->via = SLICE;
  if (f->hop == NOWHERE || k->proto == IPPROTO_ICMP || k->proto == ICMP6) {
    f->hop = c->self;
    f->via = NOTHING;
  }
}

INLINE void learn(const struct flow_key *k, __u16 hop, __u64 how)
{
  struct entry e = {.hop = hop, .action = FORWARD, .used_ns = ktime_coarse()};
  map_update(&learned, k, &e, how);
}

INLINE void account(struct __sk_buff *skb, const struct packet *p, struct found *f)
{
  struct entry *e = f->entry;
  if (!e)
    return;
  __u32 segments = skb->gso_segs;
  __sync_fetch_and_add(&e->packets, segments ? segments : 1);
  __sync_fetch_and_add(&e->bytes, skb->len);
  e->used_ns = ktime_coarse();
  if (p->kind == PORTS && (p->flags & (TCP_FIN | TCP_RST)))
    e->seen |= p->flags & TCP_RST ? RESET : FIN_IN;
}

/* The first packet of a connection says where its other end is, if nothing else would. */
INLINE void learn_source(const struct config *c, const struct packet *p, __u16 origin)
{
  struct flow_key k;
  struct found f;
  source(p, &k);
  find(c, &k, 1, &f);
  if (f.via != FLOW && f.hop != origin)
    learn(&k, origin, BPF_ANY);
}

INLINE int into_nest(struct __sk_buff *skb, const struct config *c)
{
  if (skb->pkt_type != 0)
    skb_change_type(skb, 0); /* PACKET_HOST: whatever its MAC address was on the way */
  return redirect_peer(c->nest_if, 0);
}

INLINE int send_to(struct __sk_buff *skb, const struct config *c, __u16 number)
{
  __u32 key = number;
  struct hop *hop = map_lookup(&hops, &key);
  if (!hop || !hop->ifindex)
    return drop(UNREACHABLE);
  if (hop->tunnel4) {
    struct bpf_tunnel_key tunnel = {.tunnel_id = 7117, .remote_ipv4 = hop->tunnel4, .tunnel_ttl = 64};
    if (set_tunnel_key(skb, &tunnel, sizeof tunnel, BPF_F_ZERO_CSUM_TX))
      return drop(ODD);
  }
  void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
  if (data + 12 <= end)
    __builtin_memcpy(data, hop->to_mac, 12); /* both addresses: they lie side by side */
  else if (skb_store(skb, 0, hop->to_mac, 12, 0))
    return drop(ODD);
  return redirect(hop->ifindex, 0);
}

INLINE void fragment_name(const struct packet *p, int inwards, struct fragment_key *k)
{
  __builtin_memset(k, 0, sizeof *k);
  __builtin_memcpy(k->src, p->src, 16);
  k->id = p->fragment_id;
  k->proto = p->proto;
  k->family = p->family;
  k->inwards = inwards;
}

/* On its way, to a node that is known. */
INLINE int dispatch(struct __sk_buff *skb, const struct config *c, struct packet *p, __u16 hop, __u8 action, enum from from)
{
  if (action == HOLD && from != PARK) {
    __u32 key = HELD;
    __u64 *count = map_lookup(&counters, &key);
    if (count)
      (*count)++;
    return redirect(c->park_if, 0);
  }
  if (hop == c->self)
    return into_nest(skb, c);
  /* A packet that went astray ends at last. */
  if (from == LINK && !age(skb, p))
    return drop(LOOPED);
  return send_to(skb, c, hop);
}

/* A packet to the inside address, when it is known who has its destination. */
INLINE int steer(struct __sk_buff *skb, const struct config *c, struct packet *p, const struct flow_key *k, struct found *f, __u16 origin, enum from from)
{
  int opening = is_opening(p);
  if (f->action == HOLD && from == PARK)
    f->action = FORWARD;
  account(skb, p, f);
  if (opening && f->action == FORWARD) {
    if (f->via != FLOW)
      learn(k, f->hop, BPF_ANY);
    if (from != OUTSIDE && origin != NOWHERE)
      learn_source(c, p, origin);
  }
  if (p->first) {
    struct fragment_key name;
    fragment_name(p, 1, &name);
    struct fragment first = {.hop = f->hop, .action = f->action};
    map_update(&fragments, &name, &first, BPF_ANY);
  }
  return dispatch(skb, c, p, f->hop, f->action, from);
}

/* The same of a later fragment: it goes where the first one went. */
INLINE int follow_first(struct __sk_buff *skb, const struct config *c, struct packet *p, enum from from)
{
  struct fragment_key name;
  fragment_name(p, 1, &name);
  struct fragment *first = map_lookup(&fragments, &name);
  if (!first)
    return drop(FRAGMENT);
  return dispatch(skb, c, p, first->hop, first->action, from);
}

/* A packet to the inside address. */
INLINE int to_inside(struct __sk_buff *skb, const struct config *c, struct packet *p, __u16 origin, enum from from)
{
  if (p->kind == LATER)
    return follow_first(skb, c, p, from);
  if (p->kind == PING || p->kind == OTHER)
    return into_nest(skb, c);
  struct flow_key k;
  struct found f;
  destination(p, &k);
  find(c, &k, is_opening(p), &f);
  return steer(skb, c, p, &k, &f, origin, from);
}

INLINE int is_unicast(const struct packet *p)
{
  if (p->family == 4)
    return p->dst[0] && p->dst[0] < 224 && p->dst[0] != 127;
  return p->dst[0] != 0xff && !(p->dst[0] == 0xfe && (p->dst[1] & 0xc0) == 0x80);
}

/* At the gateway: from the inside to the world. */
INLINE int to_outside(struct __sk_buff *skb, const struct config *c, struct packet *p, __u16 origin)
{
  const __u8 *own = outside(c, p);
  if (!c->outside_if || is_zero(own) || !is_unicast(p))
    return drop(UNREACHABLE);
  int tcp = p->kind == PORTS && p->proto == IPPROTO_TCP;
  /* The answer finds its way back by an entry: made by a connection's first packet, or by any datagram. */
  if ((p->kind == PORTS || p->kind == PING) && (!tcp || (p->flags & (TCP_SYN | TCP_FIN | TCP_RST)))) {
    struct flow_key k;
    struct found f;
    int opening = is_opening(p);
    source(p, &k);
    find(c, &k, opening, &f);
    int other = f.via < PORT || (f.via == LEARNED && f.hop != origin);
    if (opening ? f.via != FLOW : !tcp && other)
      learn(&k, origin, BPF_ANY);
    else if (tcp && f.entry && f.via >= FLOW)
      f.entry->seen |= p->flags & TCP_RST ? RESET : p->flags & TCP_FIN ? FIN_OUT : 0;
  }
  if (p->kind == ERROR && same(p->inner_dst, inside(c, p)) && rewrite_inner(skb, p, 0, own))
    return drop(ODD);
  if (rewrite(skb, p, 1, own))
    return drop(ODD);
  return redirect_neigh(c->outside_if, 0, 0, 0);
}

/* Egress of the nest's device: what a program sends to a socket of the same nest turns back at once. */
SEC("classifier")
int nest_egress(struct __sk_buff *skb)
{
  struct packet p;
  struct config *c = configuration();
  if (!c)
    return DROP;
  parse(skb, &p);
  if (!p.family || !same(p.dst, inside(c, &p)) || p.first || p.kind == LATER)
    return NEXT;
  if (p.kind == PORTS || p.kind == ERROR) {
    struct flow_key k;
    struct found f;
    int opening = is_opening(&p);
    destination(&p, &k);
    find(c, &k, opening, &f);
    if (f.hop != c->self || f.action == HOLD)
      return NEXT;
    account(skb, &p, &f);
    if (opening) {
      if (f.via != FLOW)
        learn(&k, f.hop, BPF_ANY);
      learn_source(c, &p, c->self);
    }
  }
  return redirect(c->inner_if, BPF_F_INGRESS);
}

/* A program inside dials the outside address: both addresses change places, and with them neither checksum. */
INLINE long turn_round(struct __sk_buff *skb, const struct config *c, struct packet *p)
{
  const __u8 *in = inside(c, p), *out = outside(c, p);
  int length = p->family == 4 ? 4 : 16;
  long failed;
  if (p->family == 4) {
    failed = skb_store(skb, SRC4, out, 4, 0) | skb_store(skb, DST4, in, 4, 0);
  } else {
    failed = skb_store(skb, SRC6, out, 16, 0) | skb_store(skb, DST6, in, 16, 0);
  }
  if (p->kind == ERROR && same(p->inner_src, out) && same(p->inner_dst, in)) {
    __u32 at = p->inner + (p->family == 4 ? 12 : 8);
    if (length == 4)
      failed |= skb_store(skb, at, in, 4, 0) | skb_store(skb, at + 4, out, 4, 0);
    else
      failed |= skb_store(skb, at, in, 16, 0) | skb_store(skb, at + 16, out, 16, 0);
    __builtin_memcpy(p->inner_src, in, 16);
    __builtin_memcpy(p->inner_dst, out, 16);
  }
  __builtin_memcpy(p->src, out, 16);
  __builtin_memcpy(p->dst, in, 16);
  return failed;
}

/* Ingress of the host's end: everything else that leaves the nest. */
SEC("classifier")
int nest_out(struct __sk_buff *skb)
{
  struct packet p;
  struct config *c = configuration();
  if (!c)
    return DROP;
  parse(skb, &p);
  if (!p.family)
    return DROP;
  if (!same(p.src, inside(c, &p)))
    return drop(SPOOFED);
  if (is_outside(c, &p, p.dst) && turn_round(skb, c, &p))
    return drop(ODD);
  if (same(p.dst, inside(c, &p)))
    return to_inside(skb, c, &p, c->self, NEST);
  if (c->gateway == c->self)
    return to_outside(skb, c, &p, c->self);
  if (c->gateway == NOWHERE || !is_unicast(&p))
    return drop(UNREACHABLE);
  if (is_opening(&p))
    learn_source(c, &p, c->self);
  return send_to(skb, c, c->gateway);
}

/* From another node. */
INLINE int from_node(struct __sk_buff *skb, const struct config *c, struct packet *p, __u16 origin)
{
  if (origin == NOWHERE)
    return drop(STRANGER);
  if (same(p->dst, inside(c, p)))
    return to_inside(skb, c, p, origin, LINK);
  return to_outside(skb, c, p, origin);
}

/* Ingress of the link between the nodes. */
SEC("classifier")
int link_in(struct __sk_buff *skb)
{
  struct packet p;
  struct config *c = configuration();
  if (!c)
    return NEXT;
  parse(skb, &p);
  if (!p.family || (!same(p.dst, inside(c, &p)) && !same(p.src, inside(c, &p))))
    return NEXT;
  struct mac_key sender = {};
  if (skb_load(skb, ETH_ALEN, sender.mac, ETH_ALEN))
    return drop(ODD);
  __u32 *origin = map_lookup(&stations, &sender);
  return from_node(skb, c, &p, origin ? *origin : NOWHERE);
}

/* Ingress of the device that tunnels end at. */
SEC("classifier")
int tunnel_in(struct __sk_buff *skb)
{
  struct packet p;
  struct bpf_tunnel_key tunnel = {};
  struct config *c = configuration();
  if (!c)
    return DROP;
  parse(skb, &p);
  if (!p.family || (!same(p.dst, inside(c, &p)) && !same(p.src, inside(c, &p))))
    return DROP;
  if (get_tunnel_key(skb, &tunnel, sizeof tunnel, 0))
    return drop(ODD);
  /* A sender's address in place of a MAC address: no MAC address begins so. */
  struct mac_key sender = {.mac = {0xff, 0xff}};
  __builtin_memcpy(sender.mac + 2, &tunnel.remote_ipv4, 4);
  __u32 *origin = map_lookup(&stations, &sender);
  return from_node(skb, c, &p, origin ? *origin : NOWHERE);
}

/* Ingress of the gateway's device to the world. */
SEC("classifier")
int outside_in(struct __sk_buff *skb)
{
  struct packet p;
  struct config *c = configuration();
  if (!c)
    return DROP;
  parse(skb, &p);
  if (!p.family)
    return NEXT;
  const __u8 *in = inside(c, &p);
  if (same(p.dst, in) || same(p.src, in) || same(p.dst, c->underlay) || is_outside(c, &p, p.src))
    return drop(SPOOFED);
  if (!is_outside(c, &p, p.dst))
    return NEXT;
  if (p.kind == PING || (p.kind == OTHER && p.proto == ICMP6 && p.icmp >= 133 && p.icmp <= 137))
    return NEXT; /* pings and neighbours: the kernel's, which has the address */
  if (p.kind == OTHER)
    return drop(CLOSED);
  if (p.kind == LATER)
    return rewrite(skb, &p, 0, in) ? drop(ODD) : follow_first(skb, c, &p, OUTSIDE);
  struct flow_key k;
  struct found f;
  int opening = is_opening(&p);
  if (p.kind == ERROR && !is_outside(c, &p, p.inner_src))
    return drop(CLOSED);
  destination(&p, &k);
  find(c, &k, opening, &f);
  /* Only what has an entry is reachable; a connection from inside that is older than the table is known by its port. */
  int old = f.via == SLICE && p.kind == PORTS && p.proto == IPPROTO_TCP && !opening;
  if (f.via < PORT && !old)
    return drop(CLOSED);
  if (p.kind == ERROR && rewrite_inner(skb, &p, 1, in))
    return drop(ODD);
  if (rewrite(skb, &p, 0, in))
    return drop(ODD);
  return steer(skb, c, &p, &k, &f, NOWHERE, OUTSIDE);
}

/* Ingress of the device where held packets wait: the daemon lets them go on. */
SEC("classifier")
int park_in(struct __sk_buff *skb)
{
  struct packet p;
  struct config *c = configuration();
  if (!c)
    return DROP;
  parse(skb, &p);
  if (!p.family || !same(p.dst, inside(c, &p)))
    return drop(ODD);
  return to_inside(skb, c, &p, NOWHERE, PARK);
}

char LICENCE[] SEC("license") = "GPL";
