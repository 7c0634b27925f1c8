//! `/proc/PID/net/tcp` and `tcp6`: the TCP sockets of a network namespace, those included that no program has yet.
//!
//! Owns the parsing. Refuses to judge.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// One socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TcpRow {
    /// Its own address.
    pub local: SocketAddr,
    /// Its peer's.
    pub remote: SocketAddr,
    /// The kernel's number of its state.
    pub state: u8,
    /// Its inode, 0 for one that no program has.
    pub inode: u64,
}

/// Reads a table; a line that is not understood is left out.
pub fn parse_tcp(text: &str) -> Vec<TcpRow> {
    text.lines().skip(1).filter_map(row).collect()
}

fn row(line: &str) -> Option<TcpRow> {
    let mut words = line.split_ascii_whitespace().skip(1);
    let local = address(words.next()?)?;
    let remote = address(words.next()?)?;
    let state = u8::from_str_radix(words.next()?, 16).ok()?;
    // Queues, timer, retransmissions, user, timeout come between.
    let inode = words.nth(5)?.parse().ok()?;
    Some(TcpRow {
        local,
        remote,
        state,
        inode,
    })
}

fn address(word: &str) -> Option<SocketAddr> {
    let (ip, port) = word.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let mut bytes = Vec::with_capacity(16);
    for at in (0..ip.len()).step_by(8) {
        // Words as this machine has them in memory.
        bytes.extend(u32::from_str_radix(ip.get(at..at + 8)?, 16).ok()?.to_ne_bytes());
    }
    let ip = match bytes.len() {
        4 => IpAddr::V4(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?)),
        16 => IpAddr::V6(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?)),
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_both_families_are_read() {
        let text = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n   \
            0: 0100007F:0050 0200007F:1F90 02 00000001:00000000 01:00000064 00000002  1000        0 4711 2 0000\n";
        assert_eq!(
            parse_tcp(text),
            [TcpRow {
                local: "127.0.0.1:80".parse().unwrap(),
                remote: "127.0.0.2:8080".parse().unwrap(),
                state: 2,
                inode: 4711
            }]
        );
        let six = "head\n 0: 00000000000000000000000001000000:0016 B80D0120000000000000000001000000:0017 03 0:0 0:0 0 0 0 0 1\n";
        let rows = parse_tcp(six);
        assert_eq!(rows[0].local, "[::1]:22".parse().unwrap());
        assert_eq!(rows[0].remote, "[2001:db8::1]:23".parse().unwrap());
        assert_eq!(parse_tcp("head\nnonsense\n"), []);
    }
}
