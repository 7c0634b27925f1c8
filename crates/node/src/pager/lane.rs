//! One page connection at the client: requests out, replies in, never blocking.
//!
//! Owns the socket, what has been asked on it and the reply that is half here (of the bulk, a [`Reader`] reads). Invariants: replies are matched with
//! requests in order, and one that says more than was asked ends the connection; a buffer is handed out whole and
//! comes back to the pool, never reused while it may still be installed.

use super::claims::Bell;
use super::reader::Reader;
use dunlin_cluster::page_map::{PAGE, Want};
use dunlin_proto::pages::{MAX_PAYLOAD_BYTES, Malformed, PAGE_BYTES, REPLY_BYTES, ReplyHeader, Request};
use rustix::fd::{AsFd, BorrowedFd};
use rustix::io::Errno;
use rustix::net::SendFlags;
use std::collections::VecDeque;
use std::io::{self, IoSliceMut, Read};
use std::net::TcpStream;
use std::sync::Arc;

/// Buffers for page data; they are large, so they are kept.
#[derive(Default)]
pub(super) struct Pool(Vec<Vec<u8>>);

/// More free buffers than this are given back.
const MAX_POOLED: usize = 8;

impl Pool {
    pub(super) fn take(&mut self) -> Vec<u8> {
        self.0.pop().unwrap_or_else(|| vec![0; MAX_PAYLOAD_BYTES])
    }

    pub(super) fn give(&mut self, buffer: Vec<u8>) {
        if self.0.len() < MAX_POOLED {
            self.0.push(buffer);
        }
    }
}

/// One whole reply.
pub(super) enum Reply {
    /// Content of pages: those of `want` that are in `present`, in `data` one after another.
    Pages { want: Want, present: u64, data: Vec<u8> },
    /// The image's pages in `from..to` that have content.
    Scan {
        from: u64,
        to: u64,
        present: Vec<(u64, u64)>,
        last: bool,
    },
    /// The claim is released.
    Released,
}

enum Asked {
    Pages { tag: u32, want: Want },
    Scan { tag: u32, from: u64, end: u64 },
    Release { tag: u32 },
}

/// One connection.
pub(super) struct Lane {
    stream: TcpStream,
    out: VecDeque<u8>,
    asked: VecDeque<Asked>,
    next_tag: u32,
    header: [u8; REPLY_BYTES],
    payload: Vec<u8>,
    /// Bytes of header and payload that are here.
    filled: usize,
    reply: Option<ReplyHeader>,
    /// Bytes read beyond the last reply.
    surplus: VecDeque<u8>,
    /// Reads instead of us.
    reader: Option<Reader>,
}

impl Lane {
    /// `stream` is blocking and past its hello; a thread of its own reads it and rings.
    pub(super) fn read_aside(stream: TcpStream, bell: Arc<Bell>, pool: &mut Pool) -> io::Result<Lane> {
        let reader = Reader::start(stream.try_clone()?, bell, pool)?;
        Ok(Lane {
            reader: Some(reader),
            ..Lane::new(stream, pool)
        })
    }

    /// `stream` is non-blocking and past its hello.
    pub(super) fn new(stream: TcpStream, pool: &mut Pool) -> Lane {
        Lane {
            stream,
            out: VecDeque::new(),
            asked: VecDeque::new(),
            next_tag: 0,
            header: [0; REPLY_BYTES],
            payload: pool.take(),
            filled: 0,
            reply: None,
            surplus: VecDeque::new(),
            reader: None,
        }
    }

    pub(super) fn ask_pages(&mut self, want: Want) {
        let tag = self.tag();
        self.asked.push_back(Asked::Pages { tag, want });
        self.send(Request::Pages {
            tag,
            start: want.source,
            want: want.pages,
        });
    }

    pub(super) fn ask_scan(&mut self, start: u64, pages: u64) {
        let tag = self.tag();
        self.asked.push_back(Asked::Scan {
            tag,
            from: start,
            end: start + pages * PAGE,
        });
        self.send(Request::Scan { tag, start, pages });
    }

    pub(super) fn ask_release(&mut self) {
        let tag = self.tag();
        self.asked.push_back(Asked::Release { tag });
        self.send(Request::Release { tag });
    }

    fn tag(&mut self) -> u32 {
        self.next_tag = self.next_tag.wrapping_add(1);
        self.next_tag
    }

    fn send(&mut self, request: Request) {
        self.out.extend(request.encode());
    }

    /// Requests without an answer.
    pub(super) fn outstanding(&self) -> usize {
        self.asked.len()
    }

    /// How many requests for pages will be answered before the one with this page; `None` if it was not asked here.
    pub(super) fn position_of(&self, source: u64) -> Option<usize> {
        self.asked.iter().position(|asked| match asked {
            Asked::Pages { want, .. } => {
                let page = source.wrapping_sub(want.source) / PAGE;
                page < 64 && want.pages >> page & 1 == 1
            }
            Asked::Scan { .. } | Asked::Release { .. } => false,
        })
    }

    /// What was asked for in vain, when the connection is given up.
    pub(super) fn unanswered(self, pool: &mut Pool) -> Vec<Want> {
        pool.give(self.payload);
        let wants = self.asked.into_iter().filter_map(|asked| match asked {
            Asked::Pages { want, .. } => Some(want),
            Asked::Scan { .. } | Asked::Release { .. } => None,
        });
        wants.collect()
    }

    /// Writes what the socket takes.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        while !self.out.is_empty() {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match rustix::net::send(&self.stream, self.out.as_slices().0, flags) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => drop(self.out.drain(..written)),
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    pub(super) fn wants_to_write(&self) -> bool {
        !self.out.is_empty()
    }

    /// Is there something to take without a poll?
    pub(super) fn has_surplus(&self) -> bool {
        !self.surplus.is_empty() || self.reader.as_ref().is_some_and(Reader::is_ready)
    }

    /// One whole reply, if it is here.
    pub(super) fn receive(&mut self, pool: &mut Pool) -> io::Result<Option<Reply>> {
        if let Some(reader) = &mut self.reader {
            let Some((header, payload)) = reader.take(pool)? else {
                return Ok(None);
            };
            pool.give(std::mem::replace(&mut self.payload, payload));
            self.header = header;
            let header = self.expect()?;
            return Ok(Some(self.finish(header, pool)));
        }
        loop {
            if self.filled >= REPLY_BYTES && self.reply.is_none() {
                self.reply = Some(self.expect()?);
            }
            if let Some(header) = self.reply {
                let total = REPLY_BYTES + header.payload_bytes();
                if self.filled >= total {
                    // What was read beyond belongs to the next replies, and comes before what was kept already.
                    let beyond = self.payload[total - REPLY_BYTES..self.filled - REPLY_BYTES].to_vec();
                    let mut beyond = VecDeque::from(beyond);
                    beyond.append(&mut self.surplus);
                    self.surplus = beyond;
                    (self.filled, self.reply) = (0, None);
                    return Ok(Some(self.finish(header, pool)));
                }
            }
            // One read for header and data: if every page has content, it ends exactly where the reply does.
            let hope = REPLY_BYTES
                + self
                    .reply
                    .map_or_else(|| self.asked.front().map_or(0, hoped_bytes), |h| h.payload_bytes());
            let read = if self.surplus.is_empty() {
                let in_header = self.filled.min(REPLY_BYTES);
                let in_payload = self.filled - in_header;
                let mut parts = [
                    IoSliceMut::new(&mut self.header[in_header..]),
                    IoSliceMut::new(&mut self.payload[in_payload..hope - REPLY_BYTES]),
                ];
                match self.stream.read_vectored(&mut parts) {
                    Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                    Ok(read) => read,
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                    Err(e) => return Err(e),
                }
            } else {
                self.take_surplus(hope)
            };
            self.filled += read;
        }
    }

    fn take_surplus(&mut self, hope: usize) -> usize {
        let mut read = 0;
        if self.filled < REPLY_BYTES {
            read += self.surplus.read(&mut self.header[self.filled..]).unwrap_or(0);
        }
        let at = self.filled + read;
        if at >= REPLY_BYTES && at < hope {
            while let Ok(more @ 1..) = self
                .surplus
                .read(&mut self.payload[self.filled + read - REPLY_BYTES..hope - REPLY_BYTES])
            {
                read += more;
            }
        }
        read
    }

    /// The header that is here, if it answers what was asked.
    fn expect(&self) -> io::Result<ReplyHeader> {
        let header = ReplyHeader::decode(&self.header)?;
        let answers = match (self.asked.front(), header) {
            (Some(Asked::Pages { tag, want }), ReplyHeader::Pages { tag: t, start, present }) => {
                *tag == t && start == want.source && present & !want.pages == 0
            }
            (Some(Asked::Scan { tag, from, end }), ReplyHeader::Scan { tag: t, scanned_to, .. }) => {
                *tag == t && (*from..=*end).contains(&scanned_to)
            }
            (Some(Asked::Release { tag }), ReplyHeader::Released { tag: t }) => *tag == t,
            _ => false,
        };
        if answers {
            Ok(header)
        } else {
            Err(Malformed("an answer to what was not asked").into())
        }
    }

    fn finish(&mut self, header: ReplyHeader, pool: &mut Pool) -> Reply {
        match (header, self.asked.pop_front()) {
            (ReplyHeader::Pages { present, .. }, Some(Asked::Pages { want, .. })) => {
                let data = std::mem::replace(&mut self.payload, pool.take());
                Reply::Pages { want, present, data }
            }
            (
                ReplyHeader::Scan {
                    tag,
                    scanned_to,
                    ranges,
                    last,
                },
                Some(Asked::Scan { from, end, .. }),
            ) => {
                let word = |at: usize| u64::from_le_bytes(self.payload[at..at + 8].try_into().expect("eight bytes"));
                let mut present: Vec<(u64, u64)> =
                    (0..ranges as usize).map(|i| (word(16 * i), word(16 * i + 8))).collect();
                present.retain(|(start, end)| start < end);
                present.sort_unstable();
                if !last {
                    self.asked.push_front(Asked::Scan {
                        tag,
                        from: scanned_to,
                        end,
                    });
                }
                Reply::Scan {
                    from,
                    to: scanned_to,
                    present,
                    last,
                }
            }
            // `expect` has matched them.
            _ => Reply::Released,
        }
    }
}

impl AsFd for Lane {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

fn hoped_bytes(asked: &Asked) -> usize {
    match asked {
        Asked::Pages { want, .. } => want.pages.count_ones() as usize * PAGE_BYTES,
        Asked::Scan { .. } | Asked::Release { .. } => 0,
    }
}
