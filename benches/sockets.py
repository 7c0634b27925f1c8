#!/usr/bin/env python3
"""What the network of the nests costs, each figure with its peer or floor in the same run.

    packet    what the gateway adds to a small datagram, against plain routing and against conntrack with DNAT, on the
              same devices; each less what the same datagram costs that is dropped where it comes in
    through   one TCP stream from the outside host through the gateway, against plain routing and conntrack with DNAT
    inside    TCP round trips over the inside address, on one node and between two, against one plain pair of devices
    redis     redis-benchmark on the outside host while redis goes round, against the same without moves
    web       the same of wrk against nginx
    many      the freeze of a process with 1 GiB and 1,000 connections

Durations are medians of medians. Exit code: 0 if nothing broke (a missed goal is a figure, not a failure), 1 otherwise.
"""
import json
import os
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent))
from drive.bench import main
from drive.lab import Broken
from drive.outside import InNest, Server, addresses, again, client, run
from drive.report import row
from servers import many, redis, web

SERVER, OUTSIDE = "10.255.1.2", "10.255.0.1"


class Plain:
    """client — router — server, three network namespaces with plain devices, as the outside host, the gateway and a nest are."""

    def __init__(self):
        self.names = {n: f"bench-{os.getpid()}-{n}" for n in ("client", "router", "server")}

    def __enter__(self):
        for name in self.names.values():
            run("ip", "netns", "add", name)
        c, r, s = self.names["client"], self.names["router"], self.names["server"]
        for near, device, far in ((c, "out0", r), (s, "in0", r)):
            run("ip", "-n", near, "link", "add", "name", "eth0", "type", "veth", "peer", "name", device, "netns", far)
        for ns, device, address in ((c, "eth0", "10.255.0.2"), (r, "out0", OUTSIDE), (r, "in0", "10.255.1.1"), (s, "eth0", SERVER)):
            run("ip", "-n", ns, "addr", "add", f"{address}/24", "dev", device)
            run("ip", "-n", ns, "link", "set", device, "up")
        run("ip", "-n", c, "route", "add", "10.255.1.0/24", "via", OUTSIDE)
        run("ip", "-n", s, "route", "add", "default", "via", "10.255.1.1")
        self.inside("router", "sysctl", "-q", "-w", "net.ipv4.ip_forward=1")
        return self

    def __exit__(self, *_):
        for name in self.names.values():
            run("ip", "netns", "del", name, check=False)

    def inside(self, where, *command, **more):
        return run("ip", "netns", "exec", self.names[where], *command, **more)

    def start(self, where, *command):
        return Server(["ip", "netns", "exec", self.names[where], *map(str, command)])

    def rules(self, text):
        """Replaces the router's rules of nftables."""
        self.inside("router", "nft", "-f", "-", input="flush ruleset\n" + text)

    DROP = """table netdev t {
        chain c {
            type filter hook ingress device out0 priority 0
            udp dport 5000 drop
        }
    }\n"""
    DNAT = f"""table ip t {{
        map to {{
            type inet_proto . inet_service : ipv4_addr . inet_service
            elements = {{ tcp . 5201 : {SERVER} . 5201, udp . 5000 : {SERVER} . 5000 }}
        }}
        chain in {{
            type nat hook prerouting priority -100
            ip daddr {OUTSIDE} dnat ip to meta l4proto . th dport map @to
        }}
    }}\n"""


def packet(lab, quick):
    flood, count, rounds = lab.work / "flood", 100_000 if quick else 300_000, 3 if quick else 5
    outside, _ = addresses(lab)
    figures = {n: [] for n in ("drop", "routing", "dnat", "gateway", "gateway to n2")}
    with Plain() as plain, plain.start("server", flood, "sink", SERVER, 5000):
        with InNest(lab, "n1", flood, "sink", "0.0.0.0", 5000), InNest(lab, "n2", flood, "sink", "0.0.0.0", 5001):
            time.sleep(1)  # the daemons look for sockets many times in this time
            for _ in range(rounds):
                for name, rules, to in (("drop", Plain.DROP, SERVER), ("routing", "", SERVER), ("dnat", Plain.DNAT, OUTSIDE)):
                    plain.rules(rules)
                    figures[name].append(float(plain.inside("client", flood, to, 5000, count)))
                figures["gateway"].append(float(client(lab, flood, outside, 5000, count)))
                figures["gateway to n2"].append(float(client(lab, flood, outside, 5001, count)))
    floor = median(figures["drop"])
    extra = {n: [v - floor for v in values] for n, values in figures.items()}
    dnat, routing = median(extra["dnat"]), median(extra["routing"])
    yield row("packet", "dropped at the first device", "ns", figures["drop"])
    yield row("packet", "plain routing adds", "ns", extra["routing"], against="conntrack with DNAT", reference=dnat)
    yield row("packet", "gateway adds", "ns", extra["gateway"], against="conntrack with DNAT", reference=dnat, at_most=0.45, goal="≤ 0.45")
    yield row("packet", "gateway adds", "ns", extra["gateway"], against="plain routing", reference=routing)
    yield row("packet", "gateway and another node add", "ns", extra["gateway to n2"], against="conntrack with DNAT", reference=dnat)


def stream(attempt):
    """What iperf3 has measured, in MiB/s. Its server takes one at a time: while it is busy with the end of the last, the answer is an error."""
    def measured():
        answer = json.loads(attempt())
        if "sum_received" not in answer.get("end", {}):
            raise Broken(answer.get("error", f"no figures in {answer}"))
        return answer["end"]["sum_received"]["bits_per_second"] / 8 / 2**20

    return again(measured, "iperf3")


def through(lab, quick):
    seconds, rounds = (1, 2) if quick else (2, 3)
    outside, _ = addresses(lab)
    serve = ["iperf3", "-s", "-p", "5201"]
    measure = ["-J", "-p", "5201", "-t", str(seconds)]
    figures = {n: [] for n in ("routing", "dnat", "gateway")}
    with Plain() as plain, Server(["ip", "netns", "exec", plain.names["server"], *serve], wait=False), InNest(lab, "n1", *serve):
        for _ in range(rounds):
            for name, rules, to in (("routing", "", SERVER), ("dnat", Plain.DNAT, OUTSIDE)):
                plain.rules(rules)
                figures[name].append(stream(lambda: plain.inside("client", "iperf3", "-c", to, *measure)))  # noqa: B023
            figures["gateway"].append(stream(lambda: client(lab, "iperf3", "-c", outside, *measure)))
    yield row("through", "conntrack with DNAT", "MiB/s", figures["dnat"], against="plain routing", reference=median(figures["routing"]))
    yield row("through", "gateway", "MiB/s", figures["gateway"], against="plain routing", reference=median(figures["routing"]))


def inside(lab, quick):
    pingpong, count, rounds = lab.work / "pingpong", 5_000 if quick else 20_000, 3 if quick else 5
    _, address = addresses(lab)
    figures = {n: [] for n in ("veth", "one node", "two nodes")}
    with Plain() as plain, plain.start("router", pingpong, "serve", "0.0.0.0", 5000):
        with InNest(lab, "n1", pingpong, "serve", "0.0.0.0", 5000), InNest(lab, "n2", pingpong, "serve", "0.0.0.0", 5001):
            for _ in range(rounds):
                figures["veth"].append(plain.inside("client", pingpong, OUTSIDE, 5000, count))
                for name, port in (("one node", 5000), ("two nodes", 5001)):
                    figures[name].append(again(lambda: lab.call("run", "--", str(pingpong), address, str(port), str(count)), "pingpong"))  # noqa: B023
    p50 = {n: [float(v.split()[0]) for v in values] for n, values in figures.items()}
    p99 = {n: [float(v.split()[1]) for v in values] for n, values in figures.items()}
    for name in ("one node", "two nodes"):
        yield row("inside", f"round trip p50, {name}", "µs", p50[name], against="plain veth", reference=median(p50["veth"]))
        yield row("inside", f"round trip p99, {name}", "µs", p99[name], against="plain veth", reference=median(p99["veth"]))


if __name__ == "__main__":
    main("sockets", __doc__, (packet, through, inside, redis, web, many))
