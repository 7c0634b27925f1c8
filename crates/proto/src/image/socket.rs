//! Sockets of the Internet families, as they travel.
//!
//! Owns their portable form: what can be made before the freeze, and what is known inside it only. Refuses to know how
//! any of it is read or set. Numbers are those of Linux.

use serde::de::{Error, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::net::{IpAddr, SocketAddr};

/// A socket, as far as it does not change of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Socket {
    /// AF_INET or AF_INET6.
    pub family: i32,
    /// SOCK_STREAM or SOCK_DGRAM.
    pub kind: i32,
    /// IPPROTO_TCP or IPPROTO_UDP.
    pub protocol: i32,
    /// User and group of whoever made it.
    pub owner: (u32, u32),
    /// Its own address, if it has one.
    pub local: Option<SocketAddr>,
    /// Its peer's, if it has one.
    pub remote: Option<SocketAddr>,
    /// It takes connections.
    pub listening: bool,
    /// In the order in which they are set.
    pub options: Vec<SocketOption>,
}

/// One option with its value, as getsockopt(2) gives it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketOption {
    /// SOL_SOCKET, IPPROTO_TCP, …
    pub level: i32,
    /// The option.
    pub name: i32,
    /// Its bytes.
    pub value: OptionValue,
}

/// The bytes of an option's value. In place, for there are dozens of each socket.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct OptionValue {
    length: u8,
    bytes: [u8; OptionValue::MAX],
}

impl OptionValue {
    /// No value is longer.
    pub const MAX: usize = 16;

    /// `None`: it is too long.
    pub fn new(value: &[u8]) -> Option<OptionValue> {
        let mut bytes = [0; OptionValue::MAX];
        bytes.get_mut(..value.len())?.copy_from_slice(value);
        let length = value.len() as u8;
        Some(OptionValue { length, bytes })
    }
}

impl std::ops::Deref for OptionValue {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..usize::from(self.length)]
    }
}

impl AsRef<[u8]> for OptionValue {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl fmt::Debug for OptionValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

impl Serialize for OptionValue {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(self)
    }
}

impl<'de> Deserialize<'de> for OptionValue {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<OptionValue, D::Error> {
        struct Value;
        impl Visitor<'_> for Value {
            type Value = OptionValue;

            fn expecting(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
                to.write_str("a few bytes")
            }

            fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<OptionValue, E> {
                OptionValue::new(bytes).ok_or_else(|| E::invalid_length(bytes.len(), &self))
            }
        }
        deserializer.deserialize_bytes(Value)
    }
}

/// A socket inside the freeze.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrozenSocket {
    /// The key of its description.
    pub key: u64,
    /// What it is now, if that is not what the plan says.
    pub changed: Option<Socket>,
    /// Open flags of its description.
    pub flags: u32,
    /// SO_SNDBUF, SO_RCVBUF, SO_BUF_LOCK.
    pub buffers: [u32; 3],
    /// What it is doing.
    pub state: SocketState,
}

/// What a socket is doing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum SocketState {
    /// A TCP socket that is not connected.
    Idle,
    /// A TCP socket whose connection is over.
    Over {
        /// What came before and was not read.
        #[serde(with = "crate::bytes")]
        received: Vec<u8>,
    },
    /// It takes connections.
    Listening {
        /// How many may wait.
        backlog: u32,
        /// Who does, in order.
        callers: Vec<Caller>,
    },
    /// It is being connected.
    Opening {
        /// Its first sequence number.
        first: u32,
    },
    /// A connection.
    Connected(Box<Connection>),
    /// A UDP socket.
    Datagrams(Vec<Datagram>),
}

/// A TCP connection. Sequence numbers and lengths are those of the bytes: a FIN is in the state alone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connection {
    /// The kernel's number of its state.
    pub state: u8,
    /// The sequence number of the first byte of `received`.
    pub receive_from: u32,
    /// What has come and was not read.
    #[serde(with = "crate::bytes")]
    pub received: Vec<u8>,
    /// The sequence number of the first byte of `sending`.
    pub send_from: u32,
    /// What was written and is not acknowledged.
    #[serde(with = "crate::bytes")]
    pub sending: Vec<u8>,
    /// How much of it, at its end, was never sent.
    pub unsent: u32,
    /// Our FIN was not sent either.
    pub fin_unsent: bool,
    /// snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup.
    pub window: [u32; 5],
    /// The largest segment that the peer takes.
    pub mss: u32,
    /// Selective acknowledgements are spoken.
    pub sack: bool,
    /// How both sides scale their windows: for what we send, for what they send.
    pub scales: Option<(u8, u8)>,
    /// The clock of the timestamps, if they are spoken.
    pub timestamp: Option<u32>,
    /// shutdown(SHUT_RD), which the peer does not see.
    pub deaf: bool,
}

/// A connection that no program has accepted yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Caller {
    /// Who calls.
    pub from: SocketAddr,
    /// Whom it has called.
    pub to: SocketAddr,
    /// What it is.
    pub connection: Connection,
    /// It was broken off by its peer.
    pub reset: bool,
}

/// A datagram that waits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Datagram {
    /// Who sent it.
    pub from: SocketAddr,
    /// To which of the addresses, if that can be told.
    pub to: Option<IpAddr>,
    /// Its bytes.
    #[serde(with = "crate::bytes")]
    pub bytes: Vec<u8>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_read_as_it_was_written_and_one_that_is_too_long_is_not() {
        let value = OptionValue::new(&[1, 2, 3]).unwrap();
        let written = postcard::to_stdvec(&value).unwrap();
        assert_eq!(written, [3, 1, 2, 3]);
        assert_eq!(postcard::from_bytes::<OptionValue>(&written).unwrap(), value);
        let long = postcard::to_stdvec(&vec![7u8; OptionValue::MAX + 1]).unwrap();
        assert!(postcard::from_bytes::<OptionValue>(&long).is_err());
        assert_eq!(OptionValue::new(&[0; OptionValue::MAX + 1]), None);
    }
}
