//! One page connection at the holder: hello, then requests answered in order.
//!
//! The two lanes differ in how they treat the CPU. Who serves faults comes soon after a wake; who serves the bulk lets go
//! for whoever wakes, and never stays in the kernel for long: a fault that another thread of this node answers, or the
//! program itself, may need this very CPU.

use super::{Image, ImageStore, ServeError};
use dunlin_proto::pages::{
    HELLO_BYTES, Hello, Lane, MAX_SCAN_RANGES, PAGE_BYTES, REPLY_BYTES, REQUEST_BYTES, ReplyHeader, Request, Welcome,
};
use rustix::net::{SendFlags, sockopt};
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// How long a thread of each lane runs in one go while others want its CPU.
const FAULTS_SLICE: Duration = Duration::from_micros(100);
const BULK_SLICE: Duration = Duration::from_millis(20);
/// So many pages are read and sent at once: what is read is still in the cache when it is sent.
const PIECE: u32 = 32;
/// Fewer pages are copied sooner than the keeper wakes.
const WORTH_LENDING: u32 = 16;
/// Requests read at once.
const REQUESTS: usize = 64;
/// A client that does not say hello in time is none.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);

pub(super) fn serve(store: &ImageStore, mut stream: TcpStream) -> Result<(), ServeError> {
    stream.set_nodelay(true)?;
    without_pacing(&stream);
    stream.set_read_timeout(Some(HELLO_TIMEOUT))?;
    let mut hello = [0; HELLO_BYTES];
    stream.read_exact(&mut hello)?;
    let hello = Hello::decode(&hello).map_err(io::Error::from)?;
    stream.set_read_timeout(None)?;
    // Looked at before: one that comes meanwhile is in neither place for no moment.
    let is_coming = store.coming().contains(&hello.image);
    let Some((image, sent)) = store.claim(hello.image, hello.client) else {
        if is_coming {
            return Err(ServeError::NotYet(hello.image));
        }
        stream.write_all(&Welcome::UnknownImage.encode())?;
        return Err(ServeError::UnknownImage(hello.image));
    };
    stream.write_all(&Welcome::Come.encode())?;
    let slice = match hello.lane {
        Lane::Faults => FAULTS_SLICE,
        Lane::Bulk => BULK_SLICE,
    };
    // A hint: where the kernel does not know it, faults wait a little longer.
    let _ = dunlin_sys::inspect::set_own_slice(slice);
    let mut requests = Requests::new(&stream);
    let mut out = vec![0; REPLY_BYTES + PIECE as usize * PAGE_BYTES];
    while let Some(request) = requests.next()? {
        match request {
            Request::Pages { tag, start, want } => {
                let present = image.present(start, want)?;
                sent.fetch_add(u64::from(present.count_ones()), Ordering::Relaxed);
                let header = ReplyHeader::Pages { tag, start, present };
                if present.count_ones() >= WORTH_LENDING
                    && let Some(loan) = image.borrow(start, present)
                {
                    send(&stream, &header.encode(), true)?;
                    image.put_back(Some(loan.send(&stream, requests.has_more())?));
                    continue;
                }
                out[..REPLY_BYTES].copy_from_slice(&header.encode());
                let mut from = REPLY_BYTES;
                let mut left = present;
                loop {
                    let piece = lowest(left, PIECE);
                    left &= !piece;
                    let end = from + piece.count_ones() as usize * PAGE_BYTES;
                    image.read(start, piece, &mut out[from..end])?;
                    send(&stream, &out[..end], left != 0)?;
                    from = 0;
                    if left == 0 {
                        break;
                    }
                }
            }
            Request::Scan { tag, start, pages } => scan(&image, &stream, tag, start, pages)?,
            Request::Release { tag } => {
                // First the claim, then the answer: whoever has it can rely on it.
                store.release(hello.image, hello.client);
                (&stream).write_all(&ReplyHeader::Released { tag }.encode())?;
                return Ok(());
            }
        }
    }
    Ok(())
}

/// Where the kernel's default is BBR, every 64 KiB wait for a timer of their own: on a link as fast as a cluster's these
/// interrupts take longer than the copying. What does not pace is always there.
fn without_pacing(stream: &TcpStream) {
    if sockopt::tcp_congestion(stream).is_ok_and(|name| name == "bbr") {
        // A hint: pages come all the same, only slower.
        let _ = sockopt::set_tcp_congestion(stream, "cubic").or_else(|_| sockopt::set_tcp_congestion(stream, "reno"));
    }
}

fn scan(image: &Image, mut stream: &TcpStream, tag: u32, start: u64, pages: u64) -> Result<(), ServeError> {
    let send = |ranges: &[(u64, u64)], scanned_to: u64, last: bool| {
        let header = ReplyHeader::Scan {
            tag,
            scanned_to,
            ranges: ranges.len() as u32,
            last,
        };
        let mut out = header.encode().to_vec();
        for (start, end) in ranges {
            out.extend(start.to_le_bytes());
            out.extend(end.to_le_bytes());
        }
        Ok(stream.write_all(&out)?)
    };
    image.scan(start, pages, send, MAX_SCAN_RANGES)
}

/// The lowest `count` bits that are set.
fn lowest(bits: u64, count: u32) -> u64 {
    let mut rest = bits;
    for _ in 0..count {
        rest &= rest.wrapping_sub(1);
    }
    bits & !rest
}

/// Sends all of it; `more` follows at once, so that no segment leaves half full.
fn send(stream: &TcpStream, mut bytes: &[u8], more: bool) -> io::Result<()> {
    let flags = if more {
        SendFlags::MORE | SendFlags::NOSIGNAL
    } else {
        SendFlags::NOSIGNAL
    };
    while !bytes.is_empty() {
        match rustix::net::send(stream, bytes, flags) {
            Ok(sent) => bytes = &bytes[sent..],
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// The requests of one connection.
struct Requests<'a> {
    stream: &'a TcpStream,
    buffer: [u8; REQUEST_BYTES * REQUESTS],
    /// What of the buffer is read and not handed out.
    from: usize,
    to: usize,
}

impl<'a> Requests<'a> {
    fn new(stream: &'a TcpStream) -> Self {
        Requests {
            stream,
            buffer: [0; REQUEST_BYTES * REQUESTS],
            from: 0,
            to: 0,
        }
    }

    /// `None` when the client has ended the connection.
    fn next(&mut self) -> io::Result<Option<Request>> {
        while self.to - self.from < REQUEST_BYTES {
            self.buffer.copy_within(self.from..self.to, 0);
            self.to -= self.from;
            self.from = 0;
            match self.fill()? {
                0 if self.to == 0 => return Ok(None),
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                more => self.to += more,
            }
        }
        let bytes = self.buffer[self.from..self.from + REQUEST_BYTES]
            .try_into()
            .expect("so many bytes");
        self.from += REQUEST_BYTES;
        Ok(Some(Request::decode(bytes)?))
    }

    /// Has the next one come already?
    fn has_more(&self) -> bool {
        self.to - self.from >= REQUEST_BYTES
    }

    fn fill(&mut self) -> io::Result<usize> {
        loop {
            match (&mut &*self.stream).read(&mut self.buffer[self.to..]) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                answer => return answer,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_bits_are_taken() {
        assert_eq!(lowest(0b1011_0100, 2), 0b0001_0100);
        assert_eq!(lowest(0b1011_0100, 9), 0b1011_0100);
        assert_eq!(lowest(u64::MAX, 16), 0xffff);
        assert_eq!(lowest(0, 16), 0);
    }
}
