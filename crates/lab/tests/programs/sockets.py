"""The two ends of small conversations, for tests of the way between them. Uses nothing but the standard library.

  serve PORT [ADDRESS]   TCP and UDP on PORT; each connection or datagram is answered with "HOST PEER: WHAT"
    (serve PORT ADDRESS HOST)
  dial ADDRESS PORT WORD [udp|tcp [SOURCE-PORT [TIMES]]]   says WORD, prints the answer and how this end is called
  ping ADDRESS           prints "answered"
"""
import os
import socket
import sys
import threading


def family(address):
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def serve(port, address="::"):
    name = sys.argv[4] if len(sys.argv) > 4 else ""
    tcp = socket.socket(family(address), socket.SOCK_STREAM)
    tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    udp = socket.socket(family(address), socket.SOCK_DGRAM)
    for s in (tcp, udp):
        if address == "::":
            s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        s.bind((address, port))
    tcp.listen(128)

    def datagrams():
        while True:
            what, peer = udp.recvfrom(65536)
            head = f"{name} {peer[0].removeprefix('::ffff:')}: ".encode()
            udp.sendto(head + what, peer)

    def connection(c, peer):
        with c:
            c.sendall(f"{name} {peer[0].removeprefix('::ffff:')}: ".encode())
            while what := c.recv(65536):
                c.sendall(what)

    threading.Thread(target=datagrams, daemon=True).start()
    print("ready", flush=True)
    while True:
        c, peer = tcp.accept()
        threading.Thread(target=connection, args=(c, peer), daemon=True).start()


def dial(address, port, word, proto="tcp", source=0):
    kind = socket.SOCK_DGRAM if proto == "udp" else socket.SOCK_STREAM
    word = (word * (int(sys.argv[7]) if len(sys.argv) > 7 else 1)).encode()
    with socket.socket(family(address), kind) as s:
        s.settimeout(5)
        if source:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.bind(("::" if ":" in address else "0.0.0.0", source))
        s.connect((address, port))
        own = s.getsockname()[0]
        s.sendall(word)
        if proto == "udp":
            got = s.recv(65536)
        else:
            s.shutdown(socket.SHUT_WR)
            got = b""
            while part := s.recv(65536):
                got += part
    head, _, rest = got.partition(b": ")
    print(f"{head.decode()} | {own} | {len(rest)} {'same' if rest == word else 'DIFFERENT'}")


def ping(address):
    six = ":" in address
    proto = socket.IPPROTO_ICMPV6 if six else socket.IPPROTO_ICMP
    number = os.getpid() & 0xFFFF
    body = bytes([128 if six else 8, 0, 0, 0]) + number.to_bytes(2, "big") + b"\0\1dunlin"
    if not six:  # of ICMPv6, the kernel makes the checksum
        total = sum(int.from_bytes(body[i : i + 2], "big") for i in range(0, len(body), 2))
        total = (total & 0xFFFF) + (total >> 16)
        body = body[:2] + (~total & 0xFFFF).to_bytes(2, "big") + body[4:]
    with socket.socket(family(address), socket.SOCK_RAW, proto) as s:
        s.settimeout(5)
        s.sendto(body, (address, 0))
        while True:
            got, peer = s.recvfrom(2048)
            got = got if six else got[(got[0] & 15) * 4 :]
            if got[0] == (129 if six else 0) and got[4:8] == body[4:8] and peer[0] == address:
                return print("answered")


if sys.argv[1] == "ping":
    ping(sys.argv[2])
elif sys.argv[1] == "serve":
    serve(int(sys.argv[2]), *sys.argv[3:4])
else:
    dial(sys.argv[2], int(sys.argv[3]), sys.argv[4], *sys.argv[5:6], *map(int, sys.argv[6:7]))
