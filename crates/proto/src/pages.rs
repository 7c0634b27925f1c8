//! Page traffic between the node that holds an image and the one whose program needs it, and the portable form of a
//! page map.
//!
//! Owns the layout of both. Refuses to know sockets and page tables. Page traffic does not use [`crate::frame`]: on a
//! connection of its own travel, little-endian, one [`Hello`], its [`Welcome`], then 24-byte [`Request`]s one way and
//! 24-byte [`ReplyHeader`]s with their data the other way, answered in the order asked. An image has two such
//! connections per client ([`Lane`]), so that a page the program waits for never queues behind the bulk.
//! Invariants: nothing is longer than [`MAX_PAYLOAD_BYTES`]; whatever arrives is parsed; a reply names no page that was
//! not asked for.

use crate::ids::{ImageId, Slot};
use serde::{Deserialize, Serialize};
use std::fmt;

/// A page.
pub const PAGE_BYTES: usize = 4096;
/// No request names more pages: its wishes are one bit each of a `u64`.
pub const MAX_RANGE_PAGES: u32 = 64;
/// So many ranges at most are in one part of a scan's answer.
pub const MAX_SCAN_RANGES: usize = 1024;
/// No reply carries more.
pub const MAX_PAYLOAD_BYTES: usize = MAX_RANGE_PAGES as usize * PAGE_BYTES;
/// The first four bytes of every page connection: a daemon that serves more than pages on one port looks here.
pub const MAGIC: [u8; 4] = *b"dlnP";
/// Raised by every change that an older peer would misread.
pub const VERSION: u16 = 1;
/// Bytes of a [`Hello`].
pub const HELLO_BYTES: usize = 32;
/// Bytes of a [`Welcome`].
pub const WELCOME_BYTES: usize = 8;
/// Bytes of a [`Request`].
pub const REQUEST_BYTES: usize = 24;
/// Bytes of a [`ReplyHeader`].
pub const REPLY_BYTES: usize = 24;

/// What arrived is not what the format says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("page traffic: {0}; hint: both nodes must run the same version of dunlin")]
pub struct Malformed(pub &'static str);

impl From<Malformed> for std::io::Error {
    fn from(why: Malformed) -> Self {
        std::io::Error::new(std::io::ErrorKind::InvalidData, why)
    }
}

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lane {
    /// Pages that a program waits for, and their neighbours.
    Faults,
    /// Everything else.
    Bulk,
}

/// Who uses an image: drawn at random by the client for each family of address spaces. A holder keeps the image
/// until every client it has seen has released it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ClientId(pub u64);

/// The client's first words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hello {
    /// Whose pages.
    pub image: ImageId,
    /// Who asks.
    pub client: ClientId,
    /// What for.
    pub lane: Lane,
}

impl Hello {
    /// As it travels.
    pub fn encode(&self) -> [u8; HELLO_BYTES] {
        let mut bytes = [0; HELLO_BYTES];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
        bytes[6] = match self.lane {
            Lane::Faults => 0,
            Lane::Bulk => 1,
        };
        bytes[8..10].copy_from_slice(&self.image.holder.0.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.image.nonce.to_le_bytes());
        bytes[24..].copy_from_slice(&self.client.0.to_le_bytes());
        bytes
    }

    /// As it was.
    pub fn decode(bytes: &[u8; HELLO_BYTES]) -> Result<Hello, Malformed> {
        if bytes[..4] != MAGIC {
            return Err(Malformed("a connection does not begin with the magic"));
        }
        if u16_at(bytes, 4) != VERSION {
            return Err(Malformed("a client speaks another version"));
        }
        let lane = match bytes[6] {
            0 => Lane::Faults,
            1 => Lane::Bulk,
            _ => return Err(Malformed("an unknown lane")),
        };
        let image = ImageId {
            holder: Slot(u16_at(bytes, 8)),
            nonce: u64_at(bytes, 16),
        };
        Ok(Hello {
            image,
            client: ClientId(u64_at(bytes, 24)),
            lane,
        })
    }
}

/// The holder's answer to a [`Hello`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Welcome {
    /// Ask on.
    Come,
    /// There is no such image here.
    UnknownImage,
}

impl Welcome {
    /// As it travels.
    pub fn encode(self) -> [u8; WELCOME_BYTES] {
        let mut bytes = [0; WELCOME_BYTES];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4] = match self {
            Welcome::Come => 0,
            Welcome::UnknownImage => 1,
        };
        bytes
    }

    /// As it was.
    pub fn decode(bytes: &[u8; WELCOME_BYTES]) -> Result<Welcome, Malformed> {
        match (bytes[..4] == MAGIC, bytes[4]) {
            (true, 0) => Ok(Welcome::Come),
            (true, 1) => Ok(Welcome::UnknownImage),
            _ => Err(Malformed("the answer to a hello is none")),
        }
    }
}

/// What a client asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Pages of the image. Answered by one reply.
    Pages {
        /// Comes back in the reply.
        tag: u32,
        /// Address of the first page.
        start: u64,
        /// Bit i: the page i pages on.
        want: u64,
    },
    /// Which pages have content? Answered by replies, the last of which says so.
    Scan {
        /// Comes back in the replies.
        tag: u32,
        /// First address.
        start: u64,
        /// How many pages.
        pages: u64,
    },
    /// This client needs the image no longer. Answered; then the holder closes.
    Release {
        /// Comes back in the reply.
        tag: u32,
    },
}

impl Request {
    /// As it travels.
    pub fn encode(&self) -> [u8; REQUEST_BYTES] {
        let (op, tag, start, last) = match *self {
            Request::Pages { tag, start, want } => (1, tag, start, want),
            Request::Scan { tag, start, pages } => (2, tag, start, pages),
            Request::Release { tag } => (3, tag, 0, 0),
        };
        header(op, tag, start, last)
    }

    /// As it was. Addresses are whole pages and do not wrap.
    pub fn decode(bytes: &[u8; REQUEST_BYTES]) -> Result<Request, Malformed> {
        let (tag, start, last) = (u32_at(bytes, 4), u64_at(bytes, 8), u64_at(bytes, 16));
        let pages = match bytes[0] {
            1 if last == 0 => return Err(Malformed("a request for no page")),
            1 => 64 - u64::from(last.leading_zeros()),
            2 => last,
            3 => return Ok(Request::Release { tag }),
            _ => return Err(Malformed("an unknown request")),
        };
        in_address_space(start, pages)?;
        Ok(match bytes[0] {
            1 => Request::Pages { tag, start, want: last },
            _ => Request::Scan { tag, start, pages },
        })
    }
}

/// What a holder answers; [`ReplyHeader::payload_bytes`] of data follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplyHeader {
    /// The pages that have content, one after another. Those asked for and not present are absent from the image:
    /// zeros.
    Pages {
        /// The request's.
        tag: u32,
        /// The request's.
        start: u64,
        /// Bit i: the page i pages on follows.
        present: u64,
    },
    /// Part of a scan: pairs of `u64`, first address and address after the last, ascending.
    Scan {
        /// The request's.
        tag: u32,
        /// Everything from where the last part ended (or the scan began) up to here has been looked at.
        scanned_to: u64,
        /// So many pairs follow.
        ranges: u32,
        /// No other part follows.
        last: bool,
    },
    /// The claim is gone.
    Released {
        /// The request's.
        tag: u32,
    },
}

impl ReplyHeader {
    /// How many bytes of data follow.
    pub fn payload_bytes(&self) -> usize {
        match self {
            ReplyHeader::Pages { present, .. } => present.count_ones() as usize * PAGE_BYTES,
            ReplyHeader::Scan { ranges, .. } => *ranges as usize * 16,
            ReplyHeader::Released { .. } => 0,
        }
    }

    /// As it travels.
    pub fn encode(&self) -> [u8; REPLY_BYTES] {
        match *self {
            ReplyHeader::Pages { tag, start, present } => header(1, tag, start, present),
            ReplyHeader::Scan {
                tag,
                scanned_to,
                ranges,
                last,
            } => header(2, tag, scanned_to, u64::from(ranges) | u64::from(last) << 32),
            ReplyHeader::Released { tag } => header(3, tag, 0, 0),
        }
    }

    /// As it was.
    pub fn decode(bytes: &[u8; REPLY_BYTES]) -> Result<ReplyHeader, Malformed> {
        let (tag, start, last) = (u32_at(bytes, 4), u64_at(bytes, 8), u64_at(bytes, 16));
        match bytes[0] {
            1 => Ok(ReplyHeader::Pages {
                tag,
                start,
                present: last,
            }),
            2 if last & 0xffff_ffff > MAX_SCAN_RANGES as u64 || last >> 33 != 0 => {
                Err(Malformed("a part of a scan is too long"))
            }
            2 => Ok(ReplyHeader::Scan {
                tag,
                scanned_to: start,
                ranges: last as u32,
                last: last >> 32 == 1,
            }),
            3 => Ok(ReplyHeader::Released { tag }),
            _ => Err(Malformed("an unknown reply")),
        }
    }
}

/// A page map, as it travels with a process that moves on while its pages are still elsewhere.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct MapImage {
    /// The registered regions, ascending.
    pub regions: Vec<RegionImage>,
}

/// One region of a page map.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionImage {
    /// First address.
    pub start: u64,
    /// How many pages.
    pub pages: u64,
    /// What of it is elsewhere; a page is in at most one layer.
    pub layers: Vec<LayerImage>,
}

/// Pages of one region that one image holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerImage {
    /// The image.
    pub image: ImageId,
    /// Where the region's first page is in that image.
    pub source: u64,
    /// Which of the region's pages.
    pub away: AwayImage,
}

/// A set of pages, in whichever form is shortest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum AwayImage {
    /// All pages of the region.
    All,
    /// First page and number of pages, ascending.
    Runs(Vec<(u64, u64)>),
    /// One bit a page, little-endian.
    Bits(Vec<u8>),
}

impl fmt::Display for ClientId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "client {:016x}", self.0)
    }
}

fn header(op: u8, tag: u32, middle: u64, last: u64) -> [u8; 24] {
    let mut bytes = [0; 24];
    bytes[0] = op;
    bytes[4..8].copy_from_slice(&tag.to_le_bytes());
    bytes[8..16].copy_from_slice(&middle.to_le_bytes());
    bytes[16..].copy_from_slice(&last.to_le_bytes());
    bytes
}

fn in_address_space(start: u64, pages: u64) -> Result<(), Malformed> {
    const LIMIT: u64 = 1 << 57;
    if !start.is_multiple_of(PAGE_BYTES as u64) {
        return Err(Malformed("an address inside a page"));
    }
    match pages
        .checked_mul(PAGE_BYTES as u64)
        .and_then(|len| len.checked_add(start))
    {
        Some(end) if end <= LIMIT => Ok(()),
        _ => Err(Malformed("a range beyond the address space")),
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().expect("two bytes"))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_encoded_is_decoded() {
        let image = ImageId {
            holder: Slot(7),
            nonce: u64::MAX - 3,
        };
        for lane in [Lane::Faults, Lane::Bulk] {
            let hello = Hello {
                image,
                client: ClientId(99),
                lane,
            };
            assert_eq!(Hello::decode(&hello.encode()), Ok(hello));
        }
        for welcome in [Welcome::Come, Welcome::UnknownImage] {
            assert_eq!(Welcome::decode(&welcome.encode()), Ok(welcome));
        }
        for request in [
            Request::Pages {
                tag: 1,
                start: 0x7000,
                want: 0b101,
            },
            Request::Scan {
                tag: 2,
                start: 0x7000,
                pages: 1 << 30,
            },
            Request::Release { tag: u32::MAX },
        ] {
            assert_eq!(Request::decode(&request.encode()), Ok(request));
        }
        for reply in [
            ReplyHeader::Pages {
                tag: 1,
                start: 0x7000,
                present: u64::MAX,
            },
            ReplyHeader::Scan {
                tag: 2,
                scanned_to: 0x9000,
                ranges: 3,
                last: true,
            },
            ReplyHeader::Scan {
                tag: 2,
                scanned_to: 0x9000,
                ranges: 1024,
                last: false,
            },
            ReplyHeader::Released { tag: 3 },
        ] {
            assert_eq!(ReplyHeader::decode(&reply.encode()), Ok(reply));
            assert!(reply.payload_bytes() <= MAX_PAYLOAD_BYTES);
        }
    }

    #[test]
    fn what_is_malformed_is_refused() {
        let mut hello = [0; HELLO_BYTES];
        assert!(Hello::decode(&hello).is_err());
        hello[..4].copy_from_slice(&MAGIC);
        assert_eq!(Hello::decode(&hello), Err(Malformed("a client speaks another version")));
        assert!(Request::decode(&header(1, 0, 0x7000, 0)).is_err());
        assert!(Request::decode(&header(1, 0, 0x7001, 1)).is_err());
        assert!(Request::decode(&header(2, 0, 0x7000, u64::MAX)).is_err());
        assert!(Request::decode(&header(1, 0, u64::MAX - 4095, 1)).is_err());
        assert!(Request::decode(&header(9, 0, 0, 0)).is_err());
        assert!(ReplyHeader::decode(&header(2, 0, 0, 1025)).is_err());
        assert!(Welcome::decode(&[0; WELCOME_BYTES]).is_err());
    }
}
