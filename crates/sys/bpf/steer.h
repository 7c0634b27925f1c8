/* What the steering programs and crates/sys/src/steer.rs agree on: the tables. Keep both in step, and raise LAYOUT there.
 *
 * Addresses are 16 bytes: IPv6, or IPv4 in the first four and zeros. Ports are in network order in keys. */
#pragma once

#include "bpf.h"

#define NOWHERE 0xffff /* no hop */

/* One; array of one element. */
struct config {
  __u8 inside4[16];
  __u8 inside6[16];
  __u8 outside4[16]; /* zeros: none */
  __u8 outside6[16];
  __u8 underlay[16];   /* this node's own address on the link: not for anybody outside */
  __u32 nest_if;       /* the host's end of the nest's device */
  __u32 inner_if;      /* the nest's end, in its namespace */
  __u32 park_if;       /* where held packets wait */
  __u32 outside_if;    /* 0: this node is no gateway */
  __u32 tunnel_if;     /* 0: all peers are on the link */
  __u16 self;          /* this node's hop */
  __u16 gateway;       /* the gateway's hop, or NOWHERE */
  __u16 slice_first;   /* ports are sliced from this one on */
  __u16 slice_width;   /* 0: they are not */
  __u16 slices;
  __u16 flows;         /* 0: a daemon has placed no connection, the table need not be asked */
};

/* How to reach a node; by number. */
struct hop {
  __u8 to_mac[6];   /* its own on the link */
  __u8 from_mac[6]; /* ours */
  __u32 ifindex;    /* 0: not known */
  __u32 tunnel4;    /* not 0: behind the tunnel device, at this address (host order) */
};

enum action { FORWARD = 0, HOLD = 1 };

/* What has been seen of a connection's end. */
enum { FIN_IN = 1, FIN_OUT = 2, RESET = 4 };

struct entry {
  __u16 hop;
  __u8 action;
  __u8 seen;
  __u32 pad;
  __u64 epoch; /* the daemon's: order of news, or of a HOLD the move it is for */
  __u64 packets;
  __u64 bytes;
  __u64 used_ns; /* CLOCK_MONOTONIC, coarse; 0: never */
};

struct port_key {
  __u8 proto;
  __u8 family; /* 4 or 6 */
  __be16 port;
};

struct flow_key {
  __u8 proto;
  __u8 family;
  __be16 port; /* on the inside address */
  __be16 peer_port;
  __u16 pad;
  __u8 peer[16];
};

struct fragment_key {
  __u8 src[16];
  __u32 id;
  __u8 proto;
  __u8 family;
  __u8 inwards;
  __u8 pad;
};

struct fragment {
  __u16 hop;
  __u8 action;
  __u8 pad;
};

/* Why packets were dropped, and how many were held. */
enum counter { SPOOFED, CLOSED, UNREACHABLE, FRAGMENT, LOOPED, ODD, HELD, STRANGER, COUNTERS };

struct {
  UINT(type, BPF_MAP_TYPE_ARRAY);
  UINT(max_entries, 1);
  TYPE(key, __u32);
  TYPE(value, struct config);
} config_of SEC(".maps");

struct {
  UINT(type, BPF_MAP_TYPE_ARRAY);
  UINT(max_entries, 1024);
  TYPE(key, __u32);
  TYPE(value, struct hop);
} hops SEC(".maps");

/* Who of the link's addresses is which hop. */
struct mac_key {
  __u8 mac[6];
  __u16 pad;
};
struct {
  UINT(type, BPF_MAP_TYPE_HASH);
  UINT(max_entries, 2048);
  TYPE(key, struct mac_key);
  TYPE(value, __u32);
} stations SEC(".maps");

/* Connections that a daemon has placed. */
struct {
  UINT(type, BPF_MAP_TYPE_HASH);
  UINT(max_entries, 262144);
  UINT(map_flags, BPF_F_NO_PREALLOC);
  TYPE(key, struct flow_key);
  TYPE(value, struct entry);
} flows SEC(".maps");

/* Connections whose first packet was seen; the kernel forgets those that were used longest ago. */
struct {
  UINT(type, BPF_MAP_TYPE_LRU_HASH);
  UINT(max_entries, 131072);
  TYPE(key, struct flow_key);
  TYPE(value, struct entry);
} learned SEC(".maps");

struct {
  UINT(type, BPF_MAP_TYPE_HASH);
  UINT(max_entries, 65536);
  UINT(map_flags, BPF_F_NO_PREALLOC);
  TYPE(key, struct port_key);
  TYPE(value, struct entry);
} ports SEC(".maps");

struct {
  UINT(type, BPF_MAP_TYPE_LRU_HASH);
  UINT(max_entries, 4096);
  TYPE(key, struct fragment_key);
  TYPE(value, struct fragment);
} fragments SEC(".maps");

struct {
  UINT(type, BPF_MAP_TYPE_PERCPU_ARRAY);
  UINT(max_entries, COUNTERS);
  TYPE(key, __u32);
  TYPE(value, __u64);
} counters SEC(".maps");
